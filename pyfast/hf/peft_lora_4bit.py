"""PEFT's LoRA layers over bitsandbytes' Linear4bit, on pyfast's kernels; see `peft_lora`."""

import weakref

import torch
from bitsandbytes import nn as bnb_nn
from peft.tuners.lora import bnb as peft_layers
from torch import Tensor, nn

from pyfast.formats.nf4_weight import NF4Weight
from pyfast.hf.bitsandbytes_layers import compute_dtype_of, nf4_weight_of
from pyfast.hf.peft_lora import LoRAForward, NotCovered
from pyfast.ops import lora


class Linear4bit(LoRAForward, peft_layers.Linear4bit):
    """PEFT's LoRA over a Linear4bit, on pyfast's kernels."""

    def _base_of(self, base: nn.Module, x: Tensor) -> tuple[NF4Weight, torch.dtype]:
        weight = nf4_weight_of(base) if isinstance(base, bnb_nn.Linear4bit) else None
        if weight is None:
            raise NotCovered(
                f"its base is a {type(base).__name__} that is not quantized, or repacked for eval"
            )
        return weight, compute_dtype_of(base, x)

    def _row_squares_of(self, weight: NF4Weight) -> Tensor | None:
        """Once for each weight: PEFT replaces the parameter when it merges, and nobody else writes to it unseen."""
        parameter = self.base_layer.weight
        if torch.compiler.is_compiling() or parameter.is_inference():
            return None
        key = (parameter.data_ptr(), parameter._version, weight.absmax.data_ptr())
        held = _squares.get(self)
        if held is None or held[0]() is not parameter or held[1] != key:
            held = _squares[self] = (weakref.ref(parameter), key, lora.row_squares(weight))
        return held[2]


_squares: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # beside the layers: in no copy, in no file


REPLACEMENTS = {peft_layers.Linear4bit: Linear4bit}
