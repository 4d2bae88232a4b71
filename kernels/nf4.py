"""4-bit weights on a GPU: quantise, dequantise, y = x W^T and dx = dy W without a 16-bit copy of W.

A weight is `state`, a list of plain tensors, plus its shape (N, K) and blocksize:
    [packed, absmax, code]  or, nested,  [packed, absmax, code, nested_absmax, nested_code, offset]
Element i of the flattened row-major weight is nibble i of `packed` (high nibble first) and belongs
to
block i // blocksize (blocks may straddle rows). Its value is code[nibble] * scale(block), one fp32
product, with scale(b) = absmax[b], or nested: nested_code[absmax[b]] * nested_absmax[b // 256] +
offset.

Two layouts of the loads, chosen by the constexpr ALIGNED: rows made of whole blocks (every real
model),
where a tile has one scale a row and no mask along K; and any shape at all, element by element.
Nothing here checks its arguments: pyfast/nf4.py does.
"""

import torch
import triton
import triton.language as tl

NESTED_BLOCK = 256  # scales in a block of the second quantisation
PANEL_BYTES = 32 << 20  # of 16-bit weights that exist at a time on the "panel" path


# ---------------------------------------------------------------- quantise


@triton.jit
def _quantize_kernel(weight_ptr, thresholds_ptr, order_ptr, packed_ptr, absmax_ptr, numel,
                     BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """code(v) = order[#{t : x > t}], x = v * (1 / absmax); a short last block divides: x = v /
    absmax.

    Grid: tiles of BLOCKS blocks. A program owns BLOCKS x BLOCKSIZE elements, their scales and their
    bytes.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)  # [BLOCKS]
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    inside = element < numel
    v = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    # The largest bit pattern, not the largest float: a NaN or an infinity stays one.
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)  # [BLOCKS]
    floor = tl.where(absmax > 1e-38, absmax, tl.full([BLOCKS], 1e-38, tl.float32))
    x = v * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floor)[:, None]
    if (first + BLOCKS) * BLOCKSIZE > numel:
        short = (block + 1) * BLOCKSIZE > numel
        x = tl.where(short[:, None], tl.div_rn(v, tl.broadcast_to(floor[:, None], [BLOCKS,
                                                                                   BLOCKSIZE])), x)
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
def _quantize_scales_kernel(absmax_ptr, offset_ptr, thresholds_ptr, codes_ptr, nested_absmax_ptr,
                            blocks,
                            BLOCK: tl.constexpr):
    """d = absmax - offset; code = #{t in thresholds[255] : d * (1 / max|d|) > t}, by bisection.

    Grid: blocks of BLOCK scales; a program owns one.
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


# ---------------------------------------------------------------- decode


@triton.jit
def _scale(block, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
           NESTED: tl.constexpr):
    """scale(block), fp32, in the shape of `block`; 0 where masked. No FMA may join the two
    roundings."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + (block >> 8), mask=mask, other=0.0)
        return tl.where(mask, tl.load(nested_code_ptr + code) * nested + tl.load(offset_ptr), 0.0)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def _element(i, mask, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
             offset_ptr,
             BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr):
    """Elements i of the flattened weight, fp32, 0 where masked: the general path, nothing
    assumed."""
    byte = tl.load(packed_ptr + (i >> 1), mask=mask, other=0).to(tl.int32)
    nibble = (byte >> (4 - 4 * (i & 1)).to(tl.int32)) & 15
    return tl.load(code_ptr + nibble) * _scale(i // BLOCKSIZE, mask, absmax_ptr,
                                               nested_absmax_ptr, nested_code_ptr,
                                               offset_ptr, NESTED)


@triton.jit
def _tile(row, k, n_rows, n_cols, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr,
          nested_code_ptr, offset_ptr,
          BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr):
    """W[row, k : k + BK] as its even and its odd columns, fp32 [BN, BK / 2] each, 0 outside the
    weight.

    Halves rather than one interleaved tile: a byte's two nibbles stay where they are, in two dot
    products.
    ALIGNED: n_cols is a multiple of BLOCKSIZE and BLOCKSIZE of BK, so one scale a row and no mask
    along k.
    """
    row = row.to(tl.int64)
    pair = tl.arange(0, BK // 2)
    if ALIGNED:
        inside = row < n_rows
        byte = tl.load(packed_ptr + (row * (n_cols // 2))[:, None] + (k // 2 + pair)[None, :],
                       mask=inside[:, None], other=0).to(tl.int32)
        scale = _scale(row * (n_cols // BLOCKSIZE) + k // BLOCKSIZE, inside, absmax_ptr,
                       nested_absmax_ptr,
                       nested_code_ptr, offset_ptr, NESTED)[:, None]
        even = tl.load(code_ptr + (byte >> 4)) * scale
        odd = tl.load(code_ptr + (byte & 15)) * scale
    else:
        column = (k + 2 * pair)[None, :]
        i = row[:, None] * n_cols + column
        inside = row[:, None] < n_rows
        even = _element(i, inside & (column < n_cols), packed_ptr, absmax_ptr, code_ptr,
                        nested_absmax_ptr,
                        nested_code_ptr, offset_ptr, BLOCKSIZE, NESTED)
        odd = _element(i + 1, inside & (column + 1 < n_cols), packed_ptr, absmax_ptr, code_ptr,
                       nested_absmax_ptr,
                       nested_code_ptr, offset_ptr, BLOCKSIZE, NESTED)
    return even, odd


# A 32-bit word holds 8 weights, the high nibble of each byte first. -> 4 words of two 16-bit codes
# each: a byte-wise
# lookup (prmt) of the low and of the high bytes in tables of 16, in two halves of 8 and a selection
# by a nibble's top
# bit. $5..$8: the low bytes of the 16 codes, $9..$12: the high ones. 21 instructions, 2.6 a weight.
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
def _gain(code_ptr, T: tl.constexpr):
    """A factor on the code table that makes its rounding to T gain accuracy; undone on the sums.
    [1, 1]

    For NF4: relative error 1.3e-3 (bf16) and 1.4e-4 (fp16) rms with a mean below 1e-5, where
    weights rounded one by
    one have 1.7e-3 and 2.1e-4. FP4's codes, multiples of 1 / 192, become exact. Any other value is
    as correct.
    """
    second = tl.load(code_ptr + tl.full([1, 1], 1, tl.int32))
    nf4 = 1.297119140625 if T == tl.bfloat16 else 1.761474609375
    return tl.where((second < -0.69) & (second > -0.70), nf4, 1.5)


@triton.jit
def _code_bits(code_ptr, index, gain, T: tl.constexpr):
    return (tl.load(code_ptr + index) * gain).to(T).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _pair(word, code_ptr, gain, SHIFT: tl.constexpr, T: tl.constexpr):
    """What DECODE gives of the byte at SHIFT, without inline assembly: for the interpreter."""
    first = _code_bits(code_ptr, (word >> (SHIFT + 4)) & 15, gain, T)
    second = _code_bits(code_ptr, (word >> SHIFT) & 15, gain, T)
    return first | second << 16


@triton.jit
def _bytes(code_ptr, gain, FIRST: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr):
    """The low (SHIFT 0) or high (8) bytes of four of the codes. [1, 1]

    Tables are [1, 1] tensors made of loads, not scalars: across a broadcast and loads (not across a
    splat) Triton
    moves the change to the tensor core's layout in front of the decode, and constants would be
    reloaded at each use.
    """
    word = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(4):
        bits = _code_bits(code_ptr, tl.full([1, 1], FIRST + i, tl.int32), gain, T)
        word |= ((bits >> SHIFT) & 255) << (8 * i)
    return word


@triton.jit
def _unpack(pair, T: tl.constexpr):
    """[R, C] words of two values of type T, the first in the low half -> [R, 2 C]."""
    first = (pair & 0xFFFF).to(tl.int16).to(T, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(T, bitcast=True)
    return tl.reshape(tl.join(first, second), [pair.shape[0], 2 * pair.shape[1]])


@triton.jit
def _dequantize_kernel(packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
                       offset_ptr, out_ptr,
                       start, length, stride, tiles,
                       BLOCK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
                       ALIGNED: tl.constexpr):
    """out[s, e] = weight[start + s * stride + e], e < length: whole rows are one segment, a panel
    of columns many.

    Grid: tiles of BLOCK elements, `tiles` of them a segment. ALIGNED: segments start and end on
    block edges.
    """
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // tiles
    begin = (pid % tiles) * BLOCK
    source = start + segment * stride + begin
    out_ptr += segment * length + begin
    if ALIGNED:
        block = tl.arange(0, BLOCK // BLOCKSIZE)  # [B]
        inside = begin + block * BLOCKSIZE < length
        scale = _scale(source // BLOCKSIZE + block, inside, absmax_ptr, nested_absmax_ptr,
                       nested_code_ptr, offset_ptr,
                       NESTED)[:, None]
        # [B, BLOCKSIZE / 2]
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
        value = _element(source + element, inside, packed_ptr, absmax_ptr, code_ptr,
                         nested_absmax_ptr,
                         nested_code_ptr, offset_ptr, BLOCKSIZE, NESTED)
        tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- multiply


@triton.jit
def _columns(x_ptr, row, k, rows, cols, BK: tl.constexpr, PAIRED: tl.constexpr):
    """x[row, k : k + BK] as its even and its odd columns, [BM, BK / 2] each, 0 outside.

    PAIRED: x is 16-bit, 4-byte aligned, with an even number of columns: a pair is one 32-bit load.
    """
    pair = tl.arange(0, BK // 2)
    start = row.to(tl.int64)[:, None] * cols
    column = (k + 2 * pair)[None, :]
    inside = (row < rows)[:, None] & (column < cols)
    if PAIRED:
        word = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + (start + column) // 2, mask=inside,
                       other=0)
        even = (word & 0xFFFF).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        odd = (word >> 16).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
    else:
        even = tl.load(x_ptr + start + column, mask=inside, other=0.0)
        odd = tl.load(x_ptr + start + column + 1, mask=inside & (column + 1 < cols), other=0.0)
    return even, odd


@triton.jit
def _linear_kernel(x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
                   offset_ptr, bias_ptr,
                   y_ptr, m, n, k, steps,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr,
                   NESTED: tl.constexpr,
                   ALIGNED: tl.constexpr, PAIRED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y[M, N] = x[M, K] W^T + bias, computed as y^T = W x^T: the decoded W is the operand that
    stays in registers.

    Grid: (M tiles, fastest, x N tiles, splits of K). A program owns y[BM, BN] over `steps` tiles of
    K; with more than
    one split y is fp32 [splits, M, N], summed in order by _sum_kernel.
    """
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    out = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BK))):
        w_even, w_odd = _tile(out, step * BK, n, k, packed_ptr, absmax_ptr, code_ptr,
                              nested_absmax_ptr,
                              nested_code_ptr, offset_ptr, BK, BLOCKSIZE, NESTED, ALIGNED)
        x_even, x_odd = _columns(x_ptr, row, step * BK, m, k, BK, PAIRED)
        acc = tl.dot(w_even.to(x_even.dtype), tl.trans(x_even), acc, input_precision="ieee")
        acc = tl.dot(w_odd.to(x_odd.dtype), tl.trans(x_odd), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * m * n
    offset = row.to(tl.int64)[None, :] * n + out[:, None]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=(row < m)[None,
                                                                            :] & (out < n)[:, None])


