"""Linear layers: which modules are one, and what they have in common."""

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.ops.nf4 import nf4_dequantize

ALL_LINEAR = "all-linear"
LINEAR_LAYER_RULE = "a plain nn.Linear of a floating dtype, an NF4Linear or a Conv1D"
TASK_HEADS = {  # attributes of heads that PEFT trains and saves beside the adapter, by task type
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_linear_like(module: nn.Module) -> bool:
    """Return whether the module derives from nn.Linear, though `is_linear` may refuse it.

    Such modules are 4-bit and 8-bit layers of other libraries, and classes of users.
    "all-linear" must not leave them out in silence.
    """
    return isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is transformers' Conv1D: its weight is transposed, [in, out]."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether LoRALinear can wrap the module.

    It must compute as nn.Linear does, on a weight of a floating dtype.
    """
    if isinstance(module, NF4Linear) or is_conv1d(module):
        return True
    # nn.MultiheadAttention reads the weight of its out_proj past the layer's forward.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_plain and module.weight.dtype in checks.FLOATS_AND_DOUBLE


def check_base(name: str, module: nn.Module) -> None:
    """Raise TypeError unless `is_linear` accepts the module."""
    if not isinstance(module, nn.Module) or not is_linear(module):
        raise TypeError(
            f"{name} is a {type(module).__name__}; it must be {LINEAR_LAYER_RULE}"
            f"{conversion_hint(module)}"
        )


def conversion_hint(module: nn.Module) -> str:
    """Return the end of an error message that says how to convert bitsandbytes' 4-bit layers."""
    is_4bit = type(module).__name__.startswith("Linear4bit")
    return "; bitsandbytes' weights are read by NF4Linear, so convert them first" if is_4bit else ""


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return out_features and in_features of a linear layer."""
    if isinstance(layer, NF4Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.t().shape if is_conv1d(layer) else layer.weight.shape)


def layer_weight(layer: nn.Module) -> Tensor | NF4Weight:
    """Return the weight of a linear layer as the ops take it, [out, in]."""
    if isinstance(layer, NF4Linear):
        return layer.nf4_weight
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a detached tensor [out, in], dequantized if NF4."""
    weight = layer_weight(layer)
    return nf4_dequantize(weight) if isinstance(weight, NF4Weight) else weight.detach()


def compute_device(layer: nn.Module) -> torch.device:
    """Return the device that the layer computes on.

    Accelerate may keep the weights elsewhere, and brings them to that device for each call.
    """
    device = getattr(layer.__dict__.get("_hf_hook"), "execution_device", None)
    return layer.weight.device if device is None else torch.device(device)


def forward_hooks(module: nn.Module) -> list[str]:
    """Return the names of the attributes by which somebody intercepts the module's calls."""
    hook_dicts = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    attributes = module.__dict__
    hooks = [name for name in hook_dicts if attributes.get(name)]
    return hooks + [name for name in ("_hf_hook", "forward") if name in attributes]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear around a weight and a bias, which are not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        is_parameter = isinstance(bias, nn.Parameter)
        linear.bias = bias if is_parameter else nn.Parameter(bias, requires_grad=False)
    return linear
