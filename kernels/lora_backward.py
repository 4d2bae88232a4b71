"""LoRA on a GPU, backward, of y = gain (x W^T + S B^T) + bias with S = scaling drop(x) A^T.

    U  = scaling (gain dy) B               expand_backward
    dB = gain (S^T dy)^T                   expand_backward, with the column sums of dy and of dy * z
    dx = (gain dy) W + mask (U A) + add    linear_backward; `mask` is dropout's with 1 / (1 - p)
    dA = U^T drop(x)                       shrink_backward

lora.py describes the forward and the paths, lora_base.py the weight W, lora_routing.py how adapters
share a batch, and lora_outer.py the kernel of U, dA and dB. The functions
`reference.lora_<launcher>_op` are the definitions.

On the panel path the kernel writes `mask (U A) + add` first, and cuBLAS adds (gain dy) W to it.
Those two terms are rounded once more, to x's dtype. In the fused kernels a gain multiplies the rows
of W or B before their rounding. Before panels it multiplies dy, which is rounded once more.
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
    column_panels,
    contiguous,
    flatten_rows,
    flatten_strided_rows,
    tile_config,
)
from .lora_outer import launch_outer
from .lora_routing import add_low_rank, rank_block_size, route_arguments, rows_at
from .nf4_loops import sum_tiles_backward

# Elements that a program of scale_columns_kernel owns; derived, not measured on a GPU.
SCALE_TILE = 2048


# ---------------------------------------------------------------- kernels


@triton.jit
def scale_columns_kernel(x_ptr, factors_ptr, out_ptr, numel, cols, BLOCK: tl.constexpr):
    """Compute out[i] = x[i] * factors[i % cols]. Grid: tiles of BLOCK elements, one a program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    factor = tl.load(factors_ptr + i % cols, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_dense_backward(
    dy_ptr, w_ptr, stride_n, stride_k, gain_ptr, row, column, begin, end, n, k, BN: tl.constexpr
):
    """Return the sum of dy[row] (gain W)[:, column] over tiles `begin` to `end` of BN rows of W.

    The result is fp32 [BM, BK].
    """
    T: tl.constexpr = dy_ptr.dtype.element_ty
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    w_ptr += (column.to(tl.int64) * stride_k)[None, :]
    for step in range(begin, end):
        out = step * BN + tl.arange(0, BN)
        mask = (out < n)[:, None] & (column < k)[None, :]
        w_address = w_ptr + (out.to(tl.int64) * stride_n)[:, None]
        w = tl.load(w_address, mask=mask, other=0.0)  # [BN, BK]
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + out, mask=out < n, other=0.0).to(tl.float32)
            w = w.to(tl.float32) * gain[:, None]
        mask = (out < n)[None, :]
        dy = tl.load(dy_ptr + (row * n)[:, None] + out[None, :], mask=mask, other=0.0)  # [BM, BN]
        acc = tl.dot(dy, w.to(T), acc, input_precision="ieee")
    return acc


