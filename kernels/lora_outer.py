"""Sums over rows and columns of x or dy that LoRA's backward needs, from one read of the matrix.

dA and dB are sums over rows, U is a sum over columns, and all want one read of a large matrix. So
lora_outer_kernel has programs that own a block of columns of many rows, and it keeps the parts of
each. The parts are added up in a fixed order: no atomics, same inputs, same bits. lora_backward.py
says what is computed with them, and lora_routing.py how adapters share a batch.
"""

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps
from ._launch import FUSED, cdiv
from .lora_base import contiguous, flatten_rows, flatten_strided_rows
from .lora_routing import (
    group_ranks,
    rank_block,
    rank_block_size,
    route_arguments,
    rows_at,
    segment_tile,
    segments,
)

# ---------------------------------------------------------------- kernels


@triton.jit
def lora_outer_kernel(
    x_ptr,
    low_ptr,
    low_stride,
    b_ptr,
    gain_ptr,
    z_ptr,
    seeds_ptr,
    order_ptr,
    starts_ptr,
    scales_ptr,
    outer_ptr,
    u_ptr,
    sum_ptr,
    weighted_ptr,
    scaling,
    threshold,
    m,
    n,
    total,
    adapters,
    steps,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RB: tl.constexpr,
):
    """Compute parts of up to four sums over X [M, N], which is x or dy, in one read of it.

    Those of the following are computed that have a pointer. B is [adapters, N, total].

        outer [row tiles, total, N]    = low^T drop(X), which is dA or dB without factors
        u     [column tiles, M, total] = scaling scales[adapter] X (gain B)
        sum, weighted [row tiles, N]   = column sums of X and of X * z

    Grid: (blocks of columns of a projection, fastest, so that X is read from memory once, x tiles
    of N; tiles of at most `steps` * BM rows of an adapter). A row tile without rows gives zeros.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    block, tile = tl.program_id(0) % BLOCKS, tl.program_id(1)
    projection, first, last = rank_block(block, RANKS, RB)
    adapter, begin, end = segment_tile(tile, starts_ptr, m, steps * BM, adapters, ADAPTERS)
    column = tl.program_id(0) // BLOCKS * BN + tl.arange(0, BN)
    j = first + tl.arange(0, RB)
    outer = tl.zeros([RB, BN], tl.float32)
    sums = tl.zeros([BN], tl.float32)
    weighted = tl.zeros([BN], tl.float32)
    if u_ptr is not None:
        b_mask = (column < tl.where(adapter >= 0, n, 0))[:, None] & (j < last)[None, :]
        b_ptr += tl.maximum(adapter, 0).to(tl.int64) * n * total
        b_address = b_ptr + column.to(tl.int64)[:, None] * total + j[None, :]
        b = tl.load(b_address, mask=b_mask, other=0.0).to(tl.float32)  # [BN, RB]
        if gain_ptr is not None:
            b *= tl.load(gain_ptr + column, mask=column < n, other=0.0).to(tl.float32)[:, None]
        b = b.to(T)
        scale = tl.cast(scaling, tl.float32)
        if scales_ptr is not None:
            scale *= tl.load(scales_ptr + adapter, mask=adapter >= 0, other=0.0)
        u_ptr += (tl.program_id(0) // BLOCKS).to(tl.int64) * m * total
    for start in range(begin, end, BM):
        position = start + tl.arange(0, BM)
        row = rows_at(order_ptr, position, m)
        inside = position < end
        mask = inside[:, None] & (column < n)[None, :]
        offset = (row * n)[:, None] + column[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0)  # [BM, BN]
        if sum_ptr is not None:
            sums += tl.sum(x.to(tl.float32), axis=0)
        if weighted_ptr is not None:
            z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            weighted += tl.sum(x.to(tl.float32) * z, axis=0)
        mask = inside[:, None] & (j < last)[None, :]
        if u_ptr is not None:
            u = tl.dot(x, b, input_precision="ieee") * scale
            tl.store(u_ptr + (row * total)[:, None] + j[None, :], u, mask=mask)
        if outer_ptr is not None:
            if seeds_ptr is not None:
                seed_ptr, first_column = seeds_ptr + projection, tl.program_id(0) // BLOCKS * BN
                keeps = dropout_keeps(seed_ptr, row, first_column, threshold, BN)
                x = tl.where(keeps, x, 0.0).to(T)
            low_address = low_ptr + (row * low_stride)[:, None] + j[None, :]
            low = tl.load(low_address, mask=mask, other=0.0)  # [BM, RB]
            outer = tl.dot(tl.trans(low.to(T)), x, outer, input_precision="ieee")
    if outer_ptr is not None:
        outer_ptr += tile.to(tl.int64) * total * n
        mask = (j < last)[:, None] & (column < n)[None, :]
        tl.store(outer_ptr + j.to(tl.int64)[:, None] * n + column[None, :], outer, mask=mask)
    first_block = column < tl.where(block == 0, n, 0)
    if sum_ptr is not None:
        tl.store(sum_ptr + tile.to(tl.int64) * n + column, sums, mask=first_block)
    if weighted_ptr is not None:
        tl.store(weighted_ptr + tile.to(tl.int64) * n + column, weighted, mask=first_block)


@triton.jit
def lora_sum_outer_kernel(
    parts_ptr,
    gain_ptr,
    starts_ptr,
    out_ptr,
    scale,
    m,
    n,
    first,
    rank,
    total,
    stride_j,
    stride_n,
    length,
    tiles,
    adapters,
    ADAPTERS: tl.constexpr,
    RB: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute out[adapter, j, column] = scale gain[column] sum of parts[tile, first + j, column].

    The sum goes over the tiles of the adapter in their order. `length` is the rows of a tile, and
    `tiles` is the number of tiles without a route. Grid: (tiles of N, blocks of the rank,
    adapters).
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * RB + tl.arange(0, RB)
    adapter = tl.program_id(2)
    begin, count = 0, tiles
    if starts_ptr is not None:
        i, _, _, segment_tiles = segments(starts_ptr, m, length, adapters, ADAPTERS)
        begin = tl.sum(tl.where(i <= adapter, segment_tiles, 0))
        count = tl.sum(tl.where(i == adapter + 1, segment_tiles, 0))
    mask = (j < rank)[:, None] & (column < n)[None, :]
    parts_ptr += tl.cast(begin, tl.int64) * total * n
    parts_ptr += (first + j).to(tl.int64)[:, None] * n + column[None, :]
    acc = tl.zeros([RB, BN], tl.float32)
    for _ in range(count):
        acc += tl.load(parts_ptr, mask=mask, other=0.0)
        parts_ptr += tl.cast(total, tl.int64) * n
    acc *= tl.cast(scale, tl.float32)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    out_ptr += adapter.to(tl.int64) * rank * n
    offset = j.to(tl.int64)[:, None] * stride_j + column.to(tl.int64)[None, :] * stride_n
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- choices

# All of them are derived. NOT ONE is measured on a GPU.

# Configuration of lora_sum_outer_kernel.
SUM_CONFIG = dict(RB=4, BN=256, num_warps=4)


def outer_config(dtype: torch.dtype, weighted: bool) -> dict[str, int]:
    """Return BM, BN, num_warps and num_stages of lora_outer_kernel; `weighted`: with X * z."""
    if dtype == torch.float32:
        return dict(BM=16, BN=64, num_warps=4, num_stages=2)
    return dict(BM=32 if weighted else 64, BN=128, num_warps=8, num_stages=3)


def _split_rows(m: int, columns: int, block: int, segments: int) -> tuple[int, int]:
    """Return the number of tiles of rows, and their length in blocks of BM = `block` rows.

    Each tile has `columns` programs. There are enough tiles for two programs on each of the 132 SMs
    of an H100 or H200, of no fewer than four blocks.
    """
    steps = max(4, cdiv(cdiv(m, block), cdiv(264, columns)))
    return cdiv(m, steps * block) + segments, steps


class OuterParts:
    """The parts that lora_outer_kernel writes, with the number and length of its row tiles."""

    def __init__(self, outer, u, sums, m, length, tiles, n, route):
        self.outer, self.u, self.sums = outer, u, sums
        self.m, self.length, self.tiles, self.n, self.route = m, length, tiles, n, route

    def add_up(self, out, strides, first, rank, gain, scale):
        """Write the sum of the outer parts' rows first to first + rank to out [n, ..].

        `strides` are those of the rank and of the columns in `out`.
        """
        (_, total, columns), (_, starts, _) = self.outer.shape, self.route[0]
        grid = cdiv(columns, SUM_CONFIG["BN"]), cdiv(rank, SUM_CONFIG["RB"]), self.n
        sizes = (self.m, columns, first, rank, total, *strides, self.length, self.tiles, self.n)
        arguments = (self.outer, contiguous(gain), starts, out, scale, *sizes)
        lora_sum_outer_kernel[grid](*arguments, ADAPTERS=self.route[1], **SUM_CONFIG, **FUSED)


def launch_outer(
    x,
    *,
    low,
    ranks,
    n,
    route,
    b=None,
    gain=None,
    z=None,
    seeds=None,
    sums=(False, False),
    scaling=1.0,
    threshold=0,
) -> OuterParts:
    """Launch lora_outer_kernel on x [M, N] and return its parts; `sums` asks for column sums."""
    (m, columns), total = x.shape, sum(ranks)
    config = outer_config(x.dtype, sums[1])
    block = rank_block_size(max(ranks) if seeds is not None else total, x.dtype)
    grouped_ranks, blocks = group_ranks(ranks, seeds, block)
    # There is one block at least, because a rank of 0 still has column sums.
    blocks = max(blocks, 1)
    column_tiles = cdiv(columns, config["BN"])
    tiles, steps = _split_rows(m, column_tiles * blocks, config["BM"], n if route else 0)
    fp32 = dict(dtype=torch.float32, device=x.device)
    outer = None if low is None else torch.empty(tiles, total, columns, **fp32)
    u = None if b is None else torch.empty(column_tiles, m, total, **fp32)
    sums = [torch.empty(tiles, columns, **fp32) if needed else None for needed in sums]
    low = None if low is None else flatten_strided_rows(low)
    z = flatten_rows(z) if sums[1] is not None else None
    routed = route_arguments(route)
    arguments = (x, low, 0 if low is None else low.stride(0), contiguous(b), contiguous(gain))
    arguments += (z, contiguous(seeds))
    sizes = (scaling, threshold, m, columns, total, n, steps)
    constants = dict(
        RANKS=grouped_ranks, BLOCKS=blocks, ADAPTERS=routed[1], RB=block, **config, **FUSED
    )
    lora_outer_kernel[(column_tiles * blocks, tiles)](
        *arguments, *routed[0], outer, u, *sums, *sizes, **constants
    )
    return OuterParts(outer, u, sums, m, steps * config["BM"], tiles, n, routed)
