"""patch: PEFT's interface works as before, and patch and unpatch report what they change."""

import copy
import io
import json
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.peft_models import (
    LORA_OPTIONS,
    assert_close,
    assert_same_step,
    make_peft_model,
    patched_copy,
    perturb,
)
from helpers.tiny_pretrained import IDS, load_with_bitsandbytes, output, tiny_gpt2, tiny_llama
from helpers.tolerance import relative_error
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn

import pyfast
from pyfast import hf
from pyfast._support import notices

# --- PEFT's interface ---


def test_peft_s_interface_works_as_before(tmp_path):
    peft_model = make_peft_model(tiny_llama(), r=4)
    patched = patched_copy(peft_model)
    for model in (peft_model, patched):
        torch.manual_seed(4)
        model.add_adapter("b", LoraConfig(r=6, target_modules="all-linear", use_dora=True))
    layers = [m for m in patched.modules() if isinstance(m, LoraLayer)]
    assert all(
        type(m).forward is not LoraLinear.forward and isinstance(m, LoraLinear) for m in layers
    )

    def same(**options):
        assert_close(patched(IDS, **options).logits, peft_model(IDS, **options).logits)
        return patched(IDS, **options).logits.detach()

    first = same()
    with patched.disable_adapter(), peft_model.disable_adapter():
        base = same()
    assert (first - base).abs().max() > 0.01
    for model in (patched, peft_model):
        model.set_adapter("b")
        torch.manual_seed(5)
        perturb(model)
    second = same()
    assert (second - first).abs().max() > 0.01
    patched.merge_adapter(), peft_model.merge_adapter()
    assert_close(same(), second)
    patched.unmerge_adapter(), peft_model.unmerge_adapter()
    same()
    for model in (patched, peft_model):
        model.save_pretrained(tmp_path / ("patched" if model is patched else "peft_model"))
        model.set_adapter("default")
    for name in ("b", "."):
        files = [tmp_path / who / name for who in ("patched", "peft_model")]
        a, b = (load_file(file / "adapter_model.safetensors") for file in files)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        a, b = (json.loads((file / "adapter_config.json").read_text()) for file in files)
        a["target_modules"], b["target_modules"] = (
            set(a["target_modules"]),
            set(b["target_modules"]),
        )
        assert a == b
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "patched")
    hf.patch(again)
    assert_close(output(again), first)
    patched.delete_adapter("b"), peft_model.delete_adapter("b")
    assert_close(same(), first)
    assert_close(patched.merge_and_unload()(IDS).logits, peft_model.merge_and_unload()(IDS).logits)
    assert not any(isinstance(m, LoraLayer) for m in patched.modules())


def test_copies_and_pickles_are_patched_and_apart():
    patched = patched_copy(make_peft_model(tiny_llama()))
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    for other in (copy.deepcopy(patched), torch.load(file, weights_only=False)):
        assert torch.equal(output(other), output(patched)) and repr(other) == repr(patched)
        perturb(other)
        assert not torch.equal(output(other), output(patched))
        assert hf.unpatch(other) == 14


def test_several_adapters_and_mixed_batches_run_as_peft_s():
    peft_model = make_peft_model(tiny_llama(), r=4)
    peft_model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    patched = patched_copy(perturb(peft_model)).eval()
    peft_model.eval()
    notices._warned.clear()
    options = {"adapter_names": ["b", "__base__"]}
    with pytest.warns(
        UserWarning, match="a LoRA layer runs as PEFT has it.*: it is called with adapter_names"
    ) as said:
        assert_close(patched(IDS, **options).logits, peft_model(IDS, **options).logits)
    assert len([w for w in said if "as PEFT has it" in str(w.message)]) == 1
    for model in (patched, peft_model):
        model.base_model.set_adapter(["default", "b"])
    with pytest.warns(UserWarning, match="2 adapters are active at once"):
        assert_close(output(patched), output(peft_model))


def odd_dropout(layer):
    layer.lora_dropout["default"] = nn.Sequential(nn.Identity())


def hooked(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_B["default"])


def other_base(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [odd_dropout, hooked, hooked_base, parametrized, other_base])
def test_changed_layers_run_as_peft_s(change):
    peft_model = make_peft_model(tiny_llama(), target_modules=["v_proj"])
    for module in list(peft_model.modules()):
        if isinstance(module, LoraLayer):
            change(module)
    patched = copy.copy(peft_model)
    expected = output(peft_model).detach()
    hf.patch(patched)
    assert torch.equal(output(patched), expected)


def test_hot_swapped_adapters_run_as_peft_s():
    peft_model = make_peft_model(tiny_llama(), target_modules=["q_proj"], r=4)
    prepare_model_for_compiled_hotswap(peft_model, target_rank=8)
    patched = patched_copy(peft_model)
    notices._warned.clear()
    with pytest.warns(UserWarning, match="its scaling is a Tensor"):
        assert torch.equal(output(patched), output(peft_model))


def test_patched_before_there_are_adapters(tmp_path):
    base = load_with_bitsandbytes(tiny_llama, tmp_path)
    before = patched_copy(base)
    assert_close(output(before), output(base))
    for variant in ("lora", "dora"):
        peft_model = make_peft_model(
            copy.deepcopy(base), **LORA_OPTIONS[variant], task_type="CAUSAL_LM"
        )
        patched = get_peft_model(copy.deepcopy(before), peft_model.peft_config["default"])
        set_peft_model_state_dict(patched, get_peft_model_state_dict(peft_model))
        assert_same_step(patched, peft_model)
        assert hf.patch(patched) == (14, 0, {})
        assert_same_step(patched, peft_model)


