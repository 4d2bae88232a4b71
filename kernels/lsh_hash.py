"""LSH's directions, hashes and sort on a GPU.

Hashing is a product with the directions, a tile of them after the other, of which only each token's
best so far is kept. 16-bit tokens meet the directions as sums of 16-bit parts, on tensor cores, as
exactly as in fp32. The sort is a radix sort of 8 bits a pass, one pass for up to 256 buckets: a
block of tokens counts its digits, a sum over all blocks before it says where each digit goes on,
and within the block a token counts those of its digit behind it. No atomics but those of the count:
same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._dropout import philox
from ._launch import cdiv, next_power_of_2

OPTIONS = dict(enable_fp_fusion=True)  # said, because Triton 3.10 turns the default around
DIGIT = 8  # bits of a pass
SORT = dict(BLOCK=256, num_warps=4)

# ---------------------------------------------------------------- directions


@triton.jit
def _normal_pair(x, y):
    """Two normal numbers of two words, by Box and Muller: in fp64, as the definition."""
    radius = tl.sqrt(-2 * tl.log(((x >> 8).to(tl.float64) + 0.5) / 16777216))
    angle = 6.283185307179586 * (y.to(tl.float64) / 4294967296)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _rotations_kernel(seed_ptr, out_ptr, count, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), (group >> 32) + (1 << 62), group)
    a, b = _normal_pair(w0, w1)
    c, d = _normal_pair(w2, w3)
    at = group * 4
    tl.store(out_ptr + at, a.to(tl.float32), mask=at < count)
    tl.store(out_ptr + at + 1, b.to(tl.float32), mask=at + 1 < count)
    tl.store(out_ptr + at + 2, c.to(tl.float32), mask=at + 2 < count)
    tl.store(out_ptr + at + 3, d.to(tl.float32), mask=at + 3 < count)


def rotations(seed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers in fp32; seed is an int64 where they shall be. See reference.lsh_rotations_op."""
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    if out.numel():
        _rotations_kernel[(cdiv(out.numel(), 1024),)](
            seed, out, out.numel(), BLOCK=256, num_warps=4, **OPTIONS
        )
    return out


# ---------------------------------------------------------------- hash


@triton.jit
def _add_product(acc, x, r, PARTS: tl.constexpr):
    """acc + x r, as if in fp32: r is a sum of PARTS of x's type."""
    for _ in tl.static_range(PARTS):
        part = r.to(x.dtype)
        acc = tl.dot(x, part, acc, input_precision="ieee")
        r -= part.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["first", "width", "product"])
def _hash_kernel(
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
    """Of each token the best of 2 `width` directions and opposites from column `first`, times
    `product`.

    Added to the ids of the factors before, if there are any. Grid: heads x tiles of BM tokens.
    """
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    row, k, w = start + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    inside = row < n
    x_ptr += head.to(tl.int64) * n * d + row.to(tl.int64)[:, None] * d
    r_ptr += (head // heads).to(tl.int64) * r_batch + (head % heads).to(tl.int64) * r_head
    r_ptr += tl.cast(first, tl.int64) * r_column
    out_ptr += head.to(tl.int64) * rounds * n + row
    x = tl.load(
        x_ptr + k[None, :], mask=inside[:, None] & (k < d)[None, :], other=0.0
    )  # of few columns, read once
    for t in range(rounds):
        best = tl.full([BM, BN], -1.0, tl.float32)
        index = tl.zeros([BM, BN], tl.int32)
        for start in range(0, width, BN):
            column = start + w
            at = r_ptr + tl.cast(t, tl.int64) * r_round + column.to(tl.int64)[None, :] * r_column
            r_mask = (column < width)[None, :]
            r = tl.load(
                at + k.to(tl.int64)[:, None] * r_row, mask=(k < d)[:, None] & r_mask, other=0.0
            )
            score = _add_product(tl.zeros([BM, BN], tl.float32), x, r.to(tl.float32), PARTS)
            for k0 in range(BK, d, BK):
                more = k0 + k
                y = tl.load(
                    x_ptr + more[None, :], mask=inside[:, None] & (more < d)[None, :], other=0.0
                )
                r = tl.load(
                    at + more.to(tl.int64)[:, None] * r_row,
                    mask=(more < d)[:, None] & r_mask,
                    other=0.0,
                )
                score = _add_product(score, y, r.to(tl.float32), PARTS)
            size = tl.where(r_mask, tl.abs(score), -1.0)
            candidate = (
                tl.where(score < 0, width, 0) + column[None, :]
            )  # opposites come after all directions
            better = (size > best) | ((size == best) & (candidate < index))
            best, index = tl.where(better, size, best), tl.where(better, candidate, index)
        found = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], index, 2147483647), axis=1)
        bucket = found * product
        earlier = tl.load(
            out_ptr + tl.cast(t, tl.int64) * n,
            mask=inside & (row >= tl.where(first > 0, 0, n)),
            other=0,
        )
        tl.store(out_ptr + tl.cast(t, tl.int64) * n, bucket + earlier, mask=inside)


