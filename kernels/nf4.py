"""4-bit weights on a GPU: quantize, decode, dequantize. The products with them are in
nf4_linear.py.

A weight is `state`, a list of plain tensors, with its shape (N, K) and its blocksize:
    [packed, absmax, code]  or, nested,  [packed, absmax, code, nested_absmax, nested_code, offset]
Element i of the flattened row-major weight is nibble i of `packed`, the high nibble of a byte
first, and belongs to block i // blocksize; blocks may straddle rows. Its value is one fp32 product,
rounded once:
    W[i] = code[nibble] * scale(i // blocksize) scale(b) = absmax[b]  or, nested,
    nested_code[absmax[b]] * nested_absmax[b // 256] + offset, two roundings

In the names below `load_*` reads memory, `code_*` prepares the code table, `decode_*` only
computes. ALIGNED means rows made of whole blocks, as in every real model: one scale a row of a
tile, no mask along K. Without it nothing is assumed, and every element finds its own scale. Nothing
here checks its arguments: pyfast/ops/nf4.py does.
"""

import torch
import triton
import triton.language as tl

from ._launch import cdiv

NESTED_BLOCK = 256  # scales that share one nested_absmax; load_scale has it as a shift by 8
QUANTIZE_TILE = 2048  # elements a program owns: 16 for each of the 128 threads of 4 warps
# By ALIGNED, of segments no shorter: 8192 move 84 to 89 % of a copy's bytes on an H200, 2048 76 %.
# Else 8192 spill.
DEQUANTIZE_TILE = {True: 8192, False: 2048}


# ---------------------------------------------------------------- quantize


