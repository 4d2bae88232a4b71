r"""The Reformer, a language model whose activations grow with the length alone: neither its square
nor the depth.

    x1 = x2 = tokens + positions        y1 = x1 + Attention(norm x2)        y2 = x2 + FeedForward(norm y1)

Attention is by LSH or local, both linear in the length; layers are reversible, so that none keeps
activations; the feed-forward, the last norm and the loss are computed in chunks of tokens. Where
streams are not exact (`reversible` says what that is) an LSH layer keeps bucket ids, 2 bytes a
token, head and round; else its replay finds them again. Models from and for transformers:
`pyfast/models/reformer/hf_format.py`.
"""

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyfast._support import checks
from pyfast.models.reformer.config import ReformerConfig
from pyfast.models.reformer.layers import Attention, AxialPositions, FeedForward, LearnedPositions
from pyfast.nn import rotary
from pyfast.nn.chunked import ChunkedFeedForward
from pyfast.nn.local_attention import LocalCache
from pyfast.nn.lsh_cache import LSHCache
from pyfast.nn.reversible import ReversibleSequence
from pyfast.ops import chunked
from pyfast.ops import lsh_hash as hashing
from pyfast.ops.chunked import chunked_cross_entropy
from pyfast.ops.registered import chunked as registered_chunked

ENDS = 1 << 16  # tokens at a time, of the last norm and the loss


class ReformerCache:
    """What the layers of a model keep of the tokens so far, for `model(ids, cache=cache)` to go on
    from.

    max_length, if given, is the most tokens there can be, and says into how many buckets they are
    hashed.
    """

    def __init__(self, model: "Reformer", max_length: int | None = None) -> None:
        checks.instance("model", model, Reformer)
        self.layers = [
            LSHCache(max_length) if kind == "lsh" else LocalCache() for kind in model.config.layers
        ]
        self.length = 0
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": None}  # a copy goes on with the first model that uses it

    def check(self, model: "Reformer") -> None:
        """Whether the model can go on from here."""
        kinds = [LSHCache if kind == "lsh" else LocalCache for kind in model.config.layers]
        self._model = self._model or weakref.ref(model)
        if self._model() is not model or [type(layer) for layer in self.layers] != kinds:
            raise ValueError("cache is of another model; it must be this model's own")

    def reorder(self, indices: Tensor) -> None:
        """Example i becomes what example indices[i] was, as beam search asks."""
        for layer in self.layers:
            layer.reorder(indices)

    @contextmanager
    def appending(self, count: int) -> Iterator[None]:
        """So many tokens come to all layers, or if anything fails to none."""
        marks = [layer.mark() for layer in self.layers]
        try:
            yield
        except BaseException:
            for layer, mark in zip(self.layers, marks):
                layer.restore(mark)
            raise
        self.length += count


