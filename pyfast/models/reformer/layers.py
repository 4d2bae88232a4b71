"""The modules of a Reformer: positions, and what each layer adds to the streams."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyfast._support import dtypes
from pyfast.models.reformer.config import ReformerConfig
from pyfast.nn.local_attention import LocalSelfAttention
from pyfast.nn.lsh_self_attention import LSHSelfAttention

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class AxialPositions(nn.Module):
    """Embeddings of rows x columns positions.

    The vector of a position is that of its row, followed by that of its column.
    """

    def __init__(self, shape: tuple[int, int], widths: tuple[int, int]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(shape[0], widths[0]))
        self.columns = nn.Parameter(torch.empty(shape[1], widths[1]))

    def forward(self, first: int, length: int) -> Tensor:
        """Return the vectors of `length` positions from `first` on, [length, width]."""
        n_columns = len(self.columns)
        top, bottom = first // n_columns, -(-(first + length) // n_columns)
        rows = self.rows[top:bottom, None].expand(-1, n_columns, -1)
        columns = self.columns.expand(bottom - top, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[first - top * n_columns :][:length]


class LearnedPositions(nn.Module):
    """Embeddings of positions, one vector for each."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, first: int, length: int) -> Tensor:
        """Return the vectors of `length` positions from `first` on, [length, width]."""
        return self.weight[first : first + length]


class Attention(nn.Module):
    """The first function of a reversible block: layer norm, attention and dropout."""

    keeps = True  # `reversible` hands bucket ids on to the replay

    def __init__(self, config: ReformerConfig, layer_type: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        sizes = {"head_dim": config.head_dim, "chunk_length": config.chunk(layer_type)}
        if layer_type == "local":
            self.attention = LocalSelfAttention(
                config.width, config.heads, dropout=config.local_dropout, **sizes
            )
        else:
            self.attention = LSHSelfAttention(
                config.width,
                config.heads,
                n_hashes=config.n_hashes,
                n_buckets=config.n_buckets,
                preset=config.preset,
                hash_seed=config.hash_seed,
                dropout=config.lsh_dropout,
                **sizes,
            )
        self.dropout, self.exact = nn.Dropout(config.dropout), config.exact

    def forward(
        self, x: Tensor, *, kept: dict, cache=None, n_hashes: int | None = None, **options
    ) -> Tensor:
        """Return what is added to the other stream, [batch, length, width]."""
        is_exact = self._is_exact(x)
        x = self.norm(x)
        if not isinstance(self.attention, LSHSelfAttention):
            y = self.attention(x, cache=cache, **options)
        elif cache is not None:
            y = self.attention(x, n_hashes=n_hashes, cache=cache, **options)
        else:
            buckets = kept.get("buckets")
            n_hashes = None if buckets is not None else n_hashes
            y, buckets = self.attention(
                x, n_hashes=n_hashes, buckets=buckets, return_buckets=True, **options
            )
            if not is_exact:
                n_buckets = math.prod(self.attention.factors(x.shape[1]))
                fits_int16 = n_buckets < 2**15  # with one more bucket, of padding
                kept.setdefault("buckets", buckets.short() if fits_int16 else buckets)
        return self.dropout(y)

    def _is_exact(self, x: Tensor) -> bool:
        """Return whether the streams are exact, so that a replay finds the same buckets."""
        if self.exact == "auto":
            return dtypes.compute_dtype(x) in (torch.bfloat16, torch.float16)
        return self.exact is not False


class FeedForward(nn.Module):
    """The second function of a reversible block: layer norm and two linear layers."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.activation, self.dropout = config.activation, nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the other stream, [batch, length, width]."""
        hidden = _ACTIVATIONS[self.activation](self.dropout(self.up(self.norm(x))))
        return self.dropout(self.down(hidden))
