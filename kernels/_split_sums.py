"""Long sums split among programs, and their parts added up in a fixed order.

A GPU with more SMs than there are tiles of the result splits the loop of a sum. Each split stores
an fp32 part, and `sum_parts` adds the parts in their order: no atomics, same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._launch import cdiv

# Elements that a program of sum_parts_kernel owns: 8 for each of the 128 threads of 4 warps.
SUM_TILE = 1024


def split_loop(path: str, programs: int, steps: int) -> tuple[int, int]:
    """Return how many splits to make of a loop of `steps`, and the steps of a split.

    `programs` is the number of programs that run the loop. The splits fill the 132 SMs of an H100
    or H200: with six two-warp programs each (792) on the gemv path, with two of the larger ones
    (264) on any other. A split has at least four steps. There are at most 16 splits on the gemv
    path and 4 on others, which are cheap to add up. No other number of SMs is looked up, so that
    the bits of a result do not depend on it.
    """
    wanted_programs, max_splits = (792, 16) if path == "gemv" else (264, 4)
    split_steps = cdiv(steps, max(1, min(cdiv(wanted_programs, programs), steps // 4, max_splits)))
    return cdiv(steps, split_steps), split_steps


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    numel,
    cols,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute y[i] = bias[i % cols] + the sum over s of parts[s, i], in the order of s.

    Grid: tiles of BLOCK elements; a program owns one. `bias_ptr` is not read without HAS_BIAS.
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


def sum_parts(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """Write parts.sum(0) + bias to y and return it; parts is fp32 [splits, *y.shape]."""
    numel, cols = y.numel(), y.shape[1]
    constants = dict(
        SPLITS=parts.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=SUM_TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    sum_parts_kernel[(cdiv(numel, SUM_TILE),)](
        parts, y if bias is None else bias, y, numel, cols, **constants
    )
    return y
