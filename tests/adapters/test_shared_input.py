"""q, k, v and gate, up in one pass over their x: the same numbers, and only where they do have one x."""

import copy
from collections import Counter

import pytest
import torch
from helpers.tiny_models import MODELS, batch, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.ops import lora

CALLS = {  # of lora_linears, by the number of layers at once, in two layers of each kind
    "llama": {3: 2, 2: 2, 1: 4},
    "mistral": {3: 2, 2: 2, 1: 4},
    "qwen2": {3: 2, 2: 2, 1: 4},
    "gpt2": {1: 8},
    "bert": {3: 2, 1: 8},
    "roberta": {3: 2, 1: 8},
    "vit": {3: 2, 1: 7},
    "t5": {3: 4, 2: 2, 1: 16},
}


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call computed."""
    found, original = [], lora.lora_linears

    def counted(x, projections, **options):
        found.append(len(projections))
        return original(x, projections, **options)

    monkeypatch.setattr(lora, "lora_linears", counted)
    return found


def adapted(model, **options):
    """With adapters that do something."""
    pyfast.add_lora(model, pyfast.LoRAConfig(r=4, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers(model):
            layer.adapters["default"].lora_b.copy_(
                torch.randn(layer.out_features, 4, generator=generator) / 8
            )
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def apart(model):
    for layer in layers(model):
        layer.shared = None
    return model


def results(model, run):
    """The output, and the gradients of all that trains."""
    torch.manual_seed(8)
    y = run(model)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, calls):
    model = adapted(make(kind).double())
    single = apart(copy.deepcopy(model))
    inputs = {key: t.double() if t.is_floating_point() else t for key, t in batch(kind).items()}
    ours = results(model, lambda m: m(**inputs).logits)
    assert Counter(calls) == CALLS[kind]
    theirs = results(single, lambda m: m(**inputs).logits)
    assert max(calls[sum(CALLS[kind].values()) :]) == 1
    for mine, alone in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, alone)
    with torch.no_grad():
        calls.clear()
        model(**inputs)
    assert Counter(calls) == CALLS[kind]
    assert all(layer.shared is None or layer.shared._held is None for layer in layers(model))


class Attention(nn.Module):
    """One that does with its projections what it is told."""

    def __init__(self, run):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.run = run

    def forward(self, x):
        return sum(self.run(self, x))


def all_of(m, x):
    return m.q_proj(x), m.k_proj(x), m.v_proj(x)


def attention(run=all_of, **options):
    torch.manual_seed(2)
    return adapted(Attention(run), **options)


def across(m, x):
    return m.q_proj(x), m.k_proj(x + 1), m.v_proj(x * 2)


def twice(m, x):
    return m.k_proj(x), m.q_proj(x), m.k_proj(x), m.v_proj(x)


def without_gradients_first(m, x):
    with torch.no_grad():
        q = m.q_proj(x)
    return q, m.k_proj(x), m.v_proj(x)


def switched_off(m, x):
    q = m.q_proj(x)
    with m.k_proj.disabled():
        k = m.k_proj(x)
    return q, k, m.v_proj(x)


@pytest.mark.parametrize("run", [all_of, across, twice, without_gradients_first, switched_off])
def test_it_is_what_each_gives_by_itself(run):
    model, x = attention(run), torch.randn(5, 8)
    single = apart(copy.deepcopy(model))
    for _ in range(2):
        for mine, alone in zip(
            results(model, lambda m: m(x)), results(single, lambda m: m(x)), strict=True
        ):
            torch.testing.assert_close(mine, alone)


@torch.no_grad()
def test_an_x_that_is_written_to_is_another():
    def changed(m, x):
        x = x + 0
        q = m.q_proj(x)
        x += 1
        return q, m.k_proj(x), m.v_proj(x)

    model, x = attention(changed), torch.randn(5, 8)
    torch.testing.assert_close(model(x), apart(copy.deepcopy(model))(x))


def test_layers_that_have_no_x_in_common_are_asked_one_by_one(calls):
    model, x = attention(across), torch.randn(5, 8)
    model(x)
    assert calls == [3, 1, 1]  # a guess that was wrong
    model(x)
    assert calls[3:] == [1, 1, 1] and model.q_proj.shared._held is None


def test_an_exception_between_them_is_forgotten(calls):
    model, x = attention(), torch.randn(5, 8)
    exact = model(x)
    calls.clear()
    model.q_proj(torch.randn(5, 8))  # and the others were not reached
    torch.testing.assert_close(model(x), exact)
    torch.testing.assert_close(model(x), exact)
    assert calls == [3, 3, 3]


def test_what_is_hooked_is_computed_when_it_is_called(calls):
    model, x = attention(), torch.randn(5, 8)
    exact = model(x)
    model.k_proj.register_forward_pre_hook(lambda module, args: None)
    calls.clear()
    torch.testing.assert_close(model(x), exact)
    assert sorted(calls) == [1, 2]


def test_it_follows_the_adapters(calls):
    """Those of other layers, merged ones, mixed batches, none."""
    model, x = attention(), torch.randn(4, 8)
    pyfast.add_lora(model, pyfast.LoRAConfig(r=2, targets=["q_proj", "v_proj"]), "two")
    calls.clear()
    model(x)
    assert calls == [2]
    with pyfast.mixed_batch(model, ["default", None, "two", "two"]):
        mixed = model(x)
    for row, name in zip(mixed, ["default", None, "two", "two"]):
        pyfast.set_adapter(model, name)
        torch.testing.assert_close(row, model(x)[mixed.eq(row).all(1).nonzero()[0, 0]])
    pyfast.set_adapter(model, "default")
    exact = model(x)
    pyfast.merge(model)
    calls.clear()
    torch.testing.assert_close(model(x), exact)
    pyfast.unmerge(model)
    pyfast.remove_adapter(model, "two")
    assert torch.equal(model(x), exact) and calls == [3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_with_dropout(reentrant):
    model = attention(dropout=0.3)
    x = torch.randn(64, 8, requires_grad=True)
    plain = results(model, lambda m: m(x))
    model.zero_grad()
    again = results(model, lambda m: checkpoint(m, x, use_reentrant=reentrant))
    for mine, theirs in zip(again, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_compiled_without_breaks():
    model, x = attention(), torch.randn(5, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
