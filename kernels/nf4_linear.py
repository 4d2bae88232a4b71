"""Products with 4-bit weights on a GPU: y = x W^T + bias and dx = dy W, with no more of W in 16
bits than a panel.

The weight is nf4.py's `state`. Three paths, of which `choose` takes one by the number of rows M:
    gemv   few rows: small tiles, the sum split over many programs; bound by reading W
    fused  more rows: larger tiles that decode W on the way to the tensor cores
    panel  many rows: W is dequantized a panel at a time for a dense product of cuBLAS
All accumulate in fp32 and add splits in a fixed order: same inputs, same bits.

How W is rounded. The definition's weight is code * scale in fp32.
  - linear, 16-bit x, blocksize >= 64 and rows of whole blocks (every real model), gemv and fused: the CODE TABLE is
    rounded to x's type, after a factor that suits it (nf4.code_gain), and the scale multiplies the
    sums in fp32. This is not the product with W rounded to 16 bits: the error of a weight is 1.3e-3
    rms (bf16) or 1.4e-4 (fp16) of the weights' rms where rounding each weight gives 1.7e-3 or
    2.1e-4; but it is the same error for the same code.
  - everything else in 16 bits: each weight is rounded to x's type, as in a product with a 16-bit copy.
  - fp32: nothing is rounded, and no TF32.
"""

import torch
import triton
import triton.language as tl

from ._launch import capability, cdiv
from .nf4 import (
    code_gain,
    code_tables,
    decode_pairs,
    decode_words,
    dequantize_segments,
    load_scale,
    load_tile,
    pointers,
)

# Of dequantized weight at a time on the panel path. More is no faster on an H200; the backward's
# panels are columns, and products with narrow ones leave SMs idle.
PANEL_BYTES = {"linear": 64 << 20, "linear_backward": 128 << 20}
FUSED = dict(enable_fp_fusion=True)  # said, because Triton 3.10 turns the default around
SUM_TILE = 1024  # elements a program of _sum_kernel owns: 8 for each of the 128 threads of 4 warps


# ---------------------------------------------------------------- kernels


