"""Products with 4-bit weights on a GPU: y = x W^T + bias and dx = dy W.

No more of W is held in 16 bits than a panel. The weight is nf4.py's `state`. There are three paths,
and `choose` takes one by the number of rows M:
    gemv   few rows: small tiles, the sum split over many programs; bound by reading W
    fused  more rows: larger tiles that decode W on the way to the tensor cores
    panel  many rows: W is dequantized a panel at a time for a dense product of cuBLAS
All accumulate in fp32 and add splits in a fixed order: same inputs, same bits. The definition's
weight is code * scale in fp32; `reference.nf4_linear_op` and `reference.nf4_linear_backward_op`
are the products with it. The paths round W as follows:
  - linear, 16-bit x, blocksize >= 64 and rows of whole blocks (every real model), gemv and fused:
    the CODE TABLE is rounded to x's type, after a factor that suits it (nf4_decode.code_gain), and
    the scale multiplies the sums in fp32. This is not the product with W rounded to 16 bits. The
    error of a weight is 1.3e-3 rms (bf16) or 1.4e-4 (fp16) of the weights' rms, where rounding each
    weight gives 1.7e-3 or 2.1e-4; but it is the same error for the same code.
  - everything else in 16 bits: each weight is rounded to x's type, as in a product with a 16-bit
    copy.
  - fp32: nothing is rounded, and there is no TF32.
"""

import torch
import triton
import triton.language as tl

from ._launch import FUSED, capability, cdiv
from ._split_sums import split_loop, sum_parts
from .nf4 import dequantize_segments, pointer_arguments
from .nf4_loops import sum_tiles, sum_tiles_backward, sum_words

# Bytes of dequantized weight at a time on the panel path. More is no faster on an H200. The
# backward's panels are columns, and products with narrow ones leave SMs idle.
PANEL_BYTES = {"linear": 64 << 20, "linear_backward": 128 << 20}


