"""A bottleneck adapter as a module."""

import math

import torch
from torch import Tensor, nn

from pyfast import reference
from pyfast._support import checks
from pyfast.ops.adapter import adapter, check_scaling


class Adapter(nn.Module):
    """An adapter of its own parameters: `Adapter(768)(x)` is x and a little more.

    init="houlsby" draws both weights from a normal of 0.01, cut off at two of these, so that a new
    adapter nearly passes x on; init="lora" draws the first as nn.Linear does and has the second
    zero, so that it passes on just x.
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
        """Of `bottleneck` hidden values, or else width // reduction. layer_norm_after also
        normalizes the residual.

        dropout is of the adapter's input, in training; the residual is whole.
        """
        super().__init__()
        for name, size in (("width", width), ("bottleneck", bottleneck), ("reduction", reduction)):
            if size is not None or name != "bottleneck":
                checks.size(name, size)
                if size == 0:
                    raise ValueError(f"{name} is 0; it must be at least 1")
        check_scaling(scaling)
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, int | float)
            or not 0 <= dropout < 1
        ):
            raise ValueError(
                f"dropout is {dropout!r}; it must be a number from 0 up to, but not including, 1"
            )
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
