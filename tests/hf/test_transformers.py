"""Interfaces of transformers: quantization "pyfast_nf4", attention "pyfast_lsh", Trainer."""

import subprocess
import sys

import peft
import pytest
import torch
from accelerate import cpu_offload
from helpers.peft_models import make_peft_model, patched_copy
from helpers.quantized_models import assert_same, quantize_layers
from helpers.tiny_pretrained import (
    IDS,
    load_with_bitsandbytes,
    output,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from helpers.tolerance import relative_error
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

import pyfast
from pyfast import hf
from pyfast.hf import attention

MODELS = [tiny_llama, tiny_bert, tiny_gpt2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# --- quantization ---


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_from_pretrained_and_save_pretrained_agree(tmp_path, nested, make):
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    config = hf.NF4Config(nested=nested)
    model = type(plain).from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    )
    expected = quantize_layers(make(), nested=nested)
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "4bit", max_shard_size="60KB")
    assert_same(type(plain).from_pretrained(tmp_path / "4bit", dtype=torch.float32), expected)
    assert_same(hf.load_quantized(tmp_path / "4bit", dtype=torch.float32), expected)
    dense = model.dequantize(torch.float32)
    assert not any(isinstance(m, pyfast.NF4Linear) for m in dense.modules())
    torch.testing.assert_close(output(dense), output(expected), **CLOSE)


