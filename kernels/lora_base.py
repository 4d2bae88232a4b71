"""The base weight W of LoRA's products: which path multiplies with it, its arguments and panels.

W is a dense matrix of any strides and floating dtype, `base` = [W] with blocksize 0. Or it is
4-bit, `base` = nf4.py's `state` with blocksize > 0.
"""

import torch

from . import nf4_linear
from ._launch import capability
from .nf4 import dequantize_segments, pointer_arguments

# Like nf4_linear.CHOICES, for a dense W: the limit is where a fused product stops costing less than
# writing and reading y once more. Every GPU takes what an H200 measured at these M alone; the limit
# of 32 lies between two of them. W is 4096 x 4096 in bf16; times are us, forward / backward:
#            M = 1         16         64        128        256
#   gemv   14 / 13    12 / 12    20 / 20    24 / 24    35 / 35
#   fused  12 / 11     9 / 11    13 / 18    17 / 21    26 / 32
#   panel  12 / 12    12 / 12    11 / 11    17 / 16    19 / 19
CHOICES = ((32, "fused"),)


def choose(op: str, m: int, shape: tuple[int, int], blocksize: int, x: torch.Tensor) -> str:
    """Return the path of "linear" or "linear_backward" for m rows."""
    if blocksize:
        return nf4_linear.choose(op, m, *shape, x.dtype, capability(x))[0]
    choices = nf4_linear.CHOICES_FP32 if x.dtype == torch.float32 else CHOICES
    return next((path for limit, path in choices if m <= limit), "panel")


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
    """Return BM, BN, BK, num_warps and num_stages of the kernels of "linear" and "linear_backward".

    `base` is the kernel's BASE: "dense", "words", "tiles", or "none" for the panel path.
    """
    if base in ("words", "tiles"):
        return nf4_linear.tile_config(
            op if base == "tiles" else "linear_words", path, m, k, dtype, blocksize, capability
        )
    if dtype == torch.float32:
        return dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=1 if base == "none" else 2)
    # Without W the kernel is bound by writing the result. Four warps spill on an A100 in the
    # backward of several adapters.
    if base == "none":
        return dict(BM=64, BN=64, BK=64, num_warps=4 if op == "linear" else 8, num_stages=1)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    if path == "gemv":
        return dict(BM=bm, BN=64, BK=64, num_warps=4, num_stages=4)
    if op == "linear":
        return dict(BM=bm, BN=128, BK=64, num_warps=4, num_stages=3)
    return dict(BM=bm, BN=32, BK=128, num_warps=8, num_stages=3)


def flatten_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as contiguous [M, columns]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def flatten_strided_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as [M, columns], contiguous in a row; S and U may be columns of a wider matrix."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x in contiguous memory, or None for None."""
    return None if x is None else x.contiguous()


def base_arguments(base: list[torch.Tensor], blocksize: int) -> tuple:
    """Return the arguments of kernels for W: six pointers and two strides."""
    if blocksize:
        return *pointer_arguments(base), 0, 0
    return base[0], None, None, None, None, None, *base[0].stride()


def row_panels(base, gain, shape, blocksize, dtype):
    """Yield (first, last, rows first to last of gain W in dtype), in the same memory each time.

    A dense W of this dtype without a gain is one panel, as it is.
    """
    (n, k), size = shape, nf4_linear.PANEL_BYTES["linear"] // dtype.itemsize
    if not blocksize and gain is None and base[0].dtype == dtype:
        yield 0, n, base[0]
        return
    # 128 rows make a tile of a dense product.
    panel = min(n, max(128, size // max(k, 1) // 128 * 128))
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
    """Yield (first, last, columns first to last of W in dtype), in the same memory each time.

    Panels are columns, so that an element of dx is one product. A dense W of this dtype is one
    panel, as it is.
    """
    (n, k), size = shape, nf4_linear.PANEL_BYTES["linear_backward"] // dtype.itemsize
    if not blocksize and base[0].dtype == dtype:
        yield 0, k, base[0]
        return
    # Panels begin where blocks do, if rows do.
    step = max(128, blocksize)
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
