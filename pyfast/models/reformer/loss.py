"""The loss of a Reformer, computed in chunks of tokens."""

from torch import Tensor, nn
from torch.nn import functional as F

from pyfast.ops.chunked import chunked_cross_entropy, sum_of_chunks
from pyfast.ops.registered import chunked as registered_chunked

TOKENS_AT_ONCE = 1 << 16  # through the last norm and the loss


def next_token_loss(model: nn.Module, y1: Tensor, y2: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of predicting each label from the streams of the tokens before it.

    Args:
        model: a Reformer.
        y1: [batch, length, width]; the first stream after all layers.
        y2: [batch, length, width]; the second one.
        labels: [batch, length], int64; -100 for a token that is not to be predicted.
    """
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    head = model.get_output_embeddings()
    is_fused = model.head is None or _is_plain(head)

    def summed_loss(y1: Tensor, y2: Tensor, targets: Tensor) -> Tensor:
        hidden = model.join_streams(y1, y2)
        if is_fused:
            bias = getattr(head, "bias", None)
            return chunked_cross_entropy(hidden, head.weight, targets, bias=bias, reduction="sum")
        logits = model.compute_logits(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    # Without fusion a chunk's logits are there as a whole.
    tokens = TOKENS_AT_ONCE
    if not is_fused:
        tokens = registered_chunked.MAX_LOGITS // model.config.vocab_size
    step = max(1, tokens // max(1, len(labels)))
    parameters = [*model.norm.parameters(), *head.parameters()]
    loss = sum_of_chunks(summed_loss, (y1, y2), targets, parameters, step)
    return loss / (targets != -100).sum().clamp(min=1)


def _is_plain(head: nn.Module) -> bool:
    """Return whether the head is its weight and bias: no adapter, no 4 bits, no hooks."""
    return type(head) is nn.Linear and not (
        head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    )
