"""Adapter files that are damaged, unknown or do not fit are refused, and change no model."""

import json
import math
import random
import struct

import pytest
import torch
from helpers.lora_files import A_KEY, B_KEY, INPUT, PREFIX, assert_refused, net, saved
from safetensors.torch import save_file

import pyfast

# --- the configuration ---

FIELDS = {
    "another method": ({"peft_type": "IA3"}, "config.json: peft_type is 'IA3'; it must be 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type is None; it must be 'LORA'"),
    "rank 0": ({"r": 0}, "config.json: r is 0; it must be an integer, 1 or more"),
    "rank true": ({"r": True}, "r is True; it must be an integer"),
    "rank text": ({"r": "4"}, "r is '4'; it must be an integer"),
    "alpha NaN": (
        {"lora_alpha": math.nan},
        "config.json: lora_alpha is nan; it must be a finite number",
    ),
    "alpha infinite": ({"lora_alpha": -math.inf}, "lora_alpha is -inf; it must be a finite number"),
    "alpha of 400 digits": (
        {"lora_alpha": 10**400},
        "lora_alpha is 1000.*; it must be a finite number",
    ),
    "alpha pattern NaN": (
        {"alpha_pattern": {"0": math.nan}},
        "alpha_pattern is {'0': nan}; it must be a dict",
    ),
    "rank pattern": ({"rank_pattern": {"0": 2.5}}, "rank_pattern is {'0': 2.5}; it must be a dict"),
    "rank pattern a list": ({"rank_pattern": [1]}, "rank_pattern is .1.; it must be a dict"),
    "pattern no regex": (
        {"rank_pattern": {"(": 2}},
        "rank_pattern holds '.'; it must be a regular expression",
    ),
    "no targets": ({"target_modules": None}, "target_modules is missing; it must name the layers"),
    "targets a number": ({"target_modules": 3}, "target_modules is 3; it must be"),
    "bias": ({"bias": "some"}, "bias is 'some'; it must be 'none', 'all' or 'lora_only'"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout is 1.5; it must be a number from 0"),
    "use_dora": ({"use_dora": "yes"}, "use_dora is 'yes'; it must be True or False"),
    "DoRA and a bias": ({"use_dora": True, "lora_bias": True}, "lora_bias is True, and so is dora"),
    "fan_in_fan_out": (
        {"fan_in_fan_out": True},
        "fan_in_fan_out is True but no target is a Conv1D",
    ),
    "pissa": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', which changes the base",
    ),
    "pissa_niter_4": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights is 'pissa_niter_4', which",
    ),
    "olora": (
        {"init_lora_weights": "olora"},
        "init_lora_weights is 'olora', which changes the base",
    ),
    "loftq": (
        {"init_lora_weights": "loftq"},
        "init_lora_weights is 'loftq', which changes the base",
    ),
    "corda": (
        {"init_lora_weights": "corda"},
        "init_lora_weights is 'corda', which changes the base",
    ),
    "lora_ga": (
        {"init_lora_weights": "lora_ga"},
        "init_lora_weights is 'lora_ga', which changes the base",
    ),
    "mica": (
        {"init_lora_weights": "mica"},
        "init_lora_weights is 'mica', which changes the base or the training",
    ),
    "unknown": ({"use_wings": {"span": 2}}, "use_wings is {'span': 2}; it must be unset"),
    "no such layer": (
        {"target_modules": ["9"]},
        r"does not fit this model: targets \['9'\] match no layer",
    ),
    "not a linear layer": (
        {"target_modules": ["0", "1"]},
        "does not fit this model: target '1' is a LayerNorm",
    ),
    "other rank": (
        {"r": 5},
        rf"safetensors: {PREFIX}0.lora_A.weight has shape \[4, 12\]; it must be \[5, 12\]",
    ),
    "other rank by pattern": (
        {"rank_pattern": {"0": 2}},
        r"0.lora_A.weight has shape \[4, 12\]; it must be \[2, 12\]",
    ),
    "more targets": (
        {"target_modules": ["0", "2"], "modules_to_save": None},
        f"{PREFIX}2.lora_A.weight is missing",
    ),
    "DoRA without magnitudes": ({"use_dora": True}, f"{PREFIX}0.lora_magnitude_vector is missing"),
    "a bias that is not there": ({"lora_bias": True}, f"{PREFIX}0.lora_B.bias is missing"),
    "biases that are not there": ({"bias": "all"}, f"{PREFIX}0.base_layer.bias is missing"),
    "nothing saved beside": (
        {"modules_to_save": None},
        f"{PREFIX}2.bias has no place in this adapter's configuration",
    ),
}
CHANGES_THE_MATHS = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1.0},
    "arrow_config": {"top_k": 2},
    "alora_invocation_tokens": [1],
    "layer_replication": [[0, 2]],
    "megatron_config": {"hidden": 2},
    "trainable_token_indices": [1, 2],
    "target_parameters": ["0.weight"],
    "ensure_weight_tying": True,
}
for _name, _value in CHANGES_THE_MATHS.items():
    FIELDS[_name] = (
        {_name: _value},
        f"config.json: {_name} is .*; it must be unset: it changes what is computed",
    )


