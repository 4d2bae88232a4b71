"""LoRA where each row of a batch has its own adapter."""

import torch
from torch import Tensor

from pyfast.adapters.lora.weights import LoRAWeights, stacked
from pyfast.adapters.mixed_batch import Rows
from pyfast.ops import lora


def mixed_sum(
    x: Tensor, weight, bias: Tensor | None, rows: Rows, own: list[LoRAWeights], squares
) -> Tensor:
    """y = gain[id] (x W^T + s[id] x A[id]^T B[id]^T) + bias[id]; `squares` gives ||W||^2 of W's rows."""
    ids = rows.ids.to(x.device).view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    a, b = stacked(own)
    plain = all(w.magnitude is None and w.lora_bias is None and w.bias is None for w in own)
    scaling = [w.scaling for w in own]
    y = lora.multi_lora_linear(
        x, weight, a, b, adapter_ids=ids, scaling=scaling, bias=bias if plain else None
    )
    return y if plain else _with_gain_and_bias(y, weight, bias, ids, own, squares)


def _with_gain_and_bias(
    y: Tensor, weight, bias: Tensor | None, ids: Tensor, own: list[LoRAWeights], squares
) -> Tensor:
    """y gain[id] + bias[id], the last of each being the base's."""
    wide = torch.promote_types(y.dtype, torch.float32)
    zero = torch.zeros(y.shape[-1], dtype=wide, device=y.device)
    base_bias = zero if bias is None else bias.to(wide)
    gains, biases = [], []
    for w in own:
        gain = zero + 1
        if w.magnitude is not None:
            norm = lora.dora_norm(weight, w.lora_a, w.lora_b, w.scaling, squares(weight))
            gain = w.magnitude.to(wide) / norm
        with_bias = base_bias if w.bias is None else w.bias.to(wide)
        gains.append(gain)
        biases.append(
            with_bias
            if w.lora_bias is None
            else with_bias + gain * w.scaling * w.lora_bias.to(wide)
        )
    ids = ids % (len(own) + 1)  # -1, the base, is the last
    return (y * torch.stack([*gains, zero + 1])[ids] + torch.stack([*biases, base_bias])[ids]).to(
        y.dtype
    )
