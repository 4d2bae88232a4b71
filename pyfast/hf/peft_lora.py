"""PEFT's LoRA layers on pyfast's kernels: the same modules and parameters, another forward.

PEFT runs the base, casts x, multiplies twice, scales and adds; `lora_linear` is one op. It serves
one active adapter of LoRA, rsLoRA or DoRA over a plain nn.Linear, Conv1D or Linear4bit. In all
other cases PEFT's forward runs.
"""

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from pyfast._support import checks, dtypes, notices
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.nn.linear_layers import forward_hooks, is_conv1d, is_linear
from pyfast.ops import lora, lora_arguments


class NotCovered(Exception):
    """Reason why PEFT's forward runs."""


class LoRAForward:
    """Forward of PEFT's LoRA layers, as one op; bases are dense."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return the same result as PEFT's forward.

        With DoRA and dropout there is one difference in training: dropout changes the x of the
        low-rank part only.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        try:
            if args or kwargs:
                raise NotCovered(f"it is called with {', '.join(kwargs) or 'more than x'}")
            if len(names) > 1:
                raise NotCovered(f"{len(names)} adapters are active at once")
            if not isinstance(x, Tensor) or x.dtype not in checks.FLOATS_AND_DOUBLE:
                raise NotCovered(f"x is {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
            return self._fused_forward(x, names[0])
        except NotCovered as reason:
            if not torch.compiler.is_compiling():
                notices.warn_once(
                    f"a LoRA layer runs as PEFT has it, slower than it could: {reason}"
                )
        return super().forward(x, *args, **kwargs)

    def _fused_forward(self, x: Tensor, name: str) -> Tensor:
        """Return the result of `lora_linears`, or raise NotCovered."""
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        base, scaling, magnitude = self.base_layer, self.scaling[name], _magnitude(self, name)
        _check_modules(a, b, dropout, base, magnitude)
        if not isinstance(scaling, int | float):
            raise NotCovered(f"its scaling is a {type(scaling).__name__}")
        weight, dtype = self._base_of(base, x)
        projection = lora_arguments.Projection(
            weight,
            a.weight,
            b.weight,
            scaling,
            base.bias,
            b.bias,
            None if magnitude is None else magnitude.weight,
            None if magnitude is None else self._row_squares_of(weight),
        )
        _check_tensors(x, dtype, projection)
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        y = lora.lora_linears(x.to(dtype), [projection], dropout_p=p)[0]
        return y.to(x.dtype) if isinstance(weight, NF4Weight) else y

    def _base_of(self, base: nn.Module, x: Tensor) -> tuple[Tensor | NF4Weight, torch.dtype]:
        """Return the base's weight, and the dtype that it computes in without autocast."""
        if not is_linear(base):
            raise NotCovered(f"its base is a {type(base).__name__}")
        if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise NotCovered(f"x is {x.dtype} and its base {base.weight.dtype}")
        return (base.weight.t() if is_conv1d(base) else base.weight), x.dtype

    def _row_squares_of(self, weight: Tensor) -> Tensor | None:
        """Return None: they are not kept, because PEFT merges into a dense weight unseen."""
        return None


def _magnitude(layer: nn.Module, name: str) -> nn.Module | None:
    """Return the module of DoRA's magnitude, or None if the adapter is plain LoRA."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return None
    if type(variant) is not DoraLinearVariant:
        raise NotCovered(f"its variant is {type(variant).__name__}")
    return layer.lora_magnitude_vector[name]


def _check_modules(
    a: nn.Module, b: nn.Module, dropout: nn.Module, *others: nn.Module | None
) -> None:
    """Check that the modules are PEFT's, without hooks or wrappers: those must be called."""
    if (
        type(a) is not nn.Linear
        or type(b) is not nn.Linear
        or type(dropout) not in (nn.Identity, nn.Dropout)
    ):
        raise NotCovered(
            f"it is made of {type(a).__name__}, {type(b).__name__} and {type(dropout).__name__}"
        )
    for module in (a, b, dropout, *others):
        if module is not None and (hooks := forward_hooks(module)):
            raise NotCovered(f"its {type(module).__name__} has {', '.join(hooks)}")


def _check_tensors(x: Tensor, dtype: torch.dtype, p: lora_arguments.Projection) -> None:
    """Check that the tensors are plain and where x is, and adapters of a dtype that the op takes.

    Shards and offloaded weights are refused.
    """
    base = p.weight.packed if isinstance(p.weight, NF4Weight) else p.weight
    for tensor in (base, p.lora_a, p.lora_b, p.bias, p.lora_bias, p.magnitude):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            raise NotCovered(f"a parameter of it is a {type(tensor).__name__}")
        if tensor is not None and tensor.device != x.device:
            raise NotCovered(f"x is on {x.device} and a parameter of it on {tensor.device}")
    allowed = (
        {torch.float64}
        if dtype == torch.float64
        else {dtype, dtypes.compute_dtype(x), torch.float32}
    )
    for tensor in (p.lora_a, p.lora_b):
        if tensor.dtype not in allowed:
            raise NotCovered(f"its adapter is {tensor.dtype}; it must be torch.float32 or {dtype}")


class Linear(LoRAForward, peft_layers.Linear):
    """PEFT's LoRA over a dense layer, on pyfast's kernels."""


REPLACEMENTS = {peft_layers.Linear: Linear}
