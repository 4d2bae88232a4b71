"""Merging a LoRALinear and unmerging it, to the bit; merging into NF4 and what that loses."""

import copy

import pytest
import torch
from helpers.lora_layers import (
    ADAPTER_OPTIONS,
    conv1d,
    dense,
    dense_weight,
    expected_output,
    make_layer,
    nf4,
)
from torch import nn

import pyfast


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("options", ADAPTER_OPTIONS.values(), ids=ADAPTER_OPTIONS)
@pytest.mark.parametrize("base", [dense, conv1d])
def test_merge_and_back_to_the_bit(base, options, dtype):
    layer, x = make_layer(base(dtype), **options), torch.randn(3, 70, dtype=dtype)
    before, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    exact = expected_output(layer, x)
    lost = layer.merge()
    assert layer.merged and layer.base.weight.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(layer(x).double(), exact, rtol=tolerance, atol=tolerance)
    assert (lost == 0) == (dtype in (torch.float32, torch.float64)) and lost < 0.1
    layer.unmerge()
    assert torch.equal(layer(x), before)
    after = layer.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)


def test_autocast_does_not_reach_a_merge():
    layer, x = make_layer(dense(), dora=True), torch.randn(3, 70)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.merge() == 0
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_merging_makes_a_bias_where_there_was_none():
    layer, x = make_layer(dense(bias=False), lora_bias=True), torch.randn(3, 70)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert layer.base.bias is None


def test_merging_leaves_a_tied_weight_alone():
    embedding, linear = nn.Embedding(24, 70), dense()
    linear.weight = embedding.weight
    before = embedding.weight.detach().clone()
    layer = make_layer(linear)
    layer.merge()
    assert torch.equal(embedding.weight, before)
    layer.unmerge()
    assert layer.base.weight is embedding.weight


@pytest.mark.parametrize("options", ADAPTER_OPTIONS.values(), ids=ADAPTER_OPTIONS)
def test_nf4_merges_into_a_dense_layer_and_back(options):
    layer, x = make_layer(nf4(), **options), torch.randn(3, 70)
    before, state, base = layer(x), layer.state_dict(), layer.base
    assert layer.merge(into="16bit") == 0 and type(layer.base) is nn.Linear
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert layer.base is base and torch.equal(layer(x), before)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())


def test_nf4_merged_into_nf4_says_what_is_lost():
    layer, x = make_layer(nf4(), dora=True, lora_bias=True), torch.randn(3, 70)
    before, adapter, w = layer(x), layer.adapters["a"], dense_weight(layer.base)
    sum_ = w + adapter.scaling * adapter.lora_b @ adapter.lora_a
    sum_ = sum_ * (adapter.magnitude / sum_.norm(dim=1))[:, None]
    with pytest.warns(UserWarning, match=r"merging into NF4 lost \d+% of the update"):
        lost = layer.merge(into="nf4")
    stored = pyfast.nf4_dequantize(layer.base.nf4_weight)
    torch.testing.assert_close(stored, pyfast.nf4_dequantize(pyfast.nf4_quantize(sum_.detach())))
    assert (
        lost == pytest.approx(((stored - sum_).norm() / (sum_ - w).norm()).item(), rel=1e-4)
        and lost > 0.01
    )
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_a_merged_layer_moves_whole_and_is_not_saved():
    layer, x = make_layer(dense()), torch.randn(3, 70)
    layer.merge()
    with pytest.raises(RuntimeError, match="state_dict: adapter 'a' is merged"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict: adapter 'a' is merged"):
        layer.load_state_dict({})
    for call in (
        lambda: layer.merge(),
        lambda: layer.set_adapter(None),
        lambda: layer.add("b", 1, 1),
    ):
        with pytest.raises(RuntimeError, match="unmerge.. comes first"):
            call()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    twin.unmerge()
    assert twin.base.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        twin(x.bfloat16()).float(),
        expected_output(unmerged(layer), x).float(),
        rtol=0.05,
        atol=0.05,
    )


def unmerged(layer):
    layer.unmerge()
    return layer
