"""Main loops of products with NF4 weights: device functions that nf4_linear.py and lora.py share.

They accumulate in fp32 and multiply on tensor cores where x has 16 bits. `weight` is a tuple of
(packed_ptr, code_ptr, scales), and `scales` is what nf4_decode.load_scale takes.
"""

import triton
import triton.language as tl

from .nf4_decode import code_gain, code_tables, decode_pairs, decode_words, load_scale, load_tile


@triton.jit
def _load_columns(x_ptr, row, k, rows, cols, BK: tl.constexpr, PAIRED: tl.constexpr):
    """Return the even and the odd columns of x[row, k : k + BK], [BM, BK / 2] each, 0 outside x.

    `k` is even. PAIRED means that x has 16 bits, is 4-byte aligned and has an even number of
    columns, so that one 32-bit load reads two neighbors.
    """
    pair = tl.arange(0, BK // 2)
    start = row.to(tl.int64)[:, None] * cols
    column = (k + 2 * pair)[None, :]
    inside = (row < rows)[:, None] & (column < cols)
    if PAIRED:
        word_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + (start + column) // 2
        word = tl.load(word_ptr, mask=inside, other=0)
        even = (word & 0xFFFF).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        odd = (word >> 16).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
    else:
        even = tl.load(x_ptr + start + column, mask=inside, other=0.0)
        odd = tl.load(x_ptr + start + column + 1, mask=inside & (column + 1 < cols), other=0.0)
    return even, odd


@triton.jit
def sum_tiles(
    x_ptr,
    weight,
    row,
    out,
    begin,
    end,
    m,
    n,
    k,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Return the sum of W[out] x[row]^T over tiles `begin` to `end` of BK columns, fp32 [BN, BM].

    It takes any shape: BK need not divide k, and blocks may straddle rows.
    """
    packed_ptr, code_ptr, scales = weight
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    for step in range(begin, end):
        w_even, w_odd = load_tile(
            packed_ptr, code_ptr, scales, out, step * BK, n, k, BK, BLOCKSIZE, NESTED, ALIGNED
        )
        x_even, x_odd = _load_columns(x_ptr, row, step * BK, m, k, BK, PAIRED)
        acc = tl.dot(w_even.to(x_even.dtype), tl.trans(x_even), acc, input_precision="ieee")
        acc = tl.dot(w_odd.to(x_odd.dtype), tl.trans(x_odd), acc, input_precision="ieee")
    return acc


@triton.jit
def sum_words(
    x_ptr,
    weight,
    row,
    out,
    begin,
    end,
    n,
    k,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the sum of `sum_tiles`, from rounded codes whose scales multiply the sums in fp32.

    x has 16 bits, and k is a multiple of BK and of BLOCKSIZE. W is read as 32-bit words of 8
    weights. A scale multiplies the fp32 sums of a group of 64 columns, so that a weight costs its
    lookup and its share of an MMA, and no arithmetic of its own. The four dots of a group take its
    columns 8 c + 2 j + {0, 1}, c = 0..7, for j = 0..3: the weights of byte j of each word, where
    they are, without a shuffle.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    packed_ptr, code_ptr, scales = weight
    gain = code_gain(code_ptr, T)
    tables = code_tables(code_ptr, gain, T)
    # Rows outside are clamped, not masked: what they compute is never stored.
    w_row = tl.minimum(out, n - 1).to(tl.int64)
    word_ptr = (
        packed_ptr.to(tl.pointer_type(tl.int32))
        + (w_row * (k // 8))[:, None]
        + tl.arange(0, 8)[None, :]
    )
    column = tl.arange(0, 16)
    x_ptr += (row * k)[None, :] + (column // 2 * 8 + column % 2)[:, None]  # [16, BM]
    w_block = w_row * (k // BLOCKSIZE)
    inside = out < n
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    for step in range(begin, end):
        for group in tl.static_range(BK // 64):
            first = step * BK + group * 64
            word = tl.load(word_ptr + first // 8)  # [BN, 8]
            p0, p1, p2, p3 = decode_words(word, tables, code_ptr, gain, T, ASM)
            part = tl.dot(decode_pairs(p0, T), tl.load(x_ptr + first))
            part = tl.dot(decode_pairs(p1, T), tl.load(x_ptr + first + 2), part)
            part = tl.dot(decode_pairs(p2, T), tl.load(x_ptr + first + 4), part)
            part = tl.dot(decode_pairs(p3, T), tl.load(x_ptr + first + 6), part)
            acc += part * load_scale(scales, w_block + first // BLOCKSIZE, inside, NESTED)[:, None]
    return acc / gain


@triton.jit
def sum_tiles_backward(
    dy_ptr,
    weight,
    gain_ptr,
    row,
    first,
    begin,
    end,
    m,
    n,
    k,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the sum of dy[row] (gain W)[:, first : first + BK] over tiles of BN rows of W.

    The tiles are `begin` to `end`, and the result is fp32 [BM, BK]. The even and the odd columns of
    dx have an accumulator each. The gain of a row of W multiplies it before it is rounded; without
    a gain, `gain_ptr` is None.
    """
    packed_ptr, code_ptr, scales = weight
    even = tl.zeros([row.shape[0], BK // 2], tl.float32)
    odd = tl.zeros([row.shape[0], BK // 2], tl.float32)
    for step in range(begin, end):
        out = step * BN + tl.arange(0, BN)
        w_even, w_odd = load_tile(
            packed_ptr, code_ptr, scales, out, first, n, k, BK, BLOCKSIZE, NESTED, ALIGNED
        )
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
            w_even *= gain
            w_odd *= gain
        inside = (row < m)[:, None] & (out < n)[None, :]
        dy = tl.load(
            dy_ptr + row.to(tl.int64)[:, None] * n + out[None, :], mask=inside, other=0.0
        )  # [BM, BN]
        even = tl.dot(dy, w_even.to(dy.dtype), even, input_precision="ieee")
        odd = tl.dot(dy, w_odd.to(dy.dtype), odd, input_precision="ieee")
    return tl.interleave(even, odd)
