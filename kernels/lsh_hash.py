"""LSH's random directions, hashes and sort on a GPU.

`reference.lsh_rotations_op`, `reference.lsh_hash_op` and `reference.lsh_sort_op` are the
definitions.

Hashing is a product with the directions, one tile of them after the other, of which only the best
so far is kept for each token. 16-bit tokens multiply the directions as sums of 16-bit parts, on
tensor cores, as exactly as in fp32.

The sort is a radix sort of 8 bits a pass, with one pass for up to 256 buckets. A block of tokens
counts its digits. A cumulative sum over all blocks then says where each block's tokens of a digit
end. Within the block a token counts itself and those of its digit after it. There are no atomics
but those of the count: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._dropout import philox
from ._launch import FUSED, cdiv, next_power_of_2

# Bits of a pass of the sort.
DIGIT_BITS = 8
# Configuration of both kernels of the sort.
SORT_CONFIG = dict(BLOCK=256, num_warps=4)

# ---------------------------------------------------------------- directions


@triton.jit
def _normal_pair(x, y):
    """Return two normal numbers made of two words by Box and Muller, in fp64 as defined."""
    radius = tl.sqrt(-2 * tl.log(((x >> 8).to(tl.float64) + 0.5) / 16777216))
    angle = 6.283185307179586 * (y.to(tl.float64) / 4294967296)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def lsh_rotations_kernel(seed_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Write `count` normal numbers, four of each counter of Philox.

    Grid: tiles of BLOCK counters; a program owns one.
    """
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), (group >> 32) + (1 << 62), group)
    a, b = _normal_pair(w0, w1)
    c, d = _normal_pair(w2, w3)
    i = group * 4
    tl.store(out_ptr + i, a.to(tl.float32), mask=i < count)
    tl.store(out_ptr + i + 1, b.to(tl.float32), mask=i + 1 < count)
    tl.store(out_ptr + i + 2, c.to(tl.float32), mask=i + 2 < count)
    tl.store(out_ptr + i + 3, d.to(tl.float32), mask=i + 3 < count)


def rotations(seed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return normal numbers in fp32, on the device of `seed`, an int64."""
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    if out.numel():
        lsh_rotations_kernel[(cdiv(out.numel(), 1024),)](
            seed, out, out.numel(), BLOCK=256, num_warps=4, **FUSED
        )
    return out


# ---------------------------------------------------------------- hash


@triton.jit
def _add_product(acc, x, r, PARTS: tl.constexpr):
    """Return acc + x r, as exact as in fp32: r is multiplied as a sum of PARTS of x's type."""
    for _ in tl.static_range(PARTS):
        part = r.to(x.dtype)
        acc = tl.dot(x, part, acc, input_precision="ieee")
        r -= part.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["first", "width", "product"])
