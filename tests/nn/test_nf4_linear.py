"""NF4Linear: construction, moves, copies, checkpoints of its own and of bitsandbytes."""

import copy
import io
import json
import math
import pickle

import bitsandbytes as bnb
import pytest
import torch
from helpers.tiny_pretrained import bnb_layer, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import pyfast
from pyfast.formats.bitsandbytes import read_bitsandbytes
from pyfast.formats.errors import CheckpointError


def layer_of(out=24, into=70, *, bias=True, dtype=torch.float32, **options):
    return pyfast.NF4Linear.from_linear(nn.Linear(into, out, bias=bias, dtype=dtype), **options)


def assert_same_layer(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key].cpu(), theirs[key].cpu()), key


# --- construction ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(device, bias, dtype):
    linear = nn.Linear(70, 24, bias=bias, dtype=dtype, device=device).eval()
    layer = pyfast.NF4Linear.from_linear(linear)
    assert layer.bias is linear.bias and not layer.training
    x = torch.randn(3, 70, dtype=dtype, device=device)
    w = pyfast.nf4_quantize(linear.weight)
    assert torch.equal(layer(x), pyfast.nf4_linear(x, w, linear.bias))
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == (["bias"] if bias else [])


def test_no_wide_copy_of_the_weight_stays():
    layer = layer_of(256, 256, bias=False, dtype=torch.bfloat16)
    assert sum(p.nbytes for p in layer.parameters()) == layer.nf4_weight.nbytes < 256 * 256 * 0.6
    assert not list(layer.buffers())


def test_from_weight_shares_it():
    w = pyfast.nf4_quantize(torch.randn(8, 64))
    layer = pyfast.NF4Linear.from_weight(w, torch.zeros(8))
    assert layer.weight.data_ptr() == w.packed.data_ptr() and isinstance(layer.bias, nn.Parameter)


def test_bias_keeps_its_dtype_and_takes_the_input_s():
    layer = layer_of()
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.bias.dtype == torch.float32


# --- moving and copying ---


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_scales_stay_float32(move, nested):
    layer = layer_of(nested=nested)
    before = pyfast.nf4_dequantize(layer.nf4_weight)
    moved = move(nn.Sequential(layer))[0]
    assert torch.equal(pyfast.nf4_dequantize(moved.nf4_weight), before)


