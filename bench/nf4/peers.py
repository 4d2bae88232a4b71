"""Implementations of NF4 that are compared.

Each makes functions of a `Layer`, and says which tensors they hold. Those are copies, so that every
set of buffers lies in its own memory.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import pyfast
from bench.measure.peer import (
    MissingOperation,
    Peer,
    SkippedCase,
    describe_error,
    index_by_name,
    load_module,
)
from bench.nf4.layer import HQQ_MODULE, Layer, load_torchao

# A function and the weights that it holds.
Built = tuple[Callable[..., Any], Sequence[torch.Tensor]]


class NF4Peer(Peer):
    """Base class: an operation that a subclass does not override does not exist there."""

    def quantize(self, layer: Layer) -> tuple[Callable, Callable]:
        """Return a function that quantizes a weight, and one that decodes its result."""
        raise MissingOperation

    def dequantize(self, layer: Layer) -> Built:
        raise MissingOperation

    def linear(self, layer: Layer) -> Built:
        raise MissingOperation


class PyFast(NF4Peer):
    name = "pyfast"

    def quantize(self, layer):
        def decode(packed):
            return pyfast.reference.nf4_dequantize(packed, torch.float64)

        return pyfast.nf4_quantize, decode

    def dequantize(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda: pyfast.nf4_dequantize(packed), packed.state

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: pyfast.nf4_linear(x, packed), packed.state


class TwoPass(NF4Peer):
    """Peer that unpacks the weight and calls torch's GEMM; a fused kernel has to be faster."""

    name = "dequantize+torch"
    has_backward = False  # a backward would keep the unpacked weight

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: F.linear(x, pyfast.nf4_dequantize(packed)), packed.state


class Torch(NF4Peer):
    """Peer that computes the dense layer in torch."""

    name = "torch"

    def linear(self, layer):
        weight = layer.dense.to(self.dtype or layer.source.dtype, copy=True)
        return lambda x: F.linear(x, weight), [weight]


class TorchFloat32(Torch):
    """The float32 dense layer, the one to beat on a CPU without AVX512-BF16 or AMX."""

    name = "torch-fp32"
    dtype = torch.float32

    def missing_reason(self, device):
        return None if device == "cpu" else "no use for it on a GPU"

    def linear(self, layer):
        if layer.source.dtype == torch.float32:
            raise MissingOperation
        return super().linear(layer)


class BitsAndBytes(NF4Peer):
    """bitsandbytes in training, and in inference where there is no packed CPU layout."""

    name = "bnb-train"
    module = "bitsandbytes"

    def quant_state(self, layer: Layer) -> tuple[torch.Tensor, Any]:
        """Return the very bytes of `layer.packed` in bitsandbytes' classes."""
        functional = load_module("bitsandbytes.functional")
        weight = copy.deepcopy(layer.packed)
        packed, absmax, code, *nested = weight.state
        extra: dict[str, Any] = {}
        if nested:
            inner, inner_code, offset = nested
            second = functional.QuantState(
                absmax=inner, code=inner_code, blocksize=256, dtype=torch.float32
            )
            extra = {"offset": offset.reshape(()), "state2": second}
        state = functional.QuantState(
            absmax=absmax,
            shape=torch.Size(weight.shape),
            code=code,
            blocksize=weight.blocksize,
            quant_type=weight.quant_type,
            dtype=layer.source.dtype,
            **extra,
        )
        return packed.view(-1, 1), state

    def linear4bit(self, layer: Layer) -> torch.nn.Module:
        nn = load_module("bitsandbytes.nn")
        packed, state = self.quant_state(layer)
        rows, cols = layer.packed.shape
        module = nn.Linear4bit(cols, rows, bias=False, quant_type="nf4", device="meta")
        module.weight = nn.Params4bit(packed, False, quant_state=state, bnb_quantized=True)
        return module

    def quantize(self, layer):
        functional = load_module("bitsandbytes.functional")

        def decode(result):
            packed, state = result
            state.dtype = torch.float32
            return functional.dequantize_4bit(packed, state)

        options = {"compress_statistics": True, "quant_type": "nf4"}
        return functools.partial(functional.quantize_4bit, **options), decode

    def dequantize(self, layer):
        functional = load_module("bitsandbytes.functional")
        packed, state = self.quant_state(layer)
        return lambda: functional.dequantize_4bit(packed, state), held_tensors(packed, state)

    def linear(self, layer):
        bnb = load_module("bitsandbytes")
        packed, state = self.quant_state(layer)
        return lambda x: bnb.matmul_4bit(x, packed, quant_state=state), held_tensors(packed, state)