def test_transformers_loads_saved_models_once_pyfast_hf_is_imported(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    hf.load_quantized(tmp_path / "plain").save_pretrained(tmp_path / "4bit")
    code = """
import sys, warnings
from transformers import AutoModelForCausalLM
import pyfast
assert "pyfast.hf" not in sys.modules
pyfast.hf
assert not {"peft", "bitsandbytes"} & set(sys.modules), "imported before they are needed"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(isinstance(m, pyfast.NF4Linear) for m in model.modules()))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "4bit")], capture_output=True, text=True
    )
    assert run.stdout.strip() == "14", run.stderr


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="blocksize is 7; it must be"):
        hf.NF4Config(blocksize=7)
    with pytest.raises(ValueError, match="quant_type is 'int4'"):
        hf.NF4Config(quant_type="int4")
    with pytest.raises(TypeError, match="skip is 'lm_head'; it must be a list of names"):
        hf.NF4Config(skip="lm_head")
    with pytest.raises(ValueError, match="quant_method is 'gptq'; it must be 'pyfast_nf4'"):
        hf.NF4Config(quant_method="gptq")
    with pytest.raises(TypeError, match="wings"):
        hf.NF4Config(wings=2)


# --- attention ---


def with_attention(model, name, **options):
    model.set_attn_implementation(name)
    model.config.pyfast_lsh = options
    return model


def padding(rows, n, *lengths):
    """Return a mask that is 1 at tokens; padding is left in even rows and right in odd ones."""
    mask = torch.ones(rows, n, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, : n - length] = i % 2
        mask[i, length:] = mask[i, length:] * (1 - i % 2)
    return mask


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_in_one_chunk_it_equals_the_model_s_own(make, padded):
    model, mask = make(), padding(2, 20, 15, 12) if padded else None
    if padded:
        assert mask[0].tolist() == [0] * 5 + [1] * 15 and mask[1].tolist() == [1] * 12 + [0] * 8
    results = {}
    for name in ("sdpa", "pyfast_lsh"):
        with_attention(model, name)
        model.zero_grad()
        logits = model(IDS, attention_mask=mask).logits
        if padded and logits.dim() == 3:
            logits = logits[mask.bool()]
        logits.pow(2).mean().backward()
        results[name] = [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    largest = max(g.norm() for g in results["sdpa"][1:])
    for exact, hashed in zip(results["sdpa"], results["pyfast_lsh"], strict=True):
        assert (hashed - exact).norm() < 1e-5 * max(exact.norm(), largest)


def long_llama(**options):
    torch.manual_seed(3)
    config = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**config | options)).eval()


def test_over_several_chunks_it_equals_lsh_attention(monkeypatch):
    model, ids, mask = long_llama(), torch.randint(64, (2, 200)), padding(2, 200, 150, 180)
    calls, merged = [], []

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return pyfast.lsh_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "lsh_attention", spy)
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: merged.append(args[0])
    )
    with torch.no_grad():
        with_attention(model, "pyfast_lsh", n_hashes=2, chunk_length=32, seed=5)(
            ids, attention_mask=mask
        )
    (((query, value), options),) = calls
    assert query.shape == (2, 4, 200, 16) and options["k"].shape == value.shape == (2, 2, 200, 16)
    assert torch.equal(options["key_padding_mask"], mask.bool()) and options["causal"]
    expected = pyfast.reference.lsh_attention(query, value, **options)
    torch.testing.assert_close(merged[0], expected.transpose(1, 2).flatten(2), **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_more_rounds_are_closer_to_the_exact(causal):
    if causal:
        model = long_llama()
    else:
        config = BertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        )
        config.num_attention_heads = 4
        torch.manual_seed(3)
        model = BertForMaskedLM(config).eval()
    ids = torch.randint(64, (1, 256))
    with torch.no_grad():
        exact = with_attention(model, "sdpa")(ids).logits
        options = {"chunk_length": 16}
        errors = [
            relative_error(
                with_attention(model, "pyfast_lsh", n_hashes=n, **options)(ids).logits, exact
            )
            for n in (1, 4, 32)
        ]
    assert errors[0] > 2 * errors[2] > 0 and errors[0] > errors[1] > errors[2]


def test_eval_is_the_same_every_time_and_training_is_not():
    model, ids = (
        with_attention(long_llama(), "pyfast_lsh", chunk_length=16),
        torch.randint(64, (1, 256)),
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_is_exact(padded, cache):
    model = tiny_llama()
    mask = padding(2, 20, 15) if padded else None
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options |= {
        "attention_mask": mask,
        "cache_implementation": cache,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = with_attention(model, "sdpa").generate(IDS, **options)
    generated = with_attention(model, "pyfast_lsh").generate(IDS, **options)
    assert torch.equal(generated.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(generated.logits), torch.stack(expected.logits), **CLOSE)


def test_a_prompt_in_pieces_is_exact_after_the_first():
    """Every piece attends to all tokens of the cache."""
    model, ids = long_llama(), torch.randint(64, (2, 96))
    logits = {}
    with torch.no_grad():
        for name in ("sdpa", "pyfast_lsh"):
            with_attention(model, name, chunk_length=64)
            first = model(ids[:, :40], use_cache=True)
            logits[name] = model(ids[:, 40:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(logits["pyfast_lsh"], logits["sdpa"], **CLOSE)


def test_other_masks_are_exact():
    sizes = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    short_window, long_window = (
        MistralConfig(**sizes, num_key_value_heads=2, sliding_window=window) for window in (7, 500)
    )
    ids = torch.randint(64, (2, 128))
    packed = torch.cat([torch.arange(50), torch.arange(78)])[None].expand(2, -1)
    four = torch.ones(128, 128, dtype=torch.bool).tril(-3) | torch.eye(128, dtype=torch.bool)
    for model, options in (
        (MistralForCausalLM(short_window).eval(), {}),
        (MistralForCausalLM(long_window).eval(), {}),
        (long_llama(), {"position_ids": packed, "use_cache": False}),
        (long_llama(), {"attention_mask": four[None, None].expand(2, 1, -1, -1)}),
    ):
        with torch.no_grad():
            expected = with_attention(model, "sdpa")(ids, **options).logits
            plain = model(ids).logits if options else None
            logits = with_attention(model, "pyfast_lsh", chunk_length=16, n_hashes=1)(
                ids, **options
            ).logits
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert plain is None or relative_error(plain, expected) > 0.01


def test_options_are_saved_and_checked(tmp_path):
    model = with_attention(long_llama(), "pyfast_lsh", n_hashes=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="pyfast_lsh")
    assert (
        again.config.pyfast_lsh == {"n_hashes": 2}
        and again.config._attn_implementation == "pyfast_lsh"
    )
    with_attention(model, "pyfast_lsh", hashes=2)
    with pytest.raises(
        ValueError, match="a key of config.pyfast_lsh is 'hashes'; it must be 'n_hashes'"
    ):
        model(IDS)
    model.config.pyfast_lsh = 4
    with pytest.raises(TypeError, match="config.pyfast_lsh must be a dict, not int"):
        model(IDS)
    query = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="softcap is set"):
        attention.attend(nn.Identity(), query, query, query, None, softcap=50.0)


def test_checkpointing_hashes_the_same_again():
    model, ids = (
        with_attention(long_llama(), "pyfast_lsh", chunk_length=16).train(),
        torch.randint(64, (1, 200)),
    )
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


# --- Trainer, and accelerate under it ---


def trained(model, directory):
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(20).expand(6, -1)]
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, use_cpu=True, seed=1,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    return losses


def test_trainer_trains_a_patched_model_as_peft_s(tmp_path):
    peft_model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path / "base"), task_type="CAUSAL_LM"
    )
    patched = patched_copy(peft_model)
    assert trained(patched, tmp_path) == pytest.approx(trained(peft_model, tmp_path), abs=1e-3)
    patched.save_pretrained(tmp_path / "adapter")
    base = load_with_bitsandbytes(tiny_llama, tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    torch.testing.assert_close(output(again), output(patched.train()), **CLOSE)


def test_trainer_trains_a_model_with_add_lora(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    model = hf.load_quantized(tmp_path / "plain", dtype=torch.float32)
    pyfast.add_lora(model, pyfast.LoRAConfig(r=4))
    trained(model, tmp_path)
    pyfast.save_adapter(model, tmp_path / "adapter")
    peft_model = peft.PeftModel.from_pretrained(
        load_with_bitsandbytes(tiny_llama, tmp_path / "base"), tmp_path / "adapter"
    )
    assert relative_error(output(model), output(peft_model)) < 0.3  # PEFT's base is not nested
    plain = pyfast.load_adapter(
        hf.load_quantized(tmp_path / "plain", dtype=torch.float32), tmp_path / "adapter"
    )
    assert torch.equal(output(plain.eval()), output(model.eval()))


def test_trainer_trains_a_model_with_lsh_attention(tmp_path):
    trained(
        with_attention(long_llama(vocab_size=128), "pyfast_lsh", chunk_length=16).train(), tmp_path
    )


@pytest.mark.parametrize("add", [pyfast.add_lora, pyfast.add_adapters])
def test_adapters_over_offloaded_weights_compute_the_same(add):
    """accelerate loads the weights when a layer is called; adapters stay on the device of x."""
    plain, offloaded = tiny_llama(), cpu_offload(tiny_llama(), execution_device="cpu")
    for model in (plain, offloaded):
        torch.manual_seed(1)
        add(model)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
    ids = torch.arange(12).reshape(2, 6)
    result, expected = (model(ids, labels=ids) for model in (offloaded, plain))
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    result.loss.backward()
    expected.loss.backward()
    for grad, expected_grad in zip(
        *([p.grad for p in m.parameters() if p.requires_grad] for m in (offloaded, plain))
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_changing_offloaded_weights_is_refused():
    model = cpu_offload(tiny_llama(), execution_device="cpu")
    with pytest.raises(
        ValueError, match="'pissa', which changes the base, and this one has .*_hf_hook"
    ):
        pyfast.add_lora(model, pyfast.LoRAConfig(init="pissa"))
    pyfast.add_lora(model)
    with pytest.raises(
        ValueError, match="the base's weight is offloaded, or has no values; it must be in memory"
    ):
        pyfast.merge(model)
