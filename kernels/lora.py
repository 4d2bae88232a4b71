"""LoRA on a GPU, forward: S = scaling drop(x) A^T and y = gain (x W^T + S B^T) + bias.

The backward is in lora_backward.py and lora_weights_backward.py. lora_base.py says what W is, and
lora_routing.py how several adapters share a batch. `reference.lora_shrink_op`,
`reference.lora_linear_op` and `reference.lora_row_squares_op` are the definitions.

There are two ways to multiply with W, and `choose` takes a path by the number of rows M:
    gemv, fused  One kernel. S B^T is r more columns of the sum in the fp32 accumulator of the main
                 loop, which is rounded once. NF4 weights are decoded by the loops of nf4_loops.py,
                 dense ones are multiplied tile by tile.
    panel        Many rows. The kernel, without its main loop, writes y = gain S B^T + bias, and
                 cuBLAS adds x W^T to it, a panel of decoded or cast rows of W at a time (a dense W
                 of x's dtype whole). That rounds the LoRA half and the bias once more, to x's
                 dtype, before the sum. A gain then multiplies the panel, which rounds W once more.
S is fp32 in memory, and is rounded to x's dtype on its way to the tensor cores, as are A and B. For
fp32 there is no TF32.

A pointer that is None stands for a missing tensor. Launchers do not check their arguments:
pyfast/ops/registered/lora.py does.
"""

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps, dropout_threshold
from ._launch import FUSED, capability, cdiv
from ._split_sums import split_loop, sum_parts
from .lora_base import (
    base_arguments,
    choose,
    contiguous,
    flatten_rows,
    flatten_strided_rows,
    row_panels,
    tile_config,
)
from .lora_routing import (
    add_low_rank,
    group_ranks,
    rank_block,
    rank_block_size,
    route_arguments,
    rows_at,
    segment_tile,
)
from .nf4_decode import load_tile
from .nf4_linear import find_formats
from .nf4_loops import sum_tiles, sum_words

# ---------------------------------------------------------------- S


