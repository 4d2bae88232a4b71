"""Models that are quantized in memory, to compare with loaded ones."""

import torch
from helpers.tiny_pretrained import output

import pyfast
from pyfast.nn.linear_layers import is_conv1d, is_linear


def quantize_layers(model, **options):
    """Replace the linear layers of a model by NF4Linear, one after the other."""
    for name, layer in list(model.named_modules()):
        if is_linear(layer) and name not in ("lm_head", "classifier"):
            weight = layer.weight.t() if is_conv1d(layer) else layer.weight
            model.set_submodule(
                name,
                pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(weight, **options), layer.bias),
            )
    return model.eval()


def assert_same(model, expected):
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for key in state:
        assert state[key].dtype == expected_state[key].dtype and torch.equal(
            state[key], expected_state[key]
        ), key
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(output(model), output(expected)) and not model.training
