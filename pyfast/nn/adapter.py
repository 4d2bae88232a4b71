"""A bottleneck adapter as a module."""

import math

import torch
from torch import Tensor, nn

from pyfast import reference
from pyfast._support import checks
from pyfast.ops.adapter import adapter


class Adapter(nn.Module):
    """A bottleneck adapter: down-projection, activation, up-projection, plus the residual.

    Args:
        width: int; the size of the input and the output.
        bottleneck: int; the number of hidden values. width // reduction by default.
        reduction: int, 16 by default; used if `bottleneck` is None.
        activation: "relu" (the default), "gelu" (by erf), "gelu_tanh", "silu" or "tanh".
        scaling: float, 1.0 by default; multiplies the adapter's output before it is added.
        dropout: float, 0 by default; drops values of the adapter's input, in training. Nothing of
            the residual is dropped.
        bias: bool, True by default; whether both projections have a bias.
        layer_norm_before: bool, False by default; normalize the adapter's input.
        layer_norm_after: bool, False by default; normalize the sum of output and residual.
        init: "houlsby" (the default) draws both weights from a normal distribution with a standard
            deviation of 0.01, cut off at two of these. So a new adapter nearly passes x on. "lora"
            draws the first weight as nn.Linear does and sets the second to zero. So a new adapter
            passes exactly x on.
        dtype: torch.dtype of the parameters; torch's default.
        device: device of the parameters; torch's default.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.Adapter(768, reduction=16, activation="gelu")
        >>> layer(torch.randn(2, 10, 768)).shape
        torch.Size([2, 10, 768])
        >>> layer.down_weight.shape
        torch.Size([48, 768])
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
        super().__init__()
        _check_sizes(width, bottleneck, reduction)
        checks.finite_number("scaling", scaling)
        checks.probability("dropout", dropout)
        checks.one_of("activation", activation, reference.ACTIVATIONS)
        checks.one_of("init", init, ("houlsby", "lora"))
        bottleneck = max(1, width // reduction) if bottleneck is None else bottleneck
        options = {"dtype": torch.get_default_dtype() if dtype is None else dtype, "device": device}
        checks.one_of("dtype", options["dtype"], checks.FLOATS_AND_DOUBLE)
        self.width, self.bottleneck = width, bottleneck
        self.activation, self.scaling, self.dropout, self.init = activation, scaling, dropout, init
        self.down_weight = nn.Parameter(torch.empty(bottleneck, width, **options))
        self.up_weight = nn.Parameter(torch.empty(width, bottleneck, **options))
        self.down_bias = nn.Parameter(torch.empty(bottleneck, **options)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(width, **options)) if bias else None
        self.norm_before = nn.LayerNorm(width, **options) if layer_norm_before else None
        self.norm_after = nn.LayerNorm(width, **options) if layer_norm_after else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reinitialize all parameters with the scheme named by `init`."""
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
        """Return the adapter's output for x, added to the residual.

        Args:
            x: [..., width]; float32, bfloat16, float16 or float64.
            residual: [..., width]; by default x itself, before any norm.

        Returns:
            [..., width].
        """
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


def _check_sizes(width: object, bottleneck: object | None, reduction: object) -> None:
    for name, size in (("width", width), ("bottleneck", bottleneck), ("reduction", reduction)):
        if size is None and name == "bottleneck":
            continue
        checks.size(name, size)
        if size == 0:
            raise ValueError(f"{name} is 0; it must be at least 1")
