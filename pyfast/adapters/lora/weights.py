"""The parameters of one adapter in one layer."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_PEFT_KEYS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "bias",
}


class LoRAWeights(nn.Module):
    """The parameters that one adapter adds to one layer, with their scaling and dropout."""

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout: float = 0.0,
        *,
        lora_bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        for name, tensor in {"lora_bias": lora_bias, "magnitude": magnitude, "bias": bias}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.scaling, self.dropout = scaling, dropout

    def tensors_by_key(self) -> dict[str, Tensor]:
        """Return the parameters themselves, keyed as in PEFT's files."""
        tensors = {key: getattr(self, name) for key, name in _PEFT_KEYS.items()}
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    def update(self, x: Tensor, dropout_p: float) -> Tensor:
        """Return s (drop(x) A^T B^T + lora_bias), by torch's ops."""
        x = nn.functional.dropout(x, dropout_p, dropout_p > 0).to(self.lora_a.dtype)
        s = nn.functional.linear(x, self.lora_a)  # [..., rank]
        return self.scaling * nn.functional.linear(s, self.lora_b, self.lora_bias)

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def extra_repr(self) -> str:
        fields = [f"r={self.rank}", f"scaling={self.scaling:g}", f"dropout={self.dropout:g}"]
        optional = ("lora_bias", "magnitude", "bias")
        fields += [name for name in optional if getattr(self, name) is not None]
        return f"{', '.join(fields)}, {self.lora_a.dtype}"


def stack_weights(adapters: list[LoRAWeights]) -> tuple[Tensor, Tensor]:
    """Return A [n, r, in] and B [n, out, r] of n adapters; smaller ranks are padded with zeros."""
    rank, dtypes = max(w.rank for w in adapters), {w.lora_a.dtype for w in adapters}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    a = [nn.functional.pad(w.lora_a.to(dtype), (0, 0, 0, rank - w.rank)) for w in adapters]
    b = [nn.functional.pad(w.lora_b.to(dtype), (0, rank - w.rank)) for w in adapters]
    return torch.stack(a), torch.stack(b)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast is off on the device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
