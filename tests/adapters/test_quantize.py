"""Quantizing a model's layers: which ones, one at a time, and what is refused."""

import io
import sys
import weakref

import pytest
import torch
from helpers.tiny_models import MODELS, logits, make, train
from torch import nn

import pyfast
from pyfast._support import notices
from pyfast._support.progress import Progress
from pyfast.adapters import quantization
from pyfast.adapters.model_state import lora_layers

WO = {
    f"{half}.DenseReluDense.wo"
    for i in (0, 1)
    for half in (f"encoder.block.{i}.layer.1", f"decoder.block.{i}.layer.2")
}
DENSE = {  # linear layers that stay so
    **{model_name: {"lm_head"} for model_name in ("llama", "mistral", "qwen2", "gpt2")},
    **{model_name: {"classifier"} for model_name in ("bert", "vit")},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "t5": {"lm_head", *WO},  # which transformers keeps in float32
}


def net():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(12, 12),
        nn.LayerNorm(12),
        nn.Sequential(nn.Linear(12, 64), nn.ReLU()),
        nn.Linear(64, 3),
    )


def linears(model):
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }


def in_4_bits(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, pyfast.NF4Linear)}


@pytest.mark.parametrize("model_name", MODELS)
def test_every_layer_but_the_head(model_name):
    model, before = make(model_name), linears(make(model_name))
    biases = {n: m.bias for n, m in linears(model).items()}
    assert pyfast.quantize(model) is model
    assert (
        linears(model).keys() == DENSE[model_name]
        and in_4_bits(model).keys() == before.keys() - DENSE[model_name]
    )
    dense = make(model_name)
    for name, layer in in_4_bits(model).items():
        weight = before[name].weight.t() if model_name == "gpt2" else before[name].weight
        expected = pyfast.nf4_dequantize(pyfast.nf4_quantize(weight))
        assert (
            torch.equal(pyfast.nf4_dequantize(layer.nf4_weight), expected)
            and layer.bias is biases[name]
        )
        with torch.no_grad():
            original = dense.get_submodule(name)
            original.weight.copy_(expected.t() if model_name == "gpt2" else expected)
    torch.testing.assert_close(
        logits(model, model_name), logits(dense, model_name), rtol=1e-4, atol=1e-5
    )
    if model_name in ("qwen2", "gpt2", "t5"):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("model_name", ["gpt2", "t5", "roberta"])
def test_lora_over_it(model_name, tmp_path):
    config = pyfast.LoRAConfig(
        r=4, modules_to_save=["classifier"] if model_name == "roberta" else []
    )
    model = pyfast.add_lora(pyfast.quantize(make(model_name)), config)
    assert all(
        (n in WO) != isinstance(layer.base, pyfast.NF4Linear)
        for n, layer in lora_layers(model).items()
    )
    losses = train(model, model_name)
    assert losses[-1] < losses[0] - 0.01
    pyfast.save_adapter(model, tmp_path)
    assert torch.equal(
        logits(pyfast.load_adapter(pyfast.quantize(make(model_name)), tmp_path), model_name),
        logits(model, model_name),
    )


def test_a_state_dict_loads_into_another_model():
    model, other = pyfast.quantize(make("llama")), pyfast.quantize(make("llama", seed=4))
    assert not torch.equal(logits(model, "llama"), logits(other, "llama"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))


def test_options():
    model = pyfast.quantize(net(), blocksize=128, nested=False, quant_type="fp4")
    for layer in in_4_bits(model).values():
        assert (layer.blocksize, layer.nested, layer.quant_type) == (128, False, "fp4")
    assert len(in_4_bits(model)) == 3
    assert in_4_bits(pyfast.quantize(net(), skip=["2"])).keys() == {"0", "3"}
    assert in_4_bits(pyfast.quantize(net(), targets=["0", "3"])).keys() == {"0", "2.0", "3"}
    assert in_4_bits(pyfast.quantize(net(), targets=r"2\.0|3", skip=())).keys() == {"2.0", "3"}
    model = make("llama")
    assert in_4_bits(pyfast.quantize(model, targets=["lm_head"], skip=[])).keys() == {"lm_head"}
    assert len(in_4_bits(pyfast.quantize(model))) == 15  # the rest, and what was done stays


def test_training_goes_on_where_it_was():
    model = net().train()
    model[0].eval()
    pyfast.quantize(model)
    assert [module.training for module in model] == [False, True, True, True]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.bias", "1.weight", "1.bias", "2.0.bias", "3.bias"
    }  # fmt: skip


def test_a_layer_in_two_places():
    model = net()
    model.append(model[2])
    pyfast.quantize(model)
    assert isinstance(model[2][0], pyfast.NF4Linear) and model[4] is model[2]
    model = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList()])
    model[1].append(model[0])
    pyfast.quantize(model)
    assert isinstance(model[0], pyfast.NF4Linear) and model[1][0] is model[0]


