"""Layers that share the pass over their input: the same numbers as separate layers, in every case.

Layers share on CUDA only. These tests let them share on the device that the tests run on.
"""

import copy
import io
import json
import threading
from collections import Counter

import pytest
import torch
from helpers.tiny_models import MODELS, batch, logits, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast.adapters.lora import shared_input
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.ops import lora

CALLS = {  # of lora_linears, by the number of layers at once, in two transformer layers
    "llama": {3: 2, 2: 2, 1: 4},
    "mistral": {3: 2, 2: 2, 1: 4},
    "qwen2": {3: 2, 2: 2, 1: 4},
    "gpt2": {1: 8},
    "bert": {3: 2, 1: 8},
    "roberta": {3: 2, 1: 8},
    "vit": {3: 2, 1: 7},
    "t5": {3: 4, 2: 2, 1: 16},
}


default_devices = set(shared_input.SHARING_DEVICES)


def test_layers_share_on_cuda_alone():
    assert default_devices == {"cuda"}


@pytest.fixture(autouse=True)
def sharing_everywhere(monkeypatch, device):
    monkeypatch.setattr(shared_input, "SHARING_DEVICES", {torch.device(device).type})


@pytest.fixture
def calls(monkeypatch):
    """Return a list that grows, at each call of lora_linears, by the number of its layers."""
    counts, original = [], lora.lora_linears

    def counted(x, projections, **options):
        counts.append(len(projections))
        return original(x, projections, **options)

    monkeypatch.setattr(lora, "lora_linears", counted)
    return counts


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def adapted(model, share_inputs=True, **options):
    """Add an adapter with random parameters."""
    config = pyfast.LoRAConfig(**{"r": 4, "share_inputs": share_inputs, **options})
    pyfast.add_lora(model, config)
    return randomized(model)


def randomized(model, name="default"):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model):
            if name in layer.adapters:
                b = layer.adapters[name].lora_b
                b.copy_(torch.randn(b.shape, generator=generator) / 8)
    return model


def separate(model):
    """Return a copy whose layers do not share."""
    model = copy.deepcopy(model)
    shared_input.unlink(model, LoRALinear)
    return model


def results(model, run):
    """Return the output, and the gradients of all that trains."""
    torch.manual_seed(8)
    y = run(model)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [None if p.grad is None else p.grad.clone() for p in trained]
    model.zero_grad()
    return [y.detach(), *grads]


def assert_same(actual, expected):
    """Compare tensors; None is the gradient of an unused tensor, and equals None alone."""
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, other)


class Attention(nn.Module):
    """A module that calls its projections as a function says."""

    def __init__(self, run):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def sum_of_all(m, x):
    return m.q_proj(x) + 2 * m.k_proj(x) + 3 * m.v_proj(x)


def all_outputs(m, x):
    return m.q_proj(x), m.k_proj(x), m.v_proj(x)


def attention(device, run=sum_of_all, **options):
    torch.manual_seed(2)
    return adapted(Attention(run).to(device), **options)


def no_forward_is_open(model):
    groups = [layer.shared_input for layer in lora_layers(model)]
    return all(group is None or group._running.forward is None for group in groups)


# --- when layers share ---


@pytest.mark.parametrize("model_name", MODELS)
def test_models(model_name, calls):
    model = adapted(make(model_name).double())
    single = separate(model)
    inputs = {
        key: t.double() if t.is_floating_point() else t for key, t in batch(model_name).items()
    }
    shared = results(model, lambda m: m(**inputs).logits)
    assert Counter(calls) == CALLS[model_name]
    calls.clear()
    assert_same(shared, results(single, lambda m: m(**inputs).logits))
    assert max(calls) == 1
    with torch.no_grad():
        calls.clear()
        model(**inputs)
    assert Counter(calls) == CALLS[model_name] and no_forward_is_open(model)


def test_layers_do_not_share_by_default(device, calls):
    model = attention(device, share_inputs=False)
    model(torch.randn(5, 8, device=device))
    assert calls == [1, 1, 1] and "shares" not in repr(model)


def test_layers_on_another_device_compute_one_by_one(device, calls, monkeypatch):
    monkeypatch.setattr(shared_input, "SHARING_DEVICES", {"xpu"})
    model, x = attention(device), torch.randn(5, 8, device=device)
    shared = results(model, lambda m: m(x))
    assert calls == [1, 1, 1]
    assert_same(shared, results(separate(model), lambda m: m(x)))


def test_a_layer_called_outside_its_parent_computes_itself_alone(device, calls):
    model, x = attention(device, all_outputs), torch.randn(5, 8, device=device)
    expected = model(x)
    calls.clear()
    assert_same([model.q_proj(x), model.k_proj(x), model.v_proj(x)], expected)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("options", [{"dora": True}, {"lora_bias": True, "bias": "all"}], ids=str)
