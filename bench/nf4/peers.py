"""The NF4 layers to compare with. Each makes functions out of a `Layer`, and says which tensors
they hold.

What is held is copied, so that every set of buffers lies in its own memory.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import pyfast
from bench.measure.machine import DTYPES
from bench.measure.peer import Lacks, Peer, Skip, by_name, load, reason

Built = tuple[Callable[..., Any], Sequence[torch.Tensor]]  # a function and the weights it holds


@dataclass
class Layer:
    """One weight: as it was, packed by the reference, and (for dense peers) unpacked again."""

    source: torch.Tensor
    packed: Any

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        return pyfast.reference.nf4_dequantize(self.packed, torch.float64)

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        return pyfast.reference.nf4_dequantize(self.packed, self.source.dtype)

    @functools.cached_property
    def torchao(self) -> torch.Tensor:
        return _torchao().to_nf4(self.source)

    @functools.cached_property
    def hqq(self) -> torch.nn.Module:
        module = load(HQQ.module)
        config, weight = module.BaseQuantizeConfig(nbits=4, group_size=64, axis=1), self.source
        return module.HQQLinear.from_weights(
            weight.clone(), None, config, compute_dtype=weight.dtype, device=str(weight.device)
        )


@functools.lru_cache(maxsize=1)
def layer(shape: str, dtype: str, device: str) -> Layer:
    """Random weights of a trained layer's size, packed by the reference."""
    rows, cols = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator, device=device) / cols**0.5
    weight = weight.to(DTYPES[dtype])
    return Layer(weight, pyfast.reference.nf4_quantize(weight))


class NF4Peer(Peer):
    def quantize(self, layer: Layer) -> tuple[Callable, Callable]:
        """Of a weight, and back again from what that gives."""
        raise Lacks

    def dequantize(self, layer: Layer) -> Built:
        raise Lacks

    def linear(self, layer: Layer) -> Built:
        raise Lacks


