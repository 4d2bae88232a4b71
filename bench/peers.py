"""The implementations to compare with: each is a name, a reason why it is missing, and builders.

A builder takes a `Layer` and gives a function together with the bytes of weight it holds. It copies
what it holds, so that every set of buffers lies in its own memory.
"""

import contextlib
import copy
import functools
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import pyfast
from bench.machine import DTYPES


class Skip(Exception):
    """This implementation does not do this case; the message says why."""


class Lacks(Exception):
    """This implementation has no such operation: no row at all."""


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


@functools.lru_cache(maxsize=1)
def layer(shape: str, dtype: str, device: str) -> Layer:
    """Random weights of a trained layer's size, packed by the reference."""
    rows, cols = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator, device=device) / cols**0.5
    weight = weight.to(DTYPES[dtype])
    return Layer(weight, pyfast.reference.nf4_quantize(weight))


def activation(seed: int, m: int, width: int, dtype: str, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(m, width, generator=generator, device=device).to(DTYPES[dtype])


Function = Callable[..., Any]
Built = tuple[Function, int]


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def quiet():
    """Peers print banners, warn and log while they are imported or first used."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def reason(error: BaseException) -> str:
    """One short line out of an exception."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    name = "" if isinstance(error, Skip | ImportError) else type(error).__name__ + ": "
    return (name + text)[:90]


@functools.cache
def load(module: str) -> Any:
    with quiet():
        return importlib.import_module(module)


def _torchao() -> Any:
    # The module has moved between releases.
    try:
        return load("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    except ImportError:
        return load("torchao.dtypes.nf4tensor")


class Peer:
    name: str
    own_format = False  # holds other numbers than `Layer.packed`: errors are not comparable
    trains = True  # has a backward
    dtype: torch.dtype | None = None  # computes in this one whatever the case's dtype

    def missing(self, device: str) -> str | None:
        """Why it can't run here at all, or None."""
        return None

    def quantize(self, layer: Layer) -> tuple[Function, Function]:
        """(call, decode): decode(call()) is the weight again."""
        raise Lacks

    def dequantize(self, layer: Layer) -> Built:
        raise Lacks

    def linear(self, layer: Layer) -> Built:
        raise Lacks


class PyFast(Peer):
    name = "pyfast"

    def quantize(self, layer):
        weight = layer.source.clone()

        def decode(packed):
            return pyfast.reference.nf4_dequantize(packed, torch.float64)

        return lambda: pyfast.nf4_quantize(weight), decode

    def dequantize(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda: pyfast.nf4_dequantize(packed), nbytes(*packed.state)

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: pyfast.nf4_linear(x, packed), nbytes(*packed.state)


class TwoPass(Peer):
    """What a fused kernel has to be ahead of: unpack the weight, then torch's GEMM."""

    name = "dequantize+torch"
    trains = False  # it would keep the unpacked weight

    def linear(self, layer):
        packed = copy.deepcopy(layer.packed)
        return lambda x: F.linear(x, pyfast.nf4_dequantize(packed)), nbytes(*packed.state)


class Torch(Peer):
    name = "torch"

    def linear(self, layer):
        weight = layer.dense.to(self.dtype or layer.source.dtype, copy=True)
        return lambda x: F.linear(x, weight), nbytes(weight)


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


class BitsAndBytes(Peer):
    """The path of training, and of inference where there is no packed CPU layout."""

    name = "bnb-train"

    def missing(self, device):
        try:
            load("bitsandbytes")
        except Exception as error:
            return reason(error)

    def state(self, layer: Layer) -> tuple[torch.Tensor, Any]:
        """The very bytes of `layer.packed`."""
        functional = load("bitsandbytes.functional")
        weight = copy.deepcopy(layer.packed)
        packed, absmax, code, *nested = weight.state
        extra: dict[str, Any] = {}
        if nested:
            inner, inner_code, offset = nested
            second = functional.QuantState(absmax=inner, code=inner_code, blocksize=256, dtype=torch.float32)
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

    def module(self, layer: Layer) -> torch.nn.Module:
        nn = load("bitsandbytes.nn")
        packed, state = self.state(layer)
        rows, cols = layer.packed.shape
        module = nn.Linear4bit(cols, rows, bias=False, quant_type="nf4", device="meta")
        module.weight = nn.Params4bit(packed, False, quant_state=state, bnb_quantized=True)
        return module

    def quantize(self, layer):
        functional = load("bitsandbytes.functional")
        weight = layer.source.clone()

        def call():
            return functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")

        def decode(result):
            packed, state = result
            state.dtype = torch.float32
            return functional.dequantize_4bit(packed, state)

        return call, decode

    def dequantize(self, layer):
        functional = load("bitsandbytes.functional")
        packed, state = self.state(layer)
        held = nbytes(*layer.packed.state)
        return lambda: functional.dequantize_4bit(packed, state), held

    def linear(self, layer):
        bnb = load("bitsandbytes")
        packed, state = self.state(layer)
        held = nbytes(*layer.packed.state)
        return lambda x: bnb.matmul_4bit(x, packed, quant_state=state), held


class BitsAndBytesEval(BitsAndBytes):
    """`Linear4bit.eval()`: on a CPU with AVX512-BF16 it repacks the weight for another kernel."""

    name = "bnb-eval"
    trains = False

    def missing(self, device):
        absent = super().missing(device)
        if absent:
            return absent
        if device == "cuda" or not load("bitsandbytes.functional").has_avx512bf16():
            return "the same path as bnb-train on this machine"

    def quantize(self, layer):
        raise Lacks

    dequantize = quantize

    def linear(self, layer):
        return self.module(layer).eval(), nbytes(*layer.packed.state)


class TorchAO(Peer):
    """Its scales are quantised differently, so it gets the source weight."""

    name = "torchao"
    own_format = True

    def missing(self, device):
        try:
            _torchao()
        except Exception as error:
            return reason(error)

    def quantize(self, layer):
        weight = layer.source.clone()
        return lambda: _torchao().to_nf4(weight), lambda packed: packed.get_original_weight()

    def _copy(self, layer: Layer) -> Built:
        weight = layer.torchao.clone()
        parts = ("quantized_scalers", "quantization_factor", "quantized_data")
        return weight, nbytes(*(getattr(weight, part) for part in parts))

    def dequantize(self, layer):
        weight, held = self._copy(layer)
        return weight.get_original_weight, held

    def linear(self, layer):
        weight, held = self._copy(layer)
        return lambda x: _torchao().linear_nf4(x, weight), held


def missing_unsloth(kernels: str) -> str | None:
    # Its import would route bitsandbytes' layers through its own kernels.
    os.environ.setdefault("UNSLOTH_BNB_NF4_LINEAR", "0")
    try:
        load(f"unsloth.kernels.{kernels}")
    except Exception as error:
        return reason(error)


class Unsloth(BitsAndBytes):
    name = "unsloth"
    trains = False  # only together with LoRA

    def missing(self, device):
        if device == "cpu":
            return "its NF4 kernels need a GPU"
        return missing_unsloth("utils")

    def quantize(self, layer):
        raise Lacks

    def dequantize(self, layer):
        kernels = load("unsloth.kernels.utils")
        packed, state = self.state(layer)
        return lambda: kernels.fast_dequantize(packed, state), nbytes(*layer.packed.state)

    def linear(self, layer):
        kernels = load("unsloth.kernels.utils")
        packed, state = self.state(layer)

        def call(x):
            if len(x) == 1:
                return kernels.fast_gemv(x[None], packed, state)[0]
            return F.linear(x, kernels.fast_dequantize(packed, state))

        return call, nbytes(*layer.packed.state)


class GemLite(Peer):
    """No table lookup: it gets 4-bit integers, symmetric, in groups of 64."""

    name = "gemlite"
    trains = False
    own_format = True

    def missing(self, device):
        if device == "cpu":
            return "needs a GPU"
        try:
            load("gemlite.helper")
        except Exception as error:
            return reason(error)

    def linear(self, layer):
        dtype = layer.source.dtype
        rows, cols = layer.source.shape
        if dtype == torch.float32 or cols % 64:
            raise Skip("16-bit and K a multiple of 64 only")
        groups = layer.dense.float().view(-1, 64)
        scale = groups.abs().amax(1, keepdim=True) / 7
        codes = (groups / scale).round().nan_to_num().add(8).to(torch.uint8).view(rows, cols)
        helper = load("gemlite.helper").A16Wn(device="cuda:0", dtype=dtype)
        scale = scale.to(dtype)
        module = helper.from_weights(codes, scale, torch.full_like(scale, 8), 4, 64)

        return module, rows * cols // 2 + 2 * nbytes(scale)


ALL: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        PyFast(),
        Torch(),
        TorchFloat32(),
        TwoPass(),
        BitsAndBytes(),
        BitsAndBytesEval(),
        TorchAO(),
        Unsloth(),
        GemLite(),
    )
}