@triton.jit
def _load_columns(x_ptr, row, k, rows, cols, BK: tl.constexpr, PAIRED: tl.constexpr):
    """x[row, k : k + BK] as its even and its odd columns, [BM, BK / 2] each, 0 outside x. k is
    even.

    PAIRED: x is 16-bit, 4-byte aligned, with an even number of columns; two neighbors are one
    32-bit load.
    """
    pair = tl.arange(0, BK // 2)
    start = row.to(tl.int64)[:, None] * cols
    column = (k + 2 * pair)[None, :]
    inside = (row < rows)[:, None] & (column < cols)
    if PAIRED:
        word_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + (start + column) // 2
        word = tl.load(word_ptr, mask=inside, other=0)
        even = (word & 0xFFFF).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        odd = (word >> 16).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
    else:
        even = tl.load(x_ptr + start + column, mask=inside, other=0.0)
        odd = tl.load(x_ptr + start + column + 1, mask=inside & (column + 1 < cols), other=0.0)
    return even, odd


@triton.jit
def sum_tiles(
    x_ptr,
    weight,
    row,
    out,
    begin,
    end,
    m,
    n,
    k,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """W[out] x[row]^T over tiles begin to end of BK columns, [BN, BM] in fp32, for any shape."""
    packed_ptr, code_ptr, scales = weight
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    for step in range(begin, end):
        w_even, w_odd = load_tile(
            packed_ptr, code_ptr, scales, out, step * BK, n, k, BK, BLOCKSIZE, NESTED, ALIGNED
        )
        x_even, x_odd = _load_columns(x_ptr, row, step * BK, m, k, BK, PAIRED)
        acc = tl.dot(w_even.to(x_even.dtype), tl.trans(x_even), acc, input_precision="ieee")
        acc = tl.dot(w_odd.to(x_odd.dtype), tl.trans(x_odd), acc, input_precision="ieee")
    return acc


@triton.jit
def sum_words(
    x_ptr,
    weight,
    row,
    out,
    begin,
    end,
    n,
    k,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
):
    """As sum_tiles, of rounded codes and the scales of their sums; k is a multiple of BK and of
    BLOCKSIZE.

    x is 16-bit. W is read as 32-bit words of 8 weights, and the scale multiplies the fp32 sums of a
    group of 64 columns, so that a weight costs its lookup and its share of an MMA, no arithmetic of
    its own. The four dots of a group take its columns 8 c + 2 j + {0, 1}, c = 0..7, for j = 0..3:
    the weights of byte j of each word, where they are, without a shuffle.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    packed_ptr, code_ptr, scales = weight
    gain = code_gain(code_ptr, T)
    tables = code_tables(code_ptr, gain, T)
    # Rows outside are clamped, not masked: what they compute is never stored.
    w_row = tl.minimum(out, n - 1).to(tl.int64)
    word_ptr = (
        packed_ptr.to(tl.pointer_type(tl.int32))
        + (w_row * (k // 8))[:, None]
        + tl.arange(0, 8)[None, :]
    )
    column = tl.arange(0, 16)
    x_ptr += (row * k)[None, :] + (column // 2 * 8 + column % 2)[:, None]  # [16, BM]
    w_block = w_row * (k // BLOCKSIZE)
    inside = out < n
    acc = tl.zeros([out.shape[0], row.shape[0]], tl.float32)
    for step in range(begin, end):
        for group in tl.static_range(BK // 64):
            first = step * BK + group * 64
            word = tl.load(word_ptr + first // 8)  # [BN, 8]
            p0, p1, p2, p3 = decode_words(word, tables, code_ptr, gain, T, ASM)
            part = tl.dot(decode_pairs(p0, T), tl.load(x_ptr + first))
            part = tl.dot(decode_pairs(p1, T), tl.load(x_ptr + first + 2), part)
            part = tl.dot(decode_pairs(p2, T), tl.load(x_ptr + first + 4), part)
            part = tl.dot(decode_pairs(p3, T), tl.load(x_ptr + first + 6), part)
            acc += part * load_scale(scales, w_block + first // BLOCKSIZE, inside, NESTED)[:, None]
    return acc / gain


@triton.jit
def _linear_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y[M, N] = x[M, K] W^T + bias for any shape, as y^T = W x^T: the first operand of an MMA may
    stay in registers.

    Grid: (tiles of M, fastest, x tiles of N, splits of K). A program owns y[BM, BN] over `steps`
    tiles of K. With more than one split y is fp32 [splits, M, N], without bias, and _sum_kernel
    adds it up.
    """
    scales = (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    out = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * steps, tl.cdiv(k, BK))
    weight = (packed_ptr, code_ptr, scales)
    acc = sum_tiles(
        x_ptr, weight, row, out, split * steps, end, m, n, k, BK, BLOCKSIZE, NESTED, ALIGNED, PAIRED
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * m * n
    offset = row.to(tl.int64)[None, :] * n + out[:, None]
    inside = (row < m)[None, :] & (out < n)[:, None]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_words_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[M, N] = x[M, K] W^T + bias of 16-bit x and rows of whole blocks. Grid, splits and y: as _linear_kernel."""
    weight = (packed_ptr, code_ptr, (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr))
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    out = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * steps, k // BK)
    x_row = tl.minimum(row, m - 1).to(tl.int64)
    acc = sum_words(x_ptr, weight, x_row, out, split * steps, end, n, k, BK, BLOCKSIZE, NESTED, ASM)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    y_ptr += split.to(tl.int64) * m * n
    offset = row.to(tl.int64)[None, :] * n + out[:, None]
    tl.store(
        y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=(row < m)[None, :] & (out < n)[:, None]
    )


@triton.jit
def sum_tiles_backward(
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
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """dy[row] (gain W)[:, first : first + BK] over tiles begin to end of BN rows of W, [BM, BK] in
    fp32.

    dx's even and odd columns have an accumulator each. The gain of a row of W, None if there is
    none, multiplies it before it is rounded.
    """
    packed_ptr, code_ptr, scales = weight
    even = tl.zeros([row.shape[0], BK // 2], tl.float32)
    odd = tl.zeros([row.shape[0], BK // 2], tl.float32)
    for step in range(begin, end):
        out = step * BN + tl.arange(0, BN)
        w_even, w_odd = load_tile(
            packed_ptr, code_ptr, scales, out, first, n, k, BK, BLOCKSIZE, NESTED, ALIGNED
        )
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
            w_even *= gain
            w_odd *= gain
        inside = (row < m)[:, None] & (out < n)[None, :]
        dy = tl.load(
            dy_ptr + row.to(tl.int64)[:, None] * n + out[None, :], mask=inside, other=0.0
        )  # [BM, BN]
        even = tl.dot(dy, w_even.to(dy.dtype), even, input_precision="ieee")
        odd = tl.dot(dy, w_odd.to(dy.dtype), odd, input_precision="ieee")
    return tl.interleave(even, odd)


@triton.jit
def _linear_backward_kernel(
    dy_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    dx_ptr,
    m,
    n,
    k,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """dx[M, K] = dy[M, N] W for any shape.

    Grid: (tiles of M, fastest, x tiles of K, splits of N). A program owns dx[BM, BK] over `steps`
    tiles of N. With more than one split dx is fp32 [splits, M, K], and _sum_kernel adds it up.
    """
    scales = (absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    tiles_m = tl.cdiv(m, BM)
    row = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    first = tl.program_id(0) // tiles_m * BK
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * steps, tl.cdiv(n, BN))
    weight = (packed_ptr, code_ptr, scales)
    dx = sum_tiles_backward(
        dy_ptr,
        weight,
        None,
        row,
        first,
        split * steps,
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
    column = first + tl.arange(0, BK)
    dx_ptr += split.to(tl.int64) * m * k
    offset = row.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(
        dx_ptr + offset,
        dx.to(dx_ptr.dtype.element_ty),
        mask=(row < m)[:, None] & (column < k)[None, :],
    )


@triton.jit
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    numel,
    cols,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[i] = sum over s of parts[s, i], in the order of s, + bias[i % cols].

    Grid: tiles of BLOCK elements; a program owns one.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(parts_ptr + i, mask=inside, other=0.0)
        parts_ptr += numel
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i % cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- choices

# (capability, operation) -> (M up to and including, path)...; beyond the last, "panel". A device
# takes the row of the newest capability that is not newer than its own. Measured on an H200 at
# these M alone, so that a limit lies somewhere between two; W of 14336 x 4096 in bf16, us (torch:
# cuBLAS):
#                   M = 1    16    64   128   256   512
#   linear, fused      25    29    60    98   182   330  (up to 16: gemv)
#           panel                  92    93   105   142
#           torch      31    31    34    34    45    87
#   linear_backward    57    58   128   176   477   617
#           panel                        97   110   130
#           torch      31    32    34    36    48    79
# Those of an A100 are derived, from the instructions a weight costs.
CHOICES = {
    ((8, 0), "linear"): ((16, "gemv"), (512, "fused")),
    ((8, 0), "linear_backward"): ((16, "gemv"), (128, "fused")),
    ((9, 0), "linear"): ((16, "gemv"), (64, "fused")),
    ((9, 0), "linear_backward"): ((16, "gemv"), (32, "fused")),
}
SOURCES = {(8, 0): "derived, not measured", (9, 0): "measured on an H200"}
CHOICES_FP32 = (
    (16, "gemv"),
)  # no tensor cores for exact fp32: cuBLAS wherever reading W is not the bound


def choose(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[str, str]:
    """-> path, reason. `op` is "linear" or "linear_backward", capability the device's; no rule uses n and k yet."""
    known = max((c for c in SOURCES if c <= tuple(capability)), default=(8, 0))
    row, source = (
        (CHOICES_FP32, SOURCES[8, 0])
        if dtype == torch.float32
        else (CHOICES[known, op], SOURCES[known])
    )
    for limit, path in row:
        if m <= limit:
            return path, f"M = {m} <= {limit} ({source})"
    return "panel", f"M = {m} > {row[-1][0]}: dequantizing is cheap beside the product ({source})"


def tile_config(
    op: str,
    path: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    blocksize: int,
    capability: tuple[int, int],
) -> dict[str, int]:
    """BM, BN, BK, num_warps, num_stages on the gemv and fused paths; `op` may also be "linear_words"."""
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if op == "linear_words":
        # Two warps: too few for wgmma and tcgen05, so mma.sync, which takes registers and has
        # nothing to wait for.
        if path == "gemv":
            return dict(BM=bm, BN=64, BK=128 if k % 128 == 0 else 64, num_warps=2, num_stages=3)
        # Triton 3.6 compiles 128 x 128 to an empty kernel for sm_100: there, tiles of 64 rows.
        if m > 64 and capability < (10, 0):
            return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
        return dict(BM=bm, BN=128, BK=64, num_warps=4, num_stages=3)
    # One stage: a pipeline would carry the looked-up codes, too, through shared memory.
    if dtype == torch.float32:
        return dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=1)
    return dict(
        BM=max(bm, 16), BN=64, BK=min(blocksize, 64), num_warps=4 if bm < 64 else 8, num_stages=1
    )


def split_loop(path: str, programs: int, steps: int) -> tuple[int, int]:
    """-> in how many parts to split a loop of `steps` that `programs` programs run, and the steps
    of a part.

    Enough to fill the 132 SMs of an H100 or H200, with six two-warp programs each (792) on the gemv
    path and two of the larger ones (264) on the other; at least four steps a part; at most 16 or 4
    parts, which are cheap to add up. No other number of SMs is looked up, so that the bits of a
    result don't depend on it.
    """
    wanted, most = (792, 16) if path == "gemv" else (264, 4)
    each = cdiv(steps, max(1, min(cdiv(wanted, programs), steps // 4, most)))
    return cdiv(steps, each), each


# ---------------------------------------------------------------- launchers


def linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    path: str | None = None,
) -> torch.Tensor:
    """y[M, N] = x W^T + bias in x's dtype, accumulated in fp32. `path` overrides `choose`."""
    (m, k), n = x.shape, shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    path = path or choose("linear", m, n, k, x.dtype, capability(x))[0]
    if path == "panel":
        return _linear_panel(x, state, bias, shape, blocksize, y)
    aligned, paired, words = formats(x, state, blocksize)
    op = "linear_words" if words else "linear"
    config = tile_config(op, path, m, k, x.dtype, blocksize, capability(x))
    tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
    splits, steps = split_loop(path, tiles, cdiv(k, config["BK"]))
    target = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    has_bias = bias is not None and splits == 1
    arguments = (x, *pointers(state), bias if has_bias else y, target, m, n, k, steps)
    constants = dict(
        BLOCKSIZE=blocksize, NESTED=len(state) == 6, HAS_BIAS=has_bias, **config, **FUSED
    )
    if words:
        asm = isinstance(_linear_words_kernel, triton.JITFunction)  # not the interpreter
        _linear_words_kernel[(tiles, splits)](*arguments, ASM=asm, **constants)
    else:
        _linear_kernel[(tiles, splits)](*arguments, ALIGNED=aligned, PAIRED=paired, **constants)
    return y if splits == 1 else sum_parts(target, bias, y)


def linear_backward(
    dy: torch.Tensor,
    state: list[torch.Tensor],
    shape: tuple[int, int],
    blocksize: int,
    path: str | None = None,
) -> torch.Tensor:
    """dx[M, K] = dy W in dy's dtype, accumulated in fp32. `path` overrides `choose`."""
    m, (n, k) = dy.shape[0], shape
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    path = path or choose("linear_backward", m, n, k, dy.dtype, capability(dy))[0]
    if path == "panel":
        return _linear_backward_panel(dy, state, shape, blocksize, dx)
    config = tile_config("linear_backward", path, m, k, dy.dtype, blocksize, capability(dy))
    tiles = cdiv(m, config["BM"]) * cdiv(k, config["BK"])
    splits, steps = split_loop(path, tiles, cdiv(n, config["BN"]))
    target = dx if splits == 1 else torch.empty(splits, m, k, dtype=torch.float32, device=dy.device)
    constants = dict(
        BLOCKSIZE=blocksize, NESTED=len(state) == 6, ALIGNED=k % blocksize == 0, **config, **FUSED
    )
    _linear_backward_kernel[(tiles, splits)](
        dy, *pointers(state), target, m, n, k, steps, **constants
    )
    return dx if splits == 1 else sum_parts(target, None, dx)


def formats(x: torch.Tensor, state: list[torch.Tensor], blocksize: int) -> tuple[bool, bool, bool]:
    """-> ALIGNED and PAIRED of sum_tiles, and whether sum_words may take its place."""
    k = x.shape[1]
    paired = x.element_size() == 2 and k % 2 == 0 and x.data_ptr() % 4 == 0
    aligned = k % blocksize == 0
    return aligned, paired, paired and aligned and blocksize >= 64 and state[0].data_ptr() % 4 == 0


def sum_parts(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """y = parts.sum(0) + bias, parts fp32 [splits, *y.shape]."""
    numel, cols = y.numel(), y.shape[1]
    constants = dict(
        SPLITS=parts.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=SUM_TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _sum_kernel[(cdiv(numel, SUM_TILE),)](
        parts, y if bias is None else bias, y, numel, cols, **constants
    )
    return y


def _linear_panel(x, state, bias, shape, blocksize, y) -> torch.Tensor:
    """Rows of W a panel at a time: dequantize, then one dense product into y's columns."""
    n, k = shape
    step = 128  # rows of a tile of a dense product
    panel = min(n, max(step, PANEL_BYTES["linear"] // (k * x.element_size()) // step * step))
    workspace = torch.empty(panel, k, dtype=x.dtype, device=x.device)
    for first in range(0, n, panel):
        last = min(n, first + panel)
        w = workspace[: last - first]
        dequantize_segments(state, blocksize, w, first * k, 1, w.numel(), 0)
        if bias is None:
            torch.mm(x, w.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, w.t(), out=y[:, first:last])
    return y


def _linear_backward_panel(dy, state, shape, blocksize, dx) -> torch.Tensor:
    """Columns of W a panel at a time, so that an element of dx is one product, rounded once."""
    n, k = shape
    step = max(
        128, blocksize
    )  # columns of a tile of a dense product; panels begin where blocks do, if rows do
    panel = min(
        k, max(step, PANEL_BYTES["linear_backward"] // (n * dy.element_size()) // step * step)
    )
    workspace = torch.empty(n * panel, dtype=dy.dtype, device=dy.device)
    for first in range(0, k, panel):
        width = min(k, first + panel) - first
        w = workspace[: n * width].view(n, width)
        if width == k:
            dequantize_segments(state, blocksize, w, 0, 1, n * k, 0)
        else:
            dequantize_segments(state, blocksize, w, first, n, width, k)
        torch.mm(dy, w, out=dx[:, first : first + width])
    return dx