def hash_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, num_warps and num_stages. Derived, not measured."""
    if dtype == torch.float32:
        return dict(PARTS=1, BM=32, BN=32, BK=16, num_warps=4, num_stages=1)
    parts = 3 if dtype == torch.bfloat16 else 2  # of 8 bits or 11 each
    return dict(
        PARTS=parts,
        BM=128,
        BN=32,
        BK=min(128, max(16, next_power_of_2(d))),
        num_warps=8,
        num_stages=2,
    )


def hash_tokens(x: torch.Tensor, rotations: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """Ids [b, h, r, n] of x[b, h, n, d], contiguous; rotations [b, h, d, r, sum(factors) / 2] of any strides."""
    batch, heads, n, d = x.shape
    rounds = rotations.shape[3]
    out = torch.empty(batch, heads, rounds, n, dtype=torch.int32, device=x.device)
    if out.numel() == 0:
        return out
    config = hash_config(d, x.dtype)
    grid = (batch * heads * cdiv(n, config["BM"]),)
    first, product = 0, 1
    for factor in factors:
        _hash_kernel[grid](
            x,
            rotations,
            out,
            n,
            d,
            rounds,
            heads,
            *rotations.stride(),
            first,
            factor // 2,
            product,
            **config,
            **OPTIONS,
        )
        first, product = first + factor // 2, product * factor
    return out


# ---------------------------------------------------------------- sort


@triton.jit
def _digits(buckets_ptr, order_ptr, i, n, shift, BITS: tl.constexpr):
    """Of places i: the position there, and its digit; outside -1, of no place."""
    inside = i < n
    position = i
    if order_ptr is not None:
        position = tl.load(order_ptr + i, mask=inside, other=0)
    bucket = tl.load(buckets_ptr + position, mask=inside, other=0)
    return position, tl.where(inside, (bucket >> shift) & ((1 << BITS) - 1), -1)


@triton.jit(do_not_specialize=["shift"])
def _count_kernel(
    buckets_ptr, order_ptr, counts_ptr, n, shift, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts[row, digit, block]: how many of a block of tokens have a digit. Grid: rows x blocks."""
    blocks = tl.cdiv(n, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    order_ptr = None if order_ptr is None else order_ptr + row * n
    _, digit = _digits(
        buckets_ptr + row * n, order_ptr, block * BLOCK + tl.arange(0, BLOCK), n, shift, BITS
    )
    counts = tl.histogram(tl.maximum(digit, 0), 1 << BITS, mask=digit >= 0)
    bin = tl.arange(0, 1 << BITS)
    tl.store(counts_ptr + (row * (1 << BITS) + bin) * blocks + block, counts)


@triton.jit(do_not_specialize=["shift"])
def _place_kernel(
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
    """Every token to its place among those of this digit and the ones below; the last pass has
    ranks to write.

    ends[row, digit, block] is where the block's tokens of a digit end, counted through all rows.
    """
    blocks = tl.cdiv(n, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    order_ptr = None if order_ptr is None else order_ptr + row * n
    buckets_ptr += row * n
    i = block * BLOCK + tl.arange(0, BLOCK)
    position, digit = _digits(buckets_ptr, order_ptr, i, n, shift, BITS)
    inside = i < n
    behind = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, BJ):
        j = block * BLOCK + first + tl.arange(0, BJ)
        _, other = _digits(buckets_ptr, order_ptr, j, n, shift, BITS)
        same = (digit[:, None] == other[None, :]) & (i[:, None] <= j[None, :])
        behind += tl.sum(same.to(tl.int32), axis=1)
    end = tl.load(ends_ptr + (row * (1 << BITS) + digit) * blocks + block, mask=inside, other=0)
    place = end - behind
    tl.store(out_ptr + place, position, mask=inside)
    if ranks_ptr is not None:
        tl.store(ranks_ptr + row * n + position, (place - row * n).to(tl.int32), mask=inside)


def sort(buckets: torch.Tensor, n_buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions by (bucket, position), and each position's rank; buckets is contiguous, its ids below n_buckets."""
    order, ranks = None, torch.empty_like(buckets)
    if buckets.numel() == 0:
        return torch.empty_like(buckets), ranks
    n, bits = buckets.shape[-1], max(1, (n_buckets - 1).bit_length())
    rows, blocks = buckets.numel() // n, cdiv(n, SORT["BLOCK"])
    for shift in range(0, bits, DIGIT):
        digit = min(DIGIT, bits - shift)
        counts = torch.empty(rows << digit, blocks, dtype=torch.int32, device=buckets.device)
        out, grid = torch.empty_like(buckets), (rows * blocks,)
        _count_kernel[grid](buckets, order, counts, n, shift, BITS=digit, **SORT)
        ends = counts.flatten().cumsum(0)
        last = ranks if shift + digit == bits else None
        _place_kernel[grid](buckets, order, ends, out, last, n, shift, BITS=digit, BJ=32, **SORT)
        order = out
    return order, ranks
