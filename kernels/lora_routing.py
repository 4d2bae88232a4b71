"""Routes, rows and ranks of LoRA's kernels: which rows an adapter has, and its half of a product.

With several adapters, `route` is [order, starts, scales]. Row order[p] has adapter a if
starts[a] <= p < starts[a + 1], and none if p < starts[0]. All of it stays on the device. A kernel
that reads A or B once for many rows has programs that own rows of one adapter, and `segment_tile`
tells whose. A kernel that reads W owns any BM neighbors in `order`, and `add_low_rank` adds the
LoRA half of each adapter among them, so that W is read as often as without adapters.

A pointer that is None stands for a missing tensor; `order_ptr` and `starts_ptr` are None without a
route. The rows of a tile beyond the last one are the last row again. What they compute is masked
where it is stored or summed.
"""

import torch
import triton
import triton.language as tl

from ._launch import cdiv, next_power_of_2


@triton.jit
def rows_at(order_ptr, position, m):
    """Return the rows at these positions, int64."""
    position = tl.minimum(position, m - 1)
    if order_ptr is not None:
        # Clamped, so that a wrong order gives wrong sums and no access outside the tensors.
        return tl.minimum(tl.maximum(tl.load(order_ptr + position), 0), m - 1).to(tl.int64)
    else:
        return position.to(tl.int64)


@triton.jit
def segments(starts_ptr, m, length, adapters, ADAPTERS: tl.constexpr):
    """Return i, begin, end and tiles, [ADAPTERS] each: the segments of rows that share an adapter.

    Segment i holds positions `begin` to `end` in `tiles` tiles of `length`. Segment 0 is the rows
    without an adapter, and segment i those of adapter i - 1. ADAPTERS > adapters.
    """
    i = tl.arange(0, ADAPTERS)
    begin = tl.load(starts_ptr + i - 1, mask=(i > 0) & (i <= adapters), other=0)
    end = tl.minimum(tl.load(starts_ptr + i, mask=i <= adapters, other=0), m)
    return i, begin, end, tl.where(i <= adapters, tl.cdiv(tl.maximum(end - begin, 0), length), 0)


@triton.jit
def segment_tile(tile, starts_ptr, m, length, adapters, ADAPTERS: tl.constexpr):
    """Return the adapter of a tile, or -1, and its positions, begin to end.

    A tile has at most `length` rows, which share the adapter. The tiles of a segment follow those
    of the segment before. Tiles after the last hold no position.
    """
    if starts_ptr is None:
        return tile * 0, tile * length, tl.minimum((tile + 1) * length, m)
    else:
        i, begin, end, tiles = segments(starts_ptr, m, length, adapters, ADAPTERS)
        through = tl.cumsum(tiles)
        is_segment = i == tl.sum((through <= tile).to(tl.int32))
        begin = tl.sum(tl.where(is_segment, begin + (tile - through + tiles) * length, 0))
        end = tl.minimum(begin + length, tl.sum(tl.where(is_segment, end, 0)))
        return tl.sum(tl.where(is_segment, i, 0)) - 1, begin, end


@triton.jit
def add_low_rank(
    acc,
    low_ptr,
    low_stride,
    position,
    row,
    matrix_ptr,
    column,
    n_columns,
    stride_column,
    stride_j,
    rank,
    starts_ptr,
    m,
    adapters,
    T: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RB: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return acc + low[row] M[:, column], where M [rank, n_columns] belongs to the row's adapter.

    `matrix_ptr` holds the M of all adapters. TRANSPOSED means that `acc` and the result are
    transposed. T is the type of the product's operands, and RB the columns of `low` at a time.
    """
    first, last = 0, 1
    if starts_ptr is not None:
        # These are the adapters that end after the tile's first position and start before its last.
        i, begin, end, _ = segments(starts_ptr, m, 1, adapters, ADAPTERS)
        first = tl.sum(((i > 0) & (i <= adapters) & (end <= tl.min(position))).to(tl.int32))
        last_position = tl.minimum(tl.max(position), m - 1)
        last = tl.sum(((i > 0) & (i <= adapters) & (begin <= last_position)).to(tl.int32))
    for adapter in tl.range(first, last, num_stages=1):
        inside = position < m
        if starts_ptr is not None:
            inside &= position >= tl.load(starts_ptr + adapter)
            inside &= position < tl.load(starts_ptr + adapter + 1)
        adapter_ptr = matrix_ptr + tl.cast(adapter, tl.int64) * rank * n_columns
        for start in tl.range(0, rank, RB, num_stages=1):
            j = start + tl.arange(0, RB)
            mask = inside[:, None] & (j < rank)[None, :]
            low_address = low_ptr + (row * low_stride)[:, None] + j[None, :]
            low = tl.load(low_address, mask=mask, other=0.0).to(T)  # [BM, RB]
            mask = (j < rank)[:, None] & (column < n_columns)[None, :]
            offset = j.to(tl.int64)[:, None] * stride_j
            offset += column.to(tl.int64)[None, :] * stride_column
            matrix = tl.load(adapter_ptr + offset, mask=mask, other=0.0).to(T)  # [RB, columns]
            if TRANSPOSED:
                acc = tl.dot(tl.trans(matrix), tl.trans(low), acc, input_precision="ieee")
            else:
                acc = tl.dot(low, matrix, acc, input_precision="ieee")
    return acc


@triton.jit
def rank_block(block, RANKS: tl.constexpr, RB: tl.constexpr):
    """Return the projection of a block of columns, its first column and the end of the projection.

    The sum(RANKS) columns of all projections are cut in blocks of at most RB columns of one
    projection.
    """
    projection, first, end = block * 0, block * 0, block * 0
    blocks, columns = 0, 0
    for i in tl.static_range(len(RANKS)):
        reached = block >= blocks
        projection = tl.where(reached, i, projection)
        first = tl.where(reached, columns + (block - blocks) * RB, first)
        end = tl.where(reached, columns + RANKS[i], end)
        blocks += (RANKS[i] + RB - 1) // RB
        columns += RANKS[i]
    return projection, first, end


def rank_block_size(rank: int, dtype: torch.dtype, limit: int = 64) -> int:
    """Return RB, the columns of a block of the rank: at least the 16 of a tensor core."""
    return 16 if dtype == torch.float32 else min(limit, max(16, next_power_of_2(rank)))


def route_arguments(route: list[torch.Tensor]) -> tuple[tuple, int]:
    """Return order, starts and scales as kernels take them, and ADAPTERS."""
    if not route:
        return (None, None, None), 1
    return tuple(t.contiguous() for t in route), next_power_of_2(len(route[1]))


def group_ranks(
    ranks: list[int], seeds: torch.Tensor | None, block: int
) -> tuple[tuple[int, ...], int]:
    """Return RANKS and BLOCKS of rank_block; without masks, all projections are treated as one."""
    ranks = tuple(ranks) if seeds is not None else (sum(ranks),)
    return ranks, sum(cdiv(r, block) for r in ranks)
