"""What a Reformer's layers are made of, and its positions."""

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
    """A vector for each of rows x columns positions, of which the row gives the first part and the column the rest."""

    def __init__(self, shape: tuple[int, int], widths: tuple[int, int]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(shape[0], widths[0]))
        self.columns = nn.Parameter(torch.empty(shape[1], widths[1]))

    def forward(self, first: int, length: int) -> Tensor:
        """[length, width], from position `first` on."""
        n_columns = len(self.columns)
        top, bottom = first // n_columns, -(-(first + length) // n_columns)
        rows = self.rows[top:bottom, None].expand(-1, n_columns, -1)
        columns = self.columns.expand(bottom - top, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[first - top * n_columns :][:length]


class LearnedPositions(nn.Module):
    """A vector for each position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, first: int, length: int) -> Tensor:
        """[length, width], from position `first` on."""
        return self.weight[first : first + length]


class Attention(nn.Module):
    """What an attention adds to a stream."""

    keeps = True  # bucket ids, for the replay

    def __init__(self, config: ReformerConfig, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        sizes = {"head_dim": config.head_dim, "chunk_length": config.chunk(kind)}
        if kind == "local":
            self.attention = LocalSelfAttention(
                config.width, config.heads, dropout=config.local_dropout, **sizes
            )
        else:
            hashes = {
                name: getattr(config, name)
                for name in ("n_hashes", "n_buckets", "preset", "hash_seed")
            }
            dropout = config.lsh_dropout
            self.attention = LSHSelfAttention(
                config.width, config.heads, dropout=dropout, **sizes, **hashes
            )
        self.dropout, self.exact = nn.Dropout(config.dropout), config.exact

    def forward(
        self, x: Tensor, *, kept: dict, cache=None, n_hashes: int | None = None, **options
    ) -> Tensor:
        """[batch, length, width]"""
        narrow = dtypes.compute_dtype(x) in (torch.bfloat16, torch.float16)
        exact = self.exact is not False and (narrow or self.exact != "auto")
        x = self.norm(x)
        if isinstance(self.attention, LSHSelfAttention) and cache is None:
            buckets = kept.get("buckets")
            n_hashes = None if buckets is not None else n_hashes
            y, buckets = self.attention(
                x, n_hashes=n_hashes, buckets=buckets, return_buckets=True, **options
            )
            small = math.prod(self.attention.factors(x.shape[1])) < 2**15  # one more is of padding
            if not exact:
                kept.setdefault("buckets", buckets.short() if small else buckets)
        elif isinstance(self.attention, LSHSelfAttention):
            y = self.attention(x, n_hashes=n_hashes, cache=cache, **options)
        else:
            y = self.attention(x, cache=cache, **options)
        return self.dropout(y)


class FeedForward(nn.Module):
    """What a feed-forward adds to a stream."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.activation, self.dropout = config.activation, nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width]"""
        hidden = _ACTIVATIONS[self.activation](self.dropout(self.up(self.norm(x))))
        return self.dropout(self.down(hidden))
