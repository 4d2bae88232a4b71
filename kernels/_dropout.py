"""Dropout masks from the counter-based generator Philox, shared by the kernels of several ops.

`reference.philox` and `reference.dropout_mask` define both.
"""

import triton
import triton.language as tl


@triton.jit
def philox(seed, row, counter):
    """Return the four 32-bit words of Philox4x32 with 7 rounds.

    The key is `seed` (int64). The counter is (counter, low word of row, high word of row, 0), with
    row an int64. `row` and `counter` broadcast against each other.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = (counter + row * 0).to(tl.uint32)
    c1 = (row + counter * 0).to(tl.uint32)
    c2 = ((row >> 32) + counter * 0).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keeps(seed_ptr, row, first, threshold, COLS: tl.constexpr):
    """Return whether dropout keeps each element of x[row, first : first + COLS].

    The result is [len(row), COLS]. `first` and COLS are multiples of 8, and `row` is int64. Eight
    columns share a counter and take 16 bits of its words each: words in order, low half first. An
    element is kept if its bits are not below the threshold.
    """
    counter = first // 8 + tl.arange(0, COLS // 8)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), row[:, None], counter[None, :])
    # Joined crosswise, so that the reshape below puts the words in order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [rows, COLS / 8, 2, 2]
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [row.shape[0], COLS])
    return bits.to(tl.int32) >= threshold


def dropout_threshold(p: float) -> int:
    """Return p in units of 2^-16, at most 65535."""
    return min(round(p * 65536), 65535)
