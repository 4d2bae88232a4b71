"""bitsandbytes' 4-bit layers on pyfast's kernels: same parameters and bytes, another forward."""

import bitsandbytes as bnb
import torch
from torch import Tensor

from pyfast._support import dtypes, notices
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.nf4 import nf4_linear


def nf4_weight_of(layer: bnb.nn.Linear4bit) -> NF4Weight | None:
    """Return the layer's weight, sharing its memory.

    Return None before the weight is quantized, and while it is repacked for eval on a CPU.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None) or layer.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    packed = weight.data if weight.dtype == torch.uint8 else weight.data.view(torch.uint8)
    nested = {}
    if state.nested:
        nested = {
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
            "offset": state.offset.reshape(1),
        }
    return NF4Weight(
        packed.reshape(-1, 1),
        state.absmax,
        state.code,
        tuple(state.shape),
        state.blocksize,
        state.dtype,
        state.quant_type,
        **nested,
    )


def unpack_weight(layer: bnb.nn.Linear4bit) -> None:
    """Undo what bitsandbytes' eval on a CPU did to the weight; scales stay rounded to 16 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # With float32 as original_dtype, unpacking does not round the scales again.
        dtype, state.original_dtype = state.original_dtype, torch.float32
        unpack = bnb.functional._convert_weight_packed_for_cpu_inverse
        layer.weight.data, _ = unpack(layer.weight.data, state)
        state.dtype = dtype
    elif state is None or state.absmax.dim() != 2:
        return
    if not state.nested:
        state.absmax = state.absmax.t().reshape(-1).float()
    notices.warn_once(
        "bitsandbytes ran in eval mode on a CPU before the model was patched, and rounded the "
        "weights' scales to 16 bits; load the model again and patch it first for what the file says"
    )


def compute_dtype_of(layer: bnb.nn.Linear4bit, x: Tensor) -> torch.dtype:
    """Return the dtype that bitsandbytes would compute in."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype


class _NF4Forward:
    """Forward of the layers below."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.t() + bias` in x's dtype, computed in compute_dtype."""
        w = nf4_weight_of(self)
        if w is None:
            if not torch.compiler.is_compiling():
                notices.warn_once(
                    "a Linear4bit that is not quantized, or repacked, runs as bitsandbytes has it"
                )
            return super().forward(x)
        lowered = x.to(compute_dtype_of(self, x))
        bias = None if self.bias is None else self.bias.to(dtypes.compute_dtype(lowered))
        return nf4_linear(lowered, w, bias).to(x.dtype)


class Linear4bit(_NF4Forward, bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit on pyfast's kernels."""


class LinearNF4(_NF4Forward, bnb.nn.LinearNF4):
    """bitsandbytes' LinearNF4 on pyfast's kernels."""


class LinearFP4(_NF4Forward, bnb.nn.LinearFP4):
    """bitsandbytes' LinearFP4 on pyfast's kernels."""


REPLACEMENTS = {
    bnb.nn.Linear4bit: Linear4bit,
    bnb.nn.LinearNF4: LinearNF4,
    bnb.nn.LinearFP4: LinearFP4,
}