@triton.jit
def nf4_linear_kernel(
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
    """Compute y[M, N] = x[M, K] W^T + bias for any shape.

    It is computed as y^T = W x^T, because the first operand of an MMA may stay in registers. Grid:
    (tiles of M, fastest, x tiles of N, splits of K). A program owns y[BM, BN] over `steps` tiles of
    K. With more than one split y is fp32 [splits, M, N], without bias, and sum_parts_kernel adds it
    up.
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
def nf4_linear_words_kernel(
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
    """Compute y[M, N] = x[M, K] W^T + bias for 16-bit x and rows of whole blocks.

    Grid, splits and y are those of nf4_linear_kernel.
    """
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
    inside = (row < m)[None, :] & (out < n)[:, None]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def nf4_linear_backward_kernel(
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
    """Compute dx[M, K] = dy[M, N] W for any shape.

    Grid: (tiles of M, fastest, x tiles of K, splits of N). A program owns dx[BM, BK] over `steps`
    tiles of N. With more than one split dx is fp32 [splits, M, K], and sum_parts_kernel adds it up.
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
    inside = (row < m)[:, None] & (column < k)[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- choices

# Paths by (capability, operation): pairs of the largest M and the path up to it; beyond the last it
# is "panel". A device takes the row of the newest capability that is not newer than its own.
# Measured on an H200 at these M alone, so that a limit lies somewhere between two. W is 14336 x
# 4096 in bf16; times are us (torch: cuBLAS):
#                   M = 1    16    64   128   256   512
#   linear, fused      25    29    60    98   182   330  (up to 16: gemv)
#           panel                  92    93   105   142
#           torch      31    31    34    34    45    87
#   linear_backward    57    58   128   176   477   617
#           panel                        97   110   130
#           torch      31    32    34    36    48    79
# The limits of an A100 are derived from the number of instructions for each weight.
CHOICES = {
    ((8, 0), "linear"): ((16, "gemv"), (512, "fused")),
    ((8, 0), "linear_backward"): ((16, "gemv"), (128, "fused")),
    ((9, 0), "linear"): ((16, "gemv"), (64, "fused")),
    ((9, 0), "linear_backward"): ((16, "gemv"), (32, "fused")),
}
SOURCES = {(8, 0): "derived, not measured", (9, 0): "measured on an H200"}
# Exact fp32 has no tensor cores, so cuBLAS is used wherever reading W is not the bound.
CHOICES_FP32 = ((16, "gemv"),)


def choose(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[str, str]:
    """Return the path and its reason for m rows of x or dy; no rule uses n and k yet.

    `op` is "linear" or "linear_backward", and `capability` is the device's.
    """
    known = max((c for c in SOURCES if c <= tuple(capability)), default=(8, 0))
    choices, source = CHOICES[known, op], SOURCES[known]
    if dtype == torch.float32:
        choices, source = CHOICES_FP32, SOURCES[8, 0]
    for limit, path in choices:
        if m <= limit:
            return path, f"M = {m} <= {limit} ({source})"
    return (
        "panel",
        f"M = {m} > {choices[-1][0]}: dequantizing is cheap beside the product ({source})",
    )


def tile_config(
    op: str,
    path: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    blocksize: int,
    capability: tuple[int, int],
) -> dict[str, int]:
    """Return BM, BN, BK, num_warps and num_stages of the gemv and fused paths.

    `op` is "linear", "linear_backward" or "linear_words".
    """
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if op == "linear_words":
        # Two warps are too few for wgmma and tcgen05. So mma.sync is used, which takes registers
        # and has nothing to wait for.
        if path == "gemv":
            return dict(BM=bm, BN=64, BK=128 if k % 128 == 0 else 64, num_warps=2, num_stages=3)
        # Triton 3.6 compiles 128 x 128 to an empty kernel for sm_100, which takes tiles of 64 rows.
        if m > 64 and capability < (10, 0):
            return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
        return dict(BM=bm, BN=128, BK=64, num_warps=4, num_stages=3)
    # One stage, because a pipeline would also carry the looked-up codes through shared memory.
    if dtype == torch.float32:
        return dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=1)
    return dict(
        BM=max(bm, 16), BN=64, BK=min(blocksize, 64), num_warps=4 if bm < 64 else 8, num_stages=1
    )


# ---------------------------------------------------------------- launchers


def linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    path: str | None = None,
) -> torch.Tensor:
    """Return y[M, N] = x W^T + bias in x's dtype, summed in fp32; `path` overrides `choose`."""
    (m, k), n = x.shape, shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    path = path or choose("linear", m, n, k, x.dtype, capability(x))[0]
    if path == "panel":
        return _linear_panel(x, state, bias, shape, blocksize, y)
    aligned, paired, words = find_formats(x, state, blocksize)
    op = "linear_words" if words else "linear"
    config = tile_config(op, path, m, k, x.dtype, blocksize, capability(x))
    tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
    splits, steps = split_loop(path, tiles, cdiv(k, config["BK"]))
    target = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    has_bias = bias is not None and splits == 1
    arguments = (x, *pointer_arguments(state), bias if has_bias else y, target, m, n, k, steps)
    constants = dict(
        BLOCKSIZE=blocksize, NESTED=len(state) == 6, HAS_BIAS=has_bias, **config, **FUSED
    )
    if words:
        # The interpreter cannot run assembly; its kernels are no JITFunction.
        asm = isinstance(nf4_linear_words_kernel, triton.JITFunction)
        nf4_linear_words_kernel[(tiles, splits)](*arguments, ASM=asm, **constants)
    else:
        nf4_linear_kernel[(tiles, splits)](*arguments, ALIGNED=aligned, PAIRED=paired, **constants)
    return y if splits == 1 else sum_parts(target, bias, y)


def linear_backward(
    dy: torch.Tensor,
    state: list[torch.Tensor],
    shape: tuple[int, int],
    blocksize: int,
    path: str | None = None,
) -> torch.Tensor:
    """Return dx[M, K] = dy W in dy's dtype, summed in fp32; `path` overrides `choose`."""
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
    nf4_linear_backward_kernel[(tiles, splits)](
        dy, *pointer_arguments(state), target, m, n, k, steps, **constants
    )
    return dx if splits == 1 else sum_parts(target, None, dx)


def find_formats(
    x: torch.Tensor, state: list[torch.Tensor], blocksize: int
) -> tuple[bool, bool, bool]:
    """Return ALIGNED and PAIRED of sum_tiles, and whether sum_words may take its place.

    The addresses of x and of the packed weight count only modulo 4.
    """
    k = x.shape[1]
    paired = x.element_size() == 2 and k % 2 == 0 and x.data_ptr() % 4 == 0
    aligned = k % blocksize == 0
    return aligned, paired, paired and aligned and blocksize >= 64 and state[0].data_ptr() % 4 == 0


def _linear_panel(x, state, bias, shape, blocksize, y) -> torch.Tensor:
    """Dequantize W a panel of rows at a time, and write one dense product to columns of y each."""
    n, k = shape
    # 128 rows make a tile of a dense product.
    step = 128
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
    """Dequantize W a panel of columns at a time, so that an element of dx is rounded once."""
    n, k = shape
    # 128 columns make a tile of a dense product. Panels begin where blocks do, if rows do.
    step = max(128, blocksize)
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
