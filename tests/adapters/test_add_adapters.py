"""Bottleneck adapters in whole models: places, outputs, files, and LoRA beside them."""

import json
import math

import pytest
import torch
from helpers.tiny_models import LAYERS, MODELS, logits, make, train
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference
from pyfast.adapters.bottleneck.layer import BottleneckLinear
from pyfast.adapters.model_state import lora_layers, walk_original_modules

WIDTH, B = 32, 8
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "vit": ["classifier"]}
ENDS = {  # of one layer, after attention and after the feed-forward
    **dict.fromkeys(("llama", "mistral", "qwen2"), (["self_attn.o_proj"], ["mlp.down_proj"])),
    **dict.fromkeys(("bert", "roberta"), (["attention.output.dense"], ["output.dense"])),
    "gpt2": (["attn.c_proj"], ["mlp.c_proj"]),
    "vit": (["attention.o_proj"], ["mlp.fc2"]),
    "t5": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"]),
}


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 3))


def randomized(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def with_adapters(model, name="default", **options):
    return randomized(
        pyfast.add_adapters(model, pyfast.AdapterConfig(**{"bottleneck": B, **options}), name)
    )


def with_lora(model, name, **options):
    return randomized(pyfast.add_lora(model, pyfast.LoRAConfig(r=4, alpha=8, **options), name))


def adapter_layers(model):
    return {
        path: module
        for path, module in walk_original_modules(model)
        if isinstance(module, BottleneckLinear)
    }


def number_of_places(model_name, style):
    """Return how many adapters the model gets."""
    if model_name == "t5":  # encoder and decoder, the latter with cross-attention
        return LAYERS * (5 if style == "houlsby" else 2)
    return LAYERS * (2 if style == "houlsby" else 1)


# --- where they are, and what they compute ---


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("model_name", MODELS)
def test_adapters_are_in_their_places_and_change_nothing_at_first(model_name, style):
    model, before = make(model_name), logits(make(model_name), model_name)
    pyfast.add_adapters(model, pyfast.AdapterConfig(bottleneck=B, style=style))
    layers, (attention, feed_forward) = adapter_layers(model), ENDS[model_name]
    ends = feed_forward + (attention if style == "houlsby" else [])
    assert len(layers) == number_of_places(model_name, style)
    assert all(any(path.endswith(f".{end}") for path in layers) for end in ends)
    assert all(any(path.endswith(f".{end}") for end in ends) for path in layers)
    if style == "pfeiffer":
        assert not any("ttention" in path for path in layers)
    assert pyfast.summary(model).trainable == number_of_places(model_name, style) * (
        2 * WIDTH * B + WIDTH + B
    )
    assert torch.equal(logits(model, model_name), before)


@pytest.mark.parametrize("model_name", MODELS)
def test_a_model_with_adapters_is_the_definition(model_name):
    options = {"activation": "silu", "scaling": 0.7}
    model, plain = with_adapters(make(model_name), **options), make(model_name)
    for path, layer in adapter_layers(model).items():
        adapter = layer.adapters["default"]
        weights = [adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias]

        def after(module, args, z, weights=weights):
            return reference.adapter(z, *weights, **options)

        plain.get_submodule(path).register_forward_hook(after)
    assert (logits(model, model_name) - logits(make(model_name), model_name)).abs().max() > 1e-3
    torch.testing.assert_close(
        logits(model, model_name), logits(plain, model_name), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("model_name", MODELS)
def test_training_saving_loading(model_name, tmp_path):
    model = make(model_name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = pyfast.AdapterConfig(bottleneck=B, modules_to_save=HEADS.get(model_name, []))
    losses = train(pyfast.add_adapters(model, config), model_name)
    assert losses[-1] < losses[0] - 0.01
    trained = logits(model, model_name)
    pyfast.save_adapter(model, tmp_path)
    assert torch.equal(logits(pyfast.load_adapter(make(model_name), tmp_path), model_name), trained)
    pyfast.set_adapter(model, None)
    assert torch.equal(logits(model, model_name), logits(make(model_name), model_name))
    pyfast.remove_adapter(model, "default")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[key], before[key]) for key in before
    )


@pytest.mark.parametrize("base", ["nf4", "bfloat16", "autocast"])
def test_over_other_bases(base):
    model = make("llama")
    if base == "nf4":
        pyfast.quantize(model)
    elif base == "bfloat16":
        model.to(torch.bfloat16)
    pyfast.add_adapters(model, pyfast.AdapterConfig(bottleneck=B))
    with torch.autocast("cpu", enabled=base == "autocast"):
        losses = train(model, "llama")
    assert losses[-1] < losses[0] - 0.01
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_dropout_is_of_the_adapter_s_input():
    layer = BottleneckLinear(nn.Linear(12, 1000))
    adapter = layer.add("a", 1000, dropout=0.5)
    with torch.no_grad():  # z + relu(2 or 0 times z)
        adapter.down_weight.copy_(torch.eye(1000))
        adapter.up_weight.copy_(torch.eye(1000))
    z, added = layer.base(X), layer(X) - layer.base(X)
    alive = z > 0
    doubled, dropped = torch.isclose(added, 2 * z), added == 0
    assert bool((doubled | dropped)[alive].all()) and 0.4 < dropped[alive].float().mean() < 0.6
    torch.testing.assert_close(layer.eval()(X), z + z.relu())


def test_an_encoder_of_torch_s():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    model, x = with_adapters(encoder, targets=["linear2"]), torch.randn(2, 5, 8)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        pyfast.set_adapter(model, None)
        assert (model(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_and_recomputed(reentrant):
    model = with_adapters(with_lora(net(), "lora", targets=["2"]), targets=["0", "2"])
    x, grads = X.clone().requires_grad_(), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for forward in (model, compiled, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        forward(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 8
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


# --- several, of both kinds ---


@pytest.mark.parametrize("order", ["lora first", "bottleneck first"])
def test_both_kinds_in_one_model(order):
    model, plain, y = net(), net()(X), {}
    adding = {
        "l": lambda: with_lora(model, "l", targets=["0", "2"]),
        "b": lambda: with_adapters(model, "b", targets=["2"]),
    }
    for name in ("l", "b") if order == "lora first" else ("b", "l"):
        adding[name]()
        y[name] = model(X)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if f".{name}." in n
        }
    y["c"] = with_adapters(
        model, "c", targets=["0", "2"], activation="tanh", modules_to_save=["3"]
    )(X)
    assert set(lora_layers(model)) == set(adapter_layers(model)) == {"0", "2"}
    for name in ("b", "l", "c", None, "l", "b"):
        pyfast.set_adapter(model, name)
        assert torch.equal(model(X), plain if name is None else y[name])
    for name in ("l", "c", "b"):
        pyfast.remove_adapter(model, name)
        for other in {"c", "b"} & set(model.__dict__["_pyfast_adapters"].configs):
            pyfast.set_adapter(model, other)
            assert torch.equal(model(X), y[other])
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert model.state_dict().keys() == net().state_dict().keys() and torch.equal(model(X), plain)


def test_beside_biases_of_all_the_model():
    model, plain = with_adapters(net(), "b", targets=["2"]), net()(X)
    y = {None: plain, "b": model(X)}
    y["l"] = with_lora(model, "l", targets=["0"], bias="all")(X)
    y["c"] = with_adapters(model, "c", targets=["3", "0"])(X)
    for name in ("b", "l", None, "c", "l"):
        pyfast.set_adapter(model, name)
        assert torch.equal(model(X), y[name])
    pyfast.remove_adapter(model, "b")
    assert torch.equal(model(X), y["l"])


def test_removing_a_bottleneck_leaves_lora():
    model = with_adapters(with_lora(net(), "l", targets=["0", "2"]), "b", targets=["2"])
    pyfast.set_adapter(model, "l")
    y = model(X)
    pyfast.remove_adapter(model, "b")
    assert (
        torch.equal(model(X), y)
        and not adapter_layers(model)
        and set(lora_layers(model)) == {"0", "2"}
    )


def test_merging():
    model = with_adapters(with_lora(net(), "l", targets=["0", "2"]), "b", targets=["2"])
    b = model(X)
    with pytest.raises(
        ValueError, match="adapter 'b' is a bottleneck, which no weight can hold; merge is for LoRA"
    ):
        pyfast.merge(model)
    pyfast.set_adapter(model, "l")
    y = model(X)
    pyfast.merge(model)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge.. comes first"):
        pyfast.set_adapter(model, "b")
    pyfast.unmerge(model)
    assert torch.equal(model(X), y)
    pyfast.set_adapter(model, "b")
    assert torch.equal(model(X), b)
    pyfast.set_adapter(model, "l")
    pyfast.merge(model, unwrap=True)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_mixed_batch_of_both_kinds():
    model = with_adapters(
        with_lora(net(), "l", targets=["0", "2"]), "b", targets=["2"], modules_to_save=["3"]
    )
    with_adapters(model, "c", targets=["0"])
    names = ["b", "l", None, "c"]
    for p in model.parameters():
        p.requires_grad_(True)
    with pyfast.mixed_batch(model, names):
        mixed = model(X)
        mixed.pow(2).sum().backward()
        with pytest.raises(ValueError, match="adapter_ids has 4 names"):
            model(X[:2])
    assert all(p.grad.any() for p in model.parameters())
    for i, name in enumerate(names):
        pyfast.set_adapter(model, name)
        torch.testing.assert_close(mixed[i], model(X)[i], rtol=1e-5, atol=1e-5)
    layer = adapter_layers(model)["0"]
    torch.testing.assert_close(layer(X, ["c", None, "c", "c"])[1], layer.base(X)[1])
    with pytest.raises(ValueError, match="name is 'b'; this layer has .'c'."):
        layer(X, ["b"] * 4)


def test_mixed_batch_of_a_transformer():
    model = with_adapters(with_adapters(make("t5"), "a"), "b", style="pfeiffer")
    with pyfast.mixed_batch(model, ["b", None, "a"]):
        mixed = logits(model, "t5")
    for i, name in enumerate(["b", None, "a"]):
        pyfast.set_adapter(model, name)
        torch.testing.assert_close(mixed[i], logits(model, "t5")[i], rtol=1e-5, atol=1e-5)


# --- counting ---


def test_summary_by_kind():
    model = pyfast.quantize(make("llama"))
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, pyfast.NF4Linear)
    )
    dense = 2 * 64 * WIDTH + (2 * LAYERS + 1) * WIDTH  # embeddings, the head, norms
    assert pyfast.summary(model) == (dense, dense + weights) and pyfast.summary(model).kinds[
        "4-bit"
    ] == (0, weights)
    with_adapters(with_lora(model, "l", modules_to_save=["lm_head"]), "b", style="pfeiffer")
    summary = pyfast.summary(model)
    bottlenecks, head = LAYERS * (2 * WIDTH * B + WIDTH + B), 64 * WIDTH
    assert summary.kinds["dense"] == (0, dense) and summary.kinds["bottleneck"] == (
        bottlenecks,
        bottlenecks,
    )
    assert summary.kinds["modules to save"] == (0, head) and summary.kinds["LoRA"].trainable == 0
    assert summary.trainable == bottlenecks and summary.total == sum(
        counts.total for counts in summary.kinds.values()
    )
    assert (
        summary.sizes["bottleneck"] == 4 * bottlenecks
        and 0.5 * weights < summary.sizes["4-bit"] < 4 * weights
    )
    assert summary.bytes == sum(p.nbytes for p in model.parameters())
    lines = summary.table.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        model_name.split()[0] for model_name in summary.kinds
    ] + ["all"]
    assert f"{bottlenecks:,}" in lines[-1] and len({len(line) for line in lines}) == 1


# --- what is refused ---

CONFIGS = {
    "no bottleneck": ({"bottleneck": 0}, "bottleneck is 0; it must be an integer, 1 or more"),
    "half a bottleneck": ({"bottleneck": 2.5}, "bottleneck is 2.5; it must be an integer"),
    "style": ({"style": "compacter"}, "style is 'compacter'; it must be 'houlsby' or 'pfeiffer'"),
    "activation": (
        {"activation": "swish"},
        "activation is 'swish'; it must be one of 'relu', 'gelu'",
    ),
    "scaling": ({"scaling": math.inf}, "scaling is inf; it must be a finite number"),
    "dropout": ({"dropout": 1}, "dropout is 1; it must be a number from 0"),
    "no targets": ({"targets": []}, "targets is ..; it must be a regex, a list of names or None"),
    "no regex": ({"targets": "("}, "targets holds '.'; it must be a regular expression"),
    "modules": ({"modules_to_save": "3"}, "modules_to_save is '3'; it must be a list of names"),
    "dtype": ({"dtype": torch.int8}, "dtype is torch.int8; it must be a floating dtype or None"),
}


@pytest.mark.parametrize("options, message", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pyfast.AdapterConfig(**options)


MISTAKES = {
    "unknown places": (
        {},
        ValueError,
        "no layer of Sequential is known to end its attention; targets must name",
    ),
    "no layer": (
        {"targets": ["9"]},
        ValueError,
        r"targets \['9'\] match no layer; the model's linear layers are",
    ),
    "not linear": (
        {"targets": ["1"]},
        TypeError,
        "target '1' is a LayerNorm; it must be a linear layer",
    ),
    "nothing to save": (
        {"targets": ["0"], "modules_to_save": ["head"]},
        ValueError,
        "holds 'head', which matches no",
    ),
    "both": (
        {"targets": ["0"], "modules_to_save": ["0"]},
        ValueError,
        "modules_to_save takes in 0, which is a target",
    ),
    "dtype": (
        {"targets": ["0"], "dtype": torch.bfloat16},
        ValueError,
        "0: dtype is torch.bfloat16; it must be torch.f",
    ),
}


@pytest.mark.parametrize("options, error, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_changes_nothing(options, error, message):
    model = net()
    with pytest.raises(error, match=message):
        pyfast.add_adapters(model, pyfast.AdapterConfig(**options))
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_other_mistakes():
    model = with_adapters(net(), targets=["0"])
    with pytest.raises(ValueError, match="name is 'default', which the model has already"):
        pyfast.add_lora(model)
    with pytest.raises(TypeError, match="config must be a AdapterConfig, not LoRAConfig"):
        pyfast.add_adapters(model, pyfast.LoRAConfig(), "b")
    with pytest.raises(TypeError, match="config must be a LoRAConfig, not AdapterConfig"):
        pyfast.add_lora(model, pyfast.AdapterConfig(), "b")
    with pytest.raises(ValueError, match="adapter 'b' is unknown; this model has .'default'."):
        pyfast.set_adapter(model, "b")
    with pytest.raises(
        ValueError, match="dropout is 1; it must be a number from 0 up to, but not including, 1"
    ):
        pyfast.Adapter(8, dropout=1)
    with pytest.raises(TypeError, match="base is a Conv2d; it must be"):
        BottleneckLinear(nn.Conv2d(2, 2, 1))


# --- files ---

P = "base_model.model."
DOWN = f"{P}0.adapter_down.weight"


def saved(directory):
    model = with_adapters(
        net(), targets=["0", "2"], modules_to_save=["3"], activation="tanh", scaling=0.5
    )
    pyfast.save_adapter(model, directory)
    fields = json.loads((directory / "adapter_config.json").read_text())
    return model, fields, load_file(directory / "adapter_model.safetensors")


def assert_refused(directory, message):
    model = net()
    with pytest.raises(pyfast.CheckpointError, match=message):
        pyfast.load_adapter(model, directory)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(X), net()(X))


def test_a_file_says_all(tmp_path):
    model, fields, tensors = saved(tmp_path)
    assert fields == {
        "peft_type": "PYFAST_BOTTLENECK",
        "bottleneck": B,
        "style": "houlsby",
        "targets": ["0", "2"],
        "activation": "tanh",
        "scaling": 0.5,
        "dropout": 0.0,
        "modules_to_save": ["3"],
        "base_model_name_or_path": None,
    }
    assert {key: tuple(t.shape) for key, t in tensors.items() if ".2." not in key} == {
        DOWN: (B, 12),
        f"{P}0.adapter_down.bias": (B,),
        f"{P}0.adapter_up.weight": (12, B),
        f"{P}0.adapter_up.bias": (12,),
        f"{P}3.weight": (3, 12),
        f"{P}3.bias": (3,),
    }
    other = pyfast.load_adapter(
        with_lora(net(), "l", targets=["0"]), tmp_path, "b", trainable=False
    )
    assert torch.equal(other(X), model(X)) and not pyfast.summary(other).trainable


def test_peft_refuses_the_file(tmp_path):
    pyfast.save_adapter(with_adapters(make("bert")), tmp_path)
    with pytest.raises(KeyError, match="PYFAST_BOTTLENECK"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="PYFAST_BOTTLENECK"):
        PeftModel.from_pretrained(make("bert"), tmp_path)


FIELDS = {
    "another model_name": (
        {"peft_type": "IA3"},
        "peft_type is 'IA3'; it must be 'LORA', 'PYFAST_BOTTLENECK' or 'PYFAST_SEL",
    ),
    "LoRA": ({"peft_type": "LORA"}, "adapter_config.json: activation is 'tanh'; it must be unset"),
    "bottleneck": (
        {"bottleneck": 0},
        "adapter_config.json: bottleneck is 0; it must be an integer",
    ),
    "activation": ({"activation": ["relu"]}, "activation is .'relu'.; it must be one of"),
    "scaling": ({"scaling": math.nan}, "scaling is nan; it must be a finite number"),
    "unknown": ({"use_wings": True}, "use_wings is True; it has no meaning in a PYFAST_BOTTLENECK"),
    "no such layer": ({"targets": ["9"]}, "does not fit this model: targets .'9'. match no layer"),
    "other width": (
        {"bottleneck": 9},
        rf"safetensors: {DOWN} has shape \[8, 12\]; it must be \[9, 12\]",
    ),
    "fewer layers": ({"targets": ["0"]}, rf"{P}2.adapter_down.bias has no place"),
    "more layers": (
        {"targets": ["0", "2", "3"], "modules_to_save": []},
        rf"{P}3.adapter_down.weight is missing",
    ),
}


@pytest.mark.parametrize("changes, message", FIELDS.values(), ids=FIELDS)
def test_fields_that_are_refused(tmp_path, changes, message):
    _, fields, _ = saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | changes))
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("field", ["bottleneck", "style", "targets", "scaling"])
def test_a_field_that_is_missing(tmp_path, field):
    _, fields, _ = saved(tmp_path)
    del fields[field]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert_refused(tmp_path, f"adapter_config.json: {field} is missing")


TENSORS = {
    "missing": (
        lambda t: {key: value for key, value in t.items() if key != DOWN},
        f"{DOWN} is missing",
    ),
    "NaN": (lambda t: {**t, DOWN: t[DOWN] * math.nan}, f"{DOWN} holds NaN or infinite values"),
    "turned": (
        lambda t: {**t, DOWN: t[DOWN].t().contiguous()},
        rf"{DOWN} has shape \[12, 8\]; it must be \[8, 12\]",
    ),
    "LoRA's": (
        lambda t: {**t, f"{P}0.lora_A.weight": torch.ones(2)},
        "0.lora_A.weight has no place",
    ),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(tmp_path, change, message):
    _, _, tensors = saved(tmp_path)
    save_file(change(tensors), tmp_path / "adapter_model.safetensors")
    assert_refused(tmp_path, message)


def test_a_file_cut_short(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert_refused(tmp_path, "is cut short")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, data):
        raise OSError("no space left")

    monkeypatch.setattr(pyfast.formats.file_io, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        saved(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
