r"""Local attention: a token sees its own chunk and the one before, but no later token.

    out_i = sum_j p_ij v_j
    p_i = softmax of scale * q_i k_j   over j <= i, in the chunk of i and the one before

It is LSH attention whose one round of hashing puts all tokens in one bucket, and it runs on the
same kernels: see `pyfast/ops/lsh_attention.py`.
"""

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.nn.attention_checks import (
    check_decoding,
    check_sizes,
    check_tokens,
    merge_heads,
    split_heads,
)
from pyfast.nn.rotary import rotate
from pyfast.ops.local_attention import local_attention
from pyfast.ops.lsh_attention import check_options
from pyfast.ops.lsh_hash import check_mask

_TOKEN_DIM = {"k": 2, "v": 2, "mask": 1}


class LocalCache:
    """The keys and values of one layer that the next tokens may see.

    `layer(x, cache=cache)` continues from the tokens in the cache, and appends x.

    Attributes:
        length: the number of all tokens so far, including those that are no longer kept.
        held: the tensors "k" and "v", [batch, heads, held, dim], and "mask", [batch, held].

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.LocalSelfAttention(64, 4, chunk_length=16)
        >>> cache = pyfast.LocalCache()
        >>> y = layer(torch.randn(2, 100, 64), cache=cache)
        >>> layer(torch.randn(2, 1, 64), cache=cache).shape, cache.length
        (torch.Size([2, 1, 64]), 101)
    """

    def __init__(self) -> None:
        self.length = 0
        self.held: dict[str, Tensor] = {}

    def reorder(self, indices: Tensor) -> None:
        """Replace example i by what example indices[i] was, as beam search asks.

        Args:
            indices: [new batch size], int64 or int32; there may be more or fewer than now.
        """
        checks.examples("indices", indices, self.held["k"].shape[0] if self.held else 0)
        held = {}
        for name, tensor in self.held.items():
            held[name] = tensor.index_select(0, indices.to(tensor.device))
        self.held = held

    def mark(self) -> tuple[int, dict[str, Tensor]]:
        """Return the state of the cache for `restore`."""
        return self.length, self.held

    def restore(self, mark: tuple[int, dict[str, Tensor]]) -> None:
        """Forget all tokens that came since `mark`."""
        self.length, self.held = mark

    def check(self, k: Tensor) -> None:
        """Check that keys of new tokens can be appended."""
        if self.held and k.shape[0] != self.held["k"].shape[0]:
            raise ValueError(
                f"x has batch size {k.shape[0]}; it must be the cache's, {self.held['k'].shape[0]}"
            )

    def append(
        self, k: Tensor, v: Tensor, mask: Tensor | None, chunk_length: int
    ) -> dict[str, Tensor]:
        """Append tokens, and drop those that the next tokens do not see.

        Returns:
            The tensors named as in `held`, of all tokens that the new ones may see. They begin at
            the start of a chunk.
        """
        if mask is None:
            mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        seen = {"k": k, "v": v, "mask": mask}
        if self.held:
            for name, tensor in seen.items():
                seen[name] = torch.cat([self.held[name], tensor], _TOKEN_DIM[name])
        self.length += k.shape[2]
        first_seen = self.length - seen["k"].shape[2]
        first_held = max(0, self.length // chunk_length - 1) * chunk_length
        self.held = {}
        for name, tensor in seen.items():
            held = tensor.narrow(
                _TOKEN_DIM[name], first_held - first_seen, self.length - first_held
            )
            self.held[name] = held.clone()  # a view would keep the whole prompt in memory
        return seen


class LocalSelfAttention(nn.Module):
    """Causal self-attention within a token's own chunk and the one before.

    Args:
        width: int; the size of the input and the output.
        heads: int; the number of heads.
        head_dim: int up to 256; width / heads by default.
        chunk_length: int, 64 by default; 16 to 256, a multiple of 16.
        bias: bool, False by default; whether the projections to queries, keys and values have one.
        out_bias: bool, False by default; whether the output projection has one.
        dropout: float, 0 by default; the dropout of the attention's weights, in training.
        dtype: torch.dtype of the parameters; torch's default.
        device: device of the parameters; torch's default.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.LocalSelfAttention(512, 8)
        >>> layer(torch.randn(2, 1000, 512)).shape
        torch.Size([2, 1000, 512])
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
        inner = heads * self.head_dim
        options = {"dtype": dtype, "device": device}
        self.query = nn.Linear(width, inner, bias=bias, **options)
        self.key = nn.Linear(width, inner, bias=bias, **options)
        self.value = nn.Linear(width, inner, bias=bias, **options)
        self.out = nn.Linear(inner, width, bias=out_bias, **options)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LocalCache | None = None,
    ) -> Tensor:
        """Let each token attend to the tokens before it that are near.

        Args:
            x: [batch, length, width]; float32, bfloat16, float16 or float64.
            key_padding_mask: [batch, length], bool; True for a token to be seen. All by default.
            rotary: cosines and sines of x's positions, as `pyfast.nn.rotary.tables` makes them.
            cache: LocalCache; x continues from the tokens in it, and is appended. For inference:
                there are no gradients.

        Returns:
            [batch, length, width].
        """
        check_tokens(x, self.width)
        if cache is None:
            q, k, v = self._project(x, rotary)
            out = local_attention(q, k, v, key_padding_mask=key_padding_mask, **self._options())
        else:
            out = self._decode(x, key_padding_mask, rotary, cache)
        return self.out(merge_heads(out))

    def _options(self) -> dict[str, object]:
        dropout = self.dropout if self.training else 0.0
        return {"chunk_length": self.chunk_length, "dropout_p": dropout}

    def _project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = split_heads(self.query(x), self.heads)
        k = split_heads(self.key(x), self.heads)
        v = split_heads(self.value(x), self.heads)
        return rotate(q, rotary), rotate(k, rotary), v

    @torch.no_grad()
    def _decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: LocalCache,
    ) -> Tensor:
        checks.instance("cache", cache, LocalCache)
        check_decoding(self)
        q, k, v = self._project(x, rotary)
        check_mask(mask, q)
        cache.check(k)
        seen = cache.append(k, v, mask, self.chunk_length)
        n_earlier = seen["k"].shape[2] - q.shape[2]  # tokens whose results are known
        q = nn.functional.pad(q, (0, 0, n_earlier, 0))
        out = local_attention(
            q, seen["k"], seen["v"], key_padding_mask=seen["mask"], **self._options()
        )
        return out[:, :, n_earlier:]

    def extra_repr(self) -> str:
        options = f"head_dim={self.head_dim}, chunk_length={self.chunk_length}"
        return f"{self.width}, {self.heads}, {options}, dropout={self.dropout!r}"
