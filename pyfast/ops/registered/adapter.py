"""The adapter's registered ops: checks, fakes, launches.

CPU kernels are in csrc/cpu/adapter, GPU kernels in kernels/adapter.py.
"""

from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast._support.dtypes import sum_dtype

# --- checks: what memory safety rests on, where C++ does not check it ---


def _check_adapter(
    x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling
) -> None:
    residual = x if residual is None else residual
    _check_sizes(x, down_weight, down_bias, up_weight, up_bias, residual)


def _check_adapter_backward(
    dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs
) -> None:
    _check_sizes(x, down_weight, down_bias, up_weight, None, dy)


def _check_sizes(x, down_weight, down_bias, up_weight, up_bias, outer) -> None:
    """Raise unless sizes and devices fit; `outer` is the residual or dy."""
    (bottleneck, in_features), out = down_weight.shape, up_weight.shape[0]
    if (
        bottleneck == 0
        or x.dim() == 0
        or x.shape[-1] != in_features
        or up_weight.shape != (out, bottleneck)
    ):
        shapes = [list(t.shape) for t in (x, down_weight, up_weight)]
        raise ValueError(
            f"x, down_weight and up_weight have shapes {shapes}; "
            "they must be [.., i], [b, i], [o, b]"
        )
    sizes = ((down_bias, (bottleneck,)), (up_bias, (out,)), (outer, (*x.shape[:-1], out)))
    for tensor, size in sizes:
        if tensor is not None and tensor.shape != size:
            raise ValueError(f"an argument has shape {list(tensor.shape)}; it must be {list(size)}")
    checks.one_device(x, down_weight, down_bias, up_weight, up_bias, outer)


# --- fakes ---


def _adapter_fake(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
    residual = x if residual is None else residual
    return residual.new_empty(residual.shape)


def _adapter_backward_fake(
    dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs
):
    bottleneck, out = down_weight.shape[0], up_weight.shape[0]
    sizes = (x.shape, down_weight.shape, (bottleneck,), up_weight.shape, (out,))
    dtypes = (x.dtype, down_weight.dtype, sum_dtype(x), up_weight.dtype, sum_dtype(x))
    return tuple(
        x.new_empty(size if need else (0,), dtype=dtype)
        for size, dtype, need in zip(sizes, dtypes, needs)
    )


# --- launches: kernels take contiguous rows and parameters ---


def _launch_adapter(
    launcher, x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling
):
    residual = x if residual is None else residual
    parameters = [_contiguous(t) for t in (down_weight, down_bias, up_weight, up_bias)]
    y = launcher(_rows(x), *parameters, _rows(residual), activation, scaling)
    return y.view(residual.shape)


def _launch_adapter_backward(
    launcher, dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs
):
    parameters = [_contiguous(t) for t in (down_weight, down_bias, up_weight)]
    dx, *grads = launcher(
        _rows(dy), _rows(x), *parameters, residual_is_x, activation, scaling, needs
    )
    return (dx.view(x.shape) if needs[0] else dx, *grads)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# --- registration ---

adapter = registry.register(
    "adapter",
    check=_check_adapter,
    fake=_adapter_fake,
    kernel="adapter:adapter",
    launch=_launch_adapter,
    reference=reference.adapter_op,
)

adapter_backward = registry.register(
    "adapter_backward",
    check=_check_adapter_backward,
    fake=_adapter_backward_fake,
    kernel="adapter:adapter_backward",
    launch=_launch_adapter_backward,
    reference=reference.adapter_backward_op,
)
