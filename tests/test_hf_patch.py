"""patch: PEFT's models on pyfast's kernels give PEFT's results, and everything else of theirs goes on."""

import copy
import io
import json
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import relative_error
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, LoraLayer
from safetensors.torch import load_file
from test_lora_peft import IDS, output, quantised_there, tiny_bert, tiny_gpt2, tiny_llama
from test_nf4_module import bnb_layer
from torch import nn

import pyfast
from pyfast import _library, hf

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "heads": {"modules_to_save": ["lm_head", "classifier"], "target_modules": r".*(q_proj|query|c_attn|value)"},
}
MODELS = [tiny_llama, tiny_bert, tiny_gpt2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def adapted(base, **options):
    return shaken(get_peft_model(base, LoraConfig(**{"target_modules": "all-linear", **options})))


def patched(model):
    """A patched copy."""
    model = copy.deepcopy(model)
    hf.patch(model)
    return model


def step(model):
    model.zero_grad()
    y = output(model)
    y.float().pow(2).mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs, tolerance=1e-5):
    (y, grads), (their_y, their_grads) = step(ours), step(theirs)
    assert y.dtype == their_y.dtype and relative_error(y, their_y) < tolerance
    assert grads.keys() == their_grads.keys() and grads
    floor = 1e-3 * max(g.norm() for g in their_grads.values())  # a bias of the keys has none, but for rounding
    for name, expected in their_grads.items():
        assert (grads[name] - expected).norm() < 10 * tolerance * max(expected.norm(), floor), name


@pytest.fixture
def no_warning():
    """Nothing runs as PEFT has it."""
    _library._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pyfast: a L")
        yield


# --- values and gradients ---


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_dense(make, options, no_warning):
    theirs = adapted(make(), **options)
    assert_same_step(patched(theirs), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ["float32", "same"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_16_bits(dora, adapter, dtype, no_warning):
    exact = adapted(tiny_llama().double(), use_dora=dora)
    theirs = copy.deepcopy(exact).to(dtype)
    if adapter == "float32":
        for name, p in theirs.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    ours = patched(theirs)
    y, grads = step(ours)
    their_y, their_grads = step(theirs)
    exact_y, exact_grads = step(exact)
    assert y.dtype == their_y.dtype == dtype
    assert relative_error(y, exact_y) < 1.5 * relative_error(their_y, exact_y)
    worst, their_worst = (max(relative_error(g[k], exact_grads[k]) for k in exact_grads) for g in (grads, their_grads))
    assert worst < 1.5 * their_worst


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["lora", "dora", "lora_bias"])
def test_4_bits(tmp_path, kind, nested, make, no_warning):
    base = quantised_there(make, tmp_path, bnb_4bit_use_double_quant=nested)
    theirs = adapted(base, **KINDS[kind], task_type="CAUSAL_LM" if make is tiny_llama else "SEQ_CLS")
    ours = patched(theirs)
    assert_same_step(ours, theirs)
    before = theirs.state_dict()
    assert ours.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_fp4_and_bf16_storage(tmp_path, no_warning):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16}
    config = hf_config(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    base = type(tiny_llama()).from_pretrained(tmp_path, quantization_config=config, device_map="cpu").train()
    theirs = adapted(base, task_type="CAUSAL_LM")
    assert_same_step(patched(theirs), theirs, 0.02)


def hf_config(**options):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, **options)


