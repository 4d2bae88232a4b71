"""LoRA on a GPU, forward: S = scaling drop(x) A^T and y = gain (x W^T + S B^T) + bias. Backward:
lora_backward.py.

W is a dense matrix of any strides and floating dtype, or nf4.py's `state` (blocksize > 0). Two
paths for the product with it, of which `choose` takes one by the number of rows M:
    gemv, fused  one kernel: r more columns of the sum in the fp32 accumulator of the main loop,
    rounded once. NF4
                 weights are decoded by the loops of nf4_linear.py, dense ones multiplied tile by
                 tile.
    panel        many rows: the kernel, without its main loop, writes y = gain S B^T + bias, and cuBLAS adds x W^T to
                 it, a panel of decoded or cast rows of W at a time (a dense W of x's dtype whole).
                 That rounds the LoRA half and the bias once more, to x's dtype, before the sum; a
                 gain, which then multiplies the panel, rounds W once more.
S is fp32 in memory, and rounded to x's dtype on its way to the tensor cores, like A and B. fp32: no
TF32.

Several adapters: `route` is [order, starts, scales]. Row order[p] has adapter a if starts[a] <= p <
starts[a + 1], and none if p < starts[0]. All of it stays on the device: a kernel that reads A or B
once for many rows has programs that own rows of one adapter and find out whose (`segment_tile`); a
kernel that reads W owns any BM neighbors in `order` and adds the LoRA half of each adapter among
them (`add_low_rank`), so that W is read as often as without adapters.

A pointer that is None is not there; `order_ptr` is None without a route. Rows of a tile that are
not there are the last row again: what they give is masked where it is stored or summed. Nothing
here checks its arguments: pyfast/ops/lora.py does.
"""

import torch
import triton
import triton.language as tl

from . import nf4_linear
from ._dropout import dropout_keeps, dropout_threshold
from ._launch import capability, cdiv, next_power_of_2
from .nf4 import dequantize_segments, load_tile, pointers
from .nf4_linear import FUSED, formats, split_loop, sum_parts, sum_tiles, sum_words

# ---------------------------------------------------------------- rows and their adapters


@triton.jit
def rows_at(order_ptr, position, m):
    """The rows at these positions, int64."""
    position = tl.minimum(position, m - 1)
    if order_ptr is not None:
        # A wrong order gives wrong sums, no access outside.
        return tl.minimum(tl.maximum(tl.load(order_ptr + position), 0), m - 1).to(tl.int64)
    else:
        return position.to(tl.int64)


@triton.jit
def segments(starts_ptr, m, length, adapters, ADAPTERS: tl.constexpr):
    """-> i, begin, end, tiles [ADAPTERS]: segment i holds positions begin to end, in tiles of
    `length`.

    Segment 0 is the rows without an adapter, segment i those of adapter i - 1. ADAPTERS > adapters.
    """
    i = tl.arange(0, ADAPTERS)
    begin = tl.load(starts_ptr + i - 1, mask=(i > 0) & (i <= adapters), other=0)
    end = tl.minimum(tl.load(starts_ptr + i, mask=i <= adapters, other=0), m)
    return i, begin, end, tl.where(i <= adapters, tl.cdiv(tl.maximum(end - begin, 0), length), 0)


