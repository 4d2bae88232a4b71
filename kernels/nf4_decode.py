"""Decoding of 4-bit weights on a GPU: device functions that all kernels of such weights share.

nf4.py describes the weight. `load_*` functions read memory, `code_*` functions prepare the code
table, and `decode_*` functions only compute. ALIGNED means that rows are made of whole blocks, as
in every real model: a row of a tile has one scale, and nothing is masked along K. Without it
nothing is assumed, and every element finds its own scale.
"""

import triton
import triton.language as tl

# ---------------------------------------------------------------- element by element, in fp32


@triton.jit
def load_scale(scales, block, mask, NESTED: tl.constexpr):
    """Return scale(block) in fp32 and in the shape of `block`, 0 where masked.

    `scales` is (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr). The nested scale
    equals the definition's bit for bit where the launcher sets enable_fp_fusion=False. An FMA would
    join its two roundings.
    """
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr = scales
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        # The shift divides by nf4.NESTED_BLOCK.
        nested = tl.load(nested_absmax_ptr + (block >> 8), mask=mask, other=0.0)
        return tl.where(mask, tl.load(nested_code_ptr + code) * nested + tl.load(offset_ptr), 0.0)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def load_elements(
    packed_ptr, code_ptr, scales, i, mask, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr
):
    """Return elements i (int64) of the flattened weight in fp32, 0 where masked."""
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
    """Return the even and the odd columns of W[row, k : k + BK], fp32 [len(row), BK / 2] each.

    Elements outside the weight are 0, and `k` is even. There are two halves, not one interleaved
    tile: the nibbles of a byte stay in the thread that loaded it, and a product over K is one dot
    with each half. ALIGNED also requires that BK divides BLOCKSIZE, so that a row of the tile has
    one scale.
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


# ---------------------------------------------------------------- 32-bit words, in 16 bits

# This decodes one word $4 of 8 weights to $0..$3. Each of these is a word for one byte of $4: two
# 16-bit codes, with the high nibble's in the low half. $5..$8 hold the low bytes of the 16 codes
# and $9..$12 the high ones, four to a register. prmt picks bytes out of eight by the low three bits
# of a nibble (s), once in codes 0..7 (a) and once in 8..15 (b). The top bit of the nibble then
# picks a or b (m: byte j of a is number j, byte j of b number 4 + j). A half of the word, four
# nibbles, is done at a time. The last two prmts of a half put the bytes of each code together, and
# its nibbles in order. These are 21 instructions, 2.6 for each weight.
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
    """Return the factor on the code table before its rounding to T, [1, 1]; sums are divided by it.

    A rounded code has the same error in every weight that uses it, and no sum averages it out. So
    the factor is one with which NF4's 16 codes happen to round well. These are the errors relative
    to normally distributed weights in blocks of 64, with this factor and with each weight rounded:

                                              bf16: factor, each     fp16: factor, each
        rms                                      1.3e-3, 1.7e-3         1.4e-4, 2.1e-4
        largest of a weight                      2.7e-3, 3.9e-3         3.0e-4, 4.9e-4
        mean                                      -8e-6, ~0              -6e-7, ~0
        common factor, sum(e w) / sum(w^2)       -7.2e-4, ~0             8.0e-5, ~0

    FP4's codes are multiples of 1/192, and a factor of 1.5 makes all of them exact. Other tables
    take that factor too, and their error is at most half a unit in the last place of T. NF4 is
    recognized by its second code, -0.6962; FP4's is 0.0052.
    """
    second = tl.load(code_ptr + tl.full([1, 1], 1, tl.int32))
    nf4 = 1.297119140625 if T.is_bf16() else 1.761474609375
    return tl.where((second < -0.69) & (second > -0.70), nf4, 1.5)


@triton.jit
def _code_bits(code_ptr, index, gain, T: tl.constexpr):
    """Return the 16 bits of code[index] * gain in T, as an int32."""
    return (tl.load(code_ptr + index) * gain).to(T).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _code_bytes(code_ptr, gain, FIRST: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr):
    """Return one byte of each of codes FIRST to FIRST + 3 as one word, [1, 1].

    SHIFT 0 takes the low bytes, SHIFT 8 the high ones.
    """
    word = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(4):
        bits = _code_bits(code_ptr, tl.full([1, 1], FIRST + i, tl.int32), gain, T)
        word |= ((bits >> SHIFT) & 255) << (8 * i)
    return word


@triton.jit
def code_tables(code_ptr, gain, T: tl.constexpr):
    """Return the eight words of DECODE's tables, $5 to $12, [1, 1] each.

    They are tensors made of loads, not scalars. Triton hoists a change of layout over broadcasts
    and loads, but not over splats. So the words come in the tensor core's layout, and their decoded
    codes stay in place. Triton would reload constants at every use.
    """
    l0, l1 = _code_bytes(code_ptr, gain, 0, 0, T), _code_bytes(code_ptr, gain, 4, 0, T)
    l2, l3 = _code_bytes(code_ptr, gain, 8, 0, T), _code_bytes(code_ptr, gain, 12, 0, T)
    h0, h1 = _code_bytes(code_ptr, gain, 0, 8, T), _code_bytes(code_ptr, gain, 4, 8, T)
    h2, h3 = _code_bytes(code_ptr, gain, 8, 8, T), _code_bytes(code_ptr, gain, 12, 8, T)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def _decode_byte(word, code_ptr, gain, SHIFT: tl.constexpr, T: tl.constexpr):
    """Return the word that DECODE gives for the byte at SHIFT."""
    first = _code_bits(code_ptr, (word >> (SHIFT + 4)) & 15, gain, T)
    second = _code_bits(code_ptr, (word >> SHIFT) & 15, gain, T)
    return first | second << 16


@triton.jit
def decode_words(word, tables, code_ptr, gain, T: tl.constexpr, ASM: tl.constexpr):
    """Decode words of 8 weights to four tensors of their shape, one for each byte of the words.

    Each element holds two values code * gain in T. Without ASM the same is computed slowly and
    through memory, for the interpreter.
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
    """Return the [R, 2 C] values of [R, C] words of two values in T, the first in the low half."""
    first = (pair & 0xFFFF).to(tl.int16).to(T, bitcast=True)
    second = (pair >> 16).to(tl.int16).to(T, bitcast=True)
    return tl.reshape(tl.join(first, second), [pair.shape[0], 2 * pair.shape[1]])
