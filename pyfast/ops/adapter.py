r"""Bottleneck adapters: a small trained detour around a frozen layer's output.

    y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu)        the residual is x by default

One op: the hidden values of a block of rows never leave the cache, and y is written once, the
residual in it. Kept for the backward: x and the parameters; the hidden values are computed again.
`pyfast/reference/_adapter.py` is the specification.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks
from pyfast._support import dtypes as _support_dtypes
from pyfast.ops.registered import adapter as registered

# --- the ops: CPU kernels in csrc/cpu/adapter/adapter.cpp, GPU kernels in kernels/adapter.py ---


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
        ctx.save_for_backward(x, down_weight, down_bias, up_weight)
        ctx.residual_is_x, ctx.activation, ctx.scaling = residual is None, activation, scaling
        ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
        return registered.adapter(
            x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, down_weight, down_bias, up_weight = ctx.saved_tensors
        needs, grads = list(ctx.needs_input_grad[:5]), [None] * 5
        if any(needs):
            found = registered.adapter_backward(
                dy,
                x,
                down_weight,
                down_bias,
                up_weight,
                ctx.residual_is_x,
                ctx.activation,
                ctx.scaling,
                needs,
            )
            bias_dtypes = {2: None if down_bias is None else down_bias.dtype, 4: ctx.up_bias_dtype}
            grads = [
                g.to(bias_dtypes.get(i, g.dtype)) if needs[i] else None for i, g in enumerate(found)
            ]
        return *grads, dy if ctx.needs_input_grad[5] else None, None, None


# --- the function ---


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
    """Y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu). Differentiable in every tensor.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64); autocast applies to the products.
        down_weight: [bottleneck, in], in float32 or x's dtype, as the other parameters; read as it
        is. down_bias: [bottleneck]. up_weight: [out, bottleneck]. up_bias: [out]. activation:
        "relu", "gelu" (by erf), "gelu_tanh", "silu" or "tanh". scaling: of all but the residual.
        residual: [..., out], in float32 or x's dtype, which is the result's; x itself by default.
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.one_of("activation", activation, reference.ACTIVATIONS)
    check_scaling(scaling)
    dtype = _support_dtypes.compute_dtype(x)
    _check_parameters(x, dtype, down_weight, down_bias, up_weight, up_bias, residual)
    if residual is None and dtype != x.dtype:
        residual = x  # autocast lowers the products, not the residual
    args = (
        x.to(dtype),
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        residual,
        activation,
        float(scaling),
    )
    leaf = any(isinstance(t, Tensor) and t.requires_grad for t in args)
    if forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and leaf
    ):  # forward mode: refused there, aloud
        return _Adapter.apply(*args)
    return registered.adapter(*args)


def check_scaling(scaling: float) -> None:
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise TypeError(f"scaling must be a number, not {type(scaling).__name__}")
    if not -math.inf < scaling < math.inf:  # which torch.compile can trace, unlike isfinite
        raise ValueError(f"scaling is {scaling!r}; it must be a finite number")


def _check_parameters(x, dtype, down_weight, down_bias, up_weight, up_bias, residual) -> None:
    """All that is wrong with the other tensors, the first of it said."""
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        checks.tensor(name, weight, checks.FLOATS_AND_DOUBLE)
        if weight.dim() != 2:
            raise ValueError(f"{name} has shape {list(weight.shape)}; it must be a matrix")
    (bottleneck, into), out = down_weight.shape, up_weight.shape[0]
    checks.last_dim("x", x, into, "the width of down_weight")
    if bottleneck == 0:
        raise ValueError(
            f"down_weight has shape {list(down_weight.shape)}; the bottleneck must be at least 1 wide"
        )
    sizes = {
        "down_weight": (down_weight, (bottleneck, into)),
        "down_bias": (down_bias, (bottleneck,)),
        "up_weight": (up_weight, (into if residual is None else out, bottleneck)),
        "up_bias": (up_bias, (out,)),
        "residual": (residual, (*x.shape[:-1], out)),
    }
    for name, (tensor, size) in sizes.items():
        if tensor is not None:
            checks.tensor(name, tensor, checks.FLOATS_AND_DOUBLE)
            checks.shape(name, tensor, size)
            checks.same_device(name, tensor, "x", x.device)
            if tensor.dtype not in (torch.float32, x.dtype, dtype):
                raise TypeError(
                    f"{name} is {tensor.dtype}; it must be torch.float32 or x's dtype, {x.dtype}"
                )


# --- the module ---
