"""Rotary positions: pairs of a query's or key's numbers turned by an angle that grows with the position."""

import torch
from torch import Tensor

BASE = 10000.0


def tables(first: int, length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions first, first + 1, ...: [length, dim / 2] each, in float32."""
    rates = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = torch.arange(first, first + length, dtype=torch.float64, device=device)[
        :, None
    ] * rates.to(device)
    return turns.cos().float(), turns.sin().float()


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """x [..., length, dim], turned by tables of its tokens; as it is without any."""
    if rotary is None:
        return x
    cos, sin = rotary
    wanted = [x.shape[-2], x.shape[-1] // 2]
    if x.shape[-1] % 2 or list(cos.shape) != wanted or list(sin.shape) != wanted:
        shapes = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(
            f"rotary has shapes {shapes}; with heads of {x.shape[-1]} they must be {wanted}, an even width"
        )
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
