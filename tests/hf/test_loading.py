"""load_quantized: the weights, damaged files, and the memory that loading takes."""

import json
import os
import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from helpers.quantized_models import assert_same, quantize_layers
from helpers.tiny_pretrained import load_with_bitsandbytes, output, tiny_bert, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

import pyfast
from pyfast import hf
from pyfast._support import notices

MODELS = [tiny_llama, tiny_bert, tiny_gpt2]
SHARDED = {"one file": {}, "shards": {"max_shard_size": "60KB"}}


@pytest.mark.parametrize("save", SHARDED.values(), ids=SHARDED)
@pytest.mark.parametrize("make", MODELS)
def test_loaded_is_what_is_quantized_in_memory(tmp_path, make, save):
    make().save_pretrained(tmp_path, **save)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(save)
    model = hf.load_quantized(tmp_path, dtype=torch.float32)
    assert type(model) is type(make())
    assert_same(model, quantize_layers(make()))


def test_dtype_and_config_are_followed(tmp_path):
    make = tiny_llama
    make().save_pretrained(tmp_path)
    config = hf.NF4Config(
        blocksize=128, nested=False, quant_type="fp4", skip=["down_proj", "lm_head"]
    )
    model = hf.load_quantized(tmp_path, config=config)
    layer = model.model.layers[0].mlp
    assert type(layer.down_proj) is nn.Linear and layer.down_proj.weight.dtype == torch.bfloat16
    w = layer.up_proj.nf4_weight
    assert (w.blocksize, w.nested, w.quant_type, w.dtype) == (128, False, "fp4", torch.bfloat16)
    expected = make().bfloat16().model.layers[0].mlp.up_proj.weight
    expected = pyfast.nf4_quantize(expected, blocksize=128, nested=False, quant_type="fp4")
    assert all(map(torch.equal, w.state, expected.state))
    assert output(model).dtype == torch.bfloat16