@triton.jit
def lora_linear_backward_kernel(
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
    """Compute dx[M, K] = (gain dy)[M, N] W + mask (U A) + add.

    BASE says how W is read: "dense", "tiles" by sum_tiles_backward, or "none" without the first
    term. Grid: (tiles of M, fastest, x tiles of K, splits of N). With more than one split dx is
    fp32 [splits, M, K], to be added up; the other two terms are in the first.
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
        add_mask = mask & (column < tl.where(split == 0, k, 0))[None, :]
        acc += tl.load(add_ptr + offset, mask=add_mask, other=0.0).to(tl.float32)
    dx_ptr += split.to(tl.int64) * m * k
    tl.store(dx_ptr + offset, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def linear_backward(
    dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route, path=None
):
    """Return dx in dy's dtype; lora_a is [n, r, in], and `path` overrides `choose`."""
    k = shape[1]
    rows = flatten_rows(dy)
    dx = torch.empty(*dy.shape[:-1], k, dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    m, gain = len(rows), contiguous(gain)
    path = path or choose("linear_backward", m, shape, blocksize, dy)
    low = (flatten_strided_rows(u), lora_a.contiguous()) if u.shape[-1] else None
    add = None if add is None else flatten_rows(add)
    threshold = dropout_threshold(dropout_p)
    mask = None if threshold == 0 else seed.contiguous(), threshold
    out = dx.view(m, k)
    if path != "panel":
        _launch_linear_backward(
            rows, low, base, gain, add, shape, blocksize, mask, route, path, out
        )
        return dx
    # cuBLAS adds to what the kernel has written, if there was anything to write.
    accumulates = low is not None or add is not None
    if accumulates:
        _launch_linear_backward(rows, low, None, None, add, shape, 0, mask, route, path, out)
    # The gain multiplies dy, which is smaller than W, so that a dense W stays as it is.
    if gain is not None:
        rows = scale_columns(rows, gain)
    for first, last, w in column_panels(base, shape, blocksize, dy.dtype):
        out[:, first:last].addmm_(rows, w, beta=int(accumulates))
    return dx


def scale_columns(x, factors):
    """Return x[M, N] * factors[N], computed in fp32 and rounded to x's dtype."""
    out = torch.empty_like(x)
    scale_columns_kernel[(cdiv(x.numel(), SCALE_TILE),)](
        x, factors, out, x.numel(), x.shape[1], BLOCK=SCALE_TILE, num_warps=4, **FUSED
    )
    return out


def _launch_linear_backward(dy, low, base, gain, add, shape, blocksize, mask, route, path, dx):
    """Launch lora_linear_backward_kernel for dx = (gain dy) W + mask (U A) + add.

    Without base there is no (gain dy) W.
    """
    m, (n, k) = len(dy), shape
    base_format = "none" if base is None else "tiles" if blocksize else "dense"
    config = tile_config(
        "linear_backward", path, base_format, m, k, dy.dtype, blocksize, capability(dy)
    )
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
    dropout = 1 / (1 - threshold / 65536), threshold
    sizes = (*dropout, m, n, k, rank, 0 if low is None else len(a), steps)
    constants = dict(BASE=base_format, BLOCKSIZE=blocksize, NESTED=blocksize > 0 and len(base) == 6)
    constants |= dict(ALIGNED=blocksize > 0 and k % blocksize == 0, ADAPTERS=adapters)
    constants |= dict(RB=rank_block_size(rank, dy.dtype, 32), **config, **FUSED)
    arguments = (dy, *weight, *low_rank, gain, add, seed, order, starts, target, *sizes)
    lora_linear_backward_kernel[(tiles, splits)](*arguments, **constants)
    if splits > 1:
        sum_parts(target, None, dx)


def expand_backward(dy, s, lora_b, gain, z, scaling, route, needs):
    """Return U [.., r], dB [n, out, r], sum [out] and weighted_sum [out].

    Those that `needs`, four booleans, does not ask for are [0].
    """
    n, out, rank = lora_b.shape
    fp32 = dict(dtype=torch.float32, device=dy.device)
    rows = flatten_rows(dy)
    m = len(rows)
    # Whatever is not needed is a tensor of its own, since the results of an op share no memory.
    u = torch.empty((m, rank) if needs[0] else 0, **fp32)
    db_shape = lora_b.shape if needs[1] else (0,)
    db = torch.zeros(db_shape, dtype=lora_b.dtype, device=dy.device)
    sums = [torch.zeros(out if need else 0, **fp32) for need in needs[2:]]
    computes = [need and size > 0 for need, size in zip(needs, (rank, rank * n, 1, 1))]
    if m and out and any(computes):
        parts = launch_outer(
            rows,
            low=s if computes[1] else None,
            ranks=[rank],
            b=lora_b if computes[0] else None,
            gain=gain,
            z=z,
            scaling=scaling,
            route=route,
            n=n,
            sums=computes[2:],
        )
        if computes[0]:
            sum_parts(parts.u, None, u)
        if computes[1]:
            parts.add_up(db, (1, rank), 0, rank, gain, 1.0)
        for i, part in enumerate(parts.sums):
            if part is not None:
                sums[i] = part.sum(0)
    elif needs[0]:
        u.zero_()
    return u.view(*dy.shape[:-1], rank) if needs[0] else u, db, *sums


def shrink_backward(u, x, ranks, n, dropout_p, seeds, route, dtype):
    """Return dA [n, r, in] of each projection; `u` has the columns of all projections."""
    rows, k = flatten_rows(x), x.shape[-1]
    grads = [torch.zeros(n, r, k, dtype=dtype, device=x.device) for r in ranks]
    if len(rows) == 0 or k * n * sum(ranks) == 0:
        return grads
    threshold = dropout_threshold(dropout_p)
    seeds = None if threshold == 0 else seeds
    parts = launch_outer(
        rows, low=u, ranks=ranks, seeds=seeds, threshold=threshold, route=route, n=n
    )
    first = 0
    for da, r in zip(grads, ranks):
        if r:
            parts.add_up(da, (k, 1), first, r, None, 1 / (1 - threshold / 65536))
        first += r
    return grads
