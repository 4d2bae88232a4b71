"""How results lie in memory, for kernels and ops."""

import torch
from torch import Tensor


def by_tokens(x: Tensor) -> bool:
    """Whether memory has a token's heads side by side, as a projection makes them; results are laid out likewise."""
    return x.stride(1) < x.stride(2)


def empty(like: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """[b, heads, n, width], laid out as another is: by tokens, or by heads."""
    batch, _, n, _ = like.shape
    if by_tokens(like):
        return like.new_empty(batch, n, heads, width, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, n, width, dtype=dtype)
