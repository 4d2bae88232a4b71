"""safetensors files: shared memory, failing disks. Damaged files are in adapters/test_lora_files.py."""

import errno
import os
import resource

import pytest
import torch

from pyfast.formats import safetensors_file


def test_tensors_that_share_memory_are_written_each(tmp_path):
    weight = torch.randn(8, 8)
    tensors = {
        "weight": weight,
        "tied": weight.detach(),
        "transposed": weight.t(),
        "rows": weight[2:],
    }
    safetensors_file.write(tmp_path / "file", tensors)
    loaded = safetensors_file.read(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_loaded_tensors_are_apart_from_the_file(tmp_path):
    weight = torch.randn(64, 64)
    safetensors_file.write(tmp_path / "file", {"weight": weight})
    loaded = safetensors_file.read(tmp_path / "file")["weight"]
    os.truncate(tmp_path / "file", 10)
    assert torch.equal(loaded.add_(1), weight + 1)


def test_a_disk_that_fails_raises_the_error_of_the_system(tmp_path):
    """As the built-in functions do: the command `finetune` reports an OSError in one line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            safetensors_file.write(tmp_path / "file", {"weight": torch.randn(64, 64)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_names_are_read_without_the_data(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.int8)}
    safetensors_file.write(tmp_path / "file", tensors)
    assert sorted(safetensors_file.names(tmp_path / "file")) == ["a", "b"]