@triton.jit
def _linear_words_kernel(x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr,
                         nested_code_ptr, offset_ptr,
                         bias_ptr, y_ptr, m, n, k, steps,
                         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                         BLOCKSIZE: tl.constexpr,
                         NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr):
    """y[M, N] = x[M, K] W^T + bias for 16-bit x, as y^T = sum over blocks of scale * (codes x^T):
    32-bit words of W.

    The scale multiplies the sums of a block in fp32, so a weight costs its lookup and its share of
    an MMA. The four
    products of 64 columns take the columns 8 c + 2 j + {0, 1}, j = 0..3: what one word decodes to,
    without a shuffle.
    k is a multiple of BK and of BLOCKSIZE, both of 64. Grid, splits and y: as _linear_kernel.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    out = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    gain = _gain(code_ptr, T)
    l0, l1 = _bytes(code_ptr, gain, 0, 0, T), _bytes(code_ptr, gain, 4, 0, T)
    l2, l3 = _bytes(code_ptr, gain, 8, 0, T), _bytes(code_ptr, gain, 12, 0, T)
    h0, h1 = _bytes(code_ptr, gain, 0, 8, T), _bytes(code_ptr, gain, 4, 8, T)
    h2, h3 = _bytes(code_ptr, gain, 8, 8, T), _bytes(code_ptr, gain, 12, 8, T)
    # Rows outside are clamped, not masked: they compute what is never stored.
    w_row = tl.minimum(out, n - 1).to(tl.int64)
    x_row = tl.minimum(row, m - 1).to(tl.int64)
    word_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + (w_row * (k // 8))[:,
                                                                             None] + (
        tl.arange(0, 8)[None, :])
    column = tl.arange(0, 16)
    x_ptr += (x_row * k)[None, :] + (column // 2 * 8 + column % 2)[:, None]  # [16, BM]
    w_block = w_row * (k // BLOCKSIZE)
    inside = out < n
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, k // BK)):
        for group in tl.static_range(BK // 64):
            first = step * BK + group * 64
            word = tl.load(word_ptr + first // 8)  # [BN, 8]
            if ASM:
                p0, p1, p2, p3 = tl.inline_asm_elementwise(
                    DECODE, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [word, l0, l1, l2, l3, h0, h1,
                                                                  h2, h3],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)
            else:
                p0 = _pair(word, code_ptr, gain, 0, T)
                p1 = _pair(word, code_ptr, gain, 8, T)
                p2 = _pair(word, code_ptr, gain, 16, T)
                p3 = _pair(word, code_ptr, gain, 24, T)
            part = tl.dot(_unpack(p0, T), tl.load(x_ptr + first))
            part = tl.dot(_unpack(p1, T), tl.load(x_ptr + first + 2), part)
            part = tl.dot(_unpack(p2, T), tl.load(x_ptr + first + 4), part)
            part = tl.dot(_unpack(p3, T), tl.load(x_ptr + first + 6), part)
            scale = _scale(w_block + first // BLOCKSIZE, inside, absmax_ptr, nested_absmax_ptr,
                           nested_code_ptr,
                           offset_ptr, NESTED)
            acc += part * scale[:, None]
    acc = acc / gain
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * m * n
    offset = row.to(tl.int64)[None, :] * n + out[:, None]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=(row < m)[None,
                                                                            :] & (out < n)[:, None])


@triton.jit
def _linear_backward_kernel(dy_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr,
                            nested_code_ptr, offset_ptr,
                            dx_ptr, m, n, k, steps,
                            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                            BLOCKSIZE: tl.constexpr,
                            NESTED: tl.constexpr, ALIGNED: tl.constexpr):
    """dx[M, K] = dy[M, N] W: the tiles of the forward, un-transposed; even and odd columns have an
    accumulator each.

    Grid: (M tiles, fastest, x K tiles, splits of N). A program owns dx[BM, BK] over `steps` tiles
    of N; with more
    than one split dx is fp32 [splits, M, K], summed in order by _sum_kernel.
    """
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    first = tl.program_id(0) // tiles_m * BK
    split = tl.program_id(1)
    even = tl.zeros([BM, BK // 2], tl.float32)
    odd = tl.zeros([BM, BK // 2], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(n, BN))):
        out = step * BN + tl.arange(0, BN)
        w_even, w_odd = _tile(out, first, n, k, packed_ptr, absmax_ptr, code_ptr,
                              nested_absmax_ptr, nested_code_ptr,
                              offset_ptr, BK, BLOCKSIZE, NESTED, ALIGNED)
        dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * n + out[None, :],
                     mask=(row < m)[:, None] & (out < n)[None, :], other=0.0)  # [BM, BN]
        even = tl.dot(dy, w_even.to(dy.dtype), even, input_precision="ieee")
        odd = tl.dot(dy, w_odd.to(dy.dtype), odd, input_precision="ieee")
    dx = tl.interleave(even, odd)  # [BM, BK]
    column = first + tl.arange(0, BK)
    dx_ptr += split.to(tl.int64) * m * k
    offset = row.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=(row < m)[:, None]
             & (column < k)[None, :])


@triton.jit
def _sum_kernel(parts_ptr, bias_ptr, y_ptr, numel, cols, SPLITS: tl.constexpr,
                HAS_BIAS: tl.constexpr,
                BLOCK: tl.constexpr):
    """y[i] = sum over s of parts[s, i], in the order of s, + bias[i % cols]. Grid: tiles of BLOCK
    elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(parts_ptr + i, mask=inside, other=0.0)
        parts_ptr += numel
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i % cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- launchers


