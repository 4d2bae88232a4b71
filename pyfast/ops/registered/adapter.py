"""The adapter's registered ops: checks, fakes, launchers."""

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import registry


def _check_sizes(x, down_weight, down_bias, up_weight, up_bias, outer) -> None:
    """What memory safety rests on, for the paths that C++ does not check. `outer`: residual or dy."""
    (bottleneck, into), out = down_weight.shape, up_weight.shape[0]
    if (
        bottleneck == 0
        or x.dim() == 0
        or x.shape[-1] != into
        or up_weight.shape != (out, bottleneck)
    ):
        shapes = [list(t.shape) for t in (x, down_weight, up_weight)]
        raise ValueError(
            f"x, down_weight and up_weight have shapes {shapes}; they must be [.., i], [b, i], [o, b]"
        )
    sizes = ((down_bias, (bottleneck,)), (up_bias, (out,)), (outer, (*x.shape[:-1], out)))
    for tensor, size in sizes:
        if tensor is not None and tensor.shape != size:
            raise ValueError(f"an argument has shape {list(tensor.shape)}; it must be {list(size)}")
    found = {
        t.device for t in (x, down_weight, down_bias, up_weight, up_bias, outer) if t is not None
    }
    if len(found) > 1:
        raise ValueError(
            f"the arguments are on {', '.join(sorted(map(str, found)))}; they must be on one device"
        )


def _adapter_fake(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
    residual = x if residual is None else residual
    _check_sizes(x, down_weight, down_bias, up_weight, up_bias, residual)
    return residual.new_empty(residual.shape)


def _adapter_cuda(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
    from pyfast.kernels import adapter as kernels

    outer = x if residual is None else residual
    _check_sizes(x, down_weight, down_bias, up_weight, up_bias, outer)
    rows, outer_rows = _rows(x), _rows(outer)
    parameters = [
        None if t is None else t.contiguous() for t in (down_weight, down_bias, up_weight, up_bias)
    ]
    return kernels.adapter(rows, *parameters, outer_rows, activation, scaling).view(outer.shape)


def _adapter_backward_fake(
    dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs
):
    _check_sizes(x, down_weight, down_bias, up_weight, None, dy)
    sums = torch.promote_types(x.dtype, torch.float32)
    bottleneck, out = down_weight.shape[0], up_weight.shape[0]
    sizes = (x.shape, down_weight.shape, (bottleneck,), up_weight.shape, (out,))
    dtypes = (x.dtype, down_weight.dtype, sums, up_weight.dtype, sums)
    return tuple(
        x.new_empty(s if need else (0,), dtype=t) for s, t, need in zip(sizes, dtypes, needs)
    )


def _adapter_backward_cuda(
    dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs
):
    from pyfast.kernels import adapter as kernels

    _check_sizes(x, down_weight, down_bias, up_weight, None, dy)
    parameters = [
        None if t is None else t.contiguous() for t in (down_weight, down_bias, up_weight)
    ]
    found = kernels.adapter_backward(
        _rows(dy), _rows(x), *parameters, residual_is_x, activation, scaling, needs
    )
    return (found[0].view(x.shape) if needs[0] else found[0], *found[1:])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


_adapter = registry.register(
    "adapter",
    fake=_adapter_fake,
    cuda=_adapter_cuda,
    reference=reference.adapter_op,
    double=reference.adapter_op,  # for gradcheck; no kernel computes in it
)


_adapter_backward = registry.register(
    "adapter_backward",
    fake=_adapter_backward_fake,
    cuda=_adapter_backward_cuda,
    reference=reference.adapter_backward_op,
    double=reference.adapter_backward_op,
)
