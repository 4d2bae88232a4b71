"""What the kernels of several ops share: Philox, and dropout's mask made of it."""

import triton
import triton.language as tl


@triton.jit
def philox(seed, row, counter):
    """Philox4x32 of 7 rounds: key = seed (int64), counter = (counter, row's low word, row's high
    word, 0): four words.

    `row` is int64; row and counter broadcast against each other.
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
    """Whether dropout keeps x[row, first : first + COLS], [len(row), COLS]; 8 divides first and
    COLS, row is int64.

    Eight columns share a counter: 16 bits each, in order of words and, in a word, low half first.
    An element is kept if its bits are not below the threshold.
    """
    counter = first // 8 + tl.arange(0, COLS // 8)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), row[:, None], counter[None, :])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., 2, 2]: in order
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [row.shape[0], COLS])
    return bits.to(tl.int32) >= threshold


def dropout_threshold(p: float) -> int:
    """P in units of 2^-16."""
    return min(round(p * 65536), 65535)
