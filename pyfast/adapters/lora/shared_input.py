"""Layers that are called on one x (q, k, v; gate, up): the first that is computes all of them, in one pass over x."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pyfast._support import dtypes
from pyfast.ops import lora

if TYPE_CHECKING:
    from pyfast.adapters.lora.layer import LoRALinear

# What they are called in transformers' models.
_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
_CROSS = re.compile(
    "cross|encoder_attn|encdec", re.IGNORECASE
)  # there q has another x than k and v


class _Held(NamedTuple):
    """Outputs that were computed and not yet asked for."""

    x: Tensor
    state: tuple  # in which they were computed
    outputs: dict[int, tuple[Tensor, tuple]]  # by the layer's id, with its own state


class SharedInput:
    """Layers that have turned up with one x so far; once they do not, each computes by itself from then on."""

    def __init__(self, layers: Sequence["LoRALinear"]) -> None:
        self.layers = list(layers)
        self._held: _Held | None = None
        self._left = 0  # times in a row that outputs were left behind

    def output(self, layer: "LoRALinear", x: Tensor) -> Tensor | None:
        """The layer's y; None if it is to compute that by itself."""
        if (
            torch.compiler.is_compiling()
            or x.is_inference()
            or getattr(layer, "_is_replica", False)
        ):
            return None
        held, state = self._held, (x._version, torch.is_grad_enabled(), dtypes.compute_dtype(x))
        if held is None:
            return self._compute(layer, x, state)
        if held.x is not x or held.state != state:
            self._held, self._left = None, self._left + 1
            if id(layer) in held.outputs or self._left > 1:
                self.layers = []
                return None
            return self._compute(
                layer, x, state
            )  # it is the first again: an exception came between
        y, own_state = held.outputs.pop(id(layer), (None, None))
        if not held.outputs:
            self._held, self._left = None, 0
        return y if own_state == layer.state_of_output() else None

    def _compute(self, layer: "LoRALinear", x: Tensor, state: tuple) -> Tensor | None:
        dropout = layer.dropout_now()
        together = [other for other in self.layers if other.can_join(x, dropout)]
        if len(together) < 2 or layer not in together:
            return None
        ys = lora.lora_linears(x, [other.projection() for other in together], dropout_p=dropout)
        outputs = {id(other): (y, other.state_of_output()) for other, y in zip(together, ys)}
        y, _ = outputs.pop(id(layer))
        self._held = _Held(x, state, outputs)
        return y

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": None}


def link(model: nn.Module, kind: type) -> None:
    """Tells the layers of this kind in the model which others will be called on their x."""
    for path, parent in model.named_modules():
        for names in _NAMES:
            names = names[1:] if len(names) == 3 and _CROSS.search(path) else names
            layers = [
                layer for name in names if isinstance(layer := parent._modules.get(name), kind)
            ]
            if len(layers) > 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer.shared = shared