def test_goes_to_a_device_and_back(device):
    layer = layer_of()
    moved = copy.deepcopy(layer).to(device)
    assert moved.nf4_weight.device.type == device.type
    assert_same_layer(moved.to("cpu"), layer)
    assert_same_layer(
        pyfast.NF4Linear.from_weight(layer.nf4_weight.to(device), layer.bias.detach()), layer
    )


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch_saved(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_apart(duplicate):
    layer = layer_of()
    twin = duplicate(layer)
    assert_same_layer(twin, layer)
    x = torch.randn(2, 70)
    assert torch.equal(twin(x), layer(x))
    twin.weight.zero_()
    assert layer.weight.any()


def torch_saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_weight_object_copies():
    w = pyfast.nf4_quantize(torch.randn(256, 512))
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert (
            torch.equal(pyfast.nf4_dequantize(twin), pyfast.nf4_dequantize(w))
            and twin.packed is not w.packed
        )
    assert "4.19 bits a value" in repr(w) and "[256, 512]" in repr(w)


# --- our own state_dict ---


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_loads_back_strictly(nested, quant_type):
    layer = layer_of(nested=nested, quant_type=quant_type)
    for other in (layer_of(nested=not nested), pyfast.NF4Linear(70, 24, blocksize=128)):
        other.load_state_dict(layer.state_dict(), strict=True)
        assert_same_layer(other, layer)
        assert (
            other.nested == nested
            and other.quant_type == quant_type
            and other.weight.data_ptr() != layer.weight.data_ptr()
        )


def test_loads_onto_meta_by_assignment():
    layer = layer_of()
    with torch.device("meta"):
        empty = nn.Sequential(pyfast.NF4Linear(70, 24))
    assert set(empty.state_dict()) == {"0." + key for key in layer.state_dict()}
    empty.load_state_dict(nn.Sequential(layer).state_dict(), assign=True)
    assert_same_layer(empty[0], layer)


def test_missing_and_unexpected_entries_are_torch_s():
    layer = layer_of()
    state = layer.state_dict()
    with pytest.raises(
        RuntimeError, match='Missing key.*"weight", "bias"|Missing key.*"bias", "weight"'
    ):
        layer.load_state_dict({})
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight.color"'):
        layer.load_state_dict({**state, "weight.color": torch.zeros(1)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        layer_of(bias=False).load_state_dict(state)
    assert set(layer.load_state_dict({}, strict=False).missing_keys) == {"weight", "bias"}


def test_loads_a_bias_alone_when_not_strict():
    layer, bias = layer_of(), torch.randn(24)
    result = layer.load_state_dict({"bias": bias}, strict=False)
    assert torch.equal(layer.bias, bias) and result.missing_keys == ["weight"]


def test_loading_keeps_sharing_children_and_hooks():
    layer, source = layer_of(), layer_of()
    twin = layer_of()
    twin.weight, twin.child = layer.weight, nn.Linear(3, 3)
    seen = []
    twin.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.append(sorted(state)))
    twin.load_state_dict(
        {**source.state_dict(), "child.weight": torch.zeros(3, 3), "child.bias": torch.zeros(3)}
    )
    assert twin.weight is layer.weight and torch.equal(layer.weight, source.weight)
    assert seen and not twin.child.weight.any()


def test_a_meta_layer_says_that_it_loads_nothing():
    layer = pyfast.NF4Linear(70, 24, device="meta")
    with pytest.warns(UserWarning, match="assign=True"):
        layer.load_state_dict(layer_of().state_dict())
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 24)


def test_strided_entries_load():
    state = layer_of().state_dict()
    strided = {k: torch.stack([v, v], -1)[..., 0] if v.dim() else v for k, v in state.items()}
    assert not strided["weight.absmax"].is_contiguous()
    layer = pyfast.NF4Linear(70, 24)
    layer.load_state_dict(strided, assign=True)
    layer(torch.randn(2, 70))


# --- bitsandbytes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_entries_are_bitsandbytes(nested, quant_type, dtype):
    theirs, linear = bnb_layer(nested=nested, quant_type=quant_type, dtype=dtype)
    ours = pyfast.NF4Linear.from_linear(linear, nested=nested, quant_type=quant_type)
    theirs_state, ours_state = theirs.state_dict(), ours.state_dict()
    assert set(ours_state) == set(theirs_state)
    for key, value in theirs_state.items():
        assert ours_state[key].dtype == value.dtype and ours_state[key].shape == value.shape, key
        assert ours_state[key].view(torch.uint8).equal(value.view(torch.uint8)), (
            key
        )  # the JSON, too, byte for byte


@pytest.mark.parametrize("nested", [True, False])
def test_loads_bitsandbytes_strictly_and_the_reverse(nested):
    theirs, _ = bnb_layer(nested=nested)
    ours = pyfast.NF4Linear(70, 24)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(5, 70)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)

    entries = {
        key.removeprefix("weight."): v
        for key, v in ours.state_dict().items()
        if key.startswith("weight.")
    }
    back = bnb.nn.Params4bit.from_prequantized(ours.weight, entries, device="cpu")
    assert torch.equal(
        bnb.functional.dequantize_4bit(back.data, back.quant_state),
        pyfast.nf4_dequantize(ours.nf4_weight),
    )


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_reads_bytes_stored_under_another_dtype(storage):
    layer = layer_of(32, 64)
    state = layer.state_dict()
    state["weight"] = state["weight"].view(-1).view(storage)[:, None]
    other = pyfast.NF4Linear(64, 32)
    other.load_state_dict(state)
    assert_same_layer(other, layer)


def with_layers(model, make):
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(linear))
    return model