class PyFast(NF4Peer):
    name = "pyfast"

    def quantize(self, layer):
        return pyfast.nf4_quantize, lambda packed: pyfast.reference.nf4_dequantize(
            packed, torch.float64
        )

    def dequantize(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda: pyfast.nf4_dequantize(packed), packed.state

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: pyfast.nf4_linear(x, packed), packed.state


class TwoPass(NF4Peer):
    """What a fused kernel has to be ahead of: unpack the weight, then torch's GEMM."""

    name = "dequantize+torch"
    trains = False  # it would keep the unpacked weight

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: F.linear(x, pyfast.nf4_dequantize(packed)), packed.state


class Torch(NF4Peer):
    name = "torch"

    def linear(self, layer):
        weight = layer.dense.to(self.dtype or layer.source.dtype, copy=True)
        return lambda x: F.linear(x, weight), [weight]


class TorchFloat32(Torch):
    """On a CPU without AVX512-BF16 or AMX the dense layer to beat is the float32 one."""

    name = "torch-fp32"
    dtype = torch.float32

    def missing(self, device):
        return None if device == "cpu" else "no use for it on a GPU"

    def linear(self, layer):
        if layer.source.dtype == torch.float32:
            raise Lacks
        return super().linear(layer)


class BitsAndBytes(NF4Peer):
    """The path of training, and of inference where there is no packed CPU layout."""

    name = "bnb-train"
    module = "bitsandbytes"

    def state(self, layer: Layer) -> tuple[torch.Tensor, Any]:
        """The very bytes of `layer.packed`."""
        functional = load("bitsandbytes.functional")
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
        nn = load("bitsandbytes.nn")
        packed, state = self.state(layer)
        rows, cols = layer.packed.shape
        module = nn.Linear4bit(cols, rows, bias=False, quant_type="nf4", device="meta")
        module.weight = nn.Params4bit(packed, False, quant_state=state, bnb_quantized=True)
        return module

    def quantize(self, layer):
        functional = load("bitsandbytes.functional")

        def decode(result):
            packed, state = result
            state.dtype = torch.float32
            return functional.dequantize_4bit(packed, state)

        return functools.partial(
            functional.quantize_4bit, compress_statistics=True, quant_type="nf4"
        ), decode

    def dequantize(self, layer):
        functional = load("bitsandbytes.functional")
        packed, state = self.state(layer)
        return lambda: functional.dequantize_4bit(packed, state), tensors(packed, state)

    def linear(self, layer):
        bnb = load("bitsandbytes")
        packed, state = self.state(layer)
        return lambda x: bnb.matmul_4bit(x, packed, quant_state=state), tensors(packed, state)


def tensors(packed: torch.Tensor, state: Any) -> list[torch.Tensor]:
    """All that bitsandbytes holds of a weight."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [packed, state.absmax, state.code, *nested]


class BitsAndBytesEval(BitsAndBytes):
    """`Linear4bit.eval()`: on a CPU with AVX512-BF16 it repacks the weight for another kernel."""

    name = "bnb-eval"
    trains = False
    quantize = dequantize = NF4Peer.quantize

    def missing(self, device):
        absent = super().missing(device)
        if absent:
            return absent
        if device == "cuda" or not load("bitsandbytes.functional").has_avx512bf16():
            return "the same path as bnb-train on this machine"

    def linear(self, layer):
        return self.linear4bit(layer).eval(), layer.packed.state


def _torchao() -> Any:
    # The module has moved between releases.
    try:
        return load("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    except ImportError:
        return load("torchao.dtypes.nf4tensor")


class TorchAO(NF4Peer):
    """Its scales are quantized differently, so it gets the source weight."""

    name = "torchao"
    own_format = True

    def missing(self, device):
        try:
            _torchao()
        except Exception as error:
            return reason(error)

    def quantize(self, layer):
        return _torchao().to_nf4, lambda packed: packed.get_original_weight()

    def _copy(self, layer: Layer) -> Built:
        """Part by part: its own clone would quantize once more, for a second."""
        weight = layer.torchao
        names, context = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name).clone() for name in names}
        held = [
            parts[name] for name in ("quantized_scalers", "quantization_factor", "quantized_data")
        ]
        return type(weight).__tensor_unflatten__(
            parts, context, weight.size(), weight.stride()
        ), held

    def dequantize(self, layer):
        weight, held = self._copy(layer)
        return weight.get_original_weight, held

    def linear(self, layer):
        weight, held = self._copy(layer)
        return lambda x: _torchao().linear_nf4(x, weight), held


class Unsloth(BitsAndBytes):
    name = "unsloth"
    module = "unsloth.kernels.utils"
    trains = False  # only together with LoRA
    quantize = NF4Peer.quantize

    def missing(self, device):
        return "its NF4 kernels need a GPU" if device == "cpu" else super().missing(device)

    def dequantize(self, layer):
        packed, state = self.state(layer)
        return lambda: load(self.module).fast_dequantize(packed, state), tensors(packed, state)

    def linear(self, layer):
        kernels = load(self.module)
        packed, state = self.state(layer)

        def call(x):
            if len(x) == 1:
                return kernels.fast_gemv(x[None], packed, state)[0]
            return F.linear(x, kernels.fast_dequantize(packed, state))

        return call, tensors(packed, state)


class HQQ(NF4Peer):
    """4-bit integers in groups of 64 with a scale and a zero of each, fitted to the weight; unpacked for every call."""

    name = "hqq"
    module = "hqq.core.quantize"
    own_format = True

    def missing(self, device):
        return (
            "run on a GPU only: fitting takes long" if device == "cpu" else super().missing(device)
        )

    def linear(self, layer):
        module = copy.deepcopy(layer.hqq)
        return module, [module.W_q, module.meta["scale"], module.meta["zero"]]


class GemLite(NF4Peer):
    """No table lookup: it gets 4-bit integers, symmetric, in groups of 64."""

    name = "gemlite"
    module = "gemlite.helper"
    trains = False
    own_format = True

    def missing(self, device):
        return "needs a GPU" if device == "cpu" else super().missing(device)

    def linear(self, layer):
        dtype = layer.source.dtype
        rows, cols = layer.source.shape
        if dtype == torch.float32 or cols % 64:
            raise Skip("16-bit and K a multiple of 64 only")
        groups = layer.dense.float().view(-1, 64)
        scale = groups.abs().amax(1, keepdim=True) / 7
        codes = (groups / scale).round().nan_to_num().add(8).to(torch.uint8).view(rows, cols)
        helper = load(self.module).A16Wn(device="cuda:0", dtype=dtype)
        scale = scale.to(dtype)
        module = helper.from_weights(codes, scale, torch.full_like(scale, 8), 4, 64)
        return module, [
            torch.empty(rows * cols // 2, dtype=torch.uint8, device="meta"),
            scale,
            scale,
        ]


PEERS = by_name(
    *(PyFast(), Torch(), TorchFloat32(), TwoPass(), BitsAndBytes(), BitsAndBytesEval()),
    *(TorchAO(), HQQ(), Unsloth(), GemLite()),
)