def test_shared_weights_stay_shared():
    model = net()
    model.append(nn.Linear(12, 12))
    model[4].weight = model[0].weight
    notices._warned.clear()
    with pytest.warns(
        UserWarning, match="0, 4: not quantized, since the weight is another module's, too"
    ):
        pyfast.quantize(model)
    assert model[4].weight is model[0].weight and in_4_bits(model).keys() == {"2.0", "3"}
    with pytest.raises(
        ValueError, match="4 shares its weight with another module; it must be in skip"
    ):
        pyfast.quantize(model, targets=["4"])


def test_an_encoder_of_torch_s():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    x = torch.randn(2, 5, 8)
    model = pyfast.quantize(encoder)
    assert {n.split(".")[-1] for n in in_4_bits(model)} == {"linear1", "linear2"}
    slow = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)


def test_one_dense_layer_at_a_time(monkeypatch):
    model, left, original = net(), [], quantization.nf4_quantize
    dense = [weakref.ref(m) for m in linears(model).values()]

    def counting(weight, **options):
        left.append(sum(ref() is not None for ref in dense))
        return original(weight, **options)

    monkeypatch.setattr(quantization, "nf4_quantize", counting)
    pyfast.quantize(model)
    assert left == [3, 2, 1] and not any(ref() for ref in dense)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = net()
    pyfast.quantize(model)
    model.load_state_dict(pyfast.quantize(net()).state_dict(), assign=True)
    x = torch.randn(2, 12)
    assert torch.equal(model(x), pyfast.quantize(net())(x))


# --- what is refused ---


def hooked(model):
    model[3].register_forward_hook(lambda *args: None)
    return model


def with_nan(model):
    model[3].weight.data[1, 2] = float("nan")
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


MISTAKES = {
    "blocksize": (net, {"blocksize": 48}, ValueError, "blocksize is 48; it must be"),
    "quant_type": (net, {"quant_type": "int4"}, ValueError, "quant_type is 'int4'; it must be"),
    "nested": (net, {"nested": 1}, TypeError, "nested must be a bool, not int"),
    "no such layer": (
        net,
        {"targets": ["q_proj"]},
        ValueError,
        r"targets \['q_proj'\] match no layer",
    ),
    "not linear": (
        net,
        {"targets": ["0", "1"]},
        TypeError,
        "1 is a LayerNorm; it must be a plain nn.Linear",
    ),
    "targets": (
        net,
        {"targets": 3},
        ValueError,
        "targets is 3; it must be 'all-linear', a regex or a list",
    ),
    "no regex": (
        net,
        {"targets": "("},
        ValueError,
        "targets holds '.'; it must be a regular expression",
    ),
    "skip": (net, {"skip": "3"}, ValueError, "skip is '3'; it must be a list of names"),
    "a slip in skip": (
        net,
        {"skip": ["head"]},
        ValueError,
        "skip holds 'head', which matches no module",
    ),
    "all skipped": (
        net,
        {"skip": ["0", "2", "3"]},
        ValueError,
        "match no layer that is not to be skipped",
    ),
    "NaN": (
        lambda: with_nan(net()),
        {},
        ValueError,
        "3: its weight holds NaN or infinite values; it must be finite",
    ),
    "hooks": (
        lambda: hooked(net()),
        {},
        ValueError,
        r"3 has \['_forward_hooks'\], which would be lost",
    ),
    "float64": (
        lambda: net().double(),
        {},
        TypeError,
        "0: its weight is torch.float64; it must be a parameter in",
    ),
    "a layer of the user's": (
        lambda: net().append(Scaled(3, 3)),
        {},
        TypeError,
        "4 is a Scaled; it must be a plain",
    ),
    "a parametrized weight": (
        lambda: net().append(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
        {},
        TypeError,
        "4: its weight is computed from others; it must be a parameter",
    ),
    "adapters": (
        lambda: pyfast.add_lora(net()),
        {},
        ValueError,
        "model has adapters, .'default'.; quantize comes before them",
    ),
    "no model": (lambda: {}, {}, TypeError, "model must be a Module, not dict"),
}


@pytest.mark.parametrize("make_one, options, error, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_changes_nothing(make_one, options, error, message):
    model = make_one()
    with pytest.raises(error, match=message):
        pyfast.quantize(model, **options)
    assert not model or not in_4_bits(model)


# --- the bar ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    pyfast.quantize(net())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr("pyfast._support.progress._PAUSE", 0)
    with Progress("train", 4) as bar:
        for loss in ("loss 2.25", "loss 1", "", "loss 0.5"):
            bar.step(loss)
    drawn = sys.stderr.getvalue().split("\r")
    assert drawn[0] == "" and drawn[1] == "train [######..................] 1/4 0 s loss 2.25"
    assert drawn[2] == "train [############............] 2/4 0 s loss 1   "
    assert drawn[-1] == "train [########################] 4/4 0 s loss 0.5\n"


def test_a_bar_is_not_drawn_more_often_than_one_can_see(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress("work", 1000) as bar:
        for _ in range(1000):
            bar.step()
    assert sys.stderr.getvalue().count("\r") < 50
