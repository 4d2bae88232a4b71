"""The same layers, values and gradients as PEFT's, and files that both read."""

import copy
import json

import pytest
import torch
from helpers.tiny_pretrained import load_with_bitsandbytes, output, tiny_bert, tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import pyfast
from pyfast.adapters.installation import adapter_tensors
from pyfast.adapters.model_state import lora_layers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(20, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 20, bias=False),
        )
        blocks = [nn.ModuleDict({"q": nn.Linear(20, 20), "v": nn.Linear(20, 20)}) for _ in range(3)]
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        for block in self.body["blocks"]:
            x = x + torch.tanh(block["q"](x)) * block["v"](x)
        return self.head(self.down(self.norm(self.up(x)).relu()))


def trained(model, steps=3):
    """Train a few steps with Adam, so that no parameter is zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        output(model).pow(2).sum().backward()
        optimizer.step()
    return model.eval()


LAYERS = ["up", "down", "q", "v"]
CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "use_dora": True},
    "rank pattern": {
        "rank_pattern": {"up": 2, r"blocks\.[01]\.q": 7},
        "alpha_pattern": {"q": 3, "^up": 9},
        "use_rslora": True,
    },
    "regex": {"target_modules": r"body\.blocks\.[12]\.(q|v)"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["down"]},
    "exclude by regex": {"exclude_modules": r"body\.blocks\.0.*"},
    "layers": {"target_modules": ["q"], "layers_to_transform": [0, 2]},
    "layers by pattern": {
        "target_modules": ["q", "v"],
        "layers_to_transform": 1,
        "layers_pattern": "blocks",
    },
    "modules to save": {"modules_to_save": ["head", "norm"]},
    "modules to save, all biases": {"modules_to_save": ["head"], "bias": "all", "use_dora": True},
}


def peft_net(**options):
    net = Net()
    model = get_peft_model(
        copy.deepcopy(net),
        LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS, **options}),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return net, model


def value_and_gradient(model, x, weights):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_values_and_all_gradients(tmp_path, options):
    net, peft_model = peft_net(**options)
    peft_model.save_pretrained(tmp_path)
    pyfast_model = pyfast.load_adapter(net, tmp_path)
    x, weights = torch.randn(6, 20), torch.randn(6, 5)
    y, dx = value_and_gradient(pyfast_model, x, weights)
    peft_y, peft_dx = value_and_gradient(peft_model, x, weights)
    torch.testing.assert_close(y, peft_y, **CLOSE)
    torch.testing.assert_close(dx, peft_dx, **CLOSE)
    grads, peft_grads = (
        {k: p.grad for k, p in ps.items()}
        for ps in (adapter_tensors(pyfast_model, "default"), peft_tensors(peft_model))
    )
    assert grads.keys() == peft_grads.keys()
    assert len(grads) == sum(p.grad is not None for p in pyfast_model.parameters())
    for key in grads:
        torch.testing.assert_close(grads[key], peft_grads[key], **CLOSE)


def peft_tensors(model):
    """Return PEFT's trained parameters, keyed as in its files."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            key = key.replace(
                "lora_magnitude_vector.default.weight", "lora_magnitude_vector"
            ).replace(".default", "")
            tensors[key] = p
    return tensors


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_saved_here_read_there(tmp_path, options):
    net, peft_model = peft_net(**options)
    peft_model.save_pretrained(tmp_path / "peft")
    pyfast_model, x = pyfast.load_adapter(copy.deepcopy(net), tmp_path / "peft"), torch.randn(6, 20)
    pyfast.save_adapter(pyfast_model, tmp_path / "pyfast")
    back = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "pyfast")
    torch.testing.assert_close(back(x), pyfast_model(x), **CLOSE)
    again = pyfast.load_adapter(copy.deepcopy(net), tmp_path / "pyfast")
    assert torch.equal(again(x), pyfast_model(x))
    with torch.no_grad():
        pyfast.set_adapter(pyfast_model, None)
        assert torch.equal(pyfast_model(x), net(x))


PYFAST_OPTIONS = {
    "all-linear": {},
    "dora": {"dora": True, "rslora": True},
    "lora_bias": {"lora_bias": True, "bias": "lora_only"},
    "patterns": {"rank_pattern": {"q_proj|query": 4}, "alpha_pattern": {"q_proj|query": 4}},
    "regex": {"targets": r".*(v_proj|value)"},
    "pissa": {"init": "pissa", "rank_pattern": {"v_proj|value|classifier": 2}},
    "pissa, rslora, dora": {
        "init": "pissa",
        "rslora": True,
        "dora": True,
        "rank_pattern": {"classifier": 2},
    },
}