@triton.jit
def segment_tile(tile, starts_ptr, m, length, adapters, ADAPTERS: tl.constexpr):
    """-> adapter, or -1, and the positions, begin to end, of a tile of at most `length` rows that
    share it.

    The tiles of a segment follow those of the one before; tiles after the last hold no position.
    """
    if starts_ptr is None:
        return tile * 0, tile * length, tl.minimum((tile + 1) * length, m)
    else:
        i, begin, end, tiles = segments(starts_ptr, m, length, adapters, ADAPTERS)
        through = tl.cumsum(tiles)
        mine = i == tl.sum((through <= tile).to(tl.int32))
        begin = tl.sum(tl.where(mine, begin + (tile - through + tiles) * length, 0))
        end = tl.minimum(begin + length, tl.sum(tl.where(mine, end, 0)))
        return tl.sum(tl.where(mine, i, 0)) - 1, begin, end


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
    """acc + low[row] M[:, column], M [rank, n_columns] the row's adapter's; TRANSPOSED: of acc^T."""
    first, last = 0, 1
    if starts_ptr is not None:
        # The adapters that end after this tile's first position and start before its last.
        i, begin, end, _ = segments(starts_ptr, m, 1, adapters, ADAPTERS)
        first = tl.sum(((i > 0) & (i <= adapters) & (end <= tl.min(position))).to(tl.int32))
        last = tl.sum(
            ((i > 0) & (i <= adapters) & (begin <= tl.minimum(tl.max(position), m - 1))).to(
                tl.int32
            )
        )
    for adapter in tl.range(first, last, num_stages=1):
        inside = position < m
        if starts_ptr is not None:
            inside &= position >= tl.load(starts_ptr + adapter)
            inside &= position < tl.load(starts_ptr + adapter + 1)
        ours_ptr = matrix_ptr + tl.cast(adapter, tl.int64) * rank * n_columns
        for start in tl.range(0, rank, RB, num_stages=1):
            j = start + tl.arange(0, RB)
            mask = inside[:, None] & (j < rank)[None, :]
            low = tl.load(
                low_ptr + (row * low_stride)[:, None] + j[None, :], mask=mask, other=0.0
            ).to(T)  # [BM, RB]
            mask = (j < rank)[:, None] & (column < n_columns)[None, :]
            offset = (
                j.to(tl.int64)[:, None] * stride_j + column.to(tl.int64)[None, :] * stride_column
            )
            matrix = tl.load(ours_ptr + offset, mask=mask, other=0.0).to(T)  # [RB, columns]
            if TRANSPOSED:
                acc = tl.dot(tl.trans(matrix), tl.trans(low), acc, input_precision="ieee")
            else:
                acc = tl.dot(low, matrix, acc, input_precision="ieee")
    return acc


@triton.jit
def rank_block(block, RANKS: tl.constexpr, RB: tl.constexpr):
    """-> projection, first and end column of a block of at most RB of the sum(RANKS) columns, all of one projection."""
    which, first, end = block * 0, block * 0, block * 0
    blocks, columns = 0, 0
    for i in tl.static_range(len(RANKS)):
        here = block >= blocks
        which = tl.where(here, i, which)
        first = tl.where(here, columns + (block - blocks) * RB, first)
        end = tl.where(here, columns + RANKS[i], end)
        blocks += (RANKS[i] + RB - 1) // RB
        columns += RANKS[i]
    return which, first, end


