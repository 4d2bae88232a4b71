"""Quantization and dequantization of 4-bit weights on a GPU. Products with them: nf4_linear.py.

A weight is `state`, a list of plain tensors, with its shape (N, K) and its blocksize:
    [packed, absmax, code]  or, nested,  [packed, absmax, code, nested_absmax, nested_code, offset]
Element i of the flattened row-major weight is nibble i of `packed`, the high nibble of a byte
first. It belongs to block i // blocksize, and blocks may straddle rows. Its value is one fp32
product, rounded once:
    W[i] = code[nibble] * scale(i // blocksize)
    scale(b) = absmax[b]  or, nested,  nested_code[absmax[b]] * nested_absmax[b // 256] + offset
The nested scale has two roundings.

`reference.nf4_quantize_op` and `reference.nf4_values` define both directions. Launchers do not
check their arguments: pyfast/ops/registered/nf4.py does.
"""

import torch
import triton
import triton.language as tl

from ._launch import cdiv
from .nf4_decode import load_elements, load_scale

# Scales that share one nested_absmax; load_scale has it as a shift by 8.
NESTED_BLOCK = 256
# Elements that a program of nf4_quantize_kernel owns: 16 for each of the 128 threads of 4 warps.
QUANTIZE_TILE = 2048
# Elements that a program of nf4_dequantize_kernel owns, by ALIGNED, for segments no shorter. On an
# H200 tiles of 8192 move 84 to 89 % of a copy's bytes, and tiles of 2048 move 76 %. Tiles of 8192
# spill unless they are aligned.
DEQUANTIZE_TILE = {True: 8192, False: 2048}


# ---------------------------------------------------------------- quantize