@pytest.mark.parametrize("options", PYFAST_OPTIONS.values(), ids=PYFAST_OPTIONS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
def test_trained_here_read_there(tmp_path, make, options):
    if "rank_pattern" in options and make is tiny_gpt2:
        options = {**options, "rank_pattern": {"c_attn": 2}}
    if "alpha_pattern" in options and make is tiny_gpt2:
        options = {**options, "alpha_pattern": {"c_fc": 5}}
    if options.get("rank_pattern") == {"classifier": 2} and make is tiny_llama:
        options = {**options, "rank_pattern": {"v_proj": 2}}
    if "targets" in options and make is tiny_gpt2:
        options = {**options, "targets": r".*c_(attn|fc)"}
    pyfast_model = trained(pyfast.add_lora(make(), pyfast.LoRAConfig(r=8, alpha=16, **options)))
    pyfast.save_adapter(pyfast_model, tmp_path)
    peft_model = PeftModel.from_pretrained(make(), tmp_path)
    assert (output(pyfast_model) - output(make())).abs().max() > 0.01
    torch.testing.assert_close(output(peft_model), output(pyfast_model), **CLOSE)


PEFT_OPTIONS = {
    "lora": {},
    "dora": {"use_dora": True},
    "heads": {"task_type": "SEQ_CLS", "bias": "all"},
    "no start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
def test_trained_there_read_here(tmp_path, make, options):
    if make is not tiny_bert:
        options = {**options, "task_type": "CAUSAL_LM"}
    peft_model = trained(get_peft_model(make(), LoraConfig(target_modules="all-linear", **options)))
    peft_model.save_pretrained(tmp_path)
    pyfast_model = pyfast.load_adapter(make(), tmp_path)
    assert (output(pyfast_model) - output(make())).abs().max() > 0.01
    torch.testing.assert_close(output(pyfast_model), output(peft_model), **CLOSE)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_linear_is_the_same_layers(make, task):
    peft_model = get_peft_model(make(), LoraConfig(target_modules="all-linear", task_type=task))
    pyfast_model = pyfast.add_lora(make(), pyfast.LoRAConfig(task_type=task))
    names = set(lora_layers(pyfast_model))
    assert names == set(peft_model.base_model.targeted_module_names)


# --- 4 bits ---


def quantize_layers(make, **options):
    model = make()
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name not in ("lm_head", "classifier"):
            model.set_submodule(name, pyfast.NF4Linear.from_linear(linear, **options))
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_4_bit_base_both_ways(tmp_path, make, dora, nested):
    peft_model = load_with_bitsandbytes(make, tmp_path / "base", bnb_4bit_use_double_quant=nested)
    task = "SEQ_CLS" if make is tiny_bert else "CAUSAL_LM"
    config = LoraConfig(target_modules="all-linear", use_dora=dora, task_type=task)
    peft_model = trained(get_peft_model(peft_model, config)).train()
    peft_model.save_pretrained(tmp_path / "peft")
    pyfast_model = pyfast.load_adapter(quantize_layers(make, nested=nested), tmp_path / "peft")
    logits = output(pyfast_model)
    assert (logits - output(quantize_layers(make, nested=nested))).abs().max() > 0.01
    torch.testing.assert_close(logits, output(peft_model), **CLOSE)

    pyfast.save_adapter(trained(pyfast_model), tmp_path / "pyfast")
    base = load_with_bitsandbytes(make, tmp_path / "base", bnb_4bit_use_double_quant=nested)
    back = PeftModel.from_pretrained(base, tmp_path / "pyfast").train()
    assert (output(pyfast_model) - logits).abs().max() > 0.01
    torch.testing.assert_close(output(back), output(pyfast_model), **CLOSE)


# --- one batch, several adapters ---


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_mixed_batch_is_peft_s(tmp_path, make):
    names = ["b", None, "a", "b"]
    options = {
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS" if make is tiny_bert else "CAUSAL_LM",
    }
    peft_model = trained(get_peft_model(make(), LoraConfig(r=4, **options), adapter_name="a"))
    peft_model.add_adapter("b", LoraConfig(r=6, **options))
    peft_model.set_adapter("b")
    trained(peft_model)
    peft_model.save_pretrained(tmp_path)
    pyfast_model = make()
    for name in ("a", "b"):
        pyfast.load_adapter(pyfast_model, tmp_path / name, name=name)
    ids = torch.arange(80).view(4, 20)
    with torch.no_grad(), pyfast.mixed_batch(pyfast_model, names):
        mixed = pyfast_model(ids).logits
    expected = peft_model(ids, adapter_names=[name or "__base__" for name in names]).logits
    torch.testing.assert_close(mixed, expected, **CLOSE)
    for i, name in enumerate(names):
        pyfast.set_adapter(pyfast_model, name)
        torch.testing.assert_close(pyfast_model(ids[i : i + 1]).logits, mixed[i : i + 1], **CLOSE)


# --- the file itself ---


def test_the_configuration_reads_the_same_there(tmp_path):
    config = pyfast.LoRAConfig(
        r=4, alpha=6, targets=("q_proj",), exclude={"k_proj"}, dropout=0.1, rslora=True, rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"], layers_to_transform=(1,), task_type="CAUSAL_LM",
    )  # fmt: skip
    pyfast.save_adapter(pyfast.add_lora(tiny_llama(), config), tmp_path)
    peft_model = LoraConfig.from_pretrained(tmp_path)
    assert (
        peft_model.r,
        peft_model.lora_alpha,
        peft_model.lora_dropout,
        peft_model.use_rslora,
    ) == (
        4,
        6,
        0.1,
        True,
    )
    assert peft_model.rank_pattern == {"q_proj": 2} and peft_model.modules_to_save == ["lm_head"]
    assert peft_model.target_modules == {
        "model.layers.1.self_attn.q_proj"
    } and peft_model.exclude_modules == {"k_proj"}
    assert peft_model.task_type == "CAUSAL_LM" and peft_model.inference_mode
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) < set(LoraConfig().to_dict())


def test_names_are_as_short_as_they_can_be(tmp_path):
    def targets(**options):
        pyfast.save_adapter(pyfast.add_lora(Net(), pyfast.LoRAConfig(**options)), tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert targets(targets="all-linear") == ["down", "head", "q", "up", "v"]
    assert targets(targets=r"body\.blocks\.1\.(q|v)") == ["body.blocks.1.q", "body.blocks.1.v"]
