"""PEFT's LoRA layers over bitsandbytes' Linear4bit, as `hf_lora` has them over dense ones."""

import torch
from bitsandbytes.nn import Linear4bit as Base
from peft.tuners.lora import bnb as peft_layers
from torch import Tensor, nn

from pyfast.hf_bitsandbytes import compute_dtype_of, nf4_weight_of
from pyfast.hf_lora import NotCovered, OneOp
from pyfast.nf4_weight import NF4Weight


class Linear4bit(OneOp, peft_layers.Linear4bit):
    def _base_of(self, base: nn.Module, x: Tensor) -> tuple[NF4Weight, torch.dtype]:
        weight = nf4_weight_of(base) if isinstance(base, Base) else None
        if weight is None:
            raise NotCovered(f"its base is a {type(base).__name__} that is not quantised, or repacked for eval")
        return weight, compute_dtype_of(base, x)


FAST = {peft_layers.Linear4bit: Linear4bit}
