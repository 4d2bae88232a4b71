"""Layers with adapters, and what they must compute."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfast

KINDS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": True},
    "everything": {"dora": True, "lora_bias": True, "bias": True, "rslora": True},
}


def dense(dtype=torch.float32, bias=True, out=24, into=70):
    return nn.Linear(into, out, bias=bias, dtype=dtype)


def nf4(dtype=torch.float32, bias=True):
    return pyfast.NF4Linear.from_linear(dense(dtype, bias))


def conv1d(dtype=torch.float32, bias=True):
    layer = Conv1D(24, 70).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def shaken(layer, name):
    """Parameters that are not zero any more."""
    with torch.no_grad():
        for p in layer.adapters[name].parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def layer_of(base, *, name="a", r=4, alpha=8, **options):
    layer = pyfast.LoRALinear(base)
    layer.add(name, r, alpha, **options)
    return shaken(layer, name)


def dense_weight(base):
    if isinstance(base, pyfast.NF4Linear):
        return pyfast.nf4_dequantize(base.nf4_weight)
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


def definition(layer, x, name="a"):
    """The formula at the top of the module, in float64."""
    own, w = layer.adapters[name], dense_weight(layer.base).double()
    update = own.scaling * own.lora_b.double() @ own.lora_a.double()
    gain = 1.0 if own.magnitude is None else own.magnitude.double() / (w + update).norm(dim=1)
    added = 0.0 if own.lora_bias is None else own.scaling * own.lora_bias.double()
    bias = layer.base.bias if own.bias is None else own.bias
    y = gain * (x.double() @ (w + update).t() + added)
    return y if bias is None else y + bias.double()
