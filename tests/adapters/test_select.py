"""Selective fine-tuning: the selected parameters alone train and are saved."""

import copy
import json
import math

import pytest
import torch
from helpers.tiny_models import MODELS, logits, make, train
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

import pyfast

P = "base_model.model."
LAST = {  # the last layer and the head or the last norm: as a user names them, and what their parameters begin with
    "llama": (["layers.1.*", "lm_head"], ("model.layers.1.", "lm_head.")),
    "mistral": (["*.layers.1", "lm_head"], ("model.layers.1.", "lm_head.")),
    "qwen2": (["model.layers.1.*", "norm"], ("model.layers.1.", "model.norm.")),
    "gpt2": (["h.1.*", "ln_f"], ("transformer.h.1.", "transformer.ln_f.")),
    "bert": (["encoder.layer.1.*", "classifier"], ("bert.encoder.layer.1.", "classifier.")),
    "roberta": (["encoder.layer.1.*", "classifier"], ("roberta.encoder.layer.1.", "classifier.")),
    "vit": (["layers.1", "classifier"], ("vit.layers.1.", "classifier.")),
    "t5": (
        ["decoder.block.1.*", "decoder.final_layer_norm"],
        ("decoder.block.1.", "decoder.final_layer_norm."),
    ),
}


def net():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        nn.Linear(6, 3),
    )


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_name", MODELS)
def test_the_last_layer_and_the_head_of_a_model(model_name, tmp_path):
    model = make(model_name)
    before = copy.deepcopy(model.state_dict())
    patterns, prefixes = LAST[model_name]
    assert pyfast.select(model, patterns) is model
    selected = trainable(model)
    assert selected == {
        name for name in dict(model.named_parameters()) if name.startswith(prefixes)
    }
    losses = train(model, model_name)
    assert losses[-1] < losses[0] - 0.01
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and changed <= selected and len(changed) > len(selected) / 2
    pyfast.save_adapter(model, tmp_path)
    fresh = pyfast.load_adapter(make(model_name), tmp_path)
    assert (
        torch.equal(logits(fresh, model_name), logits(model, model_name))
        and trainable(fresh) == selected
    )
    assert pyfast.summary(fresh) == pyfast.summary(model)


@pytest.mark.parametrize(
    "patterns, chosen",
    [
        (["2"], {"2.0.weight", "2.0.bias"}),
        (["2.*"], {"2.0.weight", "2.0.bias"}),
        (["2.0"], {"2.0.weight", "2.0.bias"}),
        (["*.bias"], {"0.bias", "1.bias", "2.0.bias", "3.bias"}),
        (["[01].weight", "3"], {"0.weight", "1.weight", "3.weight", "3.bias"}),
        (("?.bias",), {"0.bias", "1.bias", "3.bias"}),
        (
            ["*"],
            {
                "0.weight",
                "0.bias",
                "1.weight",
                "1.bias",
                "2.0.weight",
                "2.0.bias",
                "3.weight",
                "3.bias",
            },
        ),
    ],
    ids=lambda names: " ".join(sorted(names)),
)
def test_patterns(patterns, chosen):
    model = pyfast.select(net().requires_grad_(False), patterns)
    assert trainable(model) == chosen
    assert trainable(pyfast.select(model, ["0"])) == {"0.weight", "0.bias"}  # another one


def test_a_tied_parameter_goes_by_any_of_its_names():
    for pattern in ("lm_head", "embed_tokens", "model.embed_tokens.weight", "lm_head.weight"):
        model = pyfast.select(make("qwen2"), [pattern])
        assert (
            trainable(model) == {"model.embed_tokens.weight"} and model.lm_head.weight.requires_grad
        )


def test_what_training_changes_beside_parameters_is_saved(tmp_path):
    model = pyfast.select(net(), ["1"])
    for _ in range(3):
        model(X)
    pyfast.save_adapter(model, tmp_path)
    loaded = pyfast.load_adapter(net(), tmp_path)
    assert loaded[1].num_batches_tracked == 3 and torch.equal(loaded.eval()(X), model.eval()(X))


def test_over_a_4_bit_model(tmp_path):
    model = pyfast.select(pyfast.quantize(make("llama")), ["*norm*", "lm_head"])
    assert train(model, "llama")[-1] < 4.1
    pyfast.save_adapter(model, tmp_path)
    assert torch.equal(
        logits(pyfast.load_adapter(pyfast.quantize(make("llama")), tmp_path), "llama"),
        logits(model, "llama"),
    )


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"]
)
def test_a_wrapped_model_is_the_one_inside(tmp_path, wrap):
    model = net().eval()
    pyfast.select(wrap(model), ["3"])
    assert trainable(model) == {"3.weight", "3.bias"}
    pyfast.save_adapter(wrap(model), tmp_path)
    assert torch.equal(pyfast.load_adapter(net().eval(), tmp_path)(X), model(X))


def test_an_adapter_ends_a_selection(tmp_path):
    model = pyfast.add_lora(pyfast.select(net(), ["3"]), pyfast.LoRAConfig(targets=["3"]))
    assert trainable(model) == {"3.adapters.default.lora_a", "3.adapters.default.lora_b"}
    pyfast.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


