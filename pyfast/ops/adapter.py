r"""Bottleneck adapters: a small trained detour around a frozen layer's output.

    y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu)        the residual is x by default

It is one op: the hidden values of a block of rows never leave the cache, and y is written once,
with the residual in it. The backward keeps x and the parameters, and recomputes the hidden values.

`pyfast/reference/_adapter.py` is the specification.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, dtypes
from pyfast.ops.registered import adapter as registered

# --- the autograd Function ---


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
            options = ctx.residual_is_x, ctx.activation, ctx.scaling, needs
            results = registered.adapter_backward(
                dy, x, down_weight, down_bias, up_weight, *options
            )
            # The op returns the biases' gradients in the dtype of sums.
            bias_dtypes = {2: None if down_bias is None else down_bias.dtype, 4: ctx.up_bias_dtype}
            for i, grad in enumerate(results):
                grads[i] = grad.to(bias_dtypes.get(i, grad.dtype)) if needs[i] else None
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
    """Return residual + scaling * (act(x Wd^T + bd) Wu^T + bu). Differentiable in every tensor.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64). Autocast applies to the products.
        down_weight: [bottleneck, in]. All parameters are in float32 or x's dtype, and are not
            copied to another.
        down_bias: [bottleneck], or None.
        up_weight: [out, bottleneck].
        up_bias: [out], or None.
        activation: "relu", "gelu" (exact, by erf), "gelu_tanh", "silu" or "tanh".
        scaling: The factor of all but the residual.
        residual: [..., out], in float32 or x's dtype. Default: x.

    Returns:
        [..., out], in the residual's dtype.

    Example:
        >>> import torch, pyfast
        >>> x, down, up = torch.randn(2, 5, 64), torch.randn(8, 64), torch.zeros(64, 8)
        >>> y = pyfast.adapter(x, down, None, up, None, activation="gelu")
        >>> torch.equal(y, x)
        True
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.one_of("activation", activation, reference.ACTIVATIONS)
    checks.finite_number("scaling", scaling)
    dtype = dtypes.compute_dtype(x)
    _check_parameters(x, dtype, down_weight, down_bias, up_weight, up_bias, residual)
    if residual is None and dtype != x.dtype:
        residual = x  # autocast lowers the products, not the residual
    tensors = (x.to(dtype), down_weight, down_bias, up_weight, up_bias, residual)
    if dtypes.needs_graph(*tensors):
        return _Adapter.apply(*tensors, activation, float(scaling))
    return registered.adapter(*tensors, activation, float(scaling))


def _check_parameters(x, dtype, down_weight, down_bias, up_weight, up_bias, residual) -> None:
    """Raise unless the other tensors fit x and each other."""
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        checks.tensor(name, weight, checks.FLOATS_AND_DOUBLE)
        if weight.dim() != 2:
            raise ValueError(f"{name} has shape {list(weight.shape)}; it must be a matrix")
    (bottleneck, in_features), out = down_weight.shape, up_weight.shape[0]
    checks.last_dim("x", x, in_features, "the width of down_weight")
    if bottleneck == 0:
        raise ValueError(
            f"down_weight has shape {list(down_weight.shape)}; "
            "the bottleneck must be at least 1 wide"
        )
    sizes = {
        "down_weight": (down_weight, (bottleneck, in_features)),
        "down_bias": (down_bias, (bottleneck,)),
        "up_weight": (up_weight, (in_features if residual is None else out, bottleneck)),
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
