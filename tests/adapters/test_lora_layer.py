"""LoRALinear over dense, NF4 and Conv1D layers: made, switched, moved, copied and saved."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers.lora_layers import (
    ADAPTER_OPTIONS,
    conv1d,
    dense,
    expected_output,
    make_layer,
    nf4,
    randomized,
)
from torch import nn

import pyfast
from pyfast.ops import dora

# --- forward ---


@pytest.mark.parametrize("options", ADAPTER_OPTIONS.values(), ids=ADAPTER_OPTIONS)
@pytest.mark.parametrize("base", [dense, nf4, conv1d])
def test_forward_is_the_definition(base, options):
    layer, x = make_layer(base(), **options), torch.randn(2, 3, 70)
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
def test_16_bit_base_with_float32_or_16_bit_adapters(adapter_dtype):
    layer = make_layer(dense(torch.bfloat16), dtype=adapter_dtype, dora=True)
    assert layer.adapters["a"].lora_a.dtype == (adapter_dtype or torch.float32)
    x = torch.randn(5, 70, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected_output(layer, x), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"lora_bias": True, "bias": True}], ids=str
)
def test_a_new_adapter_changes_nothing(init, options):
    base = dense()
    x = torch.randn(3, 70)
    expected = base(x)
    layer = pyfast.LoRALinear(base)
    layer.add("a", 4, 8, init=init, **options)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_inits_have_their_scale():
    layer = pyfast.LoRALinear(dense(out_features=300, in_features=400))
    for init in ("kaiming", "gaussian", "orthogonal"):
        layer.add(init, 16, 32, init=init)
    bound = 400**-0.5  # kaiming_uniform, a = sqrt(5)
    kaiming, gaussian, orthogonal = (
        layer.adapters[name] for name in ("kaiming", "gaussian", "orthogonal")
    )
    assert 0.9 * bound < kaiming.lora_a.abs().max() <= bound and not kaiming.lora_b.any()
    assert abs(gaussian.lora_a.std() * 16 - 1) < 0.1 and not gaussian.lora_b.any()
    assert (
        (orthogonal.lora_b @ orthogonal.lora_a).abs().max() < 1e-6 < orthogonal.lora_b.abs().max()
    )
    # Projections to half of R^16, over 10: entries of variance (8 / 16) / 100.
    assert abs(orthogonal.lora_a.std() - 0.05**0.5 / 10**0.5) < 0.01


def test_numpy_numbers_are_options():
    adapter = pyfast.LoRALinear(dense()).add(
        "a", np.int64(4), np.float32(6), dropout=np.float64(0.5)
    )
    assert adapter.rank == 4 and adapter.scaling == 1.5 and adapter.lora_a.shape == (4, 70)


def test_scaling_is_alpha_over_the_rank_or_its_root():
    layer = pyfast.LoRALinear(dense())
    assert layer.add("a", 4, 6).scaling == 1.5 and layer.add("b", 4, 6, rslora=True).scaling == 3


def test_dropout_is_for_training_and_for_the_adapter_alone():
    layer, x = make_layer(dense(), dropout=0.5), torch.randn(400, 70)
    layer.eval()
    still = layer(x)
    assert torch.equal(still, layer(x))
    layer.train()
    torch.manual_seed(1)
    moved = layer(x)
    torch.manual_seed(1)
    assert torch.equal(moved, layer(x)) and not torch.equal(moved, layer(x))
    adapter = layer.adapters["a"]
    with torch.no_grad():
        adapter.lora_b.zero_()
    assert torch.equal(layer(x), layer.base(x))


def test_gradients_reach_the_active_adapter_only():
    layer = make_layer(dense(), dora=True, lora_bias=True, bias=True)
    layer.add("b", 2, 2)
    layer(torch.randn(3, 70)).sum().backward()
    assert all(p.grad is not None for p in layer.adapters["a"].parameters())
    assert all(
        p.grad is None for p in [*layer.adapters["b"].parameters(), *layer.base.parameters()]
    )
    assert {
        "adapters.a.lora_a",
        "adapters.a.magnitude",
        "adapters.b.lora_b",
        "base.weight",
    } <= dict(layer.named_parameters()).keys()


def doubled(module, args, y):
    return 2 * y


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"init": "pissa"}], ids=str)
def test_hooks_of_the_base_run(options):
    layer, x = make_layer(dense(), **options), torch.randn(3, 70)
    y, base = layer(x), layer.base(x)
    layer.base.register_forward_hook(doubled)
    torch.testing.assert_close(layer(x), y + base, rtol=1e-5, atol=1e-5)
    layer.base.forward = lambda x: torch.zeros(3, 24)  # as accelerate does
    torch.testing.assert_close(layer(x), y - base, rtol=1e-5, atol=1e-5)


def test_hooks_of_the_base_that_cannot_run_are_named():
    layer, x = make_layer(dense(), dora=True), torch.randn(3, 70)
    layer.base.register_forward_hook(doubled)
    for call in (lambda: layer(x), lambda: layer(x, adapter_ids=["a", None, "a"])):
        with pytest.raises(RuntimeError, match="the base has .'_forward_hooks'., past which"):
            call()


# --- switching ---


def test_switching_runs_and_trains_one_adapter():
    layer, x = make_layer(dense()), torch.randn(3, 70)
    layer.add("b", 6, 3)
    randomized(layer, "b")
    assert layer.active == "a"
    a = layer(x)
    layer.set_adapter("b")
    b = layer(x)
    torch.testing.assert_close(b, expected_output(layer, x, "b").float(), rtol=1e-5, atol=1e-5)
    with layer.disabled():
        assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer(x), b)
    layer.set_adapter(None)
    assert torch.equal(layer(x), layer.base(x))
    layer.set_adapter("a")
    assert torch.equal(layer(x), a)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "adapters.a.lora_a",
        "adapters.a.lora_b",
    }
    layer.remove("a")
    assert layer.active is None and list(layer.adapters) == ["b"]


def test_pissa_takes_the_largest_directions_out_of_the_base():
    linear, x = dense(), torch.randn(3, 70)
    w, y = linear.weight.detach().clone(), linear(x)
    layer = pyfast.LoRALinear(linear)
    adapter = layer.add("a", 4, 2, init="pissa")
    singular = torch.linalg.svdvals(w)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base.weight)[:20], singular[4:])
    torch.testing.assert_close(
        torch.linalg.svdvals(0.5 * adapter.lora_b @ adapter.lora_a)[:4], singular[:4]
    )
    assert torch.equal(linear.weight, w)  # others may use it
    randomized(layer, "a")
    with layer.disabled():
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.remove("a")
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert layer.origin is None and not [p for p in layer.parameters() if p.requires_grad]


# --- mixed batches ---


@pytest.mark.parametrize("options", ADAPTER_OPTIONS.values(), ids=ADAPTER_OPTIONS)
@pytest.mark.parametrize("base", [dense, nf4])
def test_mixed_batch_is_each_row_s_own_adapter(base, options):
    layer = make_layer(base(), **options)
    layer.add("b", 7, 3)
    randomized(layer, "b").adapters.requires_grad_(True)
    x, names = torch.randn(5, 2, 70), ["b", None, "a", "b", "a"]
    mixed = layer(x, adapter_ids=names)
    weights = torch.randn_like(mixed)
    (mixed * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.adapters.named_parameters()}
    layer.zero_grad()
    for i, name in enumerate(names):
        layer.set_adapter(name)
        row = layer(x[i])
        torch.testing.assert_close(mixed[i], row, rtol=1e-5, atol=1e-5)
        if name is not None:
            (row * weights[i]).sum().backward()
    for name, p in layer.adapters.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)


def test_mixed_batch_of_the_base_alone_and_beside_pissa():
    layer, x = make_layer(dense()), torch.randn(3, 70)
    assert torch.equal(layer(x, adapter_ids=[None] * 3), layer.base(x))
    linear = dense()
    y = linear(x)
    layer = make_layer(linear, init="pissa")
    mixed = layer(x, adapter_ids=["a", None, None])
    torch.testing.assert_close(mixed[1:], y[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[0], layer(x)[0], rtol=1e-5, atol=1e-5)


def test_mixed_batch_of_adapters_of_two_dtypes():
    layer, x = make_layer(dense(torch.bfloat16)), torch.randn(2, 70, dtype=torch.bfloat16)
    layer.add("b", 2, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(
        layer(x, adapter_ids=["a", "b"])[0], layer(x)[0], rtol=1e-2, atol=1e-2
    )


# --- DoRA's cache ---


@pytest.mark.parametrize("base", [dense, nf4])
def test_row_squares_are_kept_while_the_base_stays(base, monkeypatch):
    layer, x, calls = make_layer(base(), dora=True), torch.randn(3, 70), []
    original = dora.row_squares
    monkeypatch.setattr(dora, "row_squares", lambda w: calls.append(w) or original(w))
    layer(x), layer(x)
    layer.train()(x), layer.eval()(x), layer.train()(x)
    assert len(calls) == 1
    first = next(layer.base.parameters())
    with torch.no_grad():
        first.copy_(first.flip(0))
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)
    layer.base.load_state_dict(base().state_dict())
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3
    layer.base = base()
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)
    assert not any("square" in key for key in layer.state_dict())


def test_row_squares_of_a_base_that_trains_are_not_kept():
    layer, x = make_layer(dense(), dora=True), torch.randn(3, 70)
    layer.base.weight.requires_grad_()
    layer(x).sum().backward()
    layer.base.weight.data.mul_(3)  # which torch does not count as a change
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)
    assert layer.base.weight.grad is not None


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        layer, x = make_layer(dense(), dora=True), torch.randn(3, 70)
        torch.testing.assert_close(
            layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5
        )


# --- moving, copying, saving ---


def torch_saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("base", [dense, nf4, conv1d])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch_saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_whole_and_apart(base, duplicate):
    layer, x = make_layer(base(), dora=True), torch.randn(3, 70)
    y = layer(x)
    twin = duplicate(layer)
    assert torch.equal(twin(x), y) and twin.active == "a"
    randomized(twin, "a")
    assert torch.equal(layer(x), y) and not torch.equal(twin(x), y)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_state_dict_loads_back(init):
    layer, x = (
        make_layer(dense(), dora=True, lora_bias=True, bias=True, init=init),
        torch.randn(3, 70),
    )
    other = make_layer(dense(), dora=True, lora_bias=True, bias=True, init=init)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    with other.disabled(), layer.disabled():
        assert torch.equal(other(x), layer(x))


def test_moves_with_its_adapters(device):
    layer = make_layer(nf4(), dora=True).to(device)
    x = torch.randn(3, 70, device=device)
    torch.testing.assert_close(layer(x), expected_output(layer, x).float(), rtol=1e-5, atol=1e-5)
    half = layer.to(torch.bfloat16)
    assert (
        half.adapters["a"].lora_a.dtype == torch.bfloat16
        and half(x.bfloat16()).dtype == torch.bfloat16
    )


def test_a_layer_on_the_meta_device_has_an_output_of_its_shape():
    layer = pyfast.LoRALinear(nn.Linear(70, 24, device="meta"))
    layer.add("a", 4, 8)
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 24)


def test_autocast_lowers_the_output():
    layer, x = make_layer(dense()), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected_output(layer, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("init", ["orthogonal", "pissa"])
def test_autocast_does_not_reach_the_start(init):
    base, x = dense(), torch.randn(3, 70)
    y = base(x)
    layer = pyfast.LoRALinear(base)
    with torch.autocast("cpu", torch.bfloat16):
        layer.add("a", 4, 8, init=init, dora=True)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        layer.remove("a")
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [dense, nf4, conv1d])
def test_compiles_whole(base):
    layer, x = make_layer(base(), dora=True), torch.randn(3, 70)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_repr_shows_the_adapters():
    text = repr(make_layer(nf4(), dora=True))
    assert "active='a'" in text and "r=4, scaling=2, dropout=0, magnitude" in text
    layer = make_layer(dense())
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (70, 24)
