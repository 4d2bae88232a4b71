"""The parameters of one adapter in one layer, how they start, and which layers can have them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.ops.nf4 import NF4Linear

_KEYS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "bias",
}


class LoRAWeights(nn.Module):
    """What one adapter adds to one layer."""

    def __init__(self, lora_a, lora_b, scaling, dropout=0.0, *, lora_bias=None, magnitude=None, bias=None) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        for name, tensor in {"lora_bias": lora_bias, "magnitude": magnitude, "bias": bias}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.scaling, self.dropout = scaling, dropout

    def entries(self) -> dict[str, Tensor]:
        """The tensors, themselves, by PEFT's names."""
        found = {key: getattr(self, name) for key, name in _KEYS.items()}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def extra_repr(self) -> str:
        parts = [f"r={self.rank}", f"scaling={self.scaling:g}", f"dropout={self.dropout:g}"]
        parts += [name for name in ("lora_bias", "magnitude", "bias") if getattr(self, name) is not None]
        return f"{', '.join(parts)}, {self.lora_a.dtype}"


def stacked(own: list[LoRAWeights]) -> tuple[Tensor, Tensor]:
    """A [n, r, in] and B [n, out, r], the smaller ranks padded with zeros."""
    rank, dtypes = max(w.rank for w in own), {w.lora_a.dtype for w in own}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    a = [nn.functional.pad(w.lora_a.to(dtype), (0, 0, 0, rank - w.rank)) for w in own]
    b = [nn.functional.pad(w.lora_b.to(dtype), (0, rank - w.rank)) for w in own]
    return torch.stack(a), torch.stack(b)


def _kaiming(into: int, out: int, r: int, device) -> tuple[Tensor, Tensor]:
    a = nn.init.kaiming_uniform_(torch.empty(r, into, device=device), a=math.sqrt(5))
    return a, torch.zeros(out, r, device=device)


def _gaussian(into: int, out: int, r: int, device) -> tuple[Tensor, Tensor]:
    return torch.randn(r, into, device=device) / r, torch.zeros(out, r, device=device)


def _orthogonal(into: int, out: int, r: int, device) -> tuple[Tensor, Tensor]:
    """Both in orthogonal halves of R^r, so that B A = 0."""
    q = torch.linalg.qr(torch.randn(r, r, device=device))[0]
    a = q[0::2].t() @ torch.randn(r // 2, into, device=device)
    b = torch.randn(out, r // 2, device=device) @ q[1::2]
    return a / 10, b / 10


def precise(method: Callable) -> Callable:
    """The method of a layer, without autocast."""

    @wraps(method)
    def run(self, *args, **kwargs):
        kind = self._weight().device.type
        known = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if known else nullcontext():
            return method(self, *args, **kwargs)

    return run


INITS = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}


def looks_linear(module: nn.Module) -> bool:
    """What "all-linear" would take in, were `is_linear` so; 4-bit and 8-bit layers, and classes of the user's."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer of a transposed weight [in, out]."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


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
        raise TypeError(f"{name} is a {type(module).__name__}; it must be {BASES}{hint_for(module)}")


def hint_for(module: nn.Module) -> str:
    """How bitsandbytes' 4-bit layers come to be an NF4Linear."""
    is_4bit = type(module).__name__.startswith("Linear4bit")
    return "; bitsandbytes' weights are read by NF4Linear, so convert them first" if is_4bit else ""


def check_name(name: str) -> None:
    """A name that nn.ModuleDict can hold."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(f"name is {name!r}; it must not be empty, have dots, or be an attribute of nn.ModuleDict")


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return linear