@pytest.mark.parametrize("nested", [True, False])
def test_transformers_model_crosses_over_both_ways(tmp_path, nested):
    dense, ids = tiny_llama(), torch.arange(40).view(2, 20)
    dense.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu"
    )
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    theirs.save_pretrained(tmp_path / "theirs")
    logits = theirs(ids).logits

    def empty(linear):
        return pyfast.NF4Linear(linear.in_features, linear.out_features, linear.bias is not None)

    ours = with_layers(tiny_llama(), empty)
    ours.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"), strict=True)
    torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-4, atol=1e-5)

    quantized = with_layers(
        tiny_llama(), lambda linear: pyfast.NF4Linear.from_linear(linear, nested=nested)
    )
    (tmp_path / "ours").mkdir()
    save_file(
        {k: v.contiguous() for k, v in quantized.state_dict().items()},
        tmp_path / "ours" / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "ours" / "config.json").write_text(
        (tmp_path / "theirs" / "config.json").read_text()
    )
    back = LlamaForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert isinstance(back.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    torch.testing.assert_close(back(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-5)


# --- damaged checkpoints ---


def damaged(**changes):
    """Return a state dict with changed fields in the JSON entry; None removes a field."""
    state = layer_of().state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(state[key].tolist())) | changes
    text = json.dumps({k: v for k, v in fields.items() if v is not None}).encode()
    return {**state, key: torch.tensor(list(text), dtype=torch.uint8)}


def without(key):
    return {k: v for k, v in layer_of().state_dict().items() if k != key}


def altered(key, change):
    state = layer_of().state_dict()
    return {**state, key: change(state[key].clone())}


JSON = "weight.quant_state.bitsandbytes__nf4"
DAMAGE = {
    "no absmax": (lambda: without("weight.absmax"), "weight.absmax is missing"),
    "no map": (lambda: without("weight.quant_map"), "weight.quant_map is missing"),
    "no nested absmax": (
        lambda: without("weight.nested_absmax"),
        "weight.nested_absmax is missing",
    ),
    "no JSON": (lambda: without(JSON), "is this a 4-bit checkpoint"),
    "truncated weight": (
        lambda: altered("weight", lambda t: t[:-3]),
        "weight holds 837 bytes; shape .24, 70. needs 840",
    ),
    "truncated absmax": (lambda: altered("weight.absmax", lambda t: t[:-1]), "absmax has shape"),
    "absmax of another dtype": (
        lambda: altered("weight.absmax", lambda t: t.float()),
        "absmax is torch.float32",
    ),
    "NaN scale": (
        lambda: altered("weight.nested_absmax", lambda t: t * math.nan),
        "nested_absmax holds NaN",
    ),
    "cut JSON": (lambda: altered(JSON, lambda t: t[:-4]), "is not JSON"),
    "JSON not text": (lambda: altered(JSON, lambda t: t | 0x80), "is not JSON"),
    "JSON a list": (
        lambda: altered(JSON, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "holds list",
    ),
    "JSON of floats": (lambda: altered(JSON, lambda t: t.float()), "must be JSON"),
    "huge JSON": (lambda: altered(JSON, lambda t: t.repeat(1000)), "at most 65536 bytes"),
    "absurd shape": (lambda: damaged(shape=[2**40, 2**40]), "needs"),
    "negative shape": (lambda: damaged(shape=[-24, -70]), "shape is"),
    "shape of strings": (lambda: damaged(shape="24x70"), "shape is"),
    "other shape": (lambda: damaged(shape=[70, 24]), "this layer's is .24, 70."),
    "block size 63": (lambda: damaged(blocksize=63), "blocksize is 63"),
    "block size true": (lambda: damaged(blocksize=True), "blocksize is True"),
    "other block size": (lambda: damaged(blocksize=128), "absmax has shape"),
    "dtype int8": (lambda: damaged(dtype="int8"), "dtype is 'int8'"),
    "type fp4": (lambda: damaged(quant_type="fp4"), "quant_type is 'fp4'"),
    "nested block size": (lambda: damaged(nested_blocksize=128), "nested_blocksize is 128"),
    "no offset": (lambda: damaged(nested_offset=None), "lacks 'nested_offset'"),
    "infinite offset": (lambda: damaged(nested_offset=math.inf), "nested_offset is inf"),
    "offset true": (lambda: damaged(nested_offset=True), "nested_offset is True"),
    "offset of 400 digits": (lambda: damaged(nested_offset=10**400), "nested_offset is"),
    "deep JSON": (
        lambda: altered(JSON, lambda t: torch.full((60000,), ord("["), dtype=torch.uint8)),
        "is not JSON",
    ),
    "a thousand dimensions": (lambda: damaged(shape=[2**47] * 1000), "shape is"),
    "scalar weight": (lambda: altered("weight", lambda t: t[0, 0]), "weight holds 1 bytes"),
    "sparse absmax": (
        lambda: altered("weight.absmax", lambda t: t.to_sparse()),
        "must hold values",
    ),
    "absmax on meta": (
        lambda: altered("weight.absmax", lambda t: t.to("meta")),
        "on meta; it must hold values",
    ),
    "unknown field": (lambda: damaged(rotation=3), "unknown fields .'rotation'."),
    "bias of another shape": (
        lambda: {**layer_of().state_dict(), "bias": torch.zeros(3)},
        "bias has shape .3.",
    ),
}


@pytest.mark.parametrize("make, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_is_refused_whole(make, message):
    layer = layer_of()
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(make())
    assert_same_layer(layer, before)


def test_reading_names_the_entry():
    with pytest.raises(CheckpointError, match="model.up.weight.absmax is missing"):
        entries = {f"model.up.{k}": v for k, v in without("weight.absmax").items()}
        read_bitsandbytes(entries, "model.up.weight")
    with pytest.raises(CheckpointError, match="is a str"):
        read_bitsandbytes({**layer_of().state_dict(), "weight.absmax": "zzz"}, "weight")
    with pytest.raises(RuntimeError, match="is this a 4-bit checkpoint"):
        layer_of().load_state_dict(nn.Linear(70, 24).state_dict())