def test_other_variants_run_as_peft_s():
    options = {
        "alora_invocation_tokens": [3, 4],
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    peft_model = make_peft_model(tiny_llama(), **options)
    patched = patched_copy(peft_model)
    notices._warned.clear()
    with pytest.warns(UserWarning, match="its variant is ALoraLinearVariant"):
        layer, x = patched.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 64)
        y = layer(x)
    assert torch.equal(y, peft_model.base_model.model.model.layers[0].self_attn.q_proj(x))


# --- patch itself ---


def test_patch_says_what_it_patched():
    model = make_peft_model(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (2, 0)
    assert summary.left == {"base_model.model.model.embed_tokens": "it is a Embedding"}
    assert str(summary) == (
        "2 LoRA layers and 0 other Linear4bit layers run on pyfast; 1 are left as they are, "
        "base_model.model.model.embed_tokens because it is a Embedding"
    )
    assert hf.patch(model) == summary  # again: nothing new


def test_new_layers_of_a_second_adapter_come_with_the_next_call():
    model = make_peft_model(tiny_llama(), target_modules=["q_proj"])
    assert hf.patch(model).lora == 2
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert hf.patch(model).lora == 4


def test_unpatch_undoes_it(tmp_path):
    model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path),
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    classes, y = [type(m) for m in model.modules()], output(model)
    text = repr(model)
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (2, 12) and repr(model) == text
    assert hf.unpatch(model) == 16  # the bases under the LoRA layers, too
    assert [type(m) for m in model.modules()] == classes and torch.equal(output(model), y)
    with pytest.raises(ValueError, match="model has no patched layer"):
        hf.unpatch(model)


def test_a_conv1d_is_not_copied_at_every_call(tmp_path):
    peft_model = make_peft_model(tiny_gpt2())
    patched = copy.deepcopy(peft_model)
    notices._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pyfast")
        hf.patch(patched)
        output(patched)
    for parameter, expected in zip(patched.parameters(), peft_model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    hf.unpatch(patched)
    assert all(p.is_contiguous() for p in patched.parameters())
    hf.patch(patched)
    patched.merge_and_unload().save_pretrained(tmp_path / "patched")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "peft_model")
    a, b = (load_file(tmp_path / who / "model.safetensors") for who in ("patched", "peft_model"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_to_patch_is_an_error():
    with pytest.raises(ValueError, match="no LoRA layer of PEFT's and no Linear4bit"):
        hf.patch(tiny_llama())
    embedding = make_peft_model(tiny_llama(), target_modules=["embed_tokens"])
    with pytest.raises(
        ValueError, match="to patch; of base_model.model.model.embed_tokens, it is a Embedding"
    ):
        hf.patch(embedding)
    with pytest.raises(TypeError, match="model must be a Module, not str"):
        hf.patch("model")
    other = get_peft_model(tiny_llama(), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it is a SVDLinear"):
        hf.patch(other)


def test_weights_that_bitsandbytes_repacked_are_unpacked(tmp_path):
    """bitsandbytes' eval repacks on a CPU with AVX512-BF16; this test repacks on every CPU."""
    model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path),
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    expected, keys = output(model).detach(), model.state_dict().keys()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
                weight.data, weight.quant_state
            )
    notices._warned.clear()
    with pytest.warns(UserWarning, match="rounded the weights' scales to 16 bits"):
        hf.patch(model)
    assert 0 < relative_error(output(model), expected) < 0.01
    assert model.state_dict().keys() == keys
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert relative_error(output(model.eval()), output(model.train())) == 0


def test_hooks_of_accelerate_call_the_new_forward():
    peft_model = make_peft_model(tiny_llama())
    patched = copy.deepcopy(peft_model)
    for module in patched.modules():
        if isinstance(module, LoraLayer):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    hf.patch(patched)
    layer = patched.base_model.model.model.layers[0].mlp.up_proj
    assert layer._old_forward.__func__ is type(layer).forward is not LoraLinear.forward
    assert_same_step(patched, peft_model)


def test_peft_s_linear4bit_has_a_replacement():
    assert pyfast.hf.peft_lora_4bit.REPLACEMENTS.keys() == {Linear4bit}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merging_into_4_bits_works_as_peft_s(tmp_path, variant):
    options = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | LORA_OPTIONS[
        variant
    ]
    peft_model = make_peft_model(load_with_bitsandbytes(tiny_llama, tmp_path), **options)
    patched = patched_copy(peft_model)
    before = output(patched).detach()
    for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        patched, peft_model = (getattr(model, change)() or model for model in (patched, peft_model))
        assert_close(output(patched), output(peft_model))
        assert 0 < relative_error(output(patched), before) < 1
    layer = patched.model.layers[0].self_attn.q_proj
    assert type(layer) is pyfast.hf.bitsandbytes_layers.Linear4bit and not isinstance(
        layer, LoraLayer
    )
    assert hf.unpatch(patched) == 14
    assert_close(output(patched), output(peft_model))


def test_norms_of_dora_follow_changes_of_the_weight(tmp_path):
    """The norms are kept as long as the weight does not change."""
    peft_model = make_peft_model(
        load_with_bitsandbytes(tiny_llama, tmp_path), use_dora=True, task_type="CAUSAL_LM"
    )
    patched = patched_copy(peft_model)
    assert_same_step(patched, peft_model)
    for model in (patched, peft_model):
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.weight.copy_(module.weight.flip(0))
    assert_same_step(patched, peft_model)
    assert_same_step(copy.deepcopy(patched), peft_model)
