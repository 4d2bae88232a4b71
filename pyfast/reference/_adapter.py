"""Bottleneck adapters: a small trained detour around a frozen layer's output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast._support.dtypes import sum_dtype

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
_ACTIVATION_GRADIENTS = {  # (dh, z) -> dh act'(z)
    "relu": lambda dh, z: torch.ops.aten.threshold_backward(dh, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dh, z: torch.ops.aten.gelu_backward(dh, z, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "tanh": lambda dh, z: torch.ops.aten.tanh_backward(dh, torch.tanh(z)),
}


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + scaling * (act(x Wd^T + bd) Wu^T + bu); the residual is x by default."""
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    return (x if residual is None else residual) + scaling * F.linear(hidden, up_weight, up_bias)


def adapter_op(
    x, down_weight, down_bias, up_weight, up_bias, residual, activation: str, scaling: float
) -> Tensor:
    """Run `adapter` with sums in float32 or float64, rounded once to the residual's dtype."""
    residual = x if residual is None else residual
    *tensors, upcast_residual = _upcast(x, down_weight, down_bias, up_weight, up_bias, residual)
    y = adapter(*tensors, activation=activation, scaling=scaling, residual=upcast_residual)
    return y.to(residual.dtype)


def adapter_backward_op(
    dy,
    x,
    down_weight,
    down_bias,
    up_weight,
    residual_is_x: bool,
    activation: str,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the parameters, empty where they are not needed.

    Those of the biases are in float32 or float64.
    """
    rows, up_w, down_w, down_b = x.reshape(-1, x.shape[-1]), up_weight, down_weight, down_bias
    dy_rows = dy.reshape(len(rows), dy.shape[-1])
    rows, down_w, down_b, up_w, dy_rows = _upcast(rows, down_w, down_b, up_w, dy_rows)
    z = F.linear(rows, down_w, down_b)
    dz = _ACTIVATION_GRADIENTS[activation](scaling * dy_rows @ up_w, z)
    dx = dz @ down_w + dy_rows if residual_is_x else dz @ down_w
    d_up = scaling * dy_rows.t() @ ACTIVATIONS[activation](z)
    grads = [
        dx.view(x.shape).to(x.dtype),
        (dz.t() @ rows).to(down_weight.dtype),
        dz.sum(0),
        d_up.to(up_weight.dtype),
        scaling * dy_rows.sum(0),
    ]
    return tuple(grad if need else grad.new_empty(0) for grad, need in zip(grads, needs))


def _upcast(first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    dtype = sum_dtype(first)
    return [None if tensor is None else tensor.to(dtype) for tensor in (first, *others)]