@triton.jit
def _quantize_kernel(
    weight_ptr,
    thresholds_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """nibble(v) = order[#{t in thresholds[15] : x > t}], x = v * (1 / absmax), or v / absmax in a
    short last block.

    Both as bitsandbytes divides, which pyfast/reference/_nf4.py writes down, with its floor of
    1e-38 under absmax. Grid: tiles of BLOCKS blocks. A program owns their BLOCKS x BLOCKSIZE
    elements, their scales and their bytes.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    inside = element < numel
    v = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    # The largest bit pattern without its sign, not the largest float: a NaN or an infinity survives
    # the maximum.
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)  # [BLOCKS]
    floor = tl.where(absmax > 1e-38, absmax, tl.full([BLOCKS], 1e-38, tl.float32))
    x = v * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floor)[:, None]
    if (first + BLOCKS) * BLOCKSIZE > numel:
        short = (block + 1) * BLOCKSIZE > numel
        quotient = tl.div_rn(v, tl.broadcast_to(floor[:, None], [BLOCKS, BLOCKSIZE]))
        x = tl.where(short[:, None], quotient, x)
        absmax = tl.where(short & (absmax <= 1e-38), floor, absmax)
    x = tl.where(inside, x, 0.0)  # a missing last nibble is the code of 0, whatever the block holds
    rank = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        rank += (x > tl.load(thresholds_ptr + i)).to(tl.int32)
    nibble = tl.load(order_ptr + rank)  # [BLOCKS, BLOCKSIZE]
    high, low = tl.split(tl.reshape(nibble, [BLOCKS, BLOCKSIZE // 2, 2]))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high << 4) | low, mask=byte * 2 < numel)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)


@triton.jit
def _quantize_scales_kernel(
    absmax_ptr,
    offset_ptr,
    thresholds_ptr,
    codes_ptr,
    nested_absmax_ptr,
    blocks,
    BLOCK: tl.constexpr,
):
    """code = #{t in thresholds[255] : d * (1 / max|d|) > t}, d = absmax - offset; 0 where every d
    of the block is 0.

    Grid: blocks of BLOCK scales; a program owns one. Eight steps of bisection find the count in
    sorted thresholds.
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


# ---------------------------------------------------------------- decode: element by element, in fp32


@triton.jit
def load_scale(scales, block, mask, NESTED: tl.constexpr):
    """scale(block) in fp32 and in the shape of `block`, 0 where masked.

    `scales` is (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr). The nested scale is
    the definition's bit for bit where the launcher sets enable_fp_fusion=False; an FMA would join
    its two roundings.
    """
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr = scales
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + (block >> 8), mask=mask, other=0.0)
        return tl.where(mask, tl.load(nested_code_ptr + code) * nested + tl.load(offset_ptr), 0.0)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def load_elements(
    packed_ptr, code_ptr, scales, i, mask, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr
):
    """Elements i of the flattened weight in fp32, 0 where masked; i is int64."""
    byte = tl.load(packed_ptr + (i >> 1), mask=mask, other=0).to(tl.int32)
    nibble = (byte >> (4 - 4 * (i & 1)).to(tl.int32)) & 15
    return tl.load(code_ptr + nibble) * load_scale(scales, i // BLOCKSIZE, mask, NESTED)


@triton.jit
def load_tile(
    packed_ptr,
    code_ptr,
    scales,
    row,
    k,
    n_rows,
    n_cols,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """W[row, k : k + BK] as its even and its odd columns, fp32, [len(row), BK / 2] each, 0 outside
    the weight.

    Two halves, not one interleaved tile: a byte's nibbles stay in the thread that loaded it, and a
    product over K is one dot with each half. k is even. ALIGNED also wants BK to divide BLOCKSIZE,
    so that a tile's row has one scale.
    """
    row = row.to(tl.int64)
    pair = tl.arange(0, BK // 2)
    if ALIGNED:
        inside = row < n_rows
        byte_ptr = packed_ptr + (row * (n_cols // 2))[:, None] + (k // 2 + pair)[None, :]
        byte = tl.load(byte_ptr, mask=inside[:, None], other=0).to(tl.int32)
        scale = load_scale(scales, row * (n_cols // BLOCKSIZE) + k // BLOCKSIZE, inside, NESTED)[
            :, None
        ]
        even = tl.load(code_ptr + (byte >> 4)) * scale
        odd = tl.load(code_ptr + (byte & 15)) * scale
    else:
        column = (k + 2 * pair)[None, :]
        i = row[:, None] * n_cols + column
        inside = row[:, None] < n_rows
        even = load_elements(
            packed_ptr, code_ptr, scales, i, inside & (column < n_cols), BLOCKSIZE, NESTED
        )
        odd = load_elements(
            packed_ptr, code_ptr, scales, i + 1, inside & (column + 1 < n_cols), BLOCKSIZE, NESTED
        )
    return even, odd


# ---------------------------------------------------------------- decode: 32-bit words, in 16 bits

# One word $4 of 8 weights -> $0..$3, a word each for its bytes: two 16-bit codes, the high nibble's
# in the low half. $5..$8 hold the low bytes of the 16 codes, $9..$12 the high ones, four to a
# register. prmt picks bytes out of eight by the low three bits of a nibble (s), once in codes 0..7
# (a) and once in 8..15 (b); the nibble's top bit then picks a or b (m: byte j of a is number j,
# byte j of b number 4 + j). A half of the word, four nibbles, at a time. The last two prmts of a
# half put each code's bytes together, and its nibbles in order. 21 instructions, 2.6 a weight.
DECODE = tl.constexpr("""
{
.reg .b32 s, m, a, b, lo, hi;
and.b32 s, $4, 0x77777777;
shr.u32 m, $4, 1;
lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;
prmt.b32 a, $5, $6, s;
prmt.b32 b, $7, $8, s;
prmt.b32 lo, a, b, m;
prmt.b32 a, $9, $10, s;
prmt.b32 b, $11, $12, s;
prmt.b32 hi, a, b, m;
prmt.b32 $0, lo, hi, 0x4051;
prmt.b32 $1, lo, hi, 0x6273;
shr.u32 s, s, 16;
shr.u32 m, m, 16;
prmt.b32 a, $5, $6, s;
prmt.b32 b, $7, $8, s;
prmt.b32 lo, a, b, m;
prmt.b32 a, $9, $10, s;
prmt.b32 b, $11, $12, s;
prmt.b32 hi, a, b, m;
prmt.b32 $2, lo, hi, 0x4051;
prmt.b32 $3, lo, hi, 0x6273;
}
""")


@triton.jit
def code_gain(code_ptr, T: tl.constexpr):
    """The factor on the code table before its rounding to T; sums are divided by it. [1, 1]

    A rounded code errs alike in every weight that has it, which no sum averages out, so the factor
    is one with which NF4's 16 codes happen to round well. Errors relative to the weights of a
    normal distribution, in blocks of 64:

                                           bf16: this, each weight rounded     fp16: this, each weight rounded
        rms                                      1.3e-3, 1.7e-3                      1.4e-4, 2.1e-4
        largest of a weight                      2.7e-3, 3.9e-3                      3.0e-4, 4.9e-4
        mean                                      -8e-6, ~0                           -6e-7, ~0
        common factor, sum(e w) / sum(w^2)       -7.2e-4, ~0                          8.0e-5, ~0

    FP4's codes are multiples of 1/192, all exact after a factor of 1.5. Other tables take that
    factor, too, and err by at most half a unit in the last place of T. NF4 is told by its second
    code, -0.6962; FP4's is 0.0052.
    """
    second = tl.load(code_ptr + tl.full([1, 1], 1, tl.int32))
    nf4 = 1.297119140625 if T.is_bf16() else 1.761474609375
    return tl.where((second < -0.69) & (second > -0.70), nf4, 1.5)


@triton.jit
def _code_bits(code_ptr, index, gain, T: tl.constexpr):
    """The 16 bits of code[index] * gain in T, as an int32."""
    return (tl.load(code_ptr + index) * gain).to(T).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _code_bytes(code_ptr, gain, FIRST: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr):
    """The low (SHIFT 0) or the high bytes (8) of codes FIRST .. FIRST + 3 in one word. [1, 1]"""
    word = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(4):
        bits = _code_bits(code_ptr, tl.full([1, 1], FIRST + i, tl.int32), gain, T)
        word |= ((bits >> SHIFT) & 255) << (8 * i)
    return word


@triton.jit
def code_tables(code_ptr, gain, T: tl.constexpr):
    """The eight words of DECODE's tables, $5 to $12. [1, 1] each

    Tensors made of loads, not scalars: Triton hoists a change of layout over broadcasts and loads,
    not over splats, so the words come in the tensor core's layout and their decoded codes stay in
    place. Constants it would reload at every use.
    """
    l0, l1 = _code_bytes(code_ptr, gain, 0, 0, T), _code_bytes(code_ptr, gain, 4, 0, T)
    l2, l3 = _code_bytes(code_ptr, gain, 8, 0, T), _code_bytes(code_ptr, gain, 12, 0, T)
    h0, h1 = _code_bytes(code_ptr, gain, 0, 8, T), _code_bytes(code_ptr, gain, 4, 8, T)
    h2, h3 = _code_bytes(code_ptr, gain, 8, 8, T), _code_bytes(code_ptr, gain, 12, 8, T)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def _decode_byte(word, code_ptr, gain, SHIFT: tl.constexpr, T: tl.constexpr):
    """What DECODE gives of the byte at SHIFT."""
    first = _code_bits(code_ptr, (word >> (SHIFT + 4)) & 15, gain, T)
    second = _code_bits(code_ptr, (word >> SHIFT) & 15, gain, T)
    return first | second << 16


@triton.jit
def decode_words(word, tables, code_ptr, gain, T: tl.constexpr, ASM: tl.constexpr):
    """Words of 8 weights -> four tensors of their shape, one for each byte, of pairs of codes *
    gain in T.

    Without ASM the same, slowly and through memory: for the interpreter.
    """
    if ASM:
        l0, l1, l2, l3, h0, h1, h2, h3 = tables
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            DECODE,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [word, l0, l1, l2, l3, h0, h1, h2, h3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        p0, p1 = _decode_byte(word, code_ptr, gain, 0, T), _decode_byte(word, code_ptr, gain, 8, T)
        p2, p3 = (
            _decode_byte(word, code_ptr, gain, 16, T),
            _decode_byte(word, code_ptr, gain, 24, T),
        )
    return p0, p1, p2, p3


@triton.jit
def decode_pairs(pair, T: tl.constexpr):
    """[R, C] words of two values of T, the first in the low half -> [R, 2 C] values."""
    first = (pair & 0xFFFF).to(tl.int16).to(T, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(T, bitcast=True)
    return tl.reshape(tl.join(first, second), [pair.shape[0], 2 * pair.shape[1]])


# ---------------------------------------------------------------- dequantize


@triton.jit
def _dequantize_kernel(
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
    """out[s, e] = W[start + s * stride + e] of the flattened weight, for each segment s and e <
    length.

    Whole rows are one segment; a panel of columns is one segment a row. Here ALIGNED means that
    every segment starts and ends at the edge of a block. Grid: `tiles` tiles for each segment; a
    program owns BLOCK elements of out.
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
        pair = (
            block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
        )  # [B, BLOCKSIZE / 2]
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
    """-> packed uint8 [(numel + 1) // 2, 1], absmax fp32 [ceil(numel / blocksize)]."""
    numel = weight.numel()
    blocks = cdiv(numel, blocksize)
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if numel:
        each = max(1, QUANTIZE_TILE // blocksize)
        constants = dict(BLOCKSIZE=blocksize, BLOCKS=each, num_warps=4, enable_fp_fusion=False)
        _quantize_kernel[(cdiv(blocks, each),)](
            weight, thresholds, order, packed, absmax, numel, **constants
        )
    return packed, absmax


def quantize_scales(
    absmax: torch.Tensor, offset: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes uint8 like absmax, nested_absmax fp32 [ceil(blocks / 256)]."""
    blocks = absmax.numel()
    groups = cdiv(blocks, NESTED_BLOCK)
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    if blocks:
        constants = dict(BLOCK=NESTED_BLOCK, num_warps=2, enable_fp_fusion=False)
        _quantize_scales_kernel[(groups,)](
            absmax, offset, thresholds, codes, nested_absmax, blocks, **constants
        )
    return codes, nested_absmax


def dequantize(
    state: list[torch.Tensor], shape: tuple[int, ...], blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight in `dtype`, bit for bit the definition, of any shape."""
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
    """out[s, e] = W[start + s * stride + e] of the flattened weight; out is [segments, length] in memory."""
    if segments * length == 0:
        return out
    aligned = start % blocksize == 0 and length % blocksize == 0 and stride % blocksize == 0
    tile = max(blocksize, DEQUANTIZE_TILE[aligned and length >= DEQUANTIZE_TILE[True]])
    tiles = cdiv(length, tile)
    constants = dict(BLOCK=tile, BLOCKSIZE=blocksize, NESTED=len(state) == 6, ALIGNED=aligned)
    _dequantize_kernel[(tiles * segments,)](
        *pointers(state),
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


def pointers(state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The six pointers a kernel takes; a kernel of a weight that is not nested never reads the last three."""
    packed, absmax, code, *nested = state
    return packed, absmax, code, *(nested or (absmax, absmax, absmax))