@triton.jit
def lora_shrink_kernel(
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
    """Compute S[M, total] = scaling scales[adapter] drop(x)[M, K] A^T.

    A is [adapters, total, K], with the ranks RANKS of several projections side by side. Grid:
    (blocks of columns of a projection, fastest, so that x is read from memory once, x tiles of rows
    of an adapter, splits of K). Each projection has its dropout mask. The mask's 1 / (1 - p) is in
    `scaling`, so that x itself is not rounded again. With more than one split S is [splits, M,
    total], to be added up.
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
    # Compiled callers pass a float64.
    scale = tl.cast(scaling, tl.float32)
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
            keeps = dropout_keeps(seeds_ptr + projection, row, step * BK, threshold, BK)
            x = tl.where(keeps, x, 0.0).to(T)
        mask = mask & (j < last)[:, None]
        a_address = a_ptr + j.to(tl.int64)[:, None] * k + column[None, :]
        a = tl.load(a_address, mask=mask, other=0.0)  # [RB, BK]
        acc = tl.dot(x, tl.trans(a.to(T)), acc, input_precision="ieee")
    s_ptr += split.to(tl.int64) * m * total
    mask = (position < end)[:, None] & (j < last)[None, :]
    tl.store(s_ptr + (row * total)[:, None] + j[None, :], acc * scale, mask=mask)


# ---------------------------------------------------------------- y


@triton.jit
def _sum_dense(x_ptr, w_ptr, stride_n, stride_k, row, out, begin, end, n, k, BK: tl.constexpr):
    """Return the fp32 [BN, BM] sum of W[out] x[row]^T over tiles `begin` to `end` of BK columns."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    w_ptr += (out.to(tl.int64) * stride_n)[:, None]
    for step in range(begin, end):
        column = step * BK + tl.arange(0, BK)
        mask = (out < n)[:, None] & (column < k)[None, :]
        w_address = w_ptr + (column.to(tl.int64) * stride_k)[None, :]
        w = tl.load(w_address, mask=mask, other=0.0)  # [BN, BK]
        mask = (column < k)[None, :]
        x = tl.load(x_ptr + (row * k)[:, None] + column[None, :], mask=mask, other=0.0)  # [BM, BK]
        acc = tl.dot(w.to(T), tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def lora_linear_kernel(
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
    """Compute y[M, N] = gain (x[M, K] W^T + S B^T) + bias, as y^T for nf4_linear_kernel's reason.

    BASE says how W is read: "dense", "words" by sum_words, "tiles" by sum_tiles, or "none" without
    x W^T. Grid: (tiles of M, fastest, x tiles of N, splits of K). With more than one split y is
    fp32 [splits, M, N], to be added up; S B^T and the bias are in the first.
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
        mask = out < tl.where(split == 0, n, 0)
        acc += tl.load(bias_ptr + out, mask=mask, other=0.0).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * m * n
    mask = (position < m)[None, :] & (out < n)[:, None]
    tl.store(y_ptr + (row * n)[None, :] + out[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- ||W||^2


@triton.jit
def lora_row_squares_kernel(
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
    """Compute out[N], the sum of the squares of each row of W; W is dense where BLOCKSIZE is 0.

    Grid: tiles of BN rows; a program owns one.
    """
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


# ---------------------------------------------------------------- launchers


def shrink_config(m: int, dtype: torch.dtype) -> dict[str, int]:
    """Return BM, BK, num_warps and num_stages of lora_shrink_kernel."""
    if dtype == torch.float32:
        return dict(BM=16, BK=32, num_warps=4, num_stages=2)
    return dict(BM=16 if m <= 16 else 32 if m <= 32 else 64, BK=128, num_warps=4, num_stages=3)


def row_squares_config(blocksize: int) -> dict[str, int]:
    """Return BN, BK and num_warps of lora_row_squares_kernel."""
    return dict(BN=16, BK=min(blocksize, 128) if blocksize else 128, num_warps=4)


def shrink(x, lora_a, scaling, dropout_p, seeds, route):
    """Return S [.., sum of ranks] in fp32 for all projections; each of lora_a is [n, r, in]."""
    ranks, n, k = [a.shape[1] for a in lora_a], lora_a[0].shape[0], x.shape[-1]
    rows, total = flatten_rows(x), sum(ranks)
    m = len(rows)
    s = torch.empty(m, total, dtype=torch.float32, device=x.device)
    if s.numel() == 0:
        return s.view(*x.shape[:-1], total)
    threshold = dropout_threshold(dropout_p)
    seeds = None if threshold == 0 else seeds.contiguous()
    # One scaling for all projections is the kernel's; several multiply the columns of S afterwards.
    scale = scaling[0] if len(set(scaling)) == 1 else 1.0
    a = lora_a[0].contiguous() if len(lora_a) == 1 else torch.cat(lora_a, dim=1)
    config = shrink_config(m, x.dtype)
    rb = rank_block_size(max(ranks) if seeds is not None else total, x.dtype)
    grouped_ranks, blocks = group_ranks(ranks, seeds, rb)
    (order, starts, scales), adapters = route_arguments(route)
    tiles = (cdiv(m, config["BM"]) + (n if route else 0)) * blocks
    path = "gemv" if m <= 16 else "fused"
    splits, steps = split_loop(path, tiles, max(1, cdiv(k, config["BK"])))
    target = s if splits == 1 else s.new_empty(splits, m, total)
    arguments = (rows, a, seeds, order, starts, scales, target)
    sizes = (scale / (1 - threshold / 65536), threshold, m, k, total, n, steps)
    constants = dict(RANKS=grouped_ranks, BLOCKS=blocks, ADAPTERS=adapters, RB=rb)
    lora_shrink_kernel[(tiles, splits)](*arguments, *sizes, **constants, **config, **FUSED)
    if splits > 1:
        sum_parts(target, None, s)
    if len(set(scaling)) > 1:
        for part, factor in zip(s.split(ranks, dim=1), scaling):
            part.mul_(factor)
    return s.view(*x.shape[:-1], total)


def linear(x, s, base, lora_b, bias, gain, shape, blocksize, route, path=None):
    """Return y in x's dtype; lora_b is [n, out, r], and `path` overrides `choose`."""
    n = shape[0]
    rows = flatten_rows(x)
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    m, bias, gain = len(rows), contiguous(bias), contiguous(gain)
    path = path or choose("linear", m, shape, blocksize, x)
    low = (flatten_strided_rows(s), lora_b.contiguous()) if s.shape[-1] else None
    out = y.view(m, n)
    if path != "panel":
        _launch_linear(rows, low, base, bias, gain, shape, blocksize, route, path, out)
        return y
    # cuBLAS adds to what the kernel has written, if there was anything to write.
    accumulates = low is not None or bias is not None
    if accumulates:
        _launch_linear(rows, low, None, bias, gain, shape, 0, route, path, out)
    for first, last, w in row_panels(base, gain, shape, blocksize, x.dtype):
        out[:, first:last].addmm_(rows, w.t(), beta=int(accumulates))
    return y


def _launch_linear(x, low, base, bias, gain, shape, blocksize, route, path, y):
    """Launch lora_linear_kernel for y = gain (x W^T + S B^T) + bias; without base, no x W^T."""
    (m, k), n = x.shape, shape[0]
    aligned = paired = False
    base_format = "none" if base is None else "dense"
    if blocksize:
        aligned, paired, words = find_formats(x, base, blocksize)
        base_format = "words" if words else "tiles"
    config = tile_config("linear", path, base_format, m, k, x.dtype, blocksize, capability(x))
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
    constants = dict(BASE=base_format, BLOCKSIZE=blocksize, ADAPTERS=adapters)
    constants |= dict(NESTED=blocksize > 0 and len(base) == 6, ALIGNED=aligned, PAIRED=paired)
    # The interpreter cannot run assembly; its kernels are no JITFunction.
    constants |= dict(ASM=isinstance(lora_linear_kernel, triton.JITFunction))
    constants |= dict(RB=rank_block_size(rank, x.dtype, 32), **config, **FUSED)
    arguments = (x, *weight, *low_rank, gain, bias, order, starts, target, *sizes)
    lora_linear_kernel[(tiles, splits)](*arguments, **constants)
    if splits > 1:
        sum_parts(target, None, y)


def row_squares(base, shape, blocksize):
    """Return the squared norm of each row of W, fp32 [out]."""
    n, k = shape
    out = torch.empty(n, dtype=torch.float32, device=base[0].device)
    if n:
        config = row_squares_config(blocksize)
        constants = dict(
            BLOCKSIZE=blocksize, NESTED=len(base) == 6, ALIGNED=blocksize > 0 and k % blocksize == 0
        )
        grid = (cdiv(n, config["BN"]),)
        lora_row_squares_kernel[grid](
            *base_arguments(base, blocksize), out, n, k, **constants, **config, **FUSED
        )
    return out
