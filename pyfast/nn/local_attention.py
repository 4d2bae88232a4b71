r"""Local attention: each token sees those of its own chunk and of the one before, and none after
itself.

    out_i = sum_j p_ij v_j,   p_i = softmax of scale * q_i k_j   over j <= i, in the chunk of i and the one before

It is LSH attention whose one round of hashing puts all tokens in one bucket, and it runs on the
same kernels: see `pyfast/ops/lsh_attention.py`.
"""

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.nn.attention_checks import by_heads, check_decodes, check_sizes, check_tokens
from pyfast.nn.rotary import rotated
from pyfast.ops import lsh_hash as hashing
from pyfast.ops.local_attention import local_attention
from pyfast.ops.lsh_attention import check_options


class LocalCache:
    """The keys and values of one layer's tokens that the next may see: `layer(x, cache=cache)` appends x's."""

    def __init__(self) -> None:
        self.length = 0  # of all tokens so far
        self.held: dict[str, Tensor] = {}  # k and v [batch, heads, held, dim], mask [batch, held]

    def reorder(self, indices: Tensor) -> None:
        """Example i becomes what example indices[i] was, as beam search asks; there may be more or fewer of them."""
        checks.examples("indices", indices, self.held["k"].shape[0] if self.held else 0)
        self.held = {
            name: tensor.index_select(0, indices.to(tensor.device))
            for name, tensor in self.held.items()
        }

    def mark(self) -> tuple[int, dict[str, Tensor]]:
        """For `restore`, which forgets all that came since."""
        return self.length, self.held

    def restore(self, mark: tuple[int, dict[str, Tensor]]) -> None:
        """Back to a mark."""
        self.length, self.held = mark

    def check(self, k: Tensor) -> None:
        """Whether keys of these tokens can go on from here."""
        if self.held and k.shape[0] != self.held["k"].shape[0]:
            raise ValueError(
                f"x has batch size {k.shape[0]}; it must be the cache's, {self.held['k'].shape[0]}"
            )

    def extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None, chunk_length: int
    ) -> dict[str, Tensor]:
        """What the new tokens may see, from the start of a chunk on; what the next may see is kept."""
        new = {
            "k": k,
            "v": v,
            "mask": torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if mask is None else mask,
        }
        dims = {"k": 2, "v": 2, "mask": 1}
        seen = {
            name: torch.cat([self.held[name], t], dims[name]) if self.held else t
            for name, t in new.items()
        }
        self.length += k.shape[2]
        held = seen["k"].shape[2]
        first = self.length - held
        start = max(0, self.length // chunk_length - 1) * chunk_length
        self.held = {
            name: t.narrow(dims[name], start - first, self.length - start)
            for name, t in seen.items()
        }
        self.held = {
            name: t.clone() for name, t in self.held.items()
        }  # or the whole prompt would stay
        return seen


class LocalSelfAttention(nn.Module):
    """Causal self-attention within the own chunk and the one before: `LocalSelfAttention(512,
    8)(x)`.

    Args:
        width: of x and of the result.
        heads: of the queries.
        head_dim: up to 256; width / heads by default.
        chunk_length: 16 to 256, a multiple of 16.
        bias: of all projections but the last.
        out_bias: of the last.
        dropout: of the attention's weights, in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        chunk_length: int = 64,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width, heads, head_dim, None)
        check_options(chunk_length, True, "dropout", dropout)
        self.width, self.heads = width, heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.chunk_length, self.dropout = chunk_length, dropout
        inner, place = heads * self.head_dim, {"dtype": dtype, "device": device}
        self.query = nn.Linear(width, inner, bias=bias, **place)
        self.key = nn.Linear(width, inner, bias=bias, **place)
        self.value = nn.Linear(width, inner, bias=bias, **place)
        self.out = nn.Linear(inner, width, bias=out_bias, **place)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LocalCache | None = None,
    ) -> Tensor:
        """What each token takes from those before it that are near, [batch, length, width].

        Args:
            x: [batch, length, width]. key_padding_mask: [batch, length], True: a token to be seen.
            rotary: cosines and sines of x's positions, as `pyfast.nn.rotary.tables` makes them.
            cache: x goes on from the tokens in it, and is appended. For inference: there are no
            gradients.
        """
        check_tokens(x, self.width)
        if cache is None:
            q, k, v = self._projected(x, rotary)
            out = local_attention(q, k, v, key_padding_mask=key_padding_mask, **self._options())
        else:
            out = self._decode(x, key_padding_mask, rotary, cache)
        return self.out(out.transpose(1, 2).flatten(2))

    def _options(self) -> dict:
        return {
            "chunk_length": self.chunk_length,
            "dropout_p": self.dropout if self.training else 0.0,
        }

    def _projected(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (by_heads(linear(x), self.heads) for linear in (self.query, self.key, self.value))
        return rotated(q, rotary), rotated(k, rotary), v

    @torch.no_grad()
    def _decode(self, x: Tensor, mask: Tensor | None, rotary, cache: LocalCache) -> Tensor:
        checks.instance("cache", cache, LocalCache)
        check_decodes(self)
        q, k, v = self._projected(x, rotary)
        hashing.check_mask(mask, q)
        cache.check(k)
        seen = cache.extended(k, v, mask, self.chunk_length)
        earlier = seen["k"].shape[2] - q.shape[2]  # whose queries had their turn
        q = nn.functional.pad(q, (0, 0, earlier, 0))
        out = local_attention(
            q, seen["k"], seen["v"], key_padding_mask=seen["mask"], **self._options()
        )
        return out[:, :, earlier:]

    def extra_repr(self) -> str:
        names = ("head_dim", "chunk_length", "dropout")
        return ", ".join(
            [f"{self.width}, {self.heads}", *(f"{name}={getattr(self, name)!r}" for name in names)]
        )
