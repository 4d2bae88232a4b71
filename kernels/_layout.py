"""Memory layout of attention's tensors, for kernels and ops; needs no triton."""

import torch
from torch import Tensor


def is_token_major(x: Tensor) -> bool:
    """Return whether x[b, h, n, d] has the heads of a token side by side, as a projection does."""
    return x.stride(1) < x.stride(2)


def allocate_like(like: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty [b, heads, n, width] laid out as `like` is, by tokens or by heads."""
    batch, _, n, _ = like.shape
    if is_token_major(like):
        return like.new_empty(batch, n, heads, width, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, n, width, dtype=dtype)
