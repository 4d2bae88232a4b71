"""A LoRA layer where each row of the batch has its own adapter."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyfast._support.dtypes import sum_dtype
from pyfast.adapters.lora.weights import LoRAWeights, stack_weights
from pyfast.adapters.row_assignment import RowAssignment
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops import dora, lora

Weight = Tensor | NF4Weight


def check_mixed_batch(
    x: Tensor, rows: RowAssignment, training_adapters: dict[str | None, LoRAWeights]
) -> None:
    """Raise ValueError unless there is one adapter for each x[i], and none that trains drops."""
    if x.dim() < 2 or len(rows.indices) != x.shape[0]:
        raise ValueError(
            f"adapter_ids has {len(rows.indices)} names; x, of shape {list(x.shape)}, needs one "
            "for each x[i]"
        )
    for name, adapter in training_adapters.items():
        if adapter.dropout:
            raise ValueError(
                f"adapter {name!r} has dropout, which a mixed batch has not; call eval() or make "
                "it 0"
            )


def mixed_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rows: RowAssignment,
    adapters: list[LoRAWeights],
    row_squares: Callable[[Weight], Tensor | None],
) -> Tensor:
    """Return y = gain[id] (x W^T + s[id] x A[id]^T B[id]^T) + bias[id].

    `row_squares` returns ||W||^2 of the rows of W.
    """
    indices = rows.indices.to(x.device).view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    a, b = stack_weights(adapters)
    vectors = [v for w in adapters for v in (w.magnitude, w.lora_bias, w.bias) if v is not None]
    y = lora.multi_lora_linear(
        x,
        weight,
        a,
        b,
        adapter_ids=indices,
        scaling=[w.scaling for w in adapters],
        bias=None if vectors else bias,
    )
    if not vectors:
        return y
    return _apply_gain_and_bias(y, weight, bias, indices, adapters, row_squares)


def _apply_gain_and_bias(
    y: Tensor,
    weight: Weight,
    base_bias: Tensor | None,
    indices: Tensor,
    adapters: list[LoRAWeights],
    row_squares: Callable[[Weight], Tensor | None],
) -> Tensor:
    """Return y gain[id] + bias[id]; the last gain and bias are those of the base."""
    dtype = sum_dtype(y)
    zero = torch.zeros(y.shape[-1], dtype=dtype, device=y.device)
    one = zero + 1
    base_bias = zero if base_bias is None else base_bias.to(dtype)
    gains, biases = [], []
    for w in adapters:
        gain = one
        if w.magnitude is not None:
            norm = dora.dora_norm(weight, w.lora_a, w.lora_b, w.scaling, row_squares(weight))
            gain = w.magnitude.to(dtype) / norm
        bias = base_bias if w.bias is None else w.bias.to(dtype)
        if w.lora_bias is not None:
            bias = bias + gain * w.scaling * w.lora_bias.to(dtype)
        gains.append(gain)
        biases.append(bias)
    indices = indices % (len(adapters) + 1)  # -1, the base, becomes the last
    gain, bias = torch.stack([*gains, one])[indices], torch.stack([*biases, base_bias])[indices]
    return (y * gain + bias).to(y.dtype)
