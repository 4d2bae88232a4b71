"""NF4: quantization to 4 bits, and linear layers with such a weight."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast.formats import nf4_codebooks
from pyfast.formats.nf4_weight import NF4Weight


def nf4_quantize(
    weight: Tensor, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
) -> NF4Weight:
    """Scale each block of values by its largest magnitude; round to the nearest code."""
    tables = (
        nf4_codebooks.THRESHOLDS[quant_type],
        nf4_codebooks.ORDER[quant_type],
        nf4_codebooks.NESTED_THRESHOLDS,
    )
    packed, absmax, nested_absmax, offset = nf4_quantize_op(
        weight, *(table.to(weight.device) for table in tables), blocksize, nested
    )
    extra = {}
    if nested:
        nested_code = nf4_codebooks.NESTED_CODE.to(weight.device)
        extra = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    code = nf4_codebooks.CODE[quant_type].to(weight.device)
    return NF4Weight(
        packed, absmax, code, weight.shape, blocksize, weight.dtype, quant_type, **extra
    )


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return code * scale, computed in float32 and rounded once to `dtype`."""
    return nf4_dequantize_op(w.state, w.shape, w.blocksize, dtype or w.dtype)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias."""
    return nf4_linear_op(x, w.state, bias, w.shape, w.blocksize)


def nf4_quantize_op(
    weight: Tensor,
    thresholds: Tensor,
    order: Tensor,
    nested_thresholds: Tensor,
    blocksize: int,
    nested: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return packed nibbles, scales, and two empty tensors.

    Nested, return packed nibbles, the scales' 8-bit codes, these codes' scales, and the mean.
    """
    flat = weight.detach().reshape(-1).float()
    short = flat.numel() % blocksize
    blocks = F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    divisor = absmax.clamp(min=nf4_codebooks.SMALLEST_ABSMAX)[:, None]
    scaled = blocks * (1 / divisor)
    if short:  # bitsandbytes divides here, and stores the clamped scale
        scaled[-1] = blocks[-1] / divisor[-1]
        absmax[-1] = divisor[-1]
    nibbles = order[torch.bucketize(scaled.view(-1)[: flat.numel()], thresholds)]
    if flat.numel() % 2:
        nibbles = torch.cat([nibbles, order[torch.bucketize(flat.new_zeros(1), thresholds)]])
    packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]
    if not nested:
        check_finite(absmax)
        return packed, absmax, flat.new_empty(0), flat.new_empty(0)
    offset = mean_absmax(absmax)
    check_finite(offset)
    codes, nested_absmax = _quantize_scales(absmax - offset, nested_thresholds)
    return packed, codes, nested_absmax, offset


def mean_absmax(absmax: Tensor) -> Tensor:
    """Return the mean of the scales, [1]; it is 0 if there are none."""
    return absmax.mean().view(1) if absmax.numel() else absmax.new_zeros(1)


def check_finite(scales: Tensor) -> None:
    """Raise if the weight was not finite: NaN and infinity reach a block's scale, and the mean."""
    if not bool(scales.isfinite().all()):
        raise ValueError(
            "weight holds NaN, infinite or overflowing values; it must be finite to be quantized"
        )


def _quantize_scales(centered: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    size = nf4_codebooks.NESTED_BLOCKSIZE
    groups = F.pad(centered, (0, -len(centered) % size)).view(-1, size)
    nested_absmax = groups.abs().amax(dim=1) if len(groups) else centered.new_empty(0)
    codes = torch.bucketize(groups * (1 / nested_absmax)[:, None], thresholds)
    codes = torch.where(nested_absmax[:, None] == 0, 0, codes)
    return codes.view(-1)[: len(centered)].to(torch.uint8), nested_absmax


def nf4_values(state: list[Tensor], shape: tuple[int, ...], blocksize: int) -> Tensor:
    """Return the float32 value of every nibble."""
    packed, absmax, code, *nested = state
    scale = absmax
    if nested:
        nested_absmax, nested_code, offset = nested
        group = torch.arange(len(absmax), device=absmax.device) // nf4_codebooks.NESTED_BLOCKSIZE
        scale = nested_code[absmax.long()] * nested_absmax[group] + offset
    numel = math.prod(shape)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[:numel].long()
    block = torch.arange(numel, device=packed.device) // blocksize
    return (code[nibbles] * scale[block]).view(shape)


def nf4_dequantize_op(
    state: list[Tensor], shape: tuple[int, ...], blocksize: int, dtype: torch.dtype
) -> Tensor:
    return nf4_values(state, shape, blocksize).to(dtype)


def nf4_linear_op(
    x: Tensor, state: list[Tensor], bias: Tensor | None, shape: tuple[int, ...], blocksize: int
) -> Tensor:
    return F.linear(x, nf4_values(state, shape, blocksize).to(x.dtype), bias)


def nf4_linear_backward_op(
    dy: Tensor, state: list[Tensor], shape: tuple[int, ...], blocksize: int
) -> Tensor:
    """Return dx = dy W."""
    return dy @ nf4_values(state, shape, blocksize).to(dy.dtype)
