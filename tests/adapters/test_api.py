"""Adapters of a model: added, switched, merged, counted and mixed."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import pyfast
from pyfast.adapters.model_state import lora_layers

TOKENS = torch.arange(40).view(2, 20)
INPUT = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm, self.out = (
            nn.Linear(12, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 12, bias=False),
        )

    def forward(self, x):
        return x + self.out(self.norm(self.q(x)).tanh())


def net():
    torch.manual_seed(5)
    return nn.Sequential(Block(), Block(), nn.Linear(12, 3))


def randomized(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def with_lora(model=None, name="default", **options):
    return randomized(
        pyfast.add_lora(
            net() if model is None else model, pyfast.LoRAConfig(r=4, alpha=8, **options), name
        )
    )


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def tiny_llama(tie=False):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def quantized(model):
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            model.set_submodule(name, pyfast.NF4Linear.from_linear(linear))
    return model


# --- adding ---


def test_the_default_is_every_linear_layer_but_the_head():
    model = pyfast.add_lora(tiny_llama())
    names = {f"model.layers.{i}.{part}" for i in (0, 1) for part in PARTS}
    assert set(lora_layers(model)) == names
    assert trainable(model) == {f"{n}.adapters.default.lora_{m}" for n in names for m in "ab"}
    torch.testing.assert_close(model(TOKENS).logits, tiny_llama()(TOKENS).logits)


PARTS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def test_ranks_and_alphas_by_pattern():
    config = {"rank_pattern": {"0.q": 2, "q": 3}, "alpha_pattern": {"out": 2}}
    layers = lora_layers(with_lora(targets=["q", "out"], **config))
    assert [layers[n].adapters["default"].rank for n in ("0.q", "1.q", "1.out")] == [2, 3, 4]
    assert [layers[n].adapters["default"].scaling for n in ("0.q", "1.out")] == [4, 0.5]


def test_a_layer_in_two_places_is_adapted_in_both():
    model = net()
    model[1].q = model[0].q
    model = with_lora(model, targets=["q"])
    assert model[1].q is model[0].q and isinstance(model[0].q, pyfast.LoRALinear)


def test_layers_whose_weight_is_read_past_them_are_left_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    assert set(lora_layers(pyfast.add_lora(model))) == {"up"}


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"]])
def test_torch_s_encoder_does_not_pass_the_adapters_by(targets):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    model, x = with_lora(encoder, targets=targets), torch.randn(2, 5, 8)
    expected = slow(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
        pyfast.set_adapter(model, None)
        assert (model(x) - expected).abs().max() > 0.01


def slow(model, x):
    """Return the output of torch's slow path, to which gradients lead."""
    for layer in model.layers:
        layer.norm1.weight.requires_grad_()
    return model(x).detach()


def test_a_saved_module_takes_keywords():
    model = with_lora(modules_to_save=["2"])
    assert torch.equal(model[2](input=INPUT), model[2](INPUT))


