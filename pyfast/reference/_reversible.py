"""Reversible blocks in plain torch, which keeps all activations."""

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
    """Compute y1 = x1 + F(x2), y2 = x2 + G(y1), block after block.

    With exact=True or "int32" all summands are rounded to multiples of 2^-fraction_bits, and the
    sums are exact: in float32 below 2^(24 - fraction_bits), in float64 for "int32". No range is
    checked.
    """
    sum_dtype = {False: x1.dtype, True: torch.float32, "int32": torch.float64}[exact]
    f_options, g_options = {**kwargs, **(f_kwargs or {})}, {**kwargs, **(g_kwargs or {})}

    def summand(x: Tensor) -> Tensor:
        x = x.to(sum_dtype)
        return _round_to_multiples(x, fraction_bits) if exact else x

    s1, s2 = summand(x1), summand(x2)
    hidden = []
    for f, g in blocks:
        s1 = s1 + summand(f(s2.to(x1.dtype), *args, **f_options))
        s2 = s2 + summand(g(s1.to(x1.dtype), *args, **g_options))
        hidden.append((s1.to(x1.dtype), s2.to(x1.dtype)))
    return (*hidden[-1], hidden) if return_hidden else hidden[-1]


def _round_to_multiples(x: Tensor, bits: int) -> Tensor:
    """Round x to multiples of 2^-bits, with a gradient of 1."""
    return x + (torch.round(x * 2.0**bits) * 2.0**-bits - x).detach()


def reversible_step_op(stream, out, subtract, bits, flag) -> None:
    """Add out to the stream, or subtract it, in place.

    Unless bits is -1, out is rounded to multiples of 2^-bits. The flag is then raised to 1 if a sum
    left the range of float32's 24 bits, or int32's, and to 2 if out was not finite too.
    """
    sign = -1 if subtract else 1
    if bits < 0:
        stream.add_(out, alpha=sign)
    elif stream.dtype == torch.int32:
        limit = 2.0**31 - 128  # the largest float below 2^31
        units = sign * torch.round(out.float() * 2.0**bits)
        summand = units.nan_to_num().clamp(-limit, limit).to(torch.int32)
        total = stream + summand
        wrapped = ((stream ^ total) & (summand ^ total)) < 0
        out_of_range = wrapped | ~(units.abs() <= limit)
        stream.copy_(total)
    else:
        stream.add_(torch.round(out.float() * 2.0**bits) * 2.0**-bits, alpha=sign)
        out_of_range = ~(stream.abs() < 2.0 ** (24 - bits))
    if bits >= 0:
        problem = torch.where(out.isfinite().all(), 1, 2) * out_of_range.any()
        flag.copy_(torch.maximum(flag, problem.to(flag.dtype)))
