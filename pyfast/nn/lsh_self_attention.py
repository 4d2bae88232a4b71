"""Reformer's self-attention as a module: projections around `lsh_attention`, and decoding."""

import math
from dataclasses import fields

import torch
from torch import Tensor, nn

from pyfast._support import checks, seeds
from pyfast.nn.attention_checks import (
    check_decoding,
    check_flags,
    check_hashing,
    check_sizes,
    check_tokens,
    merge_heads,
    split_heads,
)
from pyfast.nn.lsh_cache import LSHCache
from pyfast.nn.lsh_decoding import SortedTokens, attend_rows
from pyfast.nn.rotary import rotate
from pyfast.ops import lsh_hash
from pyfast.ops.lsh_attention import check_options, lsh_attention
from pyfast.ops.registered import lsh_hash as registered_lsh_hash
from pyfast.reference import lsh_options

_CHOICE_NAMES = tuple(
    field.name for field in fields(lsh_options.LSHChoices) if field.name != "bucket_rule"
)


class LSHSelfAttention(nn.Module):
    """Self-attention of each token to those that hash near it.

    Args:
        width: int; the size of the input and the output.
        heads: int; the number of query heads.
        head_dim: int up to 256; width / heads by default.
        n_hashes: int, 4 by default; rounds of hashing. `forward` can ask for others.
        chunk_length: int, 64 by default; 16 to 256, a multiple of 16.
        n_buckets: even int or tuple of even factors; by default the preset's rule for each length.
        causal: bool, True by default; whether a token sees no later one.
        preset: str, "trax" by default; the defaults of the choices, see `lsh_attention`.
        separate_keys: bool, False by default; give keys a projection of their own, instead of the
            queries'.
        value_heads: int, a divisor of heads; each value head is then shared by a group of query
            heads, and so are separate keys. By default the number of heads.
        bias: bool, False by default; whether the projections to queries, keys and values have one.
        out_bias: bool, False by default; whether the output projection has one.
        dropout: float, 0 by default; the dropout of the attention's weights, in training.
        hash_seed: int; seeds the rotations, which are then the same at every call. With preset "hf"
            they are those that transformers draws for this seed. By default they are new ones from
            torch's generator.
        dtype: torch.dtype of the parameters; torch's default.
        device: device of the parameters; torch's default.
        **choices: scale, key_norm, same_bucket, correct_duplicates, wrap, pad_bucket, mask_queries
            and attend_self; see `lsh_attention`.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.LSHSelfAttention(512, 8, n_hashes=2)
        >>> x = torch.randn(1, 1000, 512)
        >>> layer(x).shape
        torch.Size([1, 1000, 512])
        >>> y, buckets = layer(x, return_buckets=True)
        >>> buckets.shape
        torch.Size([1, 8, 2, 1000])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        n_hashes: int = 4,
        chunk_length: int = 64,
        n_buckets: int | tuple[int, ...] | None = None,
        causal: bool = True,
        preset: str = "trax",
        separate_keys: bool = False,
        value_heads: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        hash_seed: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **choices,
    ) -> None:
        super().__init__()
        check_sizes(width, heads, head_dim, value_heads)
        check_flags(separate_keys=separate_keys, bias=bias, out_bias=out_bias)
        for name in choices:
            checks.one_of("a choice", name, _CHOICE_NAMES)
        check_options(chunk_length, causal, "dropout", dropout)
        check_hashing(n_hashes, n_buckets, hash_seed)
        options = {"dtype": torch.get_default_dtype() if dtype is None else dtype, "device": device}
        checks.one_of("dtype", options["dtype"], checks.FLOATS_AND_DOUBLE)
        self.width, self.heads = width, heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.value_heads = heads if value_heads is None else value_heads
        self.n_hashes, self.n_buckets, self.hash_seed = n_hashes, n_buckets, hash_seed
        self.chunk_length, self.causal, self.dropout = chunk_length, causal, dropout
        self.preset, self.choices = preset, choices
        self._resolved = lsh_options.resolve(preset, separate_keys, **choices)
        inner, shared = heads * self.head_dim, self.value_heads * self.head_dim
        self.query_key = nn.Linear(width, inner, bias=bias, **options)
        self.key = nn.Linear(width, shared, bias=bias, **options) if separate_keys else None
        self.value = nn.Linear(width, shared, bias=bias, **options)
        self.out = nn.Linear(inner, width, bias=out_bias, **options)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        buckets: Tensor | None = None,
        return_buckets: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LSHCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let each token attend to those that hash near it.

        Args:
            x: [batch, length, width]; float32, bfloat16, float16 or float64.
            key_padding_mask: [batch, length], bool; True for a token to be seen. All by default.
            n_hashes: int; rounds of hashing, the layer's by default.
            buckets: ids from return_buckets, instead of hashing. With them a replay in a reversible
                layer is the same.
            return_buckets: bool, False by default; return the bucket ids of x's tokens too.
            rotary: cosines and sines of x's positions, as `pyfast.nn.rotary.tables` makes them.
                They rotate queries and keys after hashing, so that buckets depend on content alone.
            cache: LSHCache; x continues from the tokens in it, and is appended. For inference:
                there are no gradients.

        Returns:
            [batch, length, width]; with return_buckets also the ids, [batch, heads, n_hashes,
            length]. With separate keys these are stacked, [2, ...]: the queries', then the keys'.
        """
        check_tokens(x, self.width)
        lsh_hash.check_rounds(n_hashes, None)
        if cache is not None:
            checks.instance("cache", cache, LSHCache)
            self._check_decoding(buckets)
        if cache is not None and x.shape[1] > 0:
            y, buckets = self._decode(x, key_padding_mask, n_hashes, rotary, cache)
        else:
            q, k, v = self._project(x)
            hashing = self._hashing(q, k, key_padding_mask, n_hashes, buckets, rotary is not None)
            q, k = _rotate_both(q, k, rotary)
            out, buckets = self._attend(q, k, v, key_padding_mask, **hashing)
            y = self.out(merge_heads(out))
        return (y, buckets) if return_buckets else y

    def _hashing(
        self,
        q: Tensor,
        k: Tensor | None,
        mask: Tensor | None,
        n_hashes: int | None,
        buckets: Tensor | None,
        rotates: bool,
    ) -> dict[str, object]:
        """Return the arguments of `lsh_attention` that decide the buckets.

        They hold rotations rather than the layer's seed, so that dropout is new at every call.
        """
        seed = self.hash_seed
        if seed is None and rotates:
            # With `buckets` too, so that a replay leaves the generator as the forward did.
            seed = seeds.seed_tensor(q, None)
        if buckets is not None or seed is None:
            n_hashes = self.n_hashes if buckets is None and n_hashes is None else n_hashes
            return {"n_hashes": n_hashes, "n_buckets": self.n_buckets, "buckets": buckets}
        factors = self.factors(q.shape[2])
        rotations = self._draw_rotations(q, n_hashes or self.n_hashes, factors, seed)
        if not rotates:
            return {"n_buckets": factors, "rotations": rotations}
        lsh_hash.check_mask(mask, q)
        buckets = self._unstack(self._hash(q, k, mask, factors, rotations))
        return {"n_buckets": factors, "buckets": buckets}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return queries, separate keys or None, and values, split into heads."""
        q = split_heads(self.query_key(x), self.heads)
        v = split_heads(self.value(x), self.value_heads)
        k = None if self.key is None else split_heads(self.key(x), self.value_heads)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor | None, v: Tensor, mask: Tensor | None, **hashing
    ) -> tuple[Tensor, Tensor]:
        return lsh_attention(
            q,
            v,
            k=k,
            chunk_length=self.chunk_length,
            causal=self.causal,
            preset=self.preset,
            key_padding_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            return_buckets=True,
            **hashing,
            **self.choices,
        )

    def _draw_rotations(
        self, q: Tensor, rounds: int, factors: tuple[int, ...], seed: int | Tensor | None
    ) -> Tensor:
        if self.preset == "hf" and self.hash_seed is not None:
            shape = (self.heads, self.head_dim, rounds, sum(factors) // 2)
            return lsh_hash.transformers_rotations(self.hash_seed, shape, q.dtype, q.device)[None]
        return lsh_hash.rotations_for(q, rounds, factors, seed, None)

    def factors(self, length: int) -> tuple[int, ...]:
        """Return the factors of the number of buckets for so many tokens."""
        rule = self._resolved.bucket_rule
        return lsh_options.factors(self.n_buckets, rule, length, self.chunk_length)

    def _check_decoding(self, buckets: Tensor | None) -> None:
        if not self.causal:
            raise ValueError("cache is given and causal is False; a layer must be causal to decode")
        check_decoding(self)
        if buckets is not None:
            raise ValueError(
                "buckets and cache are given; they must not be both, a cache has its own"
            )

    @torch.no_grad()
    def _decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        n_hashes: int | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: LSHCache,
    ) -> tuple[Tensor, Tensor]:
        """Append x to the cache. Return its attention to all tokens, and its buckets."""
        q, k, v = self._project(x)
        lsh_hash.check_mask(mask, q)
        cache.check(self, q if k is None else k, n_hashes)
        is_prompt = cache.length == 0
        if is_prompt:
            factors = self.factors(cache.max_length or x.shape[1])
            rounds = self.n_hashes if n_hashes is None else n_hashes
            cache.begin(self, factors, self._draw_rotations(q, rounds, factors, self.hash_seed))
        buckets = self._hash(q, k, mask, cache.factors, cache.rotations)
        q, k = _rotate_both(q, k, rotary)
        is_seen = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        cache.append(keys=q if k is None else k, values=v, buckets=buckets, mask=is_seen)
        if is_prompt:
            ids = self._unstack(buckets)
            out, _ = self._attend(q, k, v, mask, n_buckets=cache.factors, buckets=ids)
        else:
            out = self._attend_newest(q, cache)
        return self.out(merge_heads(out)), self._unstack(buckets)

    def _unstack(self, buckets: Tensor) -> Tensor:
        """Return buckets as `lsh_attention` takes them: not stacked if keys are not separate."""
        return buckets if self.key is not None else buckets[0]

    def _hash(
        self,
        q: Tensor,
        k: Tensor | None,
        mask: Tensor | None,
        factors: tuple[int, ...],
        rotations: Tensor,
    ) -> Tensor:
        """Return bucket ids, [1, or 2 with separate keys, batch, heads, rounds, length]."""
        options = {"n_buckets": factors, "rotations": rotations}
        options["key_padding_mask"] = mask if self._resolved.pad_bucket else None
        buckets = [lsh_hash.lsh_buckets(q, **options)]
        if k is not None:
            k = k.repeat_interleave(self.heads // self.value_heads, dim=1)
            buckets.append(lsh_hash.lsh_buckets(k, **options))
        return torch.stack(buckets)

    def _attend_newest(self, q: Tensor, cache: LSHCache) -> Tensor:
        keys, values, buckets, mask = map(cache.so_far, ("keys", "values", "buckets", "mask"))
        order, ranks = registered_lsh_hash.sort(buckets, math.prod(cache.factors) + 1)
        tokens = SortedTokens(keys, values, order, ranks, buckets, mask)
        rows = torch.arange(cache.length - q.shape[2], cache.length, device=q.device)
        scale = self.head_dim**-0.5 if self._resolved.scale is None else self._resolved.scale
        return attend_rows(rows, q, tokens, self.chunk_length, scale, self._resolved)

    def extra_repr(self) -> str:
        names = ("head_dim", "n_hashes", "chunk_length", "n_buckets", "causal", "preset")
        names += ("value_heads", "dropout", "hash_seed")
        values = {name: getattr(self, name) for name in names} | self.choices
        options = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{self.width}, {self.heads}, {options}"


def _rotate_both(
    q: Tensor, k: Tensor | None, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    return rotate(q, rotary), None if k is None else rotate(k, rotary)
