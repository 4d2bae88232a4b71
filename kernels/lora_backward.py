"""LoRA on a GPU, backward: U = scaling (gain dy) B, dB, column sums; dx = (gain dy) W + mask (U A)
+ add; dA.

lora.py says what W, paths, routes and None pointers are. On the panel path `mask (U A) + add` is
written first and cuBLAS adds (gain dy) W to it: those two are rounded once more, to x's dtype. In
the fused kernels a gain multiplies the rows of W or B before their rounding; before panels it
multiplies dy, which is rounded once more.

dA and dB are sums over rows and U is a sum over columns, and all want one read of a large matrix:
`_outer_kernel` has programs that own a block of columns of many rows, and keeps the parts of each.
What adds the parts up does so in a fixed order: no atomics, same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps, dropout_threshold
from ._launch import capability, cdiv
from .lora import (
    add_low_rank,
    base_arguments,
    choose,
    column_panels,
    contiguous,
    projections,
    rank_block,
    rank_config,
    route_arguments,
    rows_at,
    rows_of,
    segment_tile,
    segments,
    strided_rows_of,
    tile_config,
)
from .nf4_linear import FUSED, split_loop, sum_parts, sum_tiles_backward

# ---------------------------------------------------------------- one pass over x or dy


@triton.jit
def _outer_kernel(
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
    """Of X [M, N], which is x or dy, what of these has a pointer; a part for each tile of rows, or
    of columns:

        outer [row tiles, total, N]    = low^T drop(X)                         dA or dB, without factors
        u     [column tiles, M, total] = scaling scales[adapter] X (gain B)    B [adapters, N, total]
        sum, weighted [row tiles, N]   = column sums of X and of X * z

    Grid: (blocks of columns of a projection, fastest, so that X is read from memory once, x tiles
    of N; tiles of at most `steps` * BM rows of an adapter). A row tile of nothing gives zeros.
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
        b = tl.load(
            b_ptr + column.to(tl.int64)[:, None] * total + j[None, :], mask=b_mask, other=0.0
        ).to(tl.float32)
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
                first_column = tl.program_id(0) // BLOCKS * BN
                x = tl.where(
                    dropout_keeps(seeds_ptr + projection, row, first_column, threshold, BN), x, 0.0
                ).to(T)
            low = tl.load(
                low_ptr + (row * low_stride)[:, None] + j[None, :], mask=mask, other=0.0
            )  # [BM, RB]
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
def _sum_outer_kernel(
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
    """out[adapter, j, column] = scale gain[column] * the sum over its tiles of parts[tile, first +
    j, column].

    `length` is the rows of a tile, `tiles` their number without a route. Grid: (tiles of N, blocks
    of the rank, adapters).
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * RB + tl.arange(0, RB)
    adapter = tl.program_id(2)
    begin, count = 0, tiles
    if starts_ptr is not None:
        i, _, _, each = segments(starts_ptr, m, length, adapters, ADAPTERS)
        begin = tl.sum(tl.where(i <= adapter, each, 0))
        count = tl.sum(tl.where(i == adapter + 1, each, 0))
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


# ---------------------------------------------------------------- dx


@triton.jit
def _scale_kernel(x_ptr, factors_ptr, out_ptr, numel, cols, BLOCK: tl.constexpr):
    """out[i] = x[i] * factors[i % cols]. Grid: tiles of BLOCK elements; a program owns one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    factor = tl.load(factors_ptr + i % cols, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_dense_backward(
    dy_ptr, w_ptr, stride_n, stride_k, gain_ptr, row, column, begin, end, n, k, BN: tl.constexpr
):
    """dy[row] (gain W)[:, column] over tiles begin to end of BN rows of W, [BM, BK] in fp32."""
    T: tl.constexpr = dy_ptr.dtype.element_ty
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    w_ptr += (column.to(tl.int64) * stride_k)[None, :]
    for step in range(begin, end):
        out = step * BN + tl.arange(0, BN)
        mask = (out < n)[:, None] & (column < k)[None, :]
        w = tl.load(
            w_ptr + (out.to(tl.int64) * stride_n)[:, None], mask=mask, other=0.0
        )  # [BN, BK]
        if gain_ptr is not None:
            w = (
                w.to(tl.float32)
                * tl.load(gain_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
            )
        dy = tl.load(
            dy_ptr + (row * n)[:, None] + out[None, :], mask=(out < n)[None, :], other=0.0
        )  # [BM, BN]
        acc = tl.dot(dy, w.to(T), acc, input_precision="ieee")
    return acc


@triton.jit
def _linear_backward_kernel(
    dy_ptr,
    w_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    stride_n,
    stride_k,
    u_ptr,
    u_stride,
    a_ptr,
    gain_ptr,
    add_ptr,
    seed_ptr,
    order_ptr,
    starts_ptr,
    dx_ptr,
    keep_scale,
    threshold,
    m,
    n,
    k,
    rank,
    adapters,
    steps,
    BASE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RB: tl.constexpr,
):
    """dx[M, K] = (gain dy)[M, N] W + mask (U A) + add. BASE "none": without the first term.

    Grid: (tiles of M, fastest, x tiles of K, splits of N). With more than one split dx is fp32
    [splits, M, K], to be added up; the other two terms are in the first.
    """
    tiles_m = tl.cdiv(m, BM)
    position = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    row = rows_at(order_ptr, position, m)
    first = tl.program_id(0) // tiles_m * BK
    column = first + tl.arange(0, BK)
    split = tl.program_id(1)
    begin, end = split * steps, tl.minimum((split + 1) * steps, tl.cdiv(n, BN))
    if BASE == "dense":
        acc = _sum_dense_backward(
            dy_ptr, w_ptr, stride_n, stride_k, gain_ptr, row, column, begin, end, n, k, BN
        )
    elif BASE == "none":
        acc = tl.zeros([BM, BK], tl.float32)
    else:
        weight = (w_ptr, code_ptr, (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr))
        acc = sum_tiles_backward(
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
            BN,
            BK,
            BLOCKSIZE,
            NESTED,
            ALIGNED,
        )
    if u_ptr is not None:
        low = acc if seed_ptr is None else tl.zeros([BM, BK], tl.float32)
        low = add_low_rank(
            low,
            u_ptr,
            u_stride,
            position,
            row,
            a_ptr,
            column,
            k,
            1,
            k,
            tl.where(split == 0, rank, 0),
            starts_ptr,
            m,
            adapters,
            dy_ptr.dtype.element_ty,
            ADAPTERS,
            RB,
            False,
        )
        if seed_ptr is not None:
            keeps = dropout_keeps(seed_ptr, row, first, threshold, BK)
            acc += tl.where(keeps, low * tl.cast(keep_scale, tl.float32), 0.0)
        else:
            acc = low
    mask = (position < m)[:, None] & (column < k)[None, :]
    offset = (row * k)[:, None] + column[None, :]
    if add_ptr is not None:
        mine = mask & (column < tl.where(split == 0, k, 0))[None, :]
        acc += tl.load(add_ptr + offset, mask=mine, other=0.0).to(tl.float32)
    dx_ptr += split.to(tl.int64) * m * k
    tl.store(dx_ptr + offset, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- choices: derived, NOT ONE measured on a GPU


def outer_config(dtype: torch.dtype, weighted: bool) -> dict[str, int]:
    if dtype == torch.float32:
        return dict(BM=16, BN=64, num_warps=4, num_stages=2)
    return dict(BM=32 if weighted else 64, BN=128, num_warps=8, num_stages=3)


def _row_tiles(m: int, columns: int, block: int, segments: int) -> tuple[int, int]:
    """-> tiles of rows, for `columns` programs each, and their length in blocks of BM = `block`
    rows.

    Enough for two programs on each of the 132 SMs of an H100 or H200, of no fewer than four blocks.
    """
    steps = max(4, cdiv(cdiv(m, block), cdiv(264, columns)))
    return cdiv(m, steps * block) + segments, steps


SCALE_BLOCK = 2048
SUM_CONFIG = dict(RB=4, BN=256, num_warps=4)


# ---------------------------------------------------------------- launchers


def expand_backward(dy, s, lora_b, gain, z, scaling, route, needs):
    """U [.., r], dB [n, out, r], sum [out], weighted_sum [out], those that `needs` names; the others are [0]."""
    n, out, rank = lora_b.shape
    fp32 = dict(dtype=torch.float32, device=dy.device)
    nothing = [torch.empty(0, **fp32), torch.empty(0, dtype=lora_b.dtype, device=dy.device)]
    nothing += [torch.empty(0, **fp32), torch.empty(0, **fp32)]
    rows = rows_of(dy)
    m = len(rows)
    wants = [need and size > 0 for need, size in zip(needs, (rank, rank * n, 1, 1))]
    u = torch.empty(m, rank, **fp32) if needs[0] else nothing[0]
    db = torch.zeros(lora_b.shape, dtype=lora_b.dtype, device=dy.device) if needs[1] else nothing[1]
    sums = [
        torch.zeros(out, **fp32) if need else none for need, none in zip(needs[2:], nothing[2:])
    ]
    if m and out and any(wants):
        parts = _outer(
            rows,
            low=s if wants[1] else None,
            ranks=[rank],
            b=lora_b if wants[0] else None,
            gain=gain,
            z=z,
            scaling=scaling,
            route=route,
            n=n,
            sums=wants[2:],
        )
        if wants[0]:
            sum_parts(parts.u, None, u)
        if wants[1]:
            parts.add_up(db, (1, rank), 0, rank, gain, 1.0)
        sums = [
            part.sum(0) if want else none for part, want, none in zip(parts.sums, wants[2:], sums)
        ]
    elif needs[0]:
        u.zero_()
    return u.view(*dy.shape[:-1], rank) if needs[0] else u, db, *sums


def shrink_backward(u, x, ranks, n, dropout_p, seeds, route, dtype):
    """dA [n, r, in] of each projection; u is those of all of them."""
    rows, k = rows_of(x), x.shape[-1]
    found = [torch.zeros(n, r, k, dtype=dtype, device=x.device) for r in ranks]
    if len(rows) == 0 or k * n * sum(ranks) == 0:
        return found
    threshold = dropout_threshold(dropout_p)
    seeds = None if threshold == 0 else seeds
    parts = _outer(rows, low=u, ranks=ranks, seeds=seeds, threshold=threshold, route=route, n=n)
    first = 0
    for da, r in zip(found, ranks):
        if r:
            parts.add_up(da, (k, 1), first, r, None, 1 / (1 - threshold / 65536))
        first += r
    return found


class _Parts:
    """What _outer_kernel leaves, and how it is added up."""

    def __init__(self, outer, u, sums, m, length, tiles, n, route):
        self.outer, self.u, self.sums = outer, u, sums
        self.m, self.length, self.tiles, self.n, self.route = m, length, tiles, n, route

    def add_up(self, out, strides, first, rank, gain, scale):
        """out [n, ..] = its columns of the sum, with these strides of the rank and of the columns."""
        (_, total, columns), (_, starts, _) = self.outer.shape, self.route[0]
        grid = cdiv(columns, SUM_CONFIG["BN"]), cdiv(rank, SUM_CONFIG["RB"]), self.n
        sizes = (self.m, columns, first, rank, total, *strides, self.length, self.tiles, self.n)
        arguments = (self.outer, contiguous(gain), starts, out, scale, *sizes)
        _sum_outer_kernel[grid](*arguments, ADAPTERS=self.route[1], **SUM_CONFIG, **FUSED)


def _outer(
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
) -> _Parts:
    (m, columns), total = x.shape, sum(ranks)
    config = outer_config(x.dtype, sums[1])
    block = rank_config(max(ranks) if seeds is not None else total, x.dtype)
    constant_ranks, blocks = projections(ranks, seeds, block)
    blocks = max(blocks, 1)  # of no rank, there are still sums
    column_tiles = cdiv(columns, config["BN"])
    tiles, steps = _row_tiles(m, column_tiles * blocks, config["BM"], n if route else 0)
    fp32 = dict(dtype=torch.float32, device=x.device)
    outer = None if low is None else torch.empty(tiles, total, columns, **fp32)
    u = None if b is None else torch.empty(column_tiles, m, total, **fp32)
    sums = [torch.empty(tiles, columns, **fp32) if want else None for want in sums]
    low = None if low is None else strided_rows_of(low)
    z = rows_of(z) if sums[1] is not None else None
    routed = route_arguments(route)
    arguments = (x, low, 0 if low is None else low.stride(0), contiguous(b), contiguous(gain))
    arguments += (z, contiguous(seeds))
    sizes = (scaling, threshold, m, columns, total, n, steps)
    constants = dict(
        RANKS=constant_ranks, BLOCKS=blocks, ADAPTERS=routed[1], RB=block, **config, **FUSED
    )
    _outer_kernel[(column_tiles * blocks, tiles)](
        *arguments, *routed[0], outer, u, *sums, *sizes, **constants
    )
    return _Parts(outer, u, sums, m, steps * config["BM"], tiles, n, routed)


def linear_backward(
    dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route, path=None
):
    """dx in dy's dtype; lora_a: [n, r, in]. `path` overrides `choose`."""
    k = shape[1]
    rows, dx = rows_of(dy), torch.empty(*dy.shape[:-1], shape[1], dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    m, gain = len(rows), contiguous(gain)
    path = path or choose("linear_backward", m, shape, blocksize, dy)
    low = (strided_rows_of(u), lora_a.contiguous()) if u.shape[-1] else None
    add = None if add is None else rows_of(add)
    mask = (
        None if dropout_threshold(dropout_p) == 0 else seed.contiguous(),
        dropout_threshold(dropout_p),
    )
    out = dx.view(m, k)
    if path != "panel":
        _launch_linear_backward(
            rows, low, base, gain, add, shape, blocksize, mask, route, path, out
        )
        return dx
    begun = low is not None or add is not None
    if begun:
        _launch_linear_backward(rows, low, None, None, add, shape, 0, mask, route, path, out)
    if gain is not None:  # on dy, which is smaller than W, and leaves a dense one as it is
        rows = scaled_columns(rows, gain)
    for first, last, w in column_panels(base, shape, blocksize, dy.dtype):
        out[:, first:last].addmm_(rows, w, beta=int(begun))
    return dx


def scaled_columns(x, factors):
    """x[M, N] * factors[N], in fp32, rounded to x's dtype."""
    out = torch.empty_like(x)
    _scale_kernel[(cdiv(x.numel(), SCALE_BLOCK),)](
        x, factors, out, x.numel(), x.shape[1], BLOCK=SCALE_BLOCK, num_warps=4, **FUSED
    )
    return out


def _launch_linear_backward(dy, low, base, gain, add, shape, blocksize, mask, route, path, dx):
    """dx = (gain dy) W + mask (U A) + add in one kernel; without base, no (gain dy) W."""
    m, (n, k) = len(dy), shape
    kind = "none" if base is None else "tiles" if blocksize else "dense"
    config = tile_config("linear_backward", path, kind, m, k, dy.dtype, blocksize, capability(dy))
    tiles = cdiv(m, config["BM"]) * cdiv(k, config["BK"])
    splits, steps = (
        (1, 0) if base is None else split_loop(path, tiles, max(1, cdiv(n, config["BN"])))
    )
    target = dx if splits == 1 else torch.empty(splits, m, k, dtype=torch.float32, device=dy.device)
    u, a = low or (None, None)
    rank = 0 if low is None else u.shape[1]
    (order, starts, _), adapters = route_arguments(route)
    seed, threshold = mask
    weight = (None,) * 6 + (0, 0) if base is None else base_arguments(base, blocksize)
    low_rank = (u, 0 if low is None else u.stride(0), a)
    sizes = (
        1 / (1 - threshold / 65536),
        threshold,
        m,
        n,
        k,
        rank,
        0 if low is None else len(a),
        steps,
    )
    constants = dict(BASE=kind, BLOCKSIZE=blocksize, NESTED=blocksize > 0 and len(base) == 6)
    constants |= dict(ALIGNED=blocksize > 0 and k % blocksize == 0, ADAPTERS=adapters)
    constants |= dict(RB=rank_config(rank, dy.dtype, 32), **config, **FUSED)
    arguments = (dy, *weight, *low_rank, gain, add, seed, order, starts, target, *sizes)
    _linear_backward_kernel[(tiles, splits)](*arguments, **constants)
    if splits > 1:
        sum_parts(target, None, dx)