@triton.jit
def nf4_quantize_kernel(
    weight_ptr,
    thresholds_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute nibble(v) = order[#{t in thresholds[15] : x > t}] with x = v * (1 / absmax).

    In a short last block x is v / absmax. Both follow bitsandbytes, as pyfast/reference/_nf4.py
    states, with its floor of 1e-38 under absmax. Grid: tiles of BLOCKS blocks. A program owns their
    BLOCKS x BLOCKSIZE elements, their scales and their bytes.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    inside = element < numel
    v = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    # This is the largest bit pattern without its sign, not the largest float, so that a NaN or an
    # infinity survives the maximum.
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)  # [BLOCKS]
    floor = tl.where(absmax > 1e-38, absmax, tl.full([BLOCKS], 1e-38, tl.float32))
    x = v * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floor)[:, None]
    if (first + BLOCKS) * BLOCKSIZE > numel:
        short = (block + 1) * BLOCKSIZE > numel
        quotient = tl.div_rn(v, tl.broadcast_to(floor[:, None], [BLOCKS, BLOCKSIZE]))
        x = tl.where(short[:, None], quotient, x)
        absmax = tl.where(short & (absmax <= 1e-38), floor, absmax)
    # A missing last nibble is the code of 0, whatever the block holds.
    x = tl.where(inside, x, 0.0)
    rank = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        rank += (x > tl.load(thresholds_ptr + i)).to(tl.int32)
    nibble = tl.load(order_ptr + rank)  # [BLOCKS, BLOCKSIZE]
    high, low = tl.split(tl.reshape(nibble, [BLOCKS, BLOCKSIZE // 2, 2]))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high << 4) | low, mask=byte * 2 < numel)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)


@triton.jit
def nf4_quantize_scales_kernel(
    absmax_ptr,
    offset_ptr,
    thresholds_ptr,
    codes_ptr,
    nested_absmax_ptr,
    blocks,
    BLOCK: tl.constexpr,
):
    """Compute code = #{t in thresholds[255] : d * (1 / max|d|) > t} with d = absmax - offset.

    The code is 0 where every d of the block is 0. Thresholds are sorted, so eight steps of
    bisection find the count. Grid: blocks of BLOCK scales; a program owns one.
    """
    pid = tl.program_id(0).to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < blocks
    d = tl.load(absmax_ptr + i, mask=inside, other=0.0) - tl.load(offset_ptr)
    d = tl.where(inside, d, 0.0)
    largest = tl.max(d.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    x = d * tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32) + largest)
    code = tl.zeros([BLOCK], tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(x > tl.load(thresholds_ptr + code + ((128 >> bit) - 1)), 128 >> bit, 0)
    code = tl.where(largest == 0.0, 0, code)
    tl.store(codes_ptr + i, code.to(tl.uint8), mask=inside)
    tl.store(nested_absmax_ptr + pid, largest)


# ---------------------------------------------------------------- dequantize


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    start,
    length,
    stride,
    tiles,
    BLOCK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Compute out[s, e] = W[start + s * stride + e] of the flattened weight for 0 <= e < length.

    Whole rows are one segment s; a panel of columns is one segment for each row. Here ALIGNED means
    that every segment starts and ends at the edge of a block. Grid: `tiles` tiles for each segment;
    a program owns BLOCK elements of out.
    """
    scales = (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // tiles
    begin = (pid % tiles) * BLOCK
    source = start + segment * stride + begin
    out_ptr += segment * length + begin
    if ALIGNED:
        block = tl.arange(0, BLOCK // BLOCKSIZE)  # [B]
        inside = begin + block * BLOCKSIZE < length
        scale = load_scale(scales, source // BLOCKSIZE + block, inside, NESTED)[:, None]
        # pair, byte, even and odd are [B, BLOCKSIZE / 2].
        pair = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
        byte = tl.load(packed_ptr + source // 2 + pair, mask=inside[:, None], other=0).to(tl.int32)
        even = (tl.load(code_ptr + (byte >> 4)) * scale).to(out_ptr.dtype.element_ty)
        odd = (tl.load(code_ptr + (byte & 15)) * scale).to(out_ptr.dtype.element_ty)
        value = tl.interleave(even, odd)  # [B, BLOCKSIZE]
        element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
        tl.store(out_ptr + element, value, mask=inside[:, None])
    else:
        element = tl.arange(0, BLOCK)  # [BLOCK]
        inside = begin + element < length
        value = load_elements(
            packed_ptr, code_ptr, scales, source + element, inside, BLOCKSIZE, NESTED
        )
        tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- launchers


def quantize(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed, uint8 [(numel + 1) // 2, 1], and absmax, fp32 [ceil(numel / blocksize)]."""
    numel = weight.numel()
    blocks = cdiv(numel, blocksize)
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if numel:
        tile = max(1, QUANTIZE_TILE // blocksize)
        constants = dict(BLOCKSIZE=blocksize, BLOCKS=tile, num_warps=4, enable_fp_fusion=False)
        nf4_quantize_kernel[(cdiv(blocks, tile),)](
            weight, thresholds, order, packed, absmax, numel, **constants
        )
    return packed, absmax


def quantize_scales(
    absmax: torch.Tensor, offset: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 like absmax, and nested_absmax, fp32 [ceil(blocks / 256)]."""
    blocks = absmax.numel()
    groups = cdiv(blocks, NESTED_BLOCK)
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    if blocks:
        constants = dict(BLOCK=NESTED_BLOCK, num_warps=2, enable_fp_fusion=False)
        nf4_quantize_scales_kernel[(groups,)](
            absmax, offset, thresholds, codes, nested_absmax, blocks, **constants
        )
    return codes, nested_absmax


def dequantize(
    state: list[torch.Tensor], shape: tuple[int, ...], blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight of any shape in `dtype`, bit for bit as the definition gives it."""
    out = torch.empty(shape, dtype=dtype, device=state[0].device)
    return dequantize_segments(state, blocksize, out, 0, 1, out.numel(), 0)


def dequantize_segments(
    state: list[torch.Tensor],
    blocksize: int,
    out: torch.Tensor,
    start: int,
    segments: int,
    length: int,
    stride: int,
) -> torch.Tensor:
    """Write out[s, e] = W[start + s * stride + e] of the flattened weight, and return out.

    The memory of `out` is [segments, length].
    """
    if segments * length == 0:
        return out
    aligned = start % blocksize == 0 and length % blocksize == 0 and stride % blocksize == 0
    tile = max(blocksize, DEQUANTIZE_TILE[aligned and length >= DEQUANTIZE_TILE[True]])
    tiles = cdiv(length, tile)
    constants = dict(BLOCK=tile, BLOCKSIZE=blocksize, NESTED=len(state) == 6, ALIGNED=aligned)
    nf4_dequantize_kernel[(tiles * segments,)](
        *pointer_arguments(state),
        out,
        start,
        length,
        stride,
        tiles,
        **constants,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def pointer_arguments(state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the six pointers of a kernel; the last three are not read for plain weights."""
    packed, absmax, code, *nested = state
    return packed, absmax, code, *(nested or (absmax, absmax, absmax))
