"""The weight that all NF4 implementations are given."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

import pyfast
from bench.measure.machine import DTYPES
from bench.measure.peer import load_module

HQQ_MODULE = "hqq.core.quantize"


@dataclass
class Layer:
    """One weight: in 16 bits, packed by the reference and, for dense peers, unpacked again."""

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
        return load_torchao().to_nf4(self.source)

    @functools.cached_property
    def hqq(self) -> torch.nn.Module:
        module = load_module(HQQ_MODULE)
        config, weight = module.BaseQuantizeConfig(nbits=4, group_size=64, axis=1), self.source
        return module.HQQLinear.from_weights(
            weight.clone(), None, config, compute_dtype=weight.dtype, device=str(weight.device)
        )


@functools.lru_cache(maxsize=1)
def get_layer(shape: str, dtype: str, device: str) -> Layer:
    """Return random weights of a trained layer's size, packed by the reference."""
    rows, cols = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator, device=device) / cols**0.5
    weight = weight.to(DTYPES[dtype])
    return Layer(weight, pyfast.reference.nf4_quantize(weight))


def load_torchao() -> Any:
    """Import torchao's NF4 tensor, whose module has moved between releases."""
    try:
        return load_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    except ImportError:
        return load_module("torchao.dtypes.nf4tensor")
