"""patch: a patched model has the values, gradients and training of PEFT's model."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from helpers.peft_models import (
    LORA_OPTIONS,
    assert_close,
    assert_same_step,
    make_peft_model,
    patched_copy,
    step,
)
from helpers.tiny_pretrained import (
    IDS,
    bnb_layer,
    load_with_bitsandbytes,
    output,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from helpers.tolerance import relative_error
from torch import nn

import pyfast
from pyfast import hf
from pyfast._support import notices

MODELS = [tiny_llama, tiny_bert, tiny_gpt2]


@pytest.fixture
def no_warning():
    """Turn the notice that a layer runs as PEFT's into an error."""
    notices._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pyfast: a L")
        yield


# --- values and gradients ---


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS)
@pytest.mark.parametrize("make", MODELS)
def test_dense_layers_compute_as_peft_s(make, options, no_warning):
    peft_model = make_peft_model(make(), **options)
    assert_same_step(patched_copy(peft_model), peft_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ["float32", "same"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_16_bit_layers_are_as_exact_as_peft_s(dora, adapter, dtype, no_warning):
    exact = make_peft_model(tiny_llama().double(), use_dora=dora)
    peft_model = copy.deepcopy(exact).to(dtype)
    if adapter == "float32":
        for name, p in peft_model.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    patched = patched_copy(peft_model)
    y, grads = step(patched)
    peft_y, peft_grads = step(peft_model)
    exact_y, exact_grads = step(exact)
    assert y.dtype == peft_y.dtype == dtype
    assert relative_error(y, exact_y) < 1.5 * relative_error(peft_y, exact_y)
    worst, peft_worst = (
        max(relative_error(g[k], exact_grads[k]) for k in exact_grads) for g in (grads, peft_grads)
    )
    assert worst < 1.5 * peft_worst


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
def test_4_bit_layers_compute_as_peft_s(tmp_path, variant, nested, make, no_warning):
    base = load_with_bitsandbytes(make, tmp_path, bnb_4bit_use_double_quant=nested)
    peft_model = make_peft_model(
        base, **LORA_OPTIONS[variant], task_type="CAUSAL_LM" if make is tiny_llama else "SEQ_CLS"
    )
    patched = patched_copy(peft_model)
    assert_same_step(patched, peft_model)
    before = peft_model.state_dict()
    assert patched.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in patched.state_dict().items())


def test_fp4_in_bf16_storage_computes_as_peft_s(tmp_path, no_warning):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16}
    config = hf_config(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    base = (
        type(tiny_llama())
        .from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        .train()
    )
    peft_model = make_peft_model(base, task_type="CAUSAL_LM")
    assert_same_step(patched_copy(peft_model), peft_model, 0.02)


def hf_config(**options):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, **options)


@pytest.mark.parametrize("bits", [4, 32])
def test_autocast_computes_as_peft_s(tmp_path, bits, no_warning):
    peft_model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path) if bits == 4 else tiny_llama(),
        task_type="CAUSAL_LM",
    )
    patched = patched_copy(peft_model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(patched, peft_model, 0.02)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_a_linear4bit_by_itself_computes_as_bitsandbytes_s(compute, quant_type, nested):
    layer, _ = bnb_layer(64, 128, nested=nested, quant_type=quant_type)
    layer.compute_dtype, layer.compute_type_is_set = compute, compute is not None
    model = nn.Sequential(layer)
    x, dy = torch.randn(7, 128), torch.randn(7, 64)
    expected, dx = (t.detach() for t in value_and_gradient(model, x, dy))
    packed = layer.weight.data_ptr()
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (0, 1) and isinstance(model[0], bnb.nn.Linear4bit)
    y, pyfast_dx = value_and_gradient(model, x, dy)
    tolerance = 0.02 if compute else 1e-5
    assert y.dtype == torch.float32 and relative_error(y, expected) < tolerance > relative_error(
        pyfast_dx, dx
    )
    with torch.no_grad():
        assert relative_error(model.eval()(x), expected) < tolerance
    assert layer.weight.data_ptr() == packed  # bitsandbytes' eval would have repacked it
    w = pyfast.hf.bitsandbytes_layers.nf4_weight_of(layer)
    assert (
        w.packed.data_ptr() == packed
        and w.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    )


def value_and_gradient(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y, x.grad


def test_training_is_the_same(tmp_path):
    peft_model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path), task_type="CAUSAL_LM"
    )
    patched = patched_copy(peft_model)
    assert_close(*(losses(model.train()) for model in (patched, peft_model)))


def losses(model, steps=5):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, values = torch.optim.AdamW(trainable, lr=1e-3), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.1
    return torch.tensor(values)


def test_dropout_is_in_training_only_and_right_on_average():
    peft_model = make_peft_model(tiny_llama(), lora_dropout=0.4, target_modules=["lm_head"])
    patched = patched_copy(peft_model)
    assert_close(output(patched.eval()), output(peft_model.eval()))
    layer = patched.train().base_model.model.lm_head
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        many, expected = layer(x.expand(20000, -1)), layer.eval()(x)[0]
    assert many.std(0).min() > 0.001
    assert relative_error(many.mean(0), expected) < 0.05


def test_gradient_checkpointing_changes_nothing():
    peft_model = make_peft_model(tiny_llama(), lora_dropout=0.2)
    patched = patched_copy(peft_model).train()
    torch.manual_seed(1)
    expected = step(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    y, grads = step(patched)
    assert torch.equal(y, expected[0]) and all(torch.equal(grads[k], expected[1][k]) for k in grads)


@pytest.mark.parametrize("bits", [4, 32])
def test_compiles_without_breaks(tmp_path, bits):
    peft_model = make_peft_model(
        load_with_bitsandbytes(tiny_bert, tmp_path) if bits == 4 else tiny_bert(), use_dora=True
    )
    layer = patched_copy(peft_model).base_model.model.bert.encoder.layer[0].attention.self.query
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    eager_results = value_and_gradient(layer, x, dy)
    for result, expected in zip(value_and_gradient(compiled, x, dy), eager_results):
        assert_close(result, expected)