def test_other_adapters(device, calls, options):
    model, x = attention(device, **options), torch.randn(5, 8, device=device)
    shared = results(model, lambda m: m(x))
    assert calls == [3]
    assert_same(shared, results(separate(model), lambda m: m(x)))


def test_over_a_4_bit_base(device, calls):
    torch.manual_seed(2)
    model = adapted(pyfast.quantize(Attention(sum_of_all).to(device)))
    x = torch.randn(5, 8, device=device)
    shared = results(model, lambda m: m(x))
    assert calls == [3]
    assert_same(shared, results(separate(model), lambda m: m(x)))


# --- inputs and modes ---


def other_inputs(m, x):
    return m.q_proj(x) + m.k_proj(x + 1) + m.v_proj(x * 2)


def some_twice(m, x):
    return m.k_proj(x) + m.q_proj(x) + 3 * m.k_proj(x) + m.v_proj(x)


def one_alone(m, x):
    return m.k_proj(x)


def first_without_gradients(m, x):
    with torch.no_grad():
        q = m.q_proj(x)
    return q + m.k_proj(x) + m.v_proj(x)


def last_without_gradients(m, x):
    q = m.q_proj(x)
    with torch.no_grad():
        k, v = m.k_proj(x), m.v_proj(x)
    return q + k + v


def one_disabled(m, x):
    q = m.q_proj(x)
    with m.k_proj.disabled():
        k = m.k_proj(x)
    return q + k + m.v_proj(x)


def written_to(m, x):
    x = x + 0
    with torch.no_grad():
        q = m.q_proj(x)
        x += 1
    return q + m.k_proj(x) + m.v_proj(x)


