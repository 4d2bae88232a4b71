"""safetensors files: shared memory, failing disks. Damaged files are in adapters/test_lora_files.py."""

import errno
import json
import os
import resource

import pytest
import torch

from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError


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
    assert caught.value.filename == str(tmp_path / "file")


def test_names_are_read_without_the_data(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.int8)}
    safetensors_file.write(tmp_path / "file", tensors)
    assert sorted(safetensors_file.names(tmp_path / "file")) == ["a", "b"]


REFUSED = {
    "complex": (torch.zeros(2, dtype=torch.complex64), TypeError, "b is torch.complex64; it must"),
    "float8": (torch.zeros(2).to(torch.float8_e4m3fn), TypeError, "b is torch.float8_e4m3fn; it"),
    "uint16": (torch.zeros(2, dtype=torch.uint16), TypeError, "b is torch.uint16; it must be"),
    "dimensions": (torch.zeros([1] * 9), ValueError, "b has 9 dimensions; it must have 8 or fewer"),
    "no tensor": ([1.0], TypeError, "b must be a torch.Tensor, not list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_is_not_written(tmp_path, case):
    value, error, message = REFUSED[case]
    path, good = tmp_path / "file", {"a": torch.ones(3)}
    safetensors_file.write(path, good)
    with pytest.raises(error, match=message):
        file_io.replace(path, lambda aside: safetensors_file.write(aside, good | {"b": value}))
    assert torch.equal(safetensors_file.read(path)["a"], good["a"])
    with pytest.raises(error, match=message):
        safetensors_file.write(tmp_path / "new", good | {"b": value})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", safetensors_file.DTYPES.values(), ids=str)
def test_every_listed_dtype_is_written_and_read(tmp_path, dtype):
    tensor = torch.ones(2, 3).to(dtype)
    safetensors_file.write(tmp_path / "file", {"a": tensor})
    loaded = safetensors_file.read(tmp_path / "file")["a"]
    assert loaded.dtype == dtype and torch.equal(loaded, tensor)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"format": "pt", "steps": 3}, "steps of __metadata__ is a int; it must be a string"),
        ({"more": {}}, "more of __metadata__ is a dict; it must be a string"),
        ([1], "has __metadata__ of type list; it must be an object"),
    ],
)
def test_metadata_that_is_not_text_is_refused_in_one_line(tmp_path, metadata, message):
    header = {
        "__metadata__": metadata,
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors_file.read(tmp_path / "file")
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)