@pytest.mark.parametrize("bits", [4, 32])
def test_autocast(tmp_path, bits, no_warning):
    theirs = adapted(quantised_there(tiny_llama, tmp_path) if bits == 4 else tiny_llama(), task_type="CAUSAL_LM")
    ours = patched(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(ours, theirs, 0.02)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_a_linear4bit_by_itself(compute, quant_type, nested):
    layer, _ = bnb_layer(64, 128, nested=nested, quant_type=quant_type)
    layer.compute_dtype, layer.compute_type_is_set = compute, compute is not None
    model = nn.Sequential(layer)
    x, dy = torch.randn(7, 128), torch.randn(7, 64)
    expected, dx = (t.detach() for t in value_and_gradient(model, x, dy))
    packed = layer.weight.data_ptr()
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (0, 1) and isinstance(model[0], bnb.nn.Linear4bit)
    y, our_dx = value_and_gradient(model, x, dy)
    tolerance = 0.02 if compute else 1e-5
    assert y.dtype == torch.float32 and relative_error(y, expected) < tolerance > relative_error(our_dx, dx)
    with torch.no_grad():
        assert relative_error(model.eval()(x), expected) < tolerance
    assert layer.weight.data_ptr() == packed  # bitsandbytes' eval would have repacked it
    w = pyfast.hf_bitsandbytes.nf4_weight_of(layer)
    assert w.packed.data_ptr() == packed and w.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()


def value_and_gradient(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y, x.grad


def test_training_is_the_same(tmp_path):
    theirs = adapted(quantised_there(tiny_llama, tmp_path), task_type="CAUSAL_LM")
    ours = patched(theirs)
    assert_close(*(losses(model.train()) for model in (ours, theirs)))


def losses(model, steps=5):
    optimiser, found = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0] - 0.1
    return torch.tensor(found)


def assert_close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def test_dropout_is_in_training_only_and_right_on_average():
    theirs = adapted(tiny_llama(), lora_dropout=0.4, target_modules=["lm_head"])
    ours = patched(theirs)
    assert_close(output(ours.eval()), output(theirs.eval()))
    layer = ours.train().base_model.model.lm_head
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        many, expected = layer(x.expand(20000, -1)), layer.eval()(x)[0]
    assert many.std(0).min() > 0.001
    assert relative_error(many.mean(0), expected) < 0.05


def test_gradient_checkpointing():
    theirs = adapted(tiny_llama(), lora_dropout=0.2)
    ours = patched(theirs).train()
    torch.manual_seed(1)
    expected = step(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    y, grads = step(ours)
    assert torch.equal(y, expected[0]) and all(torch.equal(grads[k], expected[1][k]) for k in grads)


def test_compiles_without_breaks():
    theirs = adapted(tiny_bert(), use_dora=True)
    layer = patched(theirs).base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


# --- PEFT's interface ---


def test_the_api_goes_on(tmp_path):
    theirs = adapted(tiny_llama(), r=4)
    ours = patched(theirs)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("b", LoraConfig(r=6, target_modules="all-linear", use_dora=True))
    layers = [m for m in ours.modules() if isinstance(m, LoraLayer)]
    assert all(type(m).forward is not LoraLinear.forward and isinstance(m, LoraLinear) for m in layers)

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
        a["target_modules"], b["target_modules"] = set(a["target_modules"]), set(b["target_modules"])
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
    _library._warned.clear()
    options = {"adapter_names": ["b", "__base__"]}
    with pytest.warns(UserWarning, match="a LoRA layer runs as PEFT has it.*: it is called with adapter_names") as said:
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


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_B["default"])


def other_base(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [odd_dropout, hooked, hooked_base, parametrised, other_base])
def test_what_is_changed_is_run_as_it_is(change):
    theirs = adapted(tiny_llama(), target_modules=["v_proj"])
    for module in list(theirs.modules()):
        if isinstance(module, LoraLayer):
            change(module)
    ours = copy.copy(theirs)
    expected = output(theirs).detach()
    hf.patch(ours)
    assert torch.equal(output(ours), expected)


def test_other_variants_are_peft_s():
    options = {"alora_invocation_tokens": [3, 4], "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    theirs = adapted(tiny_llama(), **options)
    ours = patched(theirs)
    _library._warned.clear()
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
    model = adapted(quantised_there(tiny_llama, tmp_path), target_modules=["q_proj"], task_type="CAUSAL_LM")
    classes, y = [type(m) for m in model.modules()], output(model)
    summary = hf.patch(model)
    assert (summary.lora, summary.linear4bit) == (2, 12)
    assert hf.unpatch(model) == 16  # the bases under the LoRA layers, too
    assert [type(m) for m in model.modules()] == classes and torch.equal(output(model), y)
    with pytest.raises(ValueError, match="model has no patched layer"):
        hf.unpatch(model)


def test_nothing_to_patch_is_an_error():
    with pytest.raises(ValueError, match="no LoRA layer of PEFT's and no Linear4bit"):
        hf.patch(tiny_llama())
    embedding = adapted(tiny_llama(), target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="to patch; of base_model.model.model.embed_tokens, it is a Embedding"):
        hf.patch(embedding)
    with pytest.raises(TypeError, match="model must be a Module, not str"):
        hf.patch("model")
    other = get_peft_model(tiny_llama(), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it is a SVDLinear"):
        hf.patch(other)


def test_what_bitsandbytes_repacked_is_unpacked(tmp_path):
    """Its eval on a CPU with AVX512-BF16; the packing is made here whatever the CPU."""
    model = adapted(quantised_there(tiny_llama, tmp_path), target_modules=["q_proj"], task_type="CAUSAL_LM")
    expected, keys = output(model).detach(), model.state_dict().keys()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    _library._warned.clear()
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
    assert pyfast.hf_lora_4bit.FAST.keys() == {Linear4bit}
