"""NF4's registered ops: checks, fakes, launchers."""

import math
import os

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.formats import nf4_codebooks

State = list[Tensor]


Shape = tuple[int, ...]


def _check_state(state: State, numel: int, blocksize: int, *others: Tensor | None) -> None:
    """What memory safety rests on, for the paths that C++ does not check: sizes, strides, one device."""
    blocks = -(-numel // blocksize)
    sizes = [-(-numel // 2), blocks, 16, -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE), 256, 1]
    found = [tensor.numel() for tensor in state]
    if (
        len(state) not in (3, 6)
        or found != sizes[: len(state)]
        or not all(t.is_contiguous() for t in state)
    ):
        raise ValueError(
            f"state holds {found} elements; it must be {sizes[:3]}, nested {sizes}, contiguous"
        )
    devices = {tensor.device for tensor in (*state, *others) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"the arguments are on {', '.join(sorted(map(str, devices)))}; they must be on one device"
        )


def _check_rows(x: Tensor, width: int) -> None:
    if x.dtype not in checks.FLOATS_AND_DOUBLE or x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"x or dy is {x.dtype} {list(x.shape)}; it must be floating with a last dimension of {width}"
        )


def _quantize_fake(weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool):
    numel = weight.numel()
    blocks = -(-numel // blocksize)
    groups = -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE) if nested else 0
    packed = weight.new_empty((-(-numel // 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    nested_absmax = weight.new_empty(groups, dtype=torch.float32)
    return packed, absmax, nested_absmax, weight.new_empty(int(nested), dtype=torch.float32)


def _quantize_cuda(weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool):
    from pyfast.kernels import nf4 as kernels

    packed, absmax = kernels.quantize(weight.contiguous(), thresholds, order, blocksize)
    if not nested:
        reference.check_finite(absmax)
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    offset = reference.mean_absmax(absmax)
    reference.check_finite(offset)
    codes, nested_absmax = kernels.quantize_scales(absmax, offset, nested_thresholds)
    return packed, codes, nested_absmax, offset


def _dequantize_fake(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    _check_state(state, math.prod(shape), blocksize)
    return state[0].new_empty(shape, dtype=dtype)


def _dequantize_cuda(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    from pyfast.kernels import nf4 as kernels

    _check_state(state, math.prod(shape), blocksize)
    return kernels.dequantize(state, shape, blocksize, dtype)


def _linear_fake(
    x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> Tensor:
    _check_rows(x, shape[1])
    _check_state(state, math.prod(shape), blocksize, x, bias)
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_cuda(
    x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> Tensor:
    from pyfast.kernels import nf4_linear as kernels

    _check_rows(x, shape[1])
    _check_state(state, math.prod(shape), blocksize, x, bias)
    size = (*x.shape[:-1], shape[0])
    if x.dtype == torch.float64:  # for gradcheck; no kernel computes in it
        return reference.nf4_linear_op(x, state, bias, shape, blocksize)
    if 0 in (*size, shape[1]):  # nothing to launch
        return x.new_zeros(size) if bias is None else x.new_empty(size).copy_(bias)
    rows = x.reshape(-1, shape[1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    return kernels.linear(rows, state, bias, shape, blocksize, path=forced_path()).view(size)


def _linear_backward_fake(dy: Tensor, state: State, shape: Shape, blocksize: int) -> Tensor:
    _check_rows(dy, shape[0])
    _check_state(state, math.prod(shape), blocksize, dy)
    return dy.new_empty(*dy.shape[:-1], shape[1])


def _linear_backward_cuda(dy: Tensor, state: State, shape: Shape, blocksize: int) -> Tensor:
    from pyfast.kernels import nf4_linear as kernels

    _check_rows(dy, shape[0])
    _check_state(state, math.prod(shape), blocksize, dy)
    size = (*dy.shape[:-1], shape[1])
    if dy.dtype == torch.float64:
        return reference.nf4_linear_backward_op(dy, state, shape, blocksize)
    if 0 in (*size, shape[0]):
        return dy.new_zeros(size)
    rows = dy.reshape(-1, shape[0]).contiguous()
    return kernels.linear_backward(rows, state, shape, blocksize, path=forced_path()).view(size)


def forced_path() -> str | None:
    """PYFAST_NF4_PATH overrides the table of kernels/nf4_linear.py: gemv, fused or panel."""
    path = os.environ.get("PYFAST_NF4_PATH")
    if path is not None:
        checks.one_of("PYFAST_NF4_PATH", path, ("gemv", "fused", "panel"))
    return path


_quantize = registry.register(
    "nf4_quantize", fake=_quantize_fake, cuda=_quantize_cuda, reference=reference.nf4_quantize_op
)


_dequantize = registry.register(
    "nf4_dequantize",
    fake=_dequantize_fake,
    cuda=_dequantize_cuda,
    reference=reference.nf4_dequantize_op,
)


_linear = registry.register(
    "nf4_linear", fake=_linear_fake, cuda=_linear_cuda, reference=reference.nf4_linear_op
)


_linear_backward = registry.register(
    "nf4_linear_backward",
    fake=_linear_backward_fake,
    cuda=_linear_backward_cuda,
    reference=reference.nf4_linear_backward_op,
)
