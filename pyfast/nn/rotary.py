"""Rotary positions: pairs of numbers of a query or key are rotated.

The angle grows with the position.
"""

import torch
from torch import Tensor

BASE = 10000.0


def tables(first: int, length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of `length` positions from `first` on.

    Returns:
        Two float32 tensors, [length, dim / 2].
    """
    rates = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    positions = torch.arange(first, first + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * rates.to(device)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate x, [..., length, dim], by the tables of its positions; return x if there are none."""
    if rotary is None:
        return x
    cos, sin = rotary
    expected = [x.shape[-2], x.shape[-1] // 2]
    if x.shape[-1] % 2 or list(cos.shape) != expected or list(sin.shape) != expected:
        shapes = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(
            f"rotary has shapes {shapes}; with heads of {x.shape[-1]} they must be {expected}, "
            "an even width"
        )
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