# ---------------------------------------------------------------- S


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    seeds_ptr,
    order_ptr,
    starts_ptr,
    scales_ptr,
    s_ptr,
    scaling,
    threshold,
    m,
    k,
    total,
    adapters,
    steps,
    RANKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RB: tl.constexpr,
):
    """S[M, total] = scaling scales[adapter] drop(x)[M, K] A^T, A [adapters, total, K] of
    projections of ranks RANKS.

    Grid: (blocks of columns of a projection, fastest, so that x is read from memory once, x tiles
    of rows of an adapter, splits of K). Each projection has its mask; its 1 / (1 - p) is in
    `scaling`: x itself is not rounded again. With more than one split S is [splits, M, total], to
    be added up.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    projection, first, last = rank_block(tl.program_id(0) % BLOCKS, RANKS, RB)
    adapter, begin, end = segment_tile(
        tl.program_id(0) // BLOCKS, starts_ptr, m, BM, adapters, ADAPTERS
    )
    split = tl.program_id(1)
    position = begin + tl.arange(0, BM)
    row = rows_at(order_ptr, position, m)
    j = first + tl.arange(0, RB)
    a_ptr += tl.maximum(adapter, 0).to(tl.int64) * total * k
    scale = tl.cast(scaling, tl.float32)  # compiled callers hand over float64
    if scales_ptr is not None:
        scale *= tl.load(scales_ptr + adapter, mask=adapter >= 0, other=0.0)
    stop = tl.minimum((split + 1) * steps, tl.cdiv(k, BK))
    stop = tl.where((adapter >= 0) & (begin < end), stop, 0)
    acc = tl.zeros([BM, RB], tl.float32)
    for step in range(split * steps, stop):
        column = step * BK + tl.arange(0, BK)
        mask = (column < k)[None, :]
        x = tl.load(x_ptr + (row * k)[:, None] + column[None, :], mask=mask, other=0.0)  # [BM, BK]
        if seeds_ptr is not None:
            x = tl.where(
                dropout_keeps(seeds_ptr + projection, row, step * BK, threshold, BK), x, 0.0
            ).to(T)
        mask = mask & (j < last)[:, None]
        a = tl.load(
            a_ptr + j.to(tl.int64)[:, None] * k + column[None, :], mask=mask, other=0.0
        )  # [RB, BK]
        acc = tl.dot(x, tl.trans(a.to(T)), acc, input_precision="ieee")
    s_ptr += split.to(tl.int64) * m * total
    mask = (position < end)[:, None] & (j < last)[None, :]
    tl.store(s_ptr + (row * total)[:, None] + j[None, :], acc * scale, mask=mask)


# ---------------------------------------------------------------- y


@triton.jit
def _sum_dense(x_ptr, w_ptr, stride_n, stride_k, row, out, begin, end, n, k, BK: tl.constexpr):
    """W[out] x[row]^T over tiles begin to end of BK columns, [BN, BM] in fp32."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    w_ptr += (out.to(tl.int64) * stride_n)[:, None]
    for step in range(begin, end):
        column = step * BK + tl.arange(0, BK)
        mask = (out < n)[:, None] & (column < k)[None, :]
        w = tl.load(
            w_ptr + (column.to(tl.int64) * stride_k)[None, :], mask=mask, other=0.0
        )  # [BN, BK]
        x = tl.load(
            x_ptr + (row * k)[:, None] + column[None, :], mask=(column < k)[None, :], other=0.0
        )  # [BM, BK]
        acc = tl.dot(w.to(T), tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    stride_n,
    stride_k,
    s_ptr,
    s_stride,
    b_ptr,
    gain_ptr,
    bias_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
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
    PAIRED: tl.constexpr,
    ASM: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RB: tl.constexpr,
):
    """y[M, N] = gain (x[M, K] W^T + S B^T) + bias, as y^T: see nf4_linear.py. BASE "none": without
    x W^T.

    Grid: (tiles of M, fastest, x tiles of N, splits of K). With more than one split y is fp32
    [splits, M, N], to be added up; S B^T and the bias are in the first.
    """
    tiles_m = tl.cdiv(m, BM)
    position = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    row = rows_at(order_ptr, position, m)
    out = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    begin, end = split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BK))
    if BASE == "dense":
        acc = _sum_dense(x_ptr, w_ptr, stride_n, stride_k, row, out, begin, end, n, k, BK)
    elif BASE == "none":
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        weight = (w_ptr, code_ptr, (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr))
        if BASE == "words":
            acc = sum_words(x_ptr, weight, row, out, begin, end, n, k, BK, BLOCKSIZE, NESTED, ASM)
        else:
            acc = sum_tiles(
                x_ptr, weight, row, out, begin, end, m, n, k, BK, BLOCKSIZE, NESTED, ALIGNED, PAIRED
            )
    if b_ptr is not None:
        acc = add_low_rank(
            acc,
            s_ptr,
            s_stride,
            position,
            row,
            b_ptr,
            out,
            n,
            rank,
            1,
            tl.where(split == 0, rank, 0),
            starts_ptr,
            m,
            adapters,
            x_ptr.dtype.element_ty,
            ADAPTERS,
            RB,
            True,
        )
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out, mask=out < tl.where(split == 0, n, 0), other=0.0).to(
            tl.float32
        )[:, None]
    y_ptr += split.to(tl.int64) * m * n
    mask = (position < m)[None, :] & (out < n)[:, None]
    tl.store(y_ptr + (row * n)[None, :] + out[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- ||W||^2


@triton.jit
def _row_squares_kernel(
    w_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    stride_n,
    stride_k,
    out_ptr,
    n,
    k,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[N] = the sum of the squares of each row of W. Grid: tiles of N; BLOCKSIZE 0: dense."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for first in range(0, k, BK):
        if BLOCKSIZE == 0:
            column = first + tl.arange(0, BK)
            offset = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_k
            mask = (row < n)[:, None] & (column < k)[None, :]
            w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(w * w, axis=1)
        else:
            scales = (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
            even, odd = load_tile(
                w_ptr, code_ptr, scales, row, first, n, k, BK, BLOCKSIZE, NESTED, ALIGNED
            )
            acc += tl.sum(even * even + odd * odd, axis=1)
    tl.store(out_ptr + row, acc, mask=row < n)


# ---------------------------------------------------------------- choices

# As nf4_linear.CHOICES, of a dense W: up to where a fused product costs less than writing and
# reading y once more. For every GPU what an H200 took at these M alone, 32 being between two; W of
# 4096 x 4096 in bf16, us fwd / backward:
#            M = 1         16         64        128        256
#   gemv   14 / 13    12 / 12    20 / 20    24 / 24    35 / 35
#   fused  12 / 11     9 / 11    13 / 18    17 / 21    26 / 32
#   panel  12 / 12    12 / 12    11 / 11    17 / 16    19 / 19
CHOICES = ((32, "fused"),)


def choose(op: str, m: int, shape: tuple[int, int], blocksize: int, x: torch.Tensor) -> str:
    """The path of "linear" or "linear_backward"."""
    if blocksize:
        return nf4_linear.choose(op, m, *shape, x.dtype, capability(x))[0]
    row = nf4_linear.CHOICES_FP32 if x.dtype == torch.float32 else CHOICES
    return next((path for limit, path in row if m <= limit), "panel")


def tile_config(
    op: str,
    path: str,
    base: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    blocksize: int,
    capability: tuple[int, int],
) -> dict[str, int]:
    """BM, BN, BK, num_warps, num_stages of the kernels of "linear" and "linear_backward"."""
    if base in ("words", "tiles"):
        return nf4_linear.tile_config(
            op if base == "tiles" else "linear_words", path, m, k, dtype, blocksize, capability
        )
    if dtype == torch.float32:
        return dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=1 if base == "none" else 2)
    if (
        base == "none"
    ):  # bound by writing the result; four warps of several adapters' backward spill on an A100
        return dict(BM=64, BN=64, BK=64, num_warps=4 if op == "linear" else 8, num_stages=1)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    if path == "gemv":
        return dict(BM=bm, BN=64, BK=64, num_warps=4, num_stages=4)
    if op == "linear":
        return dict(BM=bm, BN=128, BK=64, num_warps=4, num_stages=3)
    return dict(BM=bm, BN=32, BK=128, num_warps=8, num_stages=3)


def rank_config(rank: int, dtype: torch.dtype, most: int = 64) -> int:
    """RB: columns of a block of the rank; at least a tensor core's 16."""
    return 16 if dtype == torch.float32 else min(most, max(16, next_power_of_2(rank)))


def shrink_config(m: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return dict(BM=16, BK=32, num_warps=4, num_stages=2)
    return dict(BM=16 if m <= 16 else 32 if m <= 32 else 64, BK=128, num_warps=4, num_stages=3)


def row_squares_config(blocksize: int) -> dict[str, int]:
    return dict(BN=16, BK=min(blocksize, 128) if blocksize else 128, num_warps=4)


# ---------------------------------------------------------------- launchers


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[M, columns], contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def strided_rows_of(x: torch.Tensor) -> torch.Tensor:
    """[M, columns], contiguous in a row: S and U may be columns of a wider one."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def base_arguments(base: list[torch.Tensor], blocksize: int) -> tuple:
    """What kernels take for W: six pointers, two strides."""
    if blocksize:
        return *pointers(base), 0, 0
    return base[0], None, None, None, None, None, *base[0].stride()


def route_arguments(route: list[torch.Tensor]) -> tuple[tuple, int]:
    """-> order, starts, scales as kernels take them; ADAPTERS."""
    if not route:
        return (None, None, None), 1
    return tuple(t.contiguous() for t in route), next_power_of_2(len(route[1]))


def projections(
    ranks: list[int], seeds: torch.Tensor | None, block: int
) -> tuple[tuple[int, ...], int]:
    """-> RANKS and BLOCKS of rank_block: without masks, all projections are one."""
    ranks = tuple(r for r in ranks) if seeds is not None else (sum(ranks),)
    return ranks, sum(cdiv(r, block) for r in ranks)


def shrink(x, lora_a, scaling, dropout_p, seeds, route):
    """S [.., sum of ranks] fp32 of all projections; lora_a: [n, r, in] each."""
    ranks, n, k = [a.shape[1] for a in lora_a], lora_a[0].shape[0], x.shape[-1]
    rows, total = rows_of(x), sum(ranks)
    m = len(rows)
    s = torch.empty(m, total, dtype=torch.float32, device=x.device)
    if s.numel():
        threshold = dropout_threshold(dropout_p)
        seeds = None if threshold == 0 else seeds.contiguous()
        scale = scaling[0] if len(set(scaling)) == 1 else 1.0
        a = lora_a[0].contiguous() if len(lora_a) == 1 else torch.cat(lora_a, dim=1)
        config = shrink_config(m, x.dtype)
        rb = rank_config(max(ranks) if seeds is not None else total, x.dtype)
        blocks = projections(ranks, seeds, rb)
        (order, starts, scales), adapters = route_arguments(route)
        tiles = (cdiv(m, config["BM"]) + (n if route else 0)) * blocks[1]
        splits, steps = split_loop(
            "gemv" if m <= 16 else "fused", tiles, max(1, cdiv(k, config["BK"]))
        )
        target = (
            s
            if splits == 1
            else torch.empty(splits, m, total, dtype=torch.float32, device=x.device)
        )
        constants = dict(
            RANKS=blocks[0], BLOCKS=blocks[1], ADAPTERS=adapters, RB=rb, **config, **FUSED
        )
        arguments = (
            rows,
            a,
            seeds,
            order,
            starts,
            scales,
            target,
            scale / (1 - threshold / 65536),
            threshold,
        )
        _shrink_kernel[(tiles, splits)](*arguments, m, k, total, n, steps, **constants)
        if splits > 1:
            sum_parts(target, None, s)
        if len(set(scaling)) > 1:
            for part, factor in zip(s.split(ranks, dim=1), scaling):
                part.mul_(factor)
    return s.view(*x.shape[:-1], total)


def linear(x, s, base, lora_b, bias, gain, shape, blocksize, route, path=None):
    """y in x's dtype; lora_b: [n, out, r]. `path` overrides `choose`."""
    n = shape[0]
    rows, y = rows_of(x), torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    m, bias, gain = len(rows), contiguous(bias), contiguous(gain)
    path = path or choose("linear", m, shape, blocksize, x)
    low = (strided_rows_of(s), lora_b.contiguous()) if s.shape[-1] else None
    out = y.view(m, n)
    if path != "panel":
        _launch_linear(rows, low, base, bias, gain, shape, blocksize, route, path, out)
        return y
    begun = low is not None or bias is not None
    if begun:
        _launch_linear(rows, low, None, bias, gain, shape, 0, route, path, out)
    for first, last, w in row_panels(base, gain, shape, blocksize, x.dtype):
        out[:, first:last].addmm_(rows, w.t(), beta=int(begun))
    return y


def _launch_linear(x, low, base, bias, gain, shape, blocksize, route, path, y):
    """y = gain (x W^T + S B^T) + bias in one kernel; without base, no x W^T."""
    (m, k), n = x.shape, shape[0]
    aligned = paired = words = False
    if blocksize:
        aligned, paired, words = formats(x, base, blocksize)
    kind = "none" if base is None else "dense" if not blocksize else "words" if words else "tiles"
    config = tile_config("linear", path, kind, m, k, x.dtype, blocksize, capability(x))
    tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
    splits, steps = (
        (1, 0) if base is None else split_loop(path, tiles, max(1, cdiv(k, config["BK"])))
    )
    target = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    s, b = low or (None, None)
    rank = 0 if low is None else s.shape[1]
    (order, starts, _), adapters = route_arguments(route)
    weight = (None,) * 6 + (0, 0) if base is None else base_arguments(base, blocksize)
    low_rank = (s, 0 if low is None else s.stride(0), b)
    sizes = (m, n, k, rank, 0 if low is None else b.shape[0], steps)
    constants = dict(
        BASE=kind, BLOCKSIZE=blocksize, NESTED=blocksize > 0 and len(base) == 6, ALIGNED=aligned
    )
    constants |= dict(
        PAIRED=paired, ASM=isinstance(_linear_kernel, triton.JITFunction), ADAPTERS=adapters
    )
    constants |= dict(RB=rank_config(rank, x.dtype, 32), **config, **FUSED)
    _linear_kernel[(tiles, splits)](
        x, *weight, *low_rank, gain, bias, order, starts, target, *sizes, **constants
    )
    if splits > 1:
        sum_parts(target, None, y)


def row_panels(base, gain, shape, blocksize, dtype):
    """(first, last, rows first to last of gain W in dtype), the same memory each time."""
    (n, k), size = shape, nf4_linear.PANEL_BYTES["linear"] // dtype.itemsize
    if not blocksize and gain is None and base[0].dtype == dtype:
        yield 0, n, base[0]
        return
    panel = min(
        n, max(128, size // max(k, 1) // 128 * 128)
    )  # 128: rows of a tile of a dense product
    workspace = torch.empty(panel, k, dtype=dtype, device=base[0].device)
    for first in range(0, n, panel):
        last = min(n, first + panel)
        w = workspace[: last - first]
        decoded = w if blocksize else base[0][first:last]
        if blocksize:
            dequantize_segments(base, blocksize, w, first * k, 1, w.numel(), 0)
        if gain is not None:
            torch.mul(decoded, gain[first:last, None], out=w)
        elif not blocksize:
            w.copy_(decoded)
        yield first, last, w


def column_panels(base, shape, blocksize, dtype):
    """The same of columns of W, so that an element of dx is one product."""
    (n, k), size = shape, nf4_linear.PANEL_BYTES["linear_backward"] // dtype.itemsize
    if not blocksize and base[0].dtype == dtype:
        yield 0, k, base[0]
        return
    step = max(128, blocksize)  # panels begin where blocks do, if rows do
    panel = min(k, max(step, size // max(n, 1) // step * step))
    workspace = torch.empty(n * panel, dtype=dtype, device=base[0].device)
    for first in range(0, k, panel):
        last = min(k, first + panel)
        w = workspace[: n * (last - first)].view(n, last - first)
        if blocksize and last - first == k:
            dequantize_segments(base, blocksize, w, 0, 1, n * k, 0)
        elif blocksize:
            dequantize_segments(base, blocksize, w, first, n, last - first, k)
        else:
            w.copy_(base[0][:, first:last])
        yield first, last, w


def row_squares(base, shape, blocksize):
    """||W||^2 of each row, [out] fp32."""
    n, k = shape
    out = torch.empty(n, dtype=torch.float32, device=base[0].device)
    if n:
        config = row_squares_config(blocksize)
        constants = dict(
            BLOCKSIZE=blocksize, NESTED=len(base) == 6, ALIGNED=blocksize > 0 and k % blocksize == 0
        )
        grid = (cdiv(n, config["BN"]),)
        _row_squares_kernel[grid](
            *base_arguments(base, blocksize), out, n, k, **constants, **config, **FUSED
        )
    return out