def test_gradients_of_a_step_train_only_the_adapter():
    model = with_lora(modules_to_save=["2"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(INPUT).pow(2).sum().backward()
    optimizer.step()
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == trainable(model) and "2.copies.default.weight" in changed


# --- switching ---


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_adapters_switch_with_all_that_is_theirs(bias):
    plain = net()(INPUT)
    model = with_lora(name="a", bias=bias, modules_to_save=["2"])
    a = model(INPUT)
    model = with_lora(model, name="b", bias=bias, dora=True, modules_to_save=["2"])
    b = model(INPUT)
    assert (a - plain).abs().max() > 0.01 and (b - a).abs().max() > 0.01
    for name, y in {"a": a, None: plain, "b": b}.items():
        pyfast.set_adapter(model, name)
        assert torch.equal(model(INPUT), y)
        others = {
            n
            for n in trainable(model)
            if name is None or (f".{name}." not in n and not n.endswith("norm.bias"))
        }
        assert not others and (name is None or trainable(model))


def test_an_adapter_with_other_targets():
    model = with_lora(name="a", targets=["q"])
    a = model(INPUT)
    with_lora(model, name="b", targets=["out"])
    pyfast.set_adapter(model, "a")
    torch.testing.assert_close(model(INPUT), a)
    assert lora_layers(model)["0.out"].active is None


def test_a_saved_module_looks_like_the_one_that_runs():
    model = with_lora(modules_to_save=["2"])
    assert model[2].out_features == 3 and model[2].weight is model[2].copies["default"].weight
    pyfast.set_adapter(model, None)
    assert model[2].weight is model[2].base.weight
    with pytest.raises(AttributeError):
        _ = model[2].color


def test_models_copy_and_load():
    model = with_lora(bias="all", modules_to_save=["2"], dora=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(INPUT), model(INPUT))
    randomized(twin)
    assert not torch.equal(twin(INPUT), model(INPUT))
    model.load_state_dict(twin.state_dict())
    assert torch.equal(twin(INPUT), model(INPUT))
    pyfast.set_adapter(twin, None)
    assert torch.equal(twin(INPUT), net()(INPUT)) and not torch.equal(model(INPUT), net()(INPUT))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_removing_adapters(init):
    plain = net()(INPUT)
    model = with_lora(name="a", targets=["q"], bias="all", modules_to_save=["2"], init=init)
    model = with_lora(model, name="b", targets=["out"], modules_to_save=["2"])
    b = model(INPUT)
    pyfast.remove_adapter(model, "a")
    torch.testing.assert_close(model(INPUT), b, rtol=1e-5, atol=1e-5)
    assert set(lora_layers(model)) == {"0.out", "1.out"} and trainable(model)
    pyfast.remove_adapter(model, "b")
    torch.testing.assert_close(model(INPUT), plain, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert model.state_dict().keys() == net().state_dict().keys() and not trainable(model)
    with_lora(model, name="a")


# --- a mixed batch ---


def test_mixed_batch():
    model = with_lora(name="a", modules_to_save=["2"])
    model = with_lora(model, name="b", bias="lora_only", targets=["q"])
    with pyfast.mixed_batch(model, ["b", "a", None, "b"]):
        mixed = model(INPUT)
        with pytest.raises(ValueError, match="adapter_ids has 4 names"):
            model(INPUT[:2])
    for i, name in enumerate(["b", "a", None, "b"]):
        pyfast.set_adapter(model, name)
        torch.testing.assert_close(mixed[i], model(INPUT)[i], rtol=1e-5, atol=1e-5)


def test_mixed_batch_trains_what_requires_it():
    model = with_lora(name="a", modules_to_save=["2"])
    model = with_lora(model, name="b", targets=["q", "out"])
    for name, p in model.named_parameters():
        p.requires_grad_(".a." in name or ".b." in name)
    with pyfast.mixed_batch(model, ["b", "a", None, "b"]):
        model(INPUT).pow(2).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def two_adapters():
    model = with_lora(
        with_lora(name="a", targets=["q"], modules_to_save=["2"]), name="b", targets=["q", "out"]
    )
    for name, p in model.named_parameters():
        p.requires_grad_(".a." in name or ".b." in name)
    return model


def gradients(model, forward, names=("b", "a", None, "b"), inside=True):
    model.zero_grad()
    with pyfast.mixed_batch(model, names):
        loss = forward(model, INPUT.clone().requires_grad_()).pow(2).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_mixed_batch_with_checkpoints(reentrant):
    def checkpointed(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    model = two_adapters()
    expected = gradients(model, lambda model, x: model(x))
    actual = gradients(model, checkpointed)
    assert actual.keys() == expected.keys() and all(
        torch.equal(actual[key], expected[key]) for key in actual
    )
    with pytest.raises(
        RuntimeError, match="mixed_batch was left before backward recomputed its layers"
    ):
        gradients(model, checkpointed, inside=False)
    checkpointed(
        model, INPUT.clone().requires_grad_()
    ).sum().backward()  # the next step, without mixed_batch
    assert gradients(model, lambda model, x: model(x), inside=False).keys() == expected.keys()


def test_mixed_batches_nest_and_are_switched_off():
    model = two_adapters()
    with pyfast.mixed_batch(model, ["a"] * 4):
        y = model(INPUT)
        with pyfast.mixed_batch(model, ["b"] * 4):
            assert not torch.equal(model(INPUT), y)
        assert torch.equal(model(INPUT), y)
        layer = model[0].q
        with layer.disabled():
            assert torch.equal(layer(INPUT), layer.base(INPUT))
        assert torch.equal(model(INPUT), y)
    assert all(layer.rows is None for layer in lora_layers(model).values())


def test_mixed_batch_is_compiled_once_for_all_orders():
    torch._dynamo.reset()
    model, counter = two_adapters(), torch._dynamo.testing.CompileCounter()
    block = torch.compile(model[0], backend=counter)
    with torch.no_grad():
        for names in (
            ["a", "b", "a", "a"],
            ["b", "b", "a", "a"],
            ["b", "a", "b", "b"],
            ["a", "a", None, "b"],
        ):
            with pyfast.mixed_batch(model, names):
                torch.testing.assert_close(block(INPUT), model[0](INPUT))
    assert counter.frame_count == 1


# --- merging ---


def test_merge_and_unmerge_a_model():
    model = with_lora(tiny_llama(tie=True), dora=True)
    before, state = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    lost = pyfast.merge(model)
    assert set(lost) == set(lora_layers(model)) and all(
        layer.merged for layer in lora_layers(model).values()
    )
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    pyfast.unmerge(model)
    assert torch.equal(model(TOKENS).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_merge_into_nf4_says_what_is_lost_once():
    model = with_lora(quantized(tiny_llama()))
    before = model(TOKENS).logits
    with pytest.warns(
        UserWarning, match=r"lost \d+% of the update on average, \d+% in model.layers"
    ) as warned:
        lost = pyfast.merge(model, into="nf4")
    assert (
        len([w for w in warned if "merging" in str(w.message)]) == 1 and min(lost.values()) > 0.01
    )
    assert all(isinstance(layer.base, pyfast.NF4Linear) for layer in lora_layers(model).values())
    pyfast.unmerge(model)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("make", [tiny_llama, lambda: quantized(tiny_llama())])
def test_unwrapping_leaves_a_plain_model(make):
    model = with_lora(make(), bias="all", modules_to_save=["lm_head"])
    before = model(TOKENS).logits
    pyfast.merge(model, unwrap=True)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    assert not lora_layers(model)
    with_lora(model)  # as if it had never had one


def test_unwrapping_returns_what_pissa_took_out_of_layers_that_do_not_run():
    plain = net()(INPUT)
    model = with_lora(name="p", targets=["q"], init="pissa")
    model = with_lora(model, name="b", targets=["out"])
    before = model(INPUT)
    assert (before - plain).abs().max() > 0.01
    pyfast.merge(model, unwrap=True)
    torch.testing.assert_close(model(INPUT), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].q.weight, net()[0].q.weight, rtol=1e-5, atol=1e-5)


def test_unwrapping_layers_wrapped_by_hand():
    model = nn.Sequential(pyfast.LoRALinear(nn.Linear(12, 12)))
    model[0].add("a", 4, 8)
    pyfast.merge(model, unwrap=True)
    assert type(model[0]) is nn.Linear


def test_unwrapping_holds_one_base_of_each_layer(monkeypatch):
    model, held, fold = with_lora(), [], pyfast.LoRALinear.merge_without_warning

    def counting(layer, into):
        held.append(sum(other.merged for other in lora_layers(model).values()))
        return fold(layer, into)

    monkeypatch.setattr(pyfast.LoRALinear, "merge_without_warning", counting)
    pyfast.merge(model, unwrap=True)
    assert held == [0] * 5


@pytest.mark.parametrize("dora", [True, False])
def test_merging_an_untrained_adapter_loses_nothing(dora):
    model = pyfast.add_lora(quantized(tiny_llama()), pyfast.LoRAConfig(r=4, dora=dora))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(pyfast.merge(model, into="nf4").values()) == {0}
        layer = pyfast.LoRALinear(pyfast.NF4Linear.from_linear(nn.Linear(128, 128)))
        layer.add("a", 4, 8, dora=dora)
        assert layer.merge(into="nf4") == 0


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"]
)
def test_a_wrapped_model_is_the_one_inside(tmp_path, wrap):
    model = with_lora(name="a", targets=["q"])
    wrapped = wrap(model)
    with_lora(wrapped, name="b", targets=["out"])
    b = model(INPUT)
    pyfast.save_adapter(wrapped, tmp_path)
    torch.testing.assert_close(pyfast.load_adapter(net(), tmp_path)(INPUT), b)
    pyfast.set_adapter(wrapped, "a")
    assert not torch.equal(model(INPUT), b)
    pyfast.set_adapter(wrapped, "b")
    assert set(pyfast.merge(wrapped, unwrap=True)) == {"0.out", "1.out"}
    torch.testing.assert_close(model(INPUT), b, rtol=1e-5, atol=1e-5)


# --- counting ---


def test_summary():
    linear = 2 * (12 * 12 + 12 + 24 + 12 * 12) + 12 * 3 + 3
    assert pyfast.summary(net()) == (linear, linear)
    counted = pyfast.summary(with_lora(targets=["q"]))
    assert counted == (2 * 4 * 24, linear + 2 * 4 * 24)
    assert str(counted) == "192 of 879 parameters train (21.8 %)"
    dense, nf4 = pyfast.add_lora(tiny_llama()), pyfast.add_lora(quantized(tiny_llama()))
    assert pyfast.summary(dense) == pyfast.summary(nf4)
    assert (
        pyfast.summary(tiny_llama(tie=True)).total == pyfast.summary(tiny_llama()).total - 128 * 64
    )
