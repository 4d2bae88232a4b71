"""Adapter files are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.lora_files import A_KEY, B_KEY, INPUT, adapted, assert_refused, net, saved
from safetensors.torch import load_file, save_file

import pyfast
from pyfast.formats import file_io, safetensors_file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_safetensors(tmp_path, dtype):
    model = pyfast.add_lora(net().to(dtype), pyfast.LoRAConfig(r=4, targets=["0"], dtype=dtype))
    pyfast.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = model[0].adapters["default"]
    assert (
        set(tensors) == {A_KEY, B_KEY}
        and torch.equal(tensors[A_KEY], adapter.lora_a)
        and torch.equal(tensors[B_KEY], adapter.lora_b)
    )


def test_every_dtype_and_shape_goes_through(tmp_path):
    tensors = {
        str(d): torch.arange(6).reshape(2, 3).to(d) for d in safetensors_file.DTYPES.values()
    }
    tensors |= {
        "empty": torch.empty(0, 3),
        "one": torch.tensor(2.5),
        "strided": torch.randn(4, 6)[:, ::2],
    }
    safetensors_file.write(tmp_path / "t", tensors)
    for found in (safetensors_file.read(tmp_path / "t"), load_file(tmp_path / "t")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    assert all(
        torch.equal(value, tensors[name])
        for name, value in safetensors_file.read(tmp_path / "theirs").items()
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


FAILURES = {
    "no space for the tensors": (safetensors_file, "write", 1),
    "no space for the configuration": (file_io, "write_json", 1),
    "the disk fails": (os, "fsync", 2),
    "the first move fails": (os, "replace", 1),
    "the second move fails": (os, "replace", 2),
    "the last word of the disk fails": (os, "fsync", 3),
}


@pytest.mark.parametrize("module, function, at", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["over another", "the first"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, module, function, at, there):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "README.md").write_text("mine")
    if there:
        saved(directory)
    before, calls, original = contents(directory), [], getattr(module, function)

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError("no space left on device")
        return original(*args)

    model = adapted(seed=9)
    monkeypatch.setattr(module, function, failing)
    with pytest.raises(OSError, match="no space left"):
        pyfast.save_adapter(model, directory)
    monkeypatch.undo()
    assert contents(directory) == before
    pyfast.save_adapter(model, directory)
    assert torch.equal(pyfast.load_adapter(net(), directory)(INPUT), model(INPUT))
    assert set(contents(directory)) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_write_killed_halfway_is_not_read(tmp_path):
    saved(tmp_path)
    other, replace, moves = adapted(seed=9, alpha=80), os.replace, []

    def killed_at_the_second(*paths):
        moves.append(paths)
        if len(moves) == 2:
            os._exit(0)  # as SIGKILL: nothing is cleaned up
        replace(*paths)

    pid = os.fork()
    if pid == 0:
        os.replace = killed_at_the_second
        try:
            pyfast.save_adapter(other, tmp_path)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert_refused(tmp_path, "adapter_config.json cannot be read: No such file")
    pyfast.save_adapter(other, tmp_path)
    assert torch.equal(pyfast.load_adapter(net(), tmp_path)(INPUT), other(INPUT))


def test_threads_write_one_after_the_other(tmp_path):
    models = [adapted(seed=i, alpha=8 + i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: pyfast.save_adapter(models[i % 3], tmp_path), range(24)))
    y = pyfast.load_adapter(net(), tmp_path)(INPUT)
    assert any(torch.equal(y, model(INPUT)) for model in models) and len(contents(tmp_path)) == 2


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for end in ("", f".{os.getpid()}.new", f".{os.getpid()}.old"):
            (directory / (f".{name}{end}" if end else name)).symlink_to(tmp_path / "precious")
    saved(directory)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (directory / "adapter_config.json").is_symlink()


def test_written_files_have_ordinary_permissions(tmp_path):
    saved(tmp_path)
    (tmp_path / "other").write_text("x")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_read_to_be_run_only(tmp_path):
    model, _, _ = saved(tmp_path)
    frozen = pyfast.load_adapter(net(), tmp_path, trainable=False)
    assert torch.equal(frozen(INPUT), model(INPUT)) and not frozen(INPUT).requires_grad
    pyfast.set_adapter(frozen, "default")
    assert frozen(INPUT).requires_grad


def test_numbers_of_numpy_are_written(tmp_path):
    options = {"r": np.int64(4), "alpha": np.float32(8), "rank_pattern": {"0": np.int32(3)}}
    model = adapted(**options)
    pyfast.save_adapter(model, tmp_path)
    assert torch.equal(pyfast.load_adapter(net(), tmp_path)(INPUT), model(INPUT))
    one, two = (pyfast.LoRAConfig(**options) for _ in range(2))
    assert one == two and hash(one) == hash(two)


def test_a_file_does_not_say_which_of_two_names(tmp_path):
    saved(tmp_path)
    two = net()
    two.append(two[0])
    with pytest.raises(pyfast.CheckpointError, match="does not fit this model: target 0 is 3, too"):
        pyfast.load_adapter(two, tmp_path)
    assert type(two[0]) is torch.nn.Linear


def test_a_second_adapter_is_read_beside_the_first(tmp_path):
    first, _, _ = saved(tmp_path / "a")
    second, _, _ = saved(tmp_path / "b", seed=3, r=2)
    model = pyfast.load_adapter(
        pyfast.load_adapter(net(), tmp_path / "a", "a"), tmp_path / "b", name="b"
    )
    assert torch.equal(model(INPUT), second(INPUT))
    pyfast.set_adapter(model, "a")
    assert torch.equal(model(INPUT), first(INPUT))
    pyfast.save_adapter(model, tmp_path / "c", name="b")
    assert contents(tmp_path / "c") == contents(tmp_path / "b")
    with pytest.raises(ValueError, match="name is 'a', which the model has already"):
        pyfast.load_adapter(model, tmp_path / "a", "a")
