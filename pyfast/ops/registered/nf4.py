"""NF4's registered ops: checks, fakes, launches.

CPU kernels are in csrc/cpu/nf4 and csrc/cpu/linear, GPU kernels in kernels/nf4.py and
kernels/nf4_linear.py.
"""

import math
import os

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.formats import nf4_codebooks

State = list[Tensor]
Shape = tuple[int, ...]

# --- checks: what memory safety rests on, where C++ does not check it ---


def check_state(state: State, numel: int, blocksize: int, *others: Tensor | None) -> None:
    """Raise unless a state of `numel` values fits, is contiguous, and on the others' device."""
    blocks = -(-numel // blocksize)
    sizes = [-(-numel // 2), blocks, 16, -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE), 256, 1]
    numels = [tensor.numel() for tensor in state]
    if (
        len(state) not in (3, 6)
        or numels != sizes[: len(state)]
        or not all(tensor.is_contiguous() for tensor in state)
    ):
        raise ValueError(
            f"state holds {numels} elements; it must be {sizes[:3]}, nested {sizes}, contiguous"
        )
    checks.one_device(*state, *others)


def _check_dequantize(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> None:
    check_state(state, math.prod(shape), blocksize)


def _check_linear(
    x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> None:
    checks.rows(x, shape[1])
    check_state(state, math.prod(shape), blocksize, x, bias)


def _check_linear_backward(dy: Tensor, state: State, shape: Shape, blocksize: int) -> None:
    checks.rows(dy, shape[0])
    check_state(state, math.prod(shape), blocksize, dy)


# --- fakes ---


def _quantize_fake(weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool):
    numel = weight.numel()
    blocks = -(-numel // blocksize)
    groups = -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE) if nested else 0
    packed = weight.new_empty((-(-numel // 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    nested_absmax = weight.new_empty(groups, dtype=torch.float32)
    return packed, absmax, nested_absmax, weight.new_empty(int(nested), dtype=torch.float32)


def _dequantize_fake(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    return state[0].new_empty(shape, dtype=dtype)


def _linear_fake(
    x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_backward_fake(dy: Tensor, state: State, shape: Shape, blocksize: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], shape[1])


# --- launches ---


def forced_path() -> str | None:
    """Return PYFAST_NF4_PATH: gemv, fused or panel, whatever kernels/nf4_linear.py would choose."""
    path = os.environ.get("PYFAST_NF4_PATH")
    if path is not None:
        checks.one_of("PYFAST_NF4_PATH", path, ("gemv", "fused", "panel"))
    return path


def _launch_quantize(
    launcher, weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool
):
    packed, absmax = launcher(weight.contiguous(), thresholds, order, blocksize)
    if not nested:
        reference.check_finite(absmax)
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    offset = reference.mean_absmax(absmax)
    reference.check_finite(offset)
    quantize_scales = registry.find_launcher("nf4:quantize_scales")
    codes, nested_absmax = quantize_scales(absmax, offset, nested_thresholds)
    return packed, codes, nested_absmax, offset


def _launch_linear(
    launcher, x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> Tensor:
    size = (*x.shape[:-1], shape[0])
    if 0 in (*size, shape[1]):  # nothing to launch
        return x.new_zeros(size) if bias is None else x.new_empty(size).copy_(bias)
    rows = x.reshape(-1, shape[1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    return launcher(rows, state, bias, shape, blocksize, path=forced_path()).view(size)


def _launch_linear_backward(
    launcher, dy: Tensor, state: State, shape: Shape, blocksize: int
) -> Tensor:
    size = (*dy.shape[:-1], shape[1])
    if 0 in (*size, shape[0]):
        return dy.new_zeros(size)
    rows = dy.reshape(-1, shape[0]).contiguous()
    return launcher(rows, state, shape, blocksize, path=forced_path()).view(size)


# --- registration ---

quantize = registry.register(
    "nf4_quantize",
    fake=_quantize_fake,
    kernel="nf4:quantize",
    launch=_launch_quantize,
    reference=reference.nf4_quantize_op,
)

dequantize = registry.register(
    "nf4_dequantize",
    check=_check_dequantize,
    fake=_dequantize_fake,
    kernel="nf4:dequantize",
    reference=reference.nf4_dequantize_op,
)

linear = registry.register(
    "nf4_linear",
    check=_check_linear,
    fake=_linear_fake,
    kernel="nf4_linear:linear",
    launch=_launch_linear,
    reference=reference.nf4_linear_op,
)

linear_backward = registry.register(
    "nf4_linear_backward",
    check=_check_linear_backward,
    fake=_linear_backward_fake,
    kernel="nf4_linear:linear_backward",
    launch=_launch_linear_backward,
    reference=reference.nf4_linear_backward_op,
)
