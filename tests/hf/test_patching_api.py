"""patch: PEFT's interface goes on, and what is patched and undone is said."""

import copy
import io
import json
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.peft_models import KINDS, adapted, assert_close, assert_same_step, patched, shaken
from helpers.tiny_pretrained import IDS, output, quantized_there, tiny_gpt2, tiny_llama
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


def test_the_api_goes_on(tmp_path):
    theirs = adapted(tiny_llama(), r=4)
    ours = patched(theirs)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("b", LoraConfig(r=6, target_modules="all-linear", use_dora=True))
    layers = [m for m in ours.modules() if isinstance(m, LoraLayer)]
    assert all(
        type(m).forward is not LoraLinear.forward and isinstance(m, LoraLinear) for m in layers
    )

    def same(**options):
        assert_close(ours(IDS, **options).logits, theirs(IDS, **options).logits)
        return ours(IDS, **options).logits.detach()

    first = same()
    with ours.disable_adapter(), theirs.disable_adapter():
        base = same()
    assert (first - base).abs().max() > 0.01
    for model in (ours, theirs):
        model.set_adapter("b")
        torch.manual_seed(5)
        shaken(model)
    second = same()
    assert (second - first).abs().max() > 0.01
    ours.merge_adapter(), theirs.merge_adapter()
    assert_close(same(), second)
    ours.unmerge_adapter(), theirs.unmerge_adapter()
    same()
    for model in (ours, theirs):
        model.save_pretrained(tmp_path / ("ours" if model is ours else "theirs"))
        model.set_adapter("default")
    for name in ("b", "."):
        files = [tmp_path / who / name for who in ("ours", "theirs")]
        a, b = (load_file(file / "adapter_model.safetensors") for file in files)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        a, b = (json.loads((file / "adapter_config.json").read_text()) for file in files)
        a["target_modules"], b["target_modules"] = (
            set(a["target_modules"]),
            set(b["target_modules"]),
        )
        assert a == b
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    hf.patch(again)
    assert_close(output(again), first)
    ours.delete_adapter("b"), theirs.delete_adapter("b")
    assert_close(same(), first)
    assert_close(ours.merge_and_unload()(IDS).logits, theirs.merge_and_unload()(IDS).logits)
    assert not any(isinstance(m, LoraLayer) for m in ours.modules())


def test_copies_and_pickles_are_patched_and_apart():
    ours = patched(adapted(tiny_llama()))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(output(other), output(ours)) and repr(other) == repr(ours)
        shaken(other)
        assert not torch.equal(output(other), output(ours))
        assert hf.unpatch(other) == 14


def test_several_adapters_and_mixed_batches_are_peft_s():
    theirs = adapted(tiny_llama(), r=4)
    theirs.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ours = patched(shaken(theirs)).eval()
    theirs.eval()
    notices._warned.clear()
    options = {"adapter_names": ["b", "__base__"]}
    with pytest.warns(
        UserWarning, match="a LoRA layer runs as PEFT has it.*: it is called with adapter_names"
    ) as said:
        assert_close(ours(IDS, **options).logits, theirs(IDS, **options).logits)
    assert len([w for w in said if "as PEFT has it" in str(w.message)]) == 1
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "b"])
    with pytest.warns(UserWarning, match="2 adapters are active at once"):
        assert_close(output(ours), output(theirs))


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
def test_what_is_changed_is_run_as_it_is(change):
    theirs = adapted(tiny_llama(), target_modules=["v_proj"])
    for module in list(theirs.modules()):
        if isinstance(module, LoraLayer):
            change(module)
    ours = copy.copy(theirs)
    expected = output(theirs).detach()
    hf.patch(ours)
    assert torch.equal(output(ours), expected)


def test_hot_swapping_is_peft_s():
    theirs = adapted(tiny_llama(), target_modules=["q_proj"], r=4)
    prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    ours = patched(theirs)
    notices._warned.clear()
    with pytest.warns(UserWarning, match="its scaling is a Tensor"):
        assert torch.equal(output(ours), output(theirs))


def test_patched_before_there_are_adapters(tmp_path):
    base = quantized_there(tiny_llama, tmp_path)
    before = patched(base)
    assert_close(output(before), output(base))
    for kind in ("lora", "dora"):
        theirs = adapted(copy.deepcopy(base), **KINDS[kind], task_type="CAUSAL_LM")
        ours = get_peft_model(copy.deepcopy(before), theirs.peft_config["default"])
        set_peft_model_state_dict(ours, get_peft_model_state_dict(theirs))
        assert_same_step(ours, theirs)
        assert hf.patch(ours) == (14, 0, {})
        assert_same_step(ours, theirs)