def test_tied_weights_are_tied(tmp_path):
    config = tiny_llama().config
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = hf.load_quantized(tmp_path, config=hf.NF4Config(skip=[]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(isinstance(m, pyfast.NF4Linear) for m in model.modules()) == 14


def test_buffers_that_no_file_has_are_computed(tmp_path):
    make = tiny_llama
    make().save_pretrained(tmp_path)
    assert not any("inv_freq" in key for key in load_file(tmp_path / "model.safetensors"))
    inv_freq = hf.load_quantized(tmp_path).model.rotary_emb.inv_freq
    assert torch.equal(inv_freq, make().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_checkpoints_are_read_as_they_are(tmp_path, quant_type, nested, make):
    options = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": torch.bfloat16}
    bnb_model = load_with_bitsandbytes(
        make, tmp_path / "base", bnb_4bit_quant_type=quant_type, **options
    )
    bnb_model.save_pretrained(tmp_path / "4bit")
    loaded = hf.load_quantized(tmp_path / "4bit", dtype=torch.float32)
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, pyfast.NF4Linear)}
    assert len(layers) == {tiny_llama: 14, tiny_bert: 13, tiny_gpt2: 8}[make]
    for name, layer in layers.items():
        weight = bnb_model.get_submodule(name).weight
        assert torch.equal(layer.weight.view(-1), weight.data.view(torch.uint8).view(-1)), name
        values = bnb.dequantize_4bit(weight.data, weight.quant_state)
        assert layer.quant_type == quant_type and layer.nested == nested
        assert torch.equal(
            pyfast.nf4_dequantize(layer.nf4_weight, torch.float32), values.float()
        ), name
    if make is not tiny_gpt2:  # its dropout is on, there
        torch.testing.assert_close(output(loaded), output(bnb_model), rtol=1e-5, atol=1e-5)


def test_experts_in_one_tensor_stay_as_they_are(tmp_path):
    """transformers keeps a layer's experts in one tensor; the file has them one by one."""
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(3)
    plain = transformers.MixtralForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    assert any("experts.3." in key for key in load_file(tmp_path / "model.safetensors"))
    notices._warned.clear()
    with pytest.warns(
        UserWarning, match="model.layers.0.mlp.experts.gate_up_proj and 1 others .* not quantized"
    ):
        model = hf.load_quantized(tmp_path, dtype=torch.float32)
    assert_same(model, quantize_layers(plain))


def test_generation_config_and_options_are_followed(tmp_path, capfd):
    plain = tiny_llama()
    plain.generation_config.temperature, plain.generation_config.do_sample = 0.25, True
    plain.save_pretrained(tmp_path)
    capfd.readouterr()
    model = hf.load_quantized(tmp_path, attn_implementation="eager")
    assert model.generation_config.temperature == 0.25 and model.config.name_or_path == str(
        tmp_path
    )
    assert model.config._attn_implementation == "eager"
    assert capfd.readouterr().err == ""  # no bar but in a terminal


# --- heads ---


def test_a_head_that_is_not_in_the_files_is_new_if_not_strict(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(
        pyfast.CheckpointError, match="score.weight is missing; strict=False goes on without"
    ):
        hf.load_quantized(tmp_path, AutoModelForSequenceClassification)
    model = hf.load_quantized(tmp_path, AutoModelForSequenceClassification, strict=False)
    assert type(model.score) is nn.Linear and 0 < model.score.weight.std() < 0.1


# --- what is refused ---


def edited(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def config_of(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "no directory": (
        lambda d: os.rename(d, d.parent / "away"),
        "model.safetensors cannot be read: No such file",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "model.safetensors cannot be read: No such file",
    ),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        "config.json cannot be read: No such file",
    ),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json holds list; it must be an object",
    ),
    "no model type": (
        lambda d: (d / "config.json").write_text("{}"),
        "config.json: Unrecognized model",
    ),
    "cut short": (cut, "model.safetensors is cut short"),
    "missing": (lambda d: edited(d, lambda t: t.pop(Q)), f"{Q} is missing"),
    "unknown": (
        lambda d: edited(d, lambda t: t.update(wings=torch.ones(1))),
        "wings has no place in the model",
    ),
    "other size": (
        lambda d: edited(d, lambda t: t.update({Q: torch.ones(64, 32)})),
        rf"{Q}: it is of shape \[64, 32\]; the model's is \[64, 64\]",
    ),
    "other size, not quantized": (
        lambda d: edited(d, lambda t: t.update({"model.norm.weight": torch.ones(65)})),
        r"model.norm.weight has shape \[65\]; it must be \[64\]",
    ),
    "NaN": (lambda d: edited(d, lambda t: t[Q].fill_(float("nan"))), f"{Q}: weight .* NaN"),
    "NaN, not quantized": (
        lambda d: edited(d, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight holds NaN",
    ),
    "code of its own": (
        lambda d: config_of(d, model_type="wings", auto_map={"AutoConfig": "wings.Config"}),
        "config.json: .*contains custom code",
    ),
    "no such class": (
        lambda d: config_of(d, architectures=["Wings"]),
        "architectures is .*Wings.*model_class must say",
    ),
    "no class": (lambda d: config_of(d, architectures=None), "architectures is None"),
    "quantized by others": (
        lambda d: config_of(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized by 'gptq'; it must be by bitsandbytes, to 4 bits, or not at all",
    ),
    "8 bits": (
        lambda d: config_of(
            d, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
        "is quantized by 'bitsandbytes'; it must be by bitsandbytes, to 4 bits",
    ),
    "quantized, of which the file knows nothing": (
        lambda d: config_of(d, quantization_config={"quant_method": "pyfast_nf4", "blocksize": 7}),
        "config.json: quantization_config: blocksize is 7",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    damage(directory)
    with pytest.raises(pyfast.CheckpointError, match=message) as caught:
        hf.load_quantized(directory)
    assert "\n" not in str(caught.value)


SHARD_DAMAGE = {
    "no map": ({"weight_map": None}, "index.json has no weight_map of names and files"),
    "a lost shard": ({"weight_map": {"a": "lost.safetensors"}}, "lost.safetensors cannot be read"),
    "elsewhere": (
        {"weight_map": {"a": "../model.safetensors"}},
        "names '../model.safetensors'; it must be a file besid",
    ),
    "not in its shard": (
        {"weight_map": {"wings": "model-00001-of-00004.safetensors"}},
        "00004.safetensors: wings is missing, which the index has there",
    ),
}


@pytest.mark.parametrize("changes, message", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE)
def test_damaged_indices_are_refused(tmp_path, changes, message):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="120KB")
    assert (tmp_path / "model-00001-of-00004.safetensors").exists()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changes))
    with pytest.raises(pyfast.CheckpointError, match=message):
        hf.load_quantized(tmp_path)


QUANTIZED_DAMAGE = {
    "no scales": (lambda t: t.pop(f"{Q}.absmax"), f"{Q}: weight.absmax is missing"),
    "no description": (
        lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"),
        f"{Q}: weight.quant_state",
    ),
    "nothing but the bytes": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{Q}.")],
        f"{Q}: weight.quant_state",
    ),
    "short": (lambda t: t.update({Q: t[Q][:-1].clone()}), f"{Q}: weight holds 2047 bytes"),
}


@pytest.mark.parametrize("damage, message", QUANTIZED_DAMAGE.values(), ids=QUANTIZED_DAMAGE)
def test_damaged_4_bit_entries_are_refused(tmp_path, damage, message):
    tiny_llama().save_pretrained(tmp_path / "plain")
    hf.load_quantized(tmp_path / "plain").save_pretrained(tmp_path)
    edited(tmp_path, damage)
    with pytest.raises(pyfast.CheckpointError, match=message):
        hf.load_quantized(tmp_path)


def test_pickles_are_read_when_asked_for(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]
    config_of(tmp_path, architectures=["LlamaForCausalLM"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        pyfast.CheckpointError, match="has weights as pickles only; allow_pickle=True reads them"
    ):
        hf.load_quantized(tmp_path)
    loaded = hf.load_quantized(tmp_path, allow_pickle=True, dtype=torch.float32)
    assert_same(loaded, quantize_layers(tiny_llama()))
    torch.save({"model.norm.weight": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pyfast.CheckpointError, match="pytorch_model.bin is not a file of tensors"):
        hf.load_quantized(tmp_path, allow_pickle=True)
    assert not RunsCode.ran


class RunsCode:
    ran = False

    def __reduce__(self):
        return RunsCode.run, ()

    @staticmethod
    def run():
        RunsCode.ran = True


def test_wrong_arguments_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is torch.int8; it must be"):
        hf.load_quantized(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match="model_class is <class 'int'>; it must be a model's class"):
        hf.load_quantized(tmp_path, int)
    with pytest.raises(TypeError, match="config must be a NF4Config, not dict"):
        hf.load_quantized(tmp_path, config={})
    hf.load_quantized(tmp_path).save_pretrained(tmp_path / "4bit")
    with pytest.raises(ValueError, match="config is given, and .* is quantized already"):
        hf.load_quantized(tmp_path / "4bit", config=hf.NF4Config())


# --- memory ---

LIMITED = """
import resource, sys, torch, transformers
from pyfast import hf
def used(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) << 10
path, room = sys.argv[1], int(sys.argv[2])
hf.load_quantized(path + "/tiny"), transformers.AutoModelForCausalLM.from_pretrained(path + "/tiny")  # imports
most = used("VmData") + room
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
print(sum(p.nbytes for p in hf.load_quantized(path).parameters()), flush=True)
transformers.AutoModelForCausalLM.from_pretrained(path)
"""


def test_no_more_memory_than_the_packed_model_and_a_layer(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in LlamaForCausalLM(config).state_dict().items()}
    tensors = {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()}
    dense, largest = (
        sum(t.nbytes for t in tensors.values()),
        max(t.nbytes for t in tensors.values()),
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "tiny")
    packed = int(0.53 * dense / 2)
    room = packed + 2 * largest + (8 << 20)  # what allocators round up to
    assert room < 0.55 * dense
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    args = [sys.executable, "-c", LIMITED, str(tmp_path), str(room)]
    run = subprocess.run(args, capture_output=True, text=True, env=env)
    assert run.stdout and int(run.stdout) < packed, run.stderr[-2000:]
    assert (
        run.returncode and "memory" in run.stderr.splitlines()[-1].lower()
    )  # the dense model has no room