def lsh_hash_kernel(
    x_ptr,
    r_ptr,
    out_ptr,
    n,
    d,
    rounds,
    heads,
    r_batch,
    r_head,
    r_row,
    r_round,
    r_column,
    first,
    width,
    product,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Hash each token by one factor: find the best of `width` directions and their opposites.

    The directions are the columns from `first`. The index of the best, times `product`, is added to
    the ids of the factors before, if there are any. Grid: heads x tiles of BM tokens.
    """
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    row, k, w = start + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    inside = row < n
    x_ptr += head.to(tl.int64) * n * d + row.to(tl.int64)[:, None] * d
    r_ptr += (head // heads).to(tl.int64) * r_batch + (head % heads).to(tl.int64) * r_head
    r_ptr += tl.cast(first, tl.int64) * r_column
    out_ptr += head.to(tl.int64) * rounds * n + row
    # The first BK columns of x are read once for all directions.
    x_mask = inside[:, None] & (k < d)[None, :]
    x = tl.load(x_ptr + k[None, :], mask=x_mask, other=0.0)  # [BM, BK]
    for t in range(rounds):
        best = tl.full([BM, BN], -1.0, tl.float32)
        index = tl.zeros([BM, BN], tl.int32)
        for start in range(0, width, BN):
            column = start + w
            r_tile = r_ptr + tl.cast(t, tl.int64) * r_round
            r_tile += column.to(tl.int64)[None, :] * r_column
            r_mask = (column < width)[None, :]
            k_mask = (k < d)[:, None] & r_mask
            r = tl.load(r_tile + k.to(tl.int64)[:, None] * r_row, mask=k_mask, other=0.0)
            score = _add_product(tl.zeros([BM, BN], tl.float32), x, r.to(tl.float32), PARTS)
            for k0 in range(BK, d, BK):
                k_next = k0 + k
                y_mask = inside[:, None] & (k_next < d)[None, :]
                y = tl.load(x_ptr + k_next[None, :], mask=y_mask, other=0.0)
                next_mask = (k_next < d)[:, None] & r_mask
                r_next = r_tile + k_next.to(tl.int64)[:, None] * r_row
                r = tl.load(r_next, mask=next_mask, other=0.0)
                score = _add_product(score, y, r.to(tl.float32), PARTS)
            size = tl.where(r_mask, tl.abs(score), -1.0)
            # Opposites come after all directions.
            candidate = tl.where(score < 0, width, 0) + column[None, :]
            better = (size > best) | ((size == best) & (candidate < index))
            best, index = tl.where(better, size, best), tl.where(better, candidate, index)
        is_best = best == tl.max(best, axis=1)[:, None]
        best_index = tl.min(tl.where(is_best, index, 2147483647), axis=1)
        bucket = best_index * product
        resumed = inside & (row >= tl.where(first > 0, 0, n))
        earlier = tl.load(out_ptr + tl.cast(t, tl.int64) * n, mask=resumed, other=0)
        tl.store(out_ptr + tl.cast(t, tl.int64) * n, bucket + earlier, mask=inside)


def hash_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Return PARTS, tiles and launch options of lsh_hash_kernel; derived, not measured."""
    if dtype == torch.float32:
        return dict(PARTS=1, BM=32, BN=32, BK=16, num_warps=4, num_stages=1)
    # A part has 8 bits in bf16 and 11 in fp16.
    parts = 3 if dtype == torch.bfloat16 else 2
    bk = min(128, max(16, next_power_of_2(d)))
    return dict(PARTS=parts, BM=128, BN=32, BK=bk, num_warps=8, num_stages=2)


def hash_tokens(x: torch.Tensor, rotations: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """Return the bucket ids [b, h, r, n] of x[b, h, n, d], which is contiguous.

    `rotations` is [b, h, d, r, sum(factors) / 2] with any strides.
    """
    batch, heads, n, d = x.shape
    rounds = rotations.shape[3]
    out = torch.empty(batch, heads, rounds, n, dtype=torch.int32, device=x.device)
    if out.numel() == 0:
        return out
    config = hash_config(d, x.dtype)
    grid = (batch * heads * cdiv(n, config["BM"]),)
    arguments = (x, rotations, out, n, d, rounds, heads, *rotations.stride())
    first, product = 0, 1
    for factor in factors:
        width = factor // 2
        lsh_hash_kernel[grid](*arguments, first, width, product, **config, **FUSED)
        first, product = first + width, product * factor
    return out


# ---------------------------------------------------------------- sort


@triton.jit
def _load_digits(buckets_ptr, order_ptr, i, n, shift, BITS: tl.constexpr):
    """Return the positions at places i of the order so far, and their digits, -1 outside it."""
    inside = i < n
    position = i
    if order_ptr is not None:
        position = tl.load(order_ptr + i, mask=inside, other=0)
    bucket = tl.load(buckets_ptr + position, mask=inside, other=0)
    return position, tl.where(inside, (bucket >> shift) & ((1 << BITS) - 1), -1)


@triton.jit(do_not_specialize=["shift"])
def lsh_sort_count_kernel(
    buckets_ptr, order_ptr, counts_ptr, n, shift, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the tokens of each digit in a block: counts[row, digit, block].

    Grid: rows x blocks of BLOCK tokens; a program owns one.
    """
    blocks = tl.cdiv(n, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    order_ptr = None if order_ptr is None else order_ptr + row * n
    _, digit = _load_digits(
        buckets_ptr + row * n, order_ptr, block * BLOCK + tl.arange(0, BLOCK), n, shift, BITS
    )
    counts = tl.histogram(tl.maximum(digit, 0), 1 << BITS, mask=digit >= 0)
    digits = tl.arange(0, 1 << BITS)
    tl.store(counts_ptr + (row * (1 << BITS) + digits) * blocks + block, counts)


@triton.jit(do_not_specialize=["shift"])
def lsh_sort_place_kernel(
    buckets_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    ranks_ptr,
    n,
    shift,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
):
    """Move every token to its place in the order by this digit and the ones below.

    ends[row, digit, block] is where the block's tokens of a digit end, counted through all rows.
    The last pass also writes the ranks; before it, `ranks_ptr` is None. Grid: rows x blocks of
    BLOCK tokens; a program owns one and compares its tokens with BJ at a time.
    """
    blocks = tl.cdiv(n, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    order_ptr = None if order_ptr is None else order_ptr + row * n
    buckets_ptr += row * n
    i = block * BLOCK + tl.arange(0, BLOCK)
    position, digit = _load_digits(buckets_ptr, order_ptr, i, n, shift, BITS)
    inside = i < n
    # The tokens of the same digit from this one to the end of the block, itself included.
    behind = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, BJ):
        j = block * BLOCK + first + tl.arange(0, BJ)
        _, other = _load_digits(buckets_ptr, order_ptr, j, n, shift, BITS)
        same = (digit[:, None] == other[None, :]) & (i[:, None] <= j[None, :])
        behind += tl.sum(same.to(tl.int32), axis=1)
    end = tl.load(ends_ptr + (row * (1 << BITS) + digit) * blocks + block, mask=inside, other=0)
    place = end - behind
    tl.store(out_ptr + place, position, mask=inside)
    if ranks_ptr is not None:
        tl.store(ranks_ptr + row * n + position, (place - row * n).to(tl.int32), mask=inside)


def sort(buckets: torch.Tensor, n_buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions sorted by (bucket, position), and the rank of each position.

    `buckets` is contiguous, and its ids are below n_buckets.
    """
    order, ranks = None, torch.empty_like(buckets)
    if buckets.numel() == 0:
        return torch.empty_like(buckets), ranks
    n, bits = buckets.shape[-1], max(1, (n_buckets - 1).bit_length())
    rows, blocks = buckets.numel() // n, cdiv(n, SORT_CONFIG["BLOCK"])
    for shift in range(0, bits, DIGIT_BITS):
        digit = min(DIGIT_BITS, bits - shift)
        counts = torch.empty(rows << digit, blocks, dtype=torch.int32, device=buckets.device)
        out, grid = torch.empty_like(buckets), (rows * blocks,)
        lsh_sort_count_kernel[grid](buckets, order, counts, n, shift, BITS=digit, **SORT_CONFIG)
        ends = counts.flatten().cumsum(0)
        last = ranks if shift + digit == bits else None
        lsh_sort_place_kernel[grid](
            buckets, order, ends, out, last, n, shift, BITS=digit, BJ=32, **SORT_CONFIG
        )
        order = out
    return order, ranks