def under_autocast(m, x):
    q = m.q_proj(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return q + m.k_proj(x) + m.v_proj(x).float()


def requiring_gradients_later(m, x):
    x = x.detach()
    q = m.q_proj(x)
    x.requires_grad_()
    return q + m.k_proj(x) + m.v_proj(x)


def in_a_mixed_batch(m, x):
    q = m.q_proj(x)
    with pyfast.mixed_batch(m, ["default", None, None, "default", None]):
        return q + m.k_proj(x) + m.v_proj(x)


RUNS = [
    sum_of_all,
    other_inputs,
    some_twice,
    one_alone,
    first_without_gradients,
    last_without_gradients,
    one_disabled,
    written_to,
    under_autocast,
    requiring_gradients_later,
    in_a_mixed_batch,
]


@pytest.mark.parametrize("run", RUNS)
def test_each_output_is_what_the_layer_gives_by_itself(device, run):
    model, x = attention(device, run), torch.randn(5, 8, device=device)
    single = separate(model)
    for _ in range(2):
        assert_same(results(model, lambda m: m(x)), results(single, lambda m: m(x)))
    assert no_forward_is_open(model)


def test_kept_outputs_keep_the_mode_of_inference(device):
    def half_in_inference_mode(m, x):
        q = m.q_proj(x)
        with torch.inference_mode():
            k = m.k_proj(x)
        return q, k, m.v_proj(x)

    with torch.no_grad():
        outputs = attention(device, half_in_inference_mode)(torch.randn(5, 8, device=device))
    assert [y.is_inference() for y in outputs] == [False, True, False]


# --- changes between the calls ---


def load_other_weights(layer):
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    layer.load_state_dict(state)


def assign_other_weights(layer):
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def change_scaling(layer):
    layer.adapters["default"].scaling = 3.0


def change_b(layer):
    layer.adapters["default"].lora_b.data = torch.randn_like(layer.adapters["default"].lora_b)


def change_bias(layer):
    with torch.no_grad():
        layer.base.bias.add_(1)


def freeze_a(layer):
    layer.adapters["default"].lora_a.requires_grad_(False)


def train_base(layer):
    layer.base.weight.requires_grad_(True)


def switch_adapter(layer):
    layer.set_adapter("other")


def merge_adapter(layer):
    layer.merge()


def use_another_base(layer):
    layer.base = nn.Linear(8, 8, device=layer.weight.device).requires_grad_(False)


def drop_inputs(layer):
    layer.adapters["default"].dropout = 0.5


CHANGES = [
    load_other_weights,
    assign_other_weights,
    change_scaling,
    change_b,
    change_bias,
    freeze_a,
    train_base,
    switch_adapter,
    merge_adapter,
    use_another_base,
    drop_inputs,
]


IN_PLACE = (load_other_weights, change_bias)


def changed_between(change, device):
    """Return a model that, once the list is not empty, changes k_proj after it called q_proj."""
    changing = []

    def run(m, x):
        q = m.q_proj(x)
        if changing:
            torch.manual_seed(9)
            change(m.k_proj)
        torch.manual_seed(7)
        return q + 2 * m.k_proj(x) + 3 * m.v_proj(x)

    model = attention(device, run)
    pyfast.add_lora(model, pyfast.LoRAConfig(r=2), "other")
    randomized(model, "other")
    pyfast.set_adapter(model, "default")
    return model, changing


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_between_the_calls_computes_again(device, calls, change):
    model, changing = changed_between(change, device)
    single, x = separate(model), torch.randn(5, 8, device=device)
    before = model(x).detach()
    calls.clear()
    changing.append(True)
    with torch.set_grad_enabled(change not in IN_PLACE):
        shared, expected = model(x), single(x)
    assert calls[0] == 3  # the pass was made, and the output of k_proj was not used
    torch.testing.assert_close(shared, expected)
    changes_gradients_only = change in (freeze_a, train_base, merge_adapter)
    assert torch.allclose(shared, before, atol=1e-5) == changes_gradients_only


def test_a_bias_that_is_a_buffer_is_compared(device):
    model, changing = changed_between(change_bias, device)
    for layer in lora_layers(model):
        bias = layer.base.bias.detach()
        del layer.base.bias
        layer.base.register_buffer("bias", bias)
    single, x = separate(model), torch.randn(5, 8, device=device)
    changing.append(True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), single(x))


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in IN_PLACE])
def test_gradients_after_a_change_between_the_calls(device, change):
    model, changing = changed_between(change, device)
    single, x = separate(model), torch.randn(5, 8, device=device)
    changing.append(True)
    assert_same(results(model, lambda m: m(x)), results(single, lambda m: m(x)))


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_backward_after_a_change_in_place_is_refused(device, change):
    model, changing = changed_between(change, device)
    changing.append(True)
    y = model(torch.randn(5, 8, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_exception_between_the_calls_is_forgotten(device, calls):
    failing = [True]

    def run(m, x):
        q = m.q_proj(x)
        if failing:
            raise KeyError(failing.pop())
        return q + m.k_proj(x) + m.v_proj(x)

    model, x = attention(device, run), torch.randn(5, 8, device=device)
    with pytest.raises(KeyError):
        model(x)
    assert no_forward_is_open(model)
    torch.testing.assert_close(model(x), separate(model)(x))


def test_a_forward_ends_while_another_thread_s_runs(device, monkeypatch):
    model, original = attention(device, run=all_outputs), lora.lora_linears
    single, xs = separate(model), torch.randn(2, 5, 8, device=device)
    is_computing, may_go_on, ys = threading.Event(), threading.Event(), []

    def slow_in_the_first_thread(x, projections, **options):
        if threading.current_thread() is first:
            is_computing.set()
            assert may_go_on.wait(60)
        return original(x, projections, **options)

    monkeypatch.setattr(lora, "lora_linears", slow_in_the_first_thread)
    first = threading.Thread(target=lambda: ys.append(model(xs[0])))
    first.start()
    assert is_computing.wait(60)
    second_ys = model(xs[1])
    may_go_on.set()
    first.join()
    assert no_forward_is_open(model)
    assert_same([*ys[0], *second_ys], [*single(xs[0]), *single(xs[1])])


def test_a_layer_with_hooks_is_computed_when_it_is_called(device, calls):
    model, x = attention(device), torch.randn(5, 8, device=device)
    expected = model(x)
    model.k_proj.register_forward_pre_hook(lambda module, args: None)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert sorted(calls) == [1, 2]


def test_dropout_draws_the_masks_that_separate_layers_draw(device, calls):
    model, x = attention(device, dropout=0.5), torch.randn(64, 8, device=device)
    shared = results(model, lambda m: m(x))
    for tensor, other in zip(shared, results(separate(model), lambda m: m(x)), strict=True):
        assert torch.equal(tensor, other)
    calls.clear()
    model.eval()(x)
    assert calls == [3]


# --- gradients ---


def test_separate_backwards(device):
    model, x = attention(device, all_outputs), torch.randn(5, 8, device=device, requires_grad=True)
    grads = []
    for m in (model, separate(model)):
        q, k, _ = m(x)
        q.sum().backward()
        first = [None if p.grad is None else p.grad.clone() for p in m.parameters()]
        k.square().sum().backward()
        grads.append([*first, *(p.grad for p in m.parameters()), x.grad.clone()])
        x.grad = None
    assert_same(*grads)


def test_gradients_of_one_output_alone(device):
    model, x = attention(device, lambda m, x: all_outputs(m, x)[1]), torch.randn(5, 8)
    x = x.to(device)
    assert_same(results(model, lambda m: m(x)), results(separate(model), lambda m: m(x)))


def outer_checkpoint(m, x, reentrant):
    return checkpoint(m, x, use_reentrant=reentrant)


def inner_checkpoint(m, x, reentrant):
    def run(m, x):
        q = checkpoint(m.q_proj, x, use_reentrant=reentrant)
        return q + 2 * m.k_proj(x) + 3 * m.v_proj(x)

    m.run = run
    return m(x)


def last_checkpoint(m, x, reentrant):
    def run(m, x):
        q = m.q_proj(x)
        return q + 2 * checkpoint(m.k_proj, x, use_reentrant=reentrant) + 3 * m.v_proj(x)

    m.run = run
    return m(x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("run", [outer_checkpoint, inner_checkpoint, last_checkpoint])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(device, run, reentrant, dropout):
    model = attention(device, dropout=dropout)
    x = torch.randn(64, 8, device=device, requires_grad=True)
    expected = results(separate(model), lambda m: m(x))
    assert_same(results(model, lambda m: run(m, x, reentrant)), expected)


def test_compiled_without_breaks(device):
    model, x = attention(device), torch.randn(5, 8, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


# --- the model ---


def test_the_model_shows_which_layers_share(device):
    model = attention(device)
    name = torch.device(device).type
    assert f"shares its input with k_proj, v_proj on {name}" in repr(model.q_proj)
    text = f"one pass over their input on {name}: 1 x (q_proj, k_proj, v_proj)"
    summary = pyfast.summary(model)
    assert text in summary.table.splitlines() and str(summary).endswith(text)
    pyfast.set_adapter(model, None)
    assert "shares" not in repr(model) and text not in pyfast.summary(model).table


def test_sharing_follows_the_adapters(device, calls):
    model, x = attention(device), torch.randn(4, 8, device=device)
    config = pyfast.LoRAConfig(r=2, targets=["q_proj", "v_proj"], share_inputs=True)
    pyfast.add_lora(model, config, "two")
    pyfast.add_lora(model, pyfast.LoRAConfig(r=2), "separate")
    for name, expected in (("default", [3]), ("two", [2]), ("separate", [1, 1, 1])):
        pyfast.set_adapter(model, name)
        calls.clear()
        model(x)
        assert calls == expected
    names = ["default", None, "two", "two"]
    with pyfast.mixed_batch(model, names):
        mixed = model(x)
    for i, name in enumerate(names):
        pyfast.set_adapter(model, name)
        torch.testing.assert_close(mixed[i], model(x)[i])
    pyfast.set_adapter(model, "default")
    expected = model(x)
    pyfast.merge(model)
    torch.testing.assert_close(model(x), expected)
    pyfast.unmerge(model)
    pyfast.remove_adapter(model, "two")
    calls.clear()
    assert torch.equal(model(x), expected) and calls == [3]
    pyfast.remove_adapter(model, "default")
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(layer.shared_input is None for layer in lora_layers(model))


def test_unwrapping_leaves_no_hooks(device):
    model = attention(device)
    pyfast.merge(model, unwrap=True)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_beside_a_bottleneck(device, calls):
    model, x = attention(device), torch.randn(4, 8, device=device)
    expected = model(x)
    pyfast.add_adapters(model, pyfast.AdapterConfig(4, targets=["q_proj"]), "bottleneck")
    pyfast.set_adapter(model, "default")
    calls.clear()
    assert torch.equal(model(x), expected) and calls == [3]


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_the_layers_of_a_copied_model_share(device, calls, duplicate):
    model, x = attention(device), torch.randn(4, 8, device=device)
    expected = model(x)
    twin = duplicate(model)
    assert twin.q_proj.shared_input is not model.q_proj.shared_input
    calls.clear()
    assert torch.equal(twin(x), expected) and calls == [3]
    pyfast.remove_adapter(twin, "default")
    calls.clear()
    assert not twin._forward_hooks and torch.equal(model(x), expected) and calls == [3]


def test_the_copy_of_one_layer_is_alone(device):
    layer = copy.deepcopy(attention(device).q_proj)
    assert layer.shared_input is None


def test_a_replica_computes_by_itself(device, calls):
    """nn.DataParallel runs replicas in threads, which must not meet in one shared pass."""
    model, x = attention(device, sum_of_all), torch.randn(5, 8, device=device)
    group = model.q_proj.shared_input
    replica = model.q_proj._replicate_for_data_parallel()
    group._begin(model, (x,))
    assert group.output(replica, x) is None
    assert group.output(model.q_proj, x) is not None


def test_files_do_not_hold_the_option(tmp_path):
    model = adapted(make("llama"))
    pyfast.save_adapter(model, tmp_path)
    assert "share_inputs" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = pyfast.load_adapter(make("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded, "llama"), logits(model, "llama"))