@pytest.mark.parametrize("changes, message", FIELDS.values(), ids=FIELDS)
def test_a_configuration_that_is_refused(tmp_path, changes, message):
    _, fields, _ = saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | changes))
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "adapter_config.json is not JSON"),
        (b'{"r": 4', "adapter_config.json is not JSON"),
        (b"[" * 100000, "adapter_config.json is not JSON"),
        (b"\xff\xfe", "adapter_config.json is not JSON"),
        (b"[]", "adapter_config.json holds list; it must be an object"),
    ],
    ids=["empty", "cut", "deep", "not text", "a list"],
)
def test_a_configuration_that_is_not_one(tmp_path, text, message):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"use_wings": None, "wings": [], "span": False},
        {"inference_mode": False, "revision": "main", "peft_version": "9.9"},
    ],
    ids=str,
)
def test_a_configuration_that_changes_nothing_is_read(tmp_path, changes):
    model, fields, _ = saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | changes))
    assert torch.equal(pyfast.load_adapter(net(), tmp_path)(INPUT), model(INPUT))


def test_peft_s_defaults_are_filled_in(tmp_path):
    model, fields, _ = saved(tmp_path, r=8, alpha=8)
    few = {name: fields[name] for name in ("peft_type", "target_modules", "modules_to_save")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(few))
    assert torch.equal(pyfast.load_adapter(net(), tmp_path)(INPUT), model(INPUT))


# --- the tensors ---


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors.get(name))}