def test_other_variants_are_peft_s():
    options = {
        "alora_invocation_tokens": [3, 4],
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    theirs = adapted(tiny_llama(), **options)
    ours = patched(theirs)
    notices._warned.clear()
    with pytest.warns(UserWarning, match="its variant is ALoraLinearVariant"):
        layer, x = ours.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 64)
        y = layer(x)
    assert torch.equal(y, theirs.base_model.model.model.layers[0].self_attn.q_proj(x))


# --- patch itself ---


def test_what_is_patched_is_said():
    model = adapted(tiny_llama(), target_modules=["q_proj", "embed_tokens"])
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (2, 0)
    assert summary.left == {"base_model.model.model.embed_tokens": "it is a Embedding"}
    assert str(summary) == (
        "2 LoRA layers and 0 other Linear4bit layers run on pyfast; 1 are left as they are, "
        "base_model.model.model.embed_tokens because it is a Embedding"
    )
    assert hf.patch(model) == summary  # again: nothing new


def test_new_layers_of_a_second_adapter_come_with_the_next_call():
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    assert hf.patch(model).lora == 2
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert hf.patch(model).lora == 4


def test_unpatch_undoes_it(tmp_path):
    model = adapted(
        quantized_there(tiny_llama, tmp_path), target_modules=["q_proj"], task_type="CAUSAL_LM"
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
    theirs = adapted(tiny_gpt2())
    ours = copy.deepcopy(theirs)
    notices._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pyfast")
        hf.patch(ours)
        output(ours)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)
    hf.unpatch(ours)
    assert all(p.is_contiguous() for p in ours.parameters())
    hf.patch(ours)
    ours.merge_and_unload().save_pretrained(tmp_path / "ours")
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_to_patch_is_an_error():
    with pytest.raises(ValueError, match="no LoRA layer of PEFT's and no Linear4bit"):
        hf.patch(tiny_llama())
    embedding = adapted(tiny_llama(), target_modules=["embed_tokens"])
    with pytest.raises(
        ValueError, match="to patch; of base_model.model.model.embed_tokens, it is a Embedding"
    ):
        hf.patch(embedding)
    with pytest.raises(TypeError, match="model must be a Module, not str"):
        hf.patch("model")
    other = get_peft_model(tiny_llama(), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it is a SVDLinear"):
        hf.patch(other)


def test_what_bitsandbytes_repacked_is_unpacked(tmp_path):
    """Its eval on a CPU with AVX512-BF16; the packing is made here whatever the CPU."""
    model = adapted(
        quantized_there(tiny_llama, tmp_path), target_modules=["q_proj"], task_type="CAUSAL_LM"
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


def test_accelerate_s_hooks_stay():
    theirs = adapted(tiny_llama())
    ours = copy.deepcopy(theirs)
    for module in ours.modules():
        if isinstance(module, LoraLayer):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    hf.patch(ours)
    layer = ours.base_model.model.model.layers[0].mlp.up_proj
    assert layer._old_forward.__func__ is type(layer).forward is not LoraLinear.forward
    assert_same_step(ours, theirs)


def test_linear4bit_of_peft_is_known():
    assert pyfast.hf.peft_lora_4bit.REPLACEMENTS.keys() == {Linear4bit}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_into_4_bits_is_peft_s(tmp_path, kind):
    options = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | KINDS[kind]
    theirs = adapted(quantized_there(tiny_llama, tmp_path), **options)
    ours = patched(theirs)
    before = output(ours).detach()
    for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        ours, theirs = (getattr(model, change)() or model for model in (ours, theirs))
        assert_close(output(ours), output(theirs))
        assert 0 < relative_error(output(ours), before) < 1
    layer = ours.model.layers[0].self_attn.q_proj
    assert type(layer) is pyfast.hf.bitsandbytes_layers.Linear4bit and not isinstance(
        layer, LoraLayer
    )
    assert hf.unpatch(ours) == 14
    assert_close(output(ours), output(theirs))


def test_norms_of_dora_are_those_of_the_weight_there_is(tmp_path):
    """They are kept as long as the weight is the same."""
    theirs = adapted(quantized_there(tiny_llama, tmp_path), use_dora=True, task_type="CAUSAL_LM")
    ours = patched(theirs)
    assert_same_step(ours, theirs)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.weight.copy_(module.weight.flip(0))
    assert_same_step(ours, theirs)
    assert_same_step(copy.deepcopy(ours), theirs)
