"""Models quantized here, to compare with loaded ones."""

import torch
from helpers.tiny_pretrained import output

import pyfast
from pyfast.nn.linear_layers import is_conv1d, is_linear


def quantized_here(model, **options):
    """Layer by layer, from the whole model in memory."""
    for name, layer in list(model.named_modules()):
        if is_linear(layer) and name not in ("lm_head", "classifier"):
            weight = layer.weight.t() if is_conv1d(layer) else layer.weight
            model.set_submodule(
                name,
                pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(weight, **options), layer.bias),
            )
    return model.eval()


def assert_same(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(output(model), output(expected)) and not model.training