TENSORS = {
    "no A": (without(A_KEY), f"safetensors: {A_KEY} is missing"),
    "no B": (without(B_KEY), f"{B_KEY} is missing"),
    "no saved module": (without(f"{PREFIX}2.weight"), f"{PREFIX}2.weight is missing"),
    "A of another width": (
        changed(A_KEY, lambda t: t[:, :6]),
        rf"{A_KEY} has shape \[4, 6\]; it must be \[4, 12\]",
    ),
    "A of a convolution": (
        changed(A_KEY, lambda t: t[..., None]),
        rf"{A_KEY} has shape \[4, 12, 1\]; it must be \[4, 12\]",
    ),
    "B turned": (
        changed(B_KEY, lambda t: t.t()),
        rf"{B_KEY} has shape \[4, 8\]; it must be \[8, 4\]",
    ),
    "NaN": (changed(A_KEY, lambda t: t * math.nan), f"{A_KEY} holds NaN or infinite values"),
    "infinite": (changed(B_KEY, lambda t: t / 0), f"{B_KEY} holds NaN or infinite values"),
    "an embedding": (
        changed(f"{PREFIX}0.lora_embedding_A", lambda _: torch.ones(2)),
        "0.lora_embedding_A has no place",
    ),
    "a magnitude": (
        changed(f"{PREFIX}0.lora_magnitude_vector", lambda _: torch.ones(8)),
        "magnitude_vector has no place",
    ),
    "tokens": (
        changed(f"{PREFIX}0.token_adapter.delta", lambda _: torch.ones(2)),
        "0.token_adapter.delta has no place",
    ),
    "another layer": (
        changed(f"{PREFIX}7.lora_A.weight", lambda _: torch.ones(2)),
        "7.lora_A.weight has no place",
    ),
    "another prefix": (
        changed("0.lora_A.weight", lambda _: torch.ones(2)),
        f"must begin with {PREFIX}",
    ),
    "nothing": (lambda tensors: {}, f"{A_KEY} is missing"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
def test_tensors_that_are_refused(tmp_path, change, message, old):
    _, _, tensors = saved(tmp_path)
    tensors = {key: value.contiguous() for key, value in change(tensors).items()}
    if old:
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_refused(
        tmp_path, message.replace("safetensors: ", "adapter_model.bin: ") if old else message
    )


def rewritten(change):
    """Return a function that changes the header of a safetensors file."""

    def damage(raw):
        length = struct.unpack("<Q", raw[:8])[0]
        text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return damage


def entry(**fields):
    return rewritten(lambda header: {**header, A_KEY: {**header[A_KEY], **fields}})


BYTES = {
    "empty": (lambda raw: b"", "is cut short: 0 bytes"),
    "seven bytes": (lambda raw: raw[:7], "is cut short: 7 bytes"),
    "half a header": (lambda raw: raw[:50], "is cut short: 50 bytes, and its header claims"),
    "cut": (lambda raw: raw[:-1], "is cut short: .* ends at byte"),
    "longer": (lambda raw: raw + b"\0", "bytes of data; its tensors take"),
    "a huge header": (
        lambda raw: b"\xff" * 8 + raw[8:],
        "is cut short: .* claims 18446744073709551615",
    ),
    "no JSON": (lambda raw: raw[:8] + b"}" + raw[9:], "a header that is not JSON"),
    "a header of a list": (rewritten(lambda header: []), "a header of type list"),
    "no object": (rewritten(lambda header: {**header, A_KEY: 3}), f"{A_KEY} has dtype None"),
    "dtype": (entry(dtype="F31"), f"{A_KEY} has dtype 'F31'; it must be one of F64, F32"),
    "a list as dtype": (entry(dtype=["F32"]), f"{A_KEY} has dtype"),
    "shape": (
        entry(shape=[-4, -12]),
        rf"{A_KEY} has shape \[-4, -12\]; it must be a list of sizes",
    ),
    "shape of text": (entry(shape="4x12"), f"{A_KEY} has shape '4x12'"),
    "another size": (entry(shape=[4, 13]), rf"{A_KEY} has data_offsets .* takes 208 bytes"),
    "an endless shape": (entry(shape=[2**47] * 8), f"{A_KEY} has data_offsets .* takes"),
    "offsets turned": (
        entry(data_offsets=[192, 0]),
        f"{A_KEY} has data_offsets .192, 0.; F32 .4, 12. takes 192 bytes",
    ),
    "offsets of three": (entry(data_offsets=[0, 1, 192]), f"{A_KEY} has data_offsets"),
    "an overlap": (entry(data_offsets=[4, 196]), "begins at byte .*; it must begin at"),
    "outside": (
        entry(data_offsets=[10**6, 10**6 + 192]),
        f"is cut short: {A_KEY} ends at byte 1000192",
    ),
}


@pytest.mark.parametrize("damage, message", BYTES.values(), ids=BYTES)
def test_a_damaged_safetensors_file(tmp_path, damage, message):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(tmp_path, f"{path}.*{message}")


def test_missing_files(tmp_path):
    assert_refused(tmp_path, "adapter_config.json cannot be read: No such file")
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_refused(tmp_path, "adapter_model.safetensors cannot be read: No such file")


# --- .bin ---


def test_an_old_file_is_read(tmp_path):
    model, _, tensors = saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(pyfast.load_adapter(net(), tmp_path)(INPUT), model(INPUT))


class Surprise:
    def __reduce__(self):
        return print, ("a pickle was run",)


@pytest.mark.parametrize(
    "content, message",
    [
        (Surprise(), "adapter_model.bin is not a file of tensors"),
        ([torch.ones(2)], "adapter_model.bin holds list; it must be a dict of tensors by name"),
        ({A_KEY: 3}, "is a int; it must be a dense tensor"),
        ({A_KEY: torch.eye(3).to_sparse()}, "it must be a dense tensor"),
        (None, "adapter_model.bin is not a file of tensors"),
    ],
    ids=["code", "list", "number", "sparse", "cut"],
)
def test_an_old_file_that_is_refused(tmp_path, capsys, content, message):
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    path = tmp_path / "adapter_model.bin"
    torch.save({A_KEY: torch.ones(3)} if content is None else content, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:100])
    assert_refused(tmp_path, message)
    assert not capsys.readouterr().out


def test_whatever_a_pickle_raises_is_a_checkpoint_error(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    path, generator = tmp_path / "adapter_model.bin", random.Random(3)
    torch.save({A_KEY: torch.ones(4, 12)}, path)
    raw = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(raw)
        for _ in range(3):
            damaged[generator.randrange(len(raw))] = generator.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(pyfast.CheckpointError):  # at best, one tensor of four
            pyfast.load_adapter(net(), tmp_path)
