"""Reversible blocks, with all that they compute kept."""

import torch
from torch import Tensor


def reversible(
    blocks,
    x1: Tensor,
    x2: Tensor,
    *args,
    exact: bool | str = False,
    fraction_bits: int = 16,
    return_hidden: bool = False,
    f_kwargs: dict | None = None,
    g_kwargs: dict | None = None,
    **kwargs,
) -> tuple[Tensor, ...]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1). exact, True or "int32": all summands rounded to multiples
    of 2^-fraction_bits, in sums that are exact: float32 ones below 2^(24 - fraction_bits), float64
    ones for "int32". No range is checked.
    """
    wide = {False: x1.dtype, True: torch.float32, "int32": torch.float64}[exact]
    s1, s2 = (_on_grid(x.to(wide), fraction_bits, exact) for x in (x1, x2))
    hidden = []
    for f, g in blocks:
        s1 = s1 + _on_grid(
            f(s2.to(x1.dtype), *args, **kwargs, **(f_kwargs or {})).to(wide), fraction_bits, exact
        )
        s2 = s2 + _on_grid(
            g(s1.to(x1.dtype), *args, **kwargs, **(g_kwargs or {})).to(wide), fraction_bits, exact
        )
        hidden.append((s1.to(x1.dtype), s2.to(x1.dtype)))
    return (*hidden[-1], hidden) if return_hidden else hidden[-1]


def _on_grid(x: Tensor, bits: int, exact: bool | str) -> Tensor:
    """Rounded, and a straight line to the gradient."""
    return x + (torch.round(x * 2.0**bits) * 2.0**-bits - x).detach() if exact else x


def reversible_step_op(stream, out, subtract, bits, flag) -> None:
    """stream +- out in place, rounded to multiples of 2^-bits unless bits is -1. To `flag`: 1, a
    sum left the range of float32's 24 bits, or int32's; 2, out was not finite.
    """
    sign = -1 if subtract else 1
    if bits < 0:
        stream.add_(out, alpha=sign)
    elif stream.dtype == torch.int32:
        most = 2.0**31 - 128  # the largest float below
        units = sign * torch.round(out.float() * 2.0**bits)
        r = units.nan_to_num().clamp(-most, most).to(torch.int32)
        y = stream + r
        left = (((stream ^ y) & (r ^ y)) < 0) | ~(units.abs() <= most)
        stream.copy_(y)
    else:
        stream.add_(torch.round(out.float() * 2.0**bits) * 2.0**-bits, alpha=sign)
        left = ~(stream.abs() < 2.0 ** (24 - bits))
    if bits >= 0:
        trouble = torch.where(out.isfinite().all(), 1, 2) * left.any()
        flag.copy_(torch.maximum(flag, trouble.to(flag.dtype)))
