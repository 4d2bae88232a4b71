"""Which modules are linear layers, and what they have in common."""

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.nn.nf4_linear import NF4Linear


def looks_linear(module: nn.Module) -> bool:
    """What "all-linear" would take in, were `is_linear` so; 4-bit and 8-bit layers, and classes of the user's."""
    return isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer of a transposed weight [in, out]."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


BASES = "a plain nn.Linear of a floating dtype, an NF4Linear or a Conv1D"


def is_linear(module: nn.Module) -> bool:
    """What LoRALinear can wrap: a linear layer that computes as nn.Linear does, on a floating weight."""
    if isinstance(module, NF4Linear) or is_conv1d(module):
        return True
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    # nn.MultiheadAttention reads the weight of its out_proj past the layer's forward.
    mine = plain and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return mine and module.weight.dtype in checks.FLOATS_AND_DOUBLE


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Out and in."""
    if isinstance(layer, NF4Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.t().shape if is_conv1d(layer) else layer.weight.shape)


def device_of(layer: nn.Module) -> torch.device:
    """Where it computes; accelerate brings weights there that are elsewhere between the calls."""
    there = getattr(layer.__dict__.get("_hf_hook"), "execution_device", None)
    return layer.weight.device if there is None else torch.device(there)


def hooks_of(module: nn.Module) -> list[str]:
    """What somebody hung on the module's forward."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    patched = [name for name in ("_hf_hook", "forward") if name in module.__dict__]
    return [kind for kind in kinds if module.__dict__.get(kind)] + patched


def check_base(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module) or not is_linear(module):
        raise TypeError(
            f"{name} is a {type(module).__name__}; it must be {BASES}{hint_for(module)}"
        )


def hint_for(module: nn.Module) -> str:
    """How bitsandbytes' 4-bit layers come to be an NF4Linear."""
    is_4bit = type(module).__name__.startswith("Linear4bit")
    return "; bitsandbytes' weights are read by NF4Linear, so convert them first" if is_4bit else ""


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = (
            bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        )
    return linear


ALL_LINEAR = "all-linear"


HEADS = {  # that PEFT trains and saves beside the adapter, by task
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
