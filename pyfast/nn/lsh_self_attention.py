"""Reformer's self-attention as a module: projections around `lsh_attention`, and decoding with a cache."""

import math
from dataclasses import fields

import torch
from torch import Tensor, nn

from pyfast._support import checks, seeds
from pyfast.nn.attention_checks import by_heads, check_decodes, check_sizes, check_tokens
from pyfast.nn.lsh_cache import LSHCache, attend_rows
from pyfast.nn.rotary import rotated
from pyfast.ops import lsh_hash as hashing
from pyfast.ops.lsh_attention import check_options, lsh_attention
from pyfast.ops.registered import lsh_hash
from pyfast.reference import lsh_options

CHOICES = tuple(
    field.name for field in fields(lsh_options.LSHChoices) if field.name != "bucket_rule"
)


class LSHSelfAttention(nn.Module):
    """Self-attention of each token to those that hash near it: `LSHSelfAttention(512, 8)(x)`, x
    [batch, length, width].

    Args:
        width: of x and of the result. heads: of the queries. head_dim: up to 256; width / heads by
        default. n_hashes: rounds of hashing; `forward` can ask for others. chunk_length: 16 to 256,
        a multiple of 16. n_buckets: even, or even factors; by default the preset's rule for each
        length. causal: whether a token sees no later one. preset: the choices' defaults, see
        `lsh_attention`. separate_keys: keys have a projection of their own instead of the queries'.
        value_heads: a divisor of heads, each then shared by a group of them; so are keys of their
        own. bias: of all projections but the last. out_bias: of the last. dropout: of the
        attention's weights, in training. hash_seed: of the rotations, then the same at every call,
        with preset "hf" those that transformers draws for it;
            by default new ones from torch's generator.
        choices: scale, key_norm, same_bucket, correct_duplicates, wrap, pad_bucket, mask_queries,
        attend_self.
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
        for name, flag in (
            ("separate_keys", separate_keys),
            ("bias", bias),
            ("out_bias", out_bias),
        ):
            checks.instance(name, flag, bool)
        for name in choices:
            checks.one_of("a choice", name, CHOICES)
        check_options(chunk_length, causal, "dropout", dropout)
        checks.size("n_hashes", n_hashes)
        hashing.check_rounds(n_hashes, None)
        if n_buckets is not None:
            hashing.check_n_buckets(n_buckets)
        hashing.check_hash_seed(hash_seed)
        place = {"dtype": torch.get_default_dtype() if dtype is None else dtype, "device": device}
        checks.one_of("dtype", place["dtype"], checks.FLOATS_AND_DOUBLE)
        self.width, self.heads = width, heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.value_heads = heads if value_heads is None else value_heads
        self.n_hashes, self.chunk_length, self.n_buckets, self.causal = (
            n_hashes,
            chunk_length,
            n_buckets,
            causal,
        )
        self.preset, self.choices, self.dropout, self.hash_seed = (
            preset,
            choices,
            dropout,
            hash_seed,
        )
        self._resolved = lsh_options.resolve(preset, separate_keys, **choices)
        inner, shared = heads * self.head_dim, self.value_heads * self.head_dim
        self.query_key = nn.Linear(width, inner, bias=bias, **place)
        self.key = nn.Linear(width, shared, bias=bias, **place) if separate_keys else None
        self.value = nn.Linear(width, shared, bias=bias, **place)
        self.out = nn.Linear(inner, width, bias=out_bias, **place)

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
        """What each token takes from those near it, [batch, length, width]; with return_buckets
        also the bucket ids.

        Args:
            x: [batch, length, width]. key_padding_mask: [batch, length], True: a token to be seen.
            n_hashes: other than the layer's. buckets: from return_buckets, instead of hashing: a
            reversible layer's replay is then the same. return_buckets: of x's tokens, [batch,
            heads, n_hashes, length], with separate keys two of these, stacked. rotary: cosines and
            sines of x's positions, as `pyfast.nn.rotary.tables` makes them: queries and keys are
                turned by them once they are hashed, so that buckets are about content alone.
            cache: x goes on from the tokens in it, and is appended. For inference: there are no
            gradients.
        """
        check_tokens(x, self.width)
        hashing.check_rounds(n_hashes, None)
        if cache is not None:
            checks.instance("cache", cache, LSHCache)
            self._check_decodes(buckets)
        if cache is not None and x.shape[1] > 0:
            y, buckets = self._decode(x, key_padding_mask, n_hashes, rotary, cache)
        else:
            q, k, v = self._projected(x)
            hashed = self._hashing(
                q, k, key_padding_mask, n_hashes, buckets, turns=rotary is not None
            )
            out, buckets = self._attend(*self._turned(q, k, rotary), v, key_padding_mask, **hashed)
            y = self._merged(out)
        return (y, buckets) if return_buckets else y

    def _hashing(
        self, q, k, mask, n_hashes: int | None, buckets: Tensor | None, turns: bool
    ) -> dict:
        """What `lsh_attention` is told of it: rotations, not a seed, as dropout is to be new all the same."""
        seed = self.hash_seed
        if (
            seed is None and turns
        ):  # with `buckets` too: what draws next finds the generator the same in a replay
            seed = seeds.seed_tensor(q, None)
        if buckets is not None or seed is None:
            n_hashes = self.n_hashes if buckets is None and n_hashes is None else n_hashes
            return {"n_hashes": n_hashes, "n_buckets": self.n_buckets, "buckets": buckets}
        factors = self.factors(q.shape[2])
        rotations = self._rotations(q, n_hashes or self.n_hashes, factors, seed)
        if not turns:
            return {"n_buckets": factors, "rotations": rotations}
        hashing.check_mask(mask, q)
        return {
            "n_buckets": factors,
            "buckets": self._as_given(self._hashed(q, k, mask, factors, rotations)),
        }

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, keys if they are their own, and values, by heads."""
        q, v = self.query_key(x), self.value(x)
        k = None if self.key is None else self.key(x)
        counts = (self.heads, self.value_heads, self.value_heads)
        return tuple(
            None if t is None else by_heads(t, count) for t, count in zip((q, k, v), counts)
        )

    def _merged(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))

    def _turned(self, q: Tensor, k: Tensor | None, rotary) -> tuple[Tensor, Tensor | None]:
        return rotated(q, rotary), None if k is None else rotated(k, rotary)

    def _attend(self, q, k, v, mask, **hashed) -> tuple[Tensor, Tensor]:
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
            **hashed,
            **self.choices,
        )

    def _rotations(
        self, q: Tensor, rounds: int, factors: tuple[int, ...], seed: int | Tensor | None
    ) -> Tensor:
        if self.preset == "hf" and self.hash_seed is not None:
            shape = (self.heads, self.head_dim, rounds, sum(factors) // 2)
            return hashing.transformers_rotations(self.hash_seed, shape, q.dtype, q.device)[None]
        return hashing.rotations_for(q, rounds, factors, seed, None)

    def factors(self, length: int) -> tuple[int, ...]:
        """Of the number of buckets, for this many tokens."""
        return lsh_options.factors(
            self.n_buckets, self._resolved.bucket_rule, length, self.chunk_length
        )

    def _check_decodes(self, buckets: Tensor | None) -> None:
        if not self.causal:
            raise ValueError("cache is given and causal is False; a layer must be causal to decode")
        check_decodes(self)
        if buckets is not None:
            raise ValueError(
                "buckets and cache are given; they must not be both, a cache has its own"
            )

    @torch.no_grad()
    def _decode(self, x: Tensor, mask, n_hashes, rotary, cache: LSHCache) -> tuple[Tensor, Tensor]:
        q, k, v = self._projected(x)
        hashing.check_mask(mask, q)
        cache.check(self, q if k is None else k, n_hashes)
        prompt = cache.length == 0
        if prompt:
            factors = self.factors(cache.max_length or x.shape[1])
            rounds = self.n_hashes if n_hashes is None else n_hashes
            cache.begin(self, factors, self._rotations(q, rounds, factors, self.hash_seed))
        buckets = self._hashed(q, k, mask, cache.factors, cache.rotations)
        q, k = self._turned(q, k, rotary)
        known = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        cache.append(keys=q if k is None else k, values=v, buckets=buckets, mask=known)
        given = self._as_given(buckets)
        if prompt:
            out, _ = self._attend(q, k, v, mask, n_buckets=cache.factors, buckets=given)
        else:
            out = self._attend_newest(q, cache)
        return self._merged(out), given

    def _as_given(self, buckets: Tensor) -> Tensor:
        """As `lsh_attention` takes them."""
        return buckets if self.key is not None else buckets[0]

    def _hashed(self, q, k, mask, factors: tuple[int, ...], rotations: Tensor) -> Tensor:
        """[1, or 2 with separate keys, batch, heads, rounds, length]."""
        mask = mask if self._resolved.pad_bucket else None
        sides = (
            [q] if k is None else [q, k.repeat_interleave(self.heads // self.value_heads, dim=1)]
        )
        options = {"n_buckets": factors, "rotations": rotations, "key_padding_mask": mask}
        return torch.stack([hashing.lsh_buckets(side, **options) for side in sides])

    def _attend_newest(self, q: Tensor, cache: LSHCache) -> Tensor:
        keys, values, buckets, mask = map(cache.so_far, ("keys", "values", "buckets", "mask"))
        order, ranks = lsh_hash.sort(buckets, math.prod(cache.factors) + 1)
        rows = torch.arange(cache.length - q.shape[2], cache.length, device=q.device)
        scale = self.head_dim**-0.5 if self._resolved.scale is None else self._resolved.scale
        return attend_rows(
            rows,
            q,
            keys,
            values,
            order,
            ranks,
            buckets,
            mask,
            self.chunk_length,
            scale,
            self._resolved,
        )

    def extra_repr(self) -> str:
        names = (
            "head_dim",
            "n_hashes",
            "chunk_length",
            "n_buckets",
            "causal",
            "preset",
            "value_heads",
            "dropout",
        )
        shown = {name: getattr(self, name) for name in (*names, "hash_seed")} | self.choices
        return ", ".join(
            [f"{self.width}, {self.heads}", *(f"{name}={value!r}" for name, value in shown.items())]
        )
