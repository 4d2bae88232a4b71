"""Layers with LoRA adapters, and the output that they must compute."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfast

ADAPTER_OPTIONS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": True},
    "everything": {"dora": True, "lora_bias": True, "bias": True, "rslora": True},
}


def dense(dtype=torch.float32, bias=True, out_features=24, in_features=70):
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def nf4(dtype=torch.float32, bias=True):
    return pyfast.NF4Linear.from_linear(dense(dtype, bias))


def conv1d(dtype=torch.float32, bias=True):
    layer = Conv1D(24, 70).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def randomized(layer, name):
    """Add noise to an adapter, so that no parameter is zero, and return the layer."""
    with torch.no_grad():
        for p in layer.adapters[name].parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def make_layer(base, *, name="a", r=4, alpha=8, **options):
    layer = pyfast.LoRALinear(base)
    layer.add(name, r, alpha, **options)
    return randomized(layer, name)


def dense_weight(base):
    if isinstance(base, pyfast.NF4Linear):
        return pyfast.nf4_dequantize(base.nf4_weight)
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


def expected_output(layer, x, name="a"):
    """Return y by the formula at the top of lora/layer.py, in float64."""
    adapter, w = layer.adapters[name], dense_weight(layer.base).double()
    update = adapter.scaling * adapter.lora_b.double() @ adapter.lora_a.double()
    gain = (
        1.0 if adapter.magnitude is None else adapter.magnitude.double() / (w + update).norm(dim=1)
    )
    added = 0.0 if adapter.lora_bias is None else adapter.scaling * adapter.lora_bias.double()
    bias = layer.base.bias if adapter.bias is None else adapter.bias
    y = gain * (x.double() @ (w + update).t() + added)
    return y if bias is None else y + bias.double()