class Reformer(nn.Module):
    """A causal language model: `Reformer(ReformerConfig(vocab_size=320))(ids)` are logits, with `labels=` the loss."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        checks.instance("config", config, ReformerConfig)
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = None
        if config.positions == "axial":
            self.positions = AxialPositions(config.axial_shape, config.axial_widths)
        elif config.positions == "learned":
            self.positions = LearnedPositions(config.max_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        chunk = config.feed_forward_chunk or sys.maxsize
        blocks = [
            (Attention(config, kind), ChunkedFeedForward(FeedForward(config), chunk))
            for kind in config.layers
        ]
        self.layers = ReversibleSequence(
            blocks, exact=config.exact, fraction_bits=config.fraction_bits, store=config.store
        )
        self.norm = nn.LayerNorm(
            config.width if config.tied else 2 * config.width, eps=config.norm_eps
        )
        self.head = (
            None
            if config.tied
            else nn.Linear(2 * config.width, config.vocab_size, bias=config.head_bias)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights; those that write to a stream smaller the deeper the model is; no biases."""
        narrow = self.config.init_std / (2 * len(self.config.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                writes = name.endswith((".attention.out.weight", ".down.weight"))
                parameter.normal_(std=narrow if writes else self.config.init_std)

    def get_output_embeddings(self) -> nn.Module:
        """The head, which adapters and quantization leave alone unless they are told to."""
        return self.tokens if self.head is None else self.head

    @classmethod
    def from_hf(cls, directory: str | os.PathLike, *, allow_pickle: bool = False) -> "Reformer":
        """A model that transformers saved, a ReformerModelWithLMHead; see `pyfast.models.reformer.hf_format.load`."""
        from pyfast.models.reformer import hf_format

        return hf_format.load(directory, allow_pickle)

    def save_hf(self, directory: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors for transformers; see `pyfast.models.reformer.hf_format.save`."""
        from pyfast.models.reformer import hf_format

        hf_format.save(self, directory)

    def forward(
        self,
        ids: Tensor,
        *,
        labels: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: ReformerCache | None = None,
    ) -> Tensor:
        """Logits, [batch, length, vocab_size]; with labels the mean loss of predicting each from
        what is before it.

        Args:
            ids: [batch, length], int64. labels: [batch, length], ids or, for a token that is not to
            be predicted, -100: mostly `ids` themselves. The
                logits are never there as a whole.
            key_padding_mask: [batch, length], True: a token to be seen.
            n_hashes: other than the config's, more of them or fewer.
            cache: ids go on from the tokens in it, and are appended; for inference, with eval().
        """
        self._check(ids, labels, key_padding_mask, n_hashes, cache)
        y1, y2 = self.streams(
            ids, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cache=cache
        )
        if labels is None:
            return self._logits(self._joined(y1, y2))
        return self._loss(y1, y2, labels)

    def streams(
        self, ids: Tensor, *, key_padding_mask=None, n_hashes=None, cache=None
    ) -> tuple[Tensor, Tensor]:
        """What the layers make of the tokens: two of [batch, length, width]."""
        if cache is not None:
            options = [{"cache": layer} for layer in cache.layers]
            with torch.no_grad(), cache.appending(ids.shape[1]):
                return self._run(ids, cache.length, key_padding_mask, n_hashes, options)
        length = ids.shape[1]
        ids, mask = self._padded(ids, key_padding_mask)
        y1, y2 = self._run(ids, 0, mask, n_hashes, [{} for _ in self.config.layers])
        return (y1, y2) if y1.shape[1] == length else (y1[:, :length], y2[:, :length])

    def _run(
        self,
        ids: Tensor,
        first: int,
        mask: Tensor | None,
        n_hashes: int | None,
        per_layer: list[dict],
    ):
        """Of tokens from position `first` on, with options for each layer."""
        x, length = self.tokens(ids), ids.shape[1]
        if self.positions is not None:
            known = self.positions(
                first, min(length, self.config.max_length - first)
            )  # what is filled up has none
            x = x + F.pad(known, (0, 0, 0, length - len(known))).to(x.dtype)
        x = self.dropout(x)
        shared = {"key_padding_mask": mask}
        if self.config.positions == "rotary":
            shared["rotary"] = rotary.tables(first, length, self.config.head_dim, ids.device)
        for kind, options in zip(self.config.layers, per_layer):
            options |= shared | ({"n_hashes": n_hashes} if kind == "lsh" else {})
        return self.layers(x, x, f_kwargs=per_layer)

    def _padded(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        config, length = self.config, ids.shape[1]
        if (
            config.pad_to is None
            or length % config.pad_to == 0
            or length <= min(map(config.chunk, config.layers))
        ):
            return ids, mask
        missing = -length % config.pad_to
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return F.pad(ids, (0, missing), value=config.pad_id), F.pad(mask, (0, missing))

    def _joined(self, y1: Tensor, y2: Tensor) -> Tensor:
        """What the head reads of the streams."""
        if self.config.tied:
            return self.dropout(self.norm((y1 + y2) / 2))
        return self.dropout(self.norm(torch.cat([y1, y2], dim=-1)))

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tokens.weight) if self.head is None else self.head(hidden)

    def _loss(self, y1: Tensor, y2: Tensor, labels: Tensor) -> Tensor:
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        head = self.get_output_embeddings()
        fused = self.head is None or _is_plain(head)
        step = ENDS if fused else registered_chunked.LOGITS // self.config.vocab_size

        def total(y1: Tensor, y2: Tensor, targets: Tensor) -> Tensor:
            hidden = self._joined(y1, y2)
            if fused:
                bias = getattr(head, "bias", None)
                return chunked_cross_entropy(
                    hidden, head.weight, targets, bias=bias, reduction="sum"
                )
            return F.cross_entropy(
                self._logits(hidden).flatten(0, 1).float(), targets.flatten(), reduction="sum"
            )

        parameters = [*self.norm.parameters(), *head.parameters()]
        found = chunked.sum_of_chunks(
            total, (y1, y2), targets, parameters, max(1, step // max(1, len(labels)))
        )
        return found / (targets != -100).sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ids with those that follow, [batch, length + new]: until all examples have had one of the
        config's end_ids.

        Tokens are hashed into as many buckets as fit the final length.

        Args:
            ids: [batch, length], at least one token. max_new_tokens: the most. temperature: 0 takes
            the most likely token; else tokens are drawn from the softmax of logits / temperature.
            top_k: draw from so many most likely tokens. top_p: draw from the most likely tokens
            that together have this probability. key_padding_mask: [batch, length], True: a token to
            be seen; for prompts filled up at their beginning. n_hashes: other than the config's.
            generator: to draw from.
        """
        self._check(ids, None, key_padding_mask, n_hashes, None)
        _check_sampling(ids, max_new_tokens, temperature, top_k, top_p)
        if key_padding_mask is not None and not bool(key_padding_mask[:, -1].all()):
            raise ValueError(
                "key_padding_mask hides the last token of an example; prompts must be filled up at the front"
            )
        self._check_length(ids.shape[1] + max_new_tokens)
        cache = ReformerCache(self, ids.shape[1] + max_new_tokens)
        new, mask = ids, key_padding_mask
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        ends = torch.tensor(self.config.end_ids, dtype=torch.int64, device=ids.device)
        with _evaluating(self):
            for _ in range(max_new_tokens):
                y1, y2 = self.streams(new, key_padding_mask=mask, n_hashes=n_hashes, cache=cache)
                mask = n_hashes = None
                logits = self._logits(self._joined(y1[:, -1], y2[:, -1]))
                new = _drawn(logits.float(), temperature, top_k, top_p, generator)
                if len(ends):
                    new = new.where(~ended, ends[0])
                    ended |= torch.isin(new, ends)
                ids, new = torch.cat([ids, new[:, None]], dim=1), new[:, None]
                if bool(ended.all()) and len(ids):
                    break
        return ids

    def _check(self, ids, labels, mask, n_hashes, cache) -> None:
        checks.tensor("ids", ids, (torch.int64,))
        if ids.dim() != 2:
            raise ValueError(f"ids has shape {list(ids.shape)}; it must be [batch, length]")
        checks.same_device("ids", ids, "the model", self.tokens.weight.device)
        if (
            ids.device.type == "cpu"
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size
        ):
            low, high = ids.aminmax()
            raise ValueError(
                f"ids holds numbers from {low} to {high}; they must be 0 to {self.config.vocab_size - 1}"
            )
        if labels is not None:
            checks.tensor("labels", labels, (torch.int64,))
            checks.shape("labels", labels, ids.shape)
        if mask is not None:
            checks.tensor("key_padding_mask", mask, (torch.bool,))
            checks.shape("key_padding_mask", mask, ids.shape)
            checks.same_device("key_padding_mask", mask, "ids", ids.device)
        hashing.check_rounds(n_hashes, None)
        if cache is not None:
            checks.instance("cache", cache, ReformerCache)
            cache.check(self)
            if labels is not None or self.training:
                raise ValueError(
                    "cache is given with labels, or in training; it is for inference: call eval()"
                )
        self._check_length(ids.shape[1] + (0 if cache is None else cache.length))

    def _check_length(self, length: int) -> None:
        most = self.config.max_length
        if self.positions is not None and length > most:
            raise ValueError(
                f"ids has {length} tokens, with those before; there must be at most max_length, {most}"
            )

    def extra_repr(self) -> str:
        return repr(self.config)


def _is_plain(head: nn.Module) -> bool:
    """Whether its weight and bias are all there is to it: no adapter, no 4 bits, no hooks."""
    return type(head) is nn.Linear and not (
        head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_sampling(ids, max_new_tokens, temperature, top_k, top_p) -> None:
    if ids.shape[1] == 0:
        raise ValueError("ids has no tokens; generate needs at least one to go on from")
    checks.size("max_new_tokens", max_new_tokens)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not 0 <= temperature < float("inf")
    ):
        raise ValueError(f"temperature is {temperature!r}; it must be a number, 0 or more")
    if top_k is not None:
        checks.size("top_k", top_k)
    if top_k == 0:
        raise ValueError("top_k is 0; it must be at least 1, or None")
    if top_p is not None and (
        isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1
    ):
        raise ValueError(f"top_p is {top_p!r}; it must be above 0 and at most 1")


def _drawn(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator
) -> Tensor:
    """A token for each row of logits."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values).double() / temperature
    probabilities, ids = logits.softmax(-1).sort(dim=-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < top_p, 0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]