def held_tensors(packed: torch.Tensor, state: Any) -> list[torch.Tensor]:
    """Return all tensors that bitsandbytes holds of a weight."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [packed, state.absmax, state.code, *nested]


class BitsAndBytesEval(BitsAndBytes):
    """`Linear4bit.eval()`, which repacks the weight for another kernel on AVX512-BF16."""

    name = "bnb-eval"
    has_backward = False
    quantize = dequantize = NF4Peer.quantize

    def missing_reason(self, device):
        absent = super().missing_reason(device)
        if absent:
            return absent
        if device == "cuda" or not load_module("bitsandbytes.functional").has_avx512bf16():
            return "the same path as bnb-train on this machine"

    def linear(self, layer):
        return self.linear4bit(layer).eval(), layer.packed.state


class TorchAO(NF4Peer):
    """torchao gets the source weight, since its scales are quantized differently."""

    name = "torchao"
    has_different_format = True

    def missing_reason(self, device):
        try:
            load_torchao()
        except Exception as error:
            return describe_error(error)

    def quantize(self, layer):
        return load_torchao().to_nf4, lambda packed: packed.get_original_weight()

    def _copy(self, layer: Layer) -> Built:
        """Copy the weight part by part, since its own clone would quantize again, for a second."""
        weight = layer.torchao
        names, context = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name).clone() for name in names}
        held_names = ("quantized_scalers", "quantization_factor", "quantized_data")
        size, stride = weight.size(), weight.stride()
        copied = type(weight).__tensor_unflatten__(parts, context, size, stride)
        return copied, [parts[name] for name in held_names]

    def dequantize(self, layer):
        weight, held = self._copy(layer)
        return weight.get_original_weight, held

    def linear(self, layer):
        weight, held = self._copy(layer)
        return lambda x: load_torchao().linear_nf4(x, weight), held


class Unsloth(BitsAndBytes):
    """unsloth's kernels over bitsandbytes' tensors."""

    name = "unsloth"
    module = "unsloth.kernels.utils"
    has_backward = False  # it has one only together with LoRA
    quantize = NF4Peer.quantize

    def missing_reason(self, device):
        return "its NF4 kernels need a GPU" if device == "cpu" else super().missing_reason(device)

    def dequantize(self, layer):
        packed, state = self.quant_state(layer)
        return lambda: load_module(self.module).fast_dequantize(packed, state), held_tensors(
            packed, state
        )

    def linear(self, layer):
        kernels = load_module(self.module)
        packed, state = self.quant_state(layer)

        def call(x):
            if len(x) == 1:
                return kernels.fast_gemv(x[None], packed, state)[0]
            return F.linear(x, kernels.fast_dequantize(packed, state))

        return call, held_tensors(packed, state)


class HQQ(NF4Peer):
    """4-bit integers in groups of 64, each with a fitted scale and zero; unpacked in every call."""

    name = "hqq"
    module = HQQ_MODULE
    has_different_format = True

    def missing_reason(self, device):
        if device == "cpu":
            return "run on a GPU only: fitting takes long"
        return super().missing_reason(device)

    def linear(self, layer):
        module = copy.deepcopy(layer.hqq)
        return module, [module.W_q, module.meta["scale"], module.meta["zero"]]


class GemLite(NF4Peer):
    """gemlite has no table lookup, and gets symmetric 4-bit integers in groups of 64."""

    name = "gemlite"
    module = "gemlite.helper"
    has_backward = False
    has_different_format = True

    def missing_reason(self, device):
        return "needs a GPU" if device == "cpu" else super().missing_reason(device)

    def linear(self, layer):
        dtype = layer.source.dtype
        rows, cols = layer.source.shape
        if dtype == torch.float32 or cols % 64:
            raise SkippedCase("16-bit and K a multiple of 64 only")
        groups = layer.dense.float().view(-1, 64)
        scale = groups.abs().amax(1, keepdim=True) / 7
        codes = (groups / scale).round().nan_to_num().add(8).to(torch.uint8).view(rows, cols)
        helper = load_module(self.module).A16Wn(device="cuda:0", dtype=dtype)
        scale = scale.to(dtype)
        module = helper.from_weights(codes, scale, torch.full_like(scale, 8), 4, 64)
        codes_held = torch.empty(rows * cols // 2, dtype=torch.uint8, device="meta")
        return module, [codes_held, scale, scale]


PEERS = index_by_name(
    *(PyFast(), Torch(), TorchFloat32(), TwoPass(), BitsAndBytes(), BitsAndBytesEval()),
    *(TorchAO(), HQQ(), Unsloth(), GemLite()),
)