def quantize(weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor,
             blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> packed uint8 [(n + 1) // 2, 1], absmax fp32 [ceil(n / blocksize)]."""
    numel = weight.numel()
    blocks = triton.cdiv(numel, blocksize)
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if numel:
        each = max(1, 2048 // blocksize)
        _quantize_kernel[(triton.cdiv(blocks, each),)](
            weight, thresholds, order, packed, absmax, numel, BLOCKSIZE=blocksize, BLOCKS=each,
            num_warps=4, enable_fp_fusion=False)
    return packed, absmax


def quantize_scales(absmax: torch.Tensor, offset: torch.Tensor,
                    thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes uint8 like absmax, nested_absmax fp32 [ceil(blocks / 256)]."""
    blocks = absmax.numel()
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty(triton.cdiv(blocks, NESTED_BLOCK), dtype=torch.float32,
                                device=absmax.device)
    if blocks:
        _quantize_scales_kernel[(nested_absmax.numel(),)](
            absmax, offset, thresholds, codes, nested_absmax, blocks, BLOCK=NESTED_BLOCK,
            num_warps=2, enable_fp_fusion=False)
    return codes, nested_absmax


def _pointers(state: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The six pointers a kernel takes; of a weight that is not nested the last three are never
    read."""
    packed, absmax, code, *nested = state
    return packed, absmax, code, *(nested or (absmax, absmax, absmax))


def _decode(state: list[torch.Tensor], blocksize: int, out: torch.Tensor, start: int,
            segments: int, length: int,
            stride: int) -> torch.Tensor:
    if segments * length == 0:
        return out
    tile = max(blocksize, 2048)
    tiles = triton.cdiv(length, tile)
    aligned = start % blocksize == 0 and length % blocksize == 0
    aligned = aligned and (segments == 1 or stride % blocksize == 0)
    _dequantize_kernel[(tiles * segments,)](
        *_pointers(state), out, start, length, stride, tiles, BLOCK=tile, BLOCKSIZE=blocksize,
        NESTED=len(state) == 6,
        ALIGNED=aligned, num_warps=4, enable_fp_fusion=False)
    return out


def dequantize(state: list[torch.Tensor], shape: tuple[int, int], blocksize: int,
               dtype: torch.dtype,
               row_start: int = 0, row_end: int | None = None,
               out: torch.Tensor | None = None) -> torch.Tensor:
    """W[row_start : row_end] in `dtype`, [rows, K], bit for bit the definition. `out`: contiguous,
    filled."""
    n, k = shape
    rows = (n if row_end is None else row_end) - row_start
    if out is None:
        out = torch.empty(rows, k, dtype=dtype, device=state[0].device)
    return _decode(state, blocksize, out, row_start * k, 1, rows * k, k)


# M up to and including -> path; beyond the last, "panel". NOT ONE of these limits has been measured
# on a GPU: all are
# derived, from the instructions a weight of the fused loops against a dequantise pass plus a dense
# product. One row a
# (capability, operation): that of the newest capability which is not newer than the device's.
CHOICES = {
    ((8, 0), "linear"): ((16, "gemv"), (512, "fused")),
    ((8, 0), "linear_backward"): ((16, "gemv"), (128, "fused")),
    ((9, 0), "linear"): ((16, "gemv"), (384, "fused")),
    ((9, 0), "linear_backward"): ((16, "gemv"), (128, "fused")),
}


def choose(op: str, m: int, n: int, k: int, dtype: torch.dtype,
           capability: tuple[int, int]) -> tuple[str, str]:
    """-> path, reason. `op` is "linear" or "linear_backward", capability that of the device."""
    known = [c for c, name in CHOICES if name == op and c <= tuple(capability)]
    row = CHOICES[max(known, default=(8, 0)), op]
    if dtype == torch.float32:
        # no tensor cores for exact fp32: cuBLAS beyond the bandwidth-bound sizes
        row = ((16, "gemv"),)
    for limit, path in row:
        if m <= limit:
            return path, f"M = {m} <= {limit} (derived, not measured)"
    return "panel", (
        f"M = {m} > {row[-1][0]}: dequantising is cheap beside the product "
        "(derived, not measured)")


def _capability(x: torch.Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def _path(op: str, path: str | None, rows: torch.Tensor, n: int, k: int) -> str:
    return path or choose(op, rows.shape[0], n, k, rows.dtype, _capability(rows))[0]


def tile_config(op: str, path: str, m: int, k: int, dtype: torch.dtype, blocksize: int,
                capability: tuple[int, int]) -> dict:
    """BM, BN, BK, num_warps, num_stages of the "gemv" and "fused" paths (derived from the SASS, not
    measured)."""
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if op == "linear_words":
        # two warps: mma.sync, whose operands are registers at once, and not wgmma and its waits
        if path == "gemv":
            return dict(BM=bm, BN=64, BK=128 if k % 128 == 0 else 64, num_warps=2, num_stages=3)
        # Triton 3.6 compiles 128 x 128 to an empty kernel for sm_100: there, tiles of 64 rows.
        if m > 64 and capability < (10, 0):
            return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
        return dict(BM=bm, BN=128, BK=64, num_warps=4, num_stages=3)
    # One stage: a pipeline would carry the looked-up codes, too, through shared memory.
    if dtype == torch.float32:
        return dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=1)
    return dict(BM=max(bm, 16), BN=64, BK=min(blocksize, 64), num_warps=4 if bm < 64 else 8,
                num_stages=1)


def _splits(path: str, programs: int, steps: int) -> tuple[int, int]:
    """How often to split a loop of `steps` so that an H200's 132 SMs are busy, and the steps of
    each split.

    Enough for six two-warp programs an SM on the "gemv" path, two of the larger ones on the other;
    at least four steps
    each; no more parts than are cheap to add up.
    """
    wanted, most = (792, 16) if path == "gemv" else (264, 4)
    each = triton.cdiv(steps, max(1, min(triton.cdiv(wanted, programs), steps // 4, most)))
    return triton.cdiv(steps, each), each


def _sum(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    _sum_kernel[(triton.cdiv(y.numel(), 1024),)](
        parts, y if bias is None else bias, y, y.numel(), y.shape[1], SPLITS=parts.shape[0],
        HAS_BIAS=bias is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False)
    return y


def linear(x: torch.Tensor, state: list[torch.Tensor], bias: torch.Tensor | None,
           shape: tuple[int, int],
           blocksize: int, path: str | None = None) -> torch.Tensor:
    """y[M, N] = x W^T + bias in x's dtype, accumulated in fp32."""
    (m, k), n = x.shape, shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    path = _path("linear", path, x, n, k)
    if path == "panel":
        return _linear_panel(x, state, bias, shape, blocksize, y)
    # Whole words of one block each: every real model in 16 bits. Anything else is decoded element
    # by element.
    words = (x.element_size() == 2 and blocksize >= 64 and k % blocksize == 0
             and x.data_ptr() % 4 == 0 and state[0].data_ptr() % 4 == 0)
    config = tile_config("linear_words" if words else "linear", path, m, k, x.dtype, blocksize,
                         _capability(x))
    tiles = triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"])
    splits, steps = _splits(path, tiles, triton.cdiv(k, config["BK"]))
    target = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    has_bias = bias is not None and splits == 1
    arguments = (x, *_pointers(state), bias if has_bias else y, target, m, n, k, steps)
    constants = dict(BLOCKSIZE=blocksize, NESTED=len(state) == 6, HAS_BIAS=has_bias,
                     enable_fp_fusion=True, **config)
    if words:
        asm = isinstance(_linear_words_kernel, triton.JITFunction)  # not the interpreter
        _linear_words_kernel[(tiles, splits)](*arguments, ASM=asm, **constants)
    else:
        paired = x.element_size() == 2 and k % 2 == 0 and x.data_ptr() % 4 == 0
        _linear_kernel[(tiles, splits)](*arguments, ALIGNED=k % blocksize == 0, PAIRED=paired,
                                        **constants)
    return y if splits == 1 else _sum(target, bias, y)


def linear_backward(dy: torch.Tensor, state: list[torch.Tensor], shape: tuple[int, int],
                    blocksize: int,
                    path: str | None = None) -> torch.Tensor:
    """dx[M, K] = dy W in dy's dtype, accumulated in fp32."""
    m, (n, k) = dy.shape[0], shape
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    path = _path("linear_backward", path, dy, n, k)
    if path == "panel":
        return _linear_backward_panel(dy, state, shape, blocksize, dx)
    config = tile_config("linear_backward", path, m, k, dy.dtype, blocksize,
                         _capability(dy))
    tiles = triton.cdiv(m, config["BM"]) * triton.cdiv(k, config["BK"])
    splits, steps = _splits(path, tiles, triton.cdiv(n, config["BN"]))
    target = dx if splits == 1 else torch.empty(splits, m, k, dtype=torch.float32, device=dy.device)
    _linear_backward_kernel[(tiles, splits)](
        dy, *_pointers(state), target, m, n, k, steps, BLOCKSIZE=blocksize, NESTED=len(state) == 6,
        ALIGNED=k % blocksize == 0, enable_fp_fusion=True, **config)
    return dx if splits == 1 else _sum(target, None, dx)


def _linear_panel(x, state, bias, shape, blocksize, y) -> torch.Tensor:
    """Rows of W a panel at a time: dequantise, then one dense product into y's columns."""
    n, k = shape
    panel = min(n, max(128, PANEL_BYTES // (k * x.element_size()) // 128 * 128))
    workspace = torch.empty(panel, k, dtype=x.dtype, device=x.device)
    for first in range(0, n, panel):
        last = min(n, first + panel)
        w = dequantize(state, shape, blocksize, x.dtype, first, last, workspace[: last - first])
        if bias is None:
            torch.mm(x, w.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, w.t(), out=y[:, first:last])
    return y


def _linear_backward_panel(dy, state, shape, blocksize, dx) -> torch.Tensor:
    """Columns of W a panel at a time, so that each dx is one product, rounded once."""
    n, k = shape
    step = max(128, blocksize)
    panel = min(k, max(step, PANEL_BYTES // (n * dy.element_size()) // step * step))
    workspace = torch.empty(n * panel, dtype=dy.dtype, device=dy.device)
    for first in range(0, k, panel):
        last = min(k, first + panel)
        w = workspace[: n * (last - first)].view(n, last - first)
        if last - first == k:
            _decode(state, blocksize, w, 0, 1, n * k, k)
        else:
            _decode(state, blocksize, w, first, n, last - first, k)
        torch.mm(dy, w, out=dx[:, first:last])
    return dx
