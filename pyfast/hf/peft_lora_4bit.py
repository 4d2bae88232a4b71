"""PEFT's LoRA layers over bitsandbytes' Linear4bit, on pyfast's kernels; see `peft_lora`."""

import weakref

import torch
from bitsandbytes import nn as bnb_nn
from peft.tuners.lora import bnb as peft_layers
from torch import Tensor, nn

from pyfast.formats.nf4_weight import NF4Weight
from pyfast.hf.bitsandbytes_layers import compute_dtype_of, nf4_weight_of
from pyfast.hf.peft_lora import LoRAForward, NotCovered
from pyfast.ops import dora


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
        """Return ||W||^2 of each row, kept, because PEFT replaces the parameter when it merges."""
        cache = _caches.setdefault(self, dora.RowSquaresCache())
        return cache.get(weight, self.base_layer.weight)


# Kept beside the layers, so that they are in no copy and in no file.
_caches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


REPLACEMENTS = {peft_layers.Linear4bit: Linear4bit}