# --- what is refused ---

MISTAKES = {
    "nothing so called": (
        ["encoder.layer.2.*"],
        r"patterns hold \['encoder.layer.2.\*'\], which match no parameter; the",
    ),
    "a slip": (["clasifier"], "patterns hold .'clasifier'., .*; the nearest names are classifier"),
    "two of three": (
        ["clasifier", "classifier", "pooler.dens"],
        r"\['clasifier', 'pooler.dens'\], which match no parameter; the nearest names are classifier.*pooler.dense",
    ),
    "without parameters": (["dropout"], "patterns hold .'dropout'., which match no parameter"),
    "a string": (
        "classifier",
        "patterns is 'classifier'; it must be a list of names, one at least",
    ),
    "nothing": ([], "patterns is ..; it must be a list of names, one at least"),
}


@pytest.mark.parametrize("patterns, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_changes_nothing(patterns, message):
    model = make("bert")
    with pytest.raises(ValueError, match=message):
        pyfast.select(model, patterns)
    assert all(p.requires_grad for p in model.parameters())


def test_what_can_not_train_is_not_chosen():
    model = pyfast.quantize(make("llama"))
    with pytest.raises(
        ValueError,
        match="patterns take in model.layers.1.self_attn.q_proj.weight, which is 4-bit and",
    ):
        pyfast.select(model, ["layers.1.*"])
    model = nn.Linear(4, 4)
    model.steps = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(
        ValueError, match="patterns take in steps, which is torch.int32 and cannot train"
    ):
        pyfast.select(model, ["*"])


def test_a_model_with_adapters_has_no_selection(tmp_path):
    pyfast.save_adapter(pyfast.select(net(), ["3"]), tmp_path)
    model = pyfast.add_lora(net(), pyfast.LoRAConfig(targets=["3"]))
    for change in (
        lambda: pyfast.select(model, ["3"]),
        lambda: pyfast.load_adapter(model, tmp_path),
    ):
        with pytest.raises(
            ValueError, match="model has adapters, .'default'.; remove_adapter or merge"
        ):
            change()
    assert len(trainable(model)) == 2


# --- files ---


def saved(directory):
    model = pyfast.select(net().eval(), ["2", "3.bias"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 0.1)
    pyfast.save_adapter(model, directory)
    return model, json.loads((directory / "adapter_config.json").read_text())


def assert_refused(directory, message):
    model = net().eval()
    with pytest.raises(pyfast.CheckpointError, match=message):
        pyfast.load_adapter(model, directory)
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(
        model(X), net().eval()(X)
    )


def test_a_file_says_all(tmp_path):
    model, fields = saved(tmp_path)
    assert fields == {
        "peft_type": "PYFAST_SELECTION",
        "patterns": ["2", "3.bias"],
        "base_model_name_or_path": None,
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"{P}{name}" for name in ("2.0.weight", "2.0.bias", "3.bias")}
    loaded = pyfast.load_adapter(net().eval(), tmp_path, trainable=False)
    assert torch.equal(loaded(X), model(X)) and not trainable(loaded)
    for call in (
        lambda: pyfast.load_adapter(net(), tmp_path, "mine"),
        lambda: pyfast.save_adapter(model, "x", "mine"),
    ):
        with pytest.raises(ValueError, match="name is 'mine', but a selection has none"):
            call()
    with pytest.raises(KeyError, match="PYFAST_SELECTION"):
        PeftConfig.from_pretrained(tmp_path)


FIELDS = {
    "no patterns": (
        {"patterns": []},
        "does not fit this model: patterns is ..; it must be a list of names",
    ),
    "a number": (
        {"patterns": 3},
        "does not fit this model: patterns is 3; it must be a list of names",
    ),
    "another layer": (
        {"patterns": ["7"]},
        "does not fit this model: patterns hold .'7'., which match no parameter",
    ),
    "more": ({"patterns": ["2", "3"]}, f"safetensors: {P}3.weight is missing"),
    "fewer": ({"patterns": ["2"]}, f"{P}3.bias has no place in this adapter's configuration"),
    "unknown": (
        {"scale": 2},
        "adapter_config.json: scale is 2; it has no meaning in a PYFAST_SELECTION",
    ),
}


@pytest.mark.parametrize("changes, message", FIELDS.values(), ids=FIELDS)
def test_fields_that_are_refused(tmp_path, changes, message):
    _, fields = saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | changes))
    assert_refused(tmp_path, message)


def test_tensors_that_are_refused(tmp_path):
    saved(tmp_path)
    path, name = tmp_path / "adapter_model.safetensors", f"{P}2.0.weight"
    tensors = load_file(path)
    for tensor, message in (
        (tensors[name][:3], r"has shape \[3, 6\]; it must be \[6, 6\]"),
        (tensors[name] * math.nan, "holds NaN"),
    ):
        save_file({**tensors, name: tensor.contiguous()}, path)
        assert_refused(tmp_path, f"{name} {message}")
    path.write_bytes(path.read_bytes()[:-2])
    assert_refused(tmp_path, "is cut short")
