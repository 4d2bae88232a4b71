r"""Bottleneck adapters: a small trained detour around a frozen layer's output.

    y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu)        the residual is x by default

One op: the hidden values of a block of rows never leave the cache, and y is written once, the residual in it. Kept for
the backward: x and the parameters; the hidden values are computed again. `pyfast/reference/_adapter.py` is the
specification.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, registry

# --- the ops: CPU kernels in csrc/cpu/adapter/adapter.cpp, GPU kernels in kernels/adapter.py ---


def _check_sizes(x, down_weight, down_bias, up_weight, up_bias, outer) -> None:
    """What memory safety rests on, for the paths that C++ does not check. `outer`: residual or dy."""
    (bottleneck, into), out = down_weight.shape, up_weight.shape[0]
    if bottleneck == 0 or x.dim() == 0 or x.shape[-1] != into or up_weight.shape != (out, bottleneck):
        shapes = [list(t.shape) for t in (x, down_weight, up_weight)]
        raise ValueError(f"x, down_weight and up_weight have shapes {shapes}; they must be [.., i], [b, i], [o, b]")
    sizes = ((down_bias, (bottleneck,)), (up_bias, (out,)), (outer, (*x.shape[:-1], out)))
    for tensor, size in sizes:
        if tensor is not None and tensor.shape != size:
            raise ValueError(f"an argument has shape {list(tensor.shape)}; it must be {list(size)}")
    found = {t.device for t in (x, down_weight, down_bias, up_weight, up_bias, outer) if t is not None}
    if len(found) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(map(str, found)))}; they must be on one device")


def _adapter_fake(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
    residual = x if residual is None else residual
    _check_sizes(x, down_weight, down_bias, up_weight, up_bias, residual)
    return residual.new_empty(residual.shape)


def _adapter_cuda(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
    from pyfast.kernels import adapter as kernels

    outer = x if residual is None else residual
    _check_sizes(x, down_weight, down_bias, up_weight, up_bias, outer)
    rows, outer_rows = _rows(x), _rows(outer)
    parameters = [None if t is None else t.contiguous() for t in (down_weight, down_bias, up_weight, up_bias)]
    return kernels.adapter(rows, *parameters, outer_rows, activation, scaling).view(outer.shape)


def _adapter_backward_fake(dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs):
    _check_sizes(x, down_weight, down_bias, up_weight, None, dy)
    sums = torch.promote_types(x.dtype, torch.float32)
    bottleneck, out = down_weight.shape[0], up_weight.shape[0]
    sizes = (x.shape, down_weight.shape, (bottleneck,), up_weight.shape, (out,))
    dtypes = (x.dtype, down_weight.dtype, sums, up_weight.dtype, sums)
    return tuple(x.new_empty(s if need else (0,), dtype=t) for s, t, need in zip(sizes, dtypes, needs))


def _adapter_backward_cuda(dy, x, down_weight, down_bias, up_weight, residual_is_x, activation, scaling, needs):
    from pyfast.kernels import adapter as kernels

    _check_sizes(x, down_weight, down_bias, up_weight, None, dy)
    parameters = [None if t is None else t.contiguous() for t in (down_weight, down_bias, up_weight)]
    found = kernels.adapter_backward(_rows(dy), _rows(x), *parameters, residual_is_x, activation, scaling, needs)
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


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling):
        ctx.save_for_backward(x, down_weight, down_bias, up_weight)
        ctx.residual_is_x, ctx.activation, ctx.scaling = residual is None, activation, scaling
        ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
        return _adapter(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, down_weight, down_bias, up_weight = ctx.saved_tensors
        needs, grads = list(ctx.needs_input_grad[:5]), [None] * 5
        if any(needs):
            found = _adapter_backward(
                dy, x, down_weight, down_bias, up_weight, ctx.residual_is_x, ctx.activation, ctx.scaling, needs
            )
            bias_dtypes = {2: None if down_bias is None else down_bias.dtype, 4: ctx.up_bias_dtype}
            grads = [g.to(bias_dtypes.get(i, g.dtype)) if needs[i] else None for i, g in enumerate(found)]
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
        down_weight: [bottleneck, in], in float32 or x's dtype, as the other parameters; read as it is.
        down_bias: [bottleneck].
        up_weight: [out, bottleneck].
        up_bias: [out].
        activation: "relu", "gelu" (by erf), "gelu_tanh", "silu" or "tanh".
        scaling: of all but the residual.
        residual: [..., out], in float32 or x's dtype, which is the result's; x itself by default.
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.one_of("activation", activation, reference.ACTIVATIONS)
    _check_scaling(scaling)
    dtype = registry.compute_dtype(x)
    _check_parameters(x, dtype, down_weight, down_bias, up_weight, up_bias, residual)
    if residual is None and dtype != x.dtype:
        residual = x  # autocast lowers the products, not the residual
    args = (x.to(dtype), down_weight, down_bias, up_weight, up_bias, residual, activation, float(scaling))
    leaf = any(isinstance(t, Tensor) and t.requires_grad for t in args)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and leaf):  # forward mode: refused there, aloud
        return _Adapter.apply(*args)
    return _adapter(*args)


def _check_scaling(scaling: float) -> None:
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
        raise ValueError(f"down_weight has shape {list(down_weight.shape)}; the bottleneck must be at least 1 wide")
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
                raise TypeError(f"{name} is {tensor.dtype}; it must be torch.float32 or x's dtype, {x.dtype}")


# --- the module ---


class Adapter(nn.Module):
    """An adapter of its own parameters: `Adapter(768)(x)` is x and a little more.

    init="houlsby" draws both weights from a normal of 0.01, cut off at two of these, so that a new adapter nearly
    passes x on; init="lora" draws the first as nn.Linear does and has the second zero, so that it passes on just x.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int | None = None,
        *,
        reduction: int = 16,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm_before: bool = False,
        layer_norm_after: bool = False,
        init: str = "houlsby",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Of `bottleneck` hidden values, or else width // reduction. layer_norm_after also normalises the residual.

        dropout is of the adapter's input, in training; the residual is whole.
        """
        super().__init__()
        for name, size in (("width", width), ("bottleneck", bottleneck), ("reduction", reduction)):
            if size is not None or name != "bottleneck":
                checks.size(name, size)
                if size == 0:
                    raise ValueError(f"{name} is 0; it must be at least 1")
        _check_scaling(scaling)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; it must be a number from 0 up to, but not including, 1")
        checks.one_of("activation", activation, reference.ACTIVATIONS)
        checks.one_of("init", init, ("houlsby", "lora"))
        bottleneck = max(1, width // reduction) if bottleneck is None else bottleneck
        place = {"dtype": torch.get_default_dtype() if dtype is None else dtype, "device": device}
        checks.one_of("dtype", place["dtype"], checks.FLOATS_AND_DOUBLE)
        self.width, self.bottleneck = width, bottleneck
        self.activation, self.scaling, self.dropout, self.init = activation, scaling, dropout, init
        self.down_weight = nn.Parameter(torch.empty(bottleneck, width, **place))
        self.up_weight = nn.Parameter(torch.empty(width, bottleneck, **place))
        self.down_bias = nn.Parameter(torch.empty(bottleneck, **place)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(width, **place)) if bias else None
        self.norm_before = nn.LayerNorm(width, **place) if layer_norm_before else None
        self.norm_after = nn.LayerNorm(width, **place) if layer_norm_after else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As new, by `init`."""
        if self.init == "houlsby":
            for weight in (self.down_weight, self.up_weight):
                nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_weight)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The adapter of x, added to the residual: x itself, before any norm, by default."""
        checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
        checks.last_dim("x", x, self.width, "the adapter's width")
        drops = self.training and self.dropout > 0
        if residual is None and (drops or self.norm_before is not None):
            residual = x
        if self.norm_before is not None:
            x = self.norm_before(x)
        if drops:
            x = nn.functional.dropout(x, self.dropout)
        y = adapter(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            activation=self.activation,
            scaling=self.scaling,
            residual=residual,
        )
        return y if self.norm_after is None else self.norm_after(y)

    def extra_repr(self) -> str:
        bias = self.down_bias is not None
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        options = f"activation={self.activation!r}, scaling={self.scaling}, bias={bias}"
        return f"{self.width}, {self.bottleneck}, {options}{dropout}"
