"""Sampling of new tokens from a language model's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyfast._support import checks


def check_sampling(
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: object,
    temperature: object,
    top_k: object,
    top_p: object,
) -> None:
    """Check the arguments of `Reformer.generate`."""
    if ids.shape[1] == 0:
        raise ValueError("ids has no tokens; generate needs at least one to go on from")
    checks.size("max_new_tokens", max_new_tokens)
    if not _is_number(temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; it must be a number, 0 or more")
    if top_k is not None:
        checks.size("top_k", top_k)
    if top_k == 0:
        raise ValueError("top_k is 0; it must be at least 1, or None")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(
            "key_padding_mask hides the last token of an example; "
            "prompts must be filled up at the front"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within a block, and its modules back as they were."""
    modules_in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in modules_in_training:
            module.training = True


def append_tokens(
    ids: Tensor,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    sample_next: Callable[[Tensor], Tensor],
) -> Tensor:
    """Append tokens until every example has had one of `end_ids`, which it then repeats.

    Args:
        ids: [batch, length].
        max_new_tokens: the most tokens to append.
        end_ids: the tokens that end an example; an example repeats the first of them.
        sample_next: returns the next token of each example, [batch], for the tokens that were
            appended since the last call (first for `ids`), [batch, new].
    """
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(end_ids, dtype=torch.int64, device=ids.device)
    new = ids
    for _ in range(max_new_tokens):
        tokens = sample_next(new)
        if len(ends):
            tokens = tokens.where(~ended, ends[0])
            ended |= torch.isin(tokens, ends)
        new = tokens[:, None]
        ids = torch.cat([ids, new], dim=1)
        if bool(ended.all()) and len(ids):
            break
    return ids


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return one token for each row of logits: the most likely at temperature 0, else a draw."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values).double() / temperature
    probabilities, ids = logits.softmax(-1).sort(dim=-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        of_more_likely = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(of_more_likely < top_p, 0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]
