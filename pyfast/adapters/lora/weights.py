"""The parameters of one adapter in one layer, how they start, and which layers can have them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor, nn

_KEYS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "bias",
}


class LoRAWeights(nn.Module):
    """What one adapter adds to one layer."""

    def __init__(
        self, lora_a, lora_b, scaling, dropout=0.0, *, lora_bias=None, magnitude=None, bias=None
    ) -> None:
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
        parts += [
            name for name in ("lora_bias", "magnitude", "bias") if getattr(self, name) is not None
        ]
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
