"""safetensors files: the safetensors library reads and writes them, after the checks below.

A file is 8 bytes that hold the header's length, a JSON header, and raw bytes. The library checks a
header too, but its errors name neither the file nor, mostly, the tensor. It also accepts dtypes
that no function here can use, such as 8-bit floats whose scales are in another tensor.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyfast._support import checks
from pyfast.formats.errors import CheckpointError
from pyfast.formats.file_io import sync

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_DIMENSIONS = 8
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file and wait until it is on the disk.

    Call this on a new path: safetensors writes a temporary file beside `path`, then renames it.

    Raises:
        TypeError: `read` would refuse a tensor's dtype. Nothing is written then.
        ValueError: `read` would refuse a tensor's shape. Nothing is written then.
        OSError: the disk fails; the error names the file.
    """
    for name, tensor in tensors.items():
        checks.tensor(name, tensor, DTYPES.values())
        if tensor.dim() > _MOST_DIMENSIONS:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions; it must have {_MOST_DIMENSIONS} or fewer"
            )
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_separate(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _as_os_error(error, path) from None
    path.chmod(mode)  # safetensors 0.8 lets nobody but the owner read its files
    sync(path)


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a file by name, or raise a CheckpointError that says what is wrong."""
    try:
        with open_checked(path) as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def open_checked(path: str | os.PathLike) -> safe_open:
    """Check the header of a file, then open the file for reading tensors one by one.

    Tensors are read into memory, never mapped, so that nobody can change them through the file.
    """
    names(path)
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def names(path: str | os.PathLike) -> list[str]:
    """Return the names of a file's tensors, in the order of their data, after checking its header.

    No data is read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            return _check_header(path, file.read(length), size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


# --- writing ---


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory, as safetensors demands.

    A tensor is copied only if it is on a device, has gaps, or shares its storage with another.
    """
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """Return the OSError that safetensors reports as text, or the error itself if there is none."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error


# --- checks ---


def _header_length(path: str | os.PathLike, first_bytes: bytes, file_size: int) -> int:
    length = int.from_bytes(first_bytes, "little")
    if file_size < 8 or length > min(file_size - 8, _LONGEST_HEADER):
        raise CheckpointError(
            f"{path} is cut short: {file_size} bytes, and its header claims {length}"
        )
    return length


def _check_header(path: str | os.PathLike, text: bytes, data_size: int) -> list[str]:
    """Check that the tensors fill `data_size` bytes without gaps; return their names in order."""
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} has a header of type {type(header).__name__}; it must be an object"
        )
    _check_metadata(path, header.pop("__metadata__", None))
    spans = sorted((_span(path, name, entry, data_size), name) for name, entry in header.items())
    reached = 0
    for (begin, end), name in spans:
        if begin != reached:
            raise CheckpointError(
                f"{path}: {name} begins at byte {begin}; it must begin at {reached}"
            )
        reached = end
    if reached != data_size:
        raise CheckpointError(f"{path} holds {data_size} bytes of data; its tensors take {reached}")
    return [name for _, name in spans]


def _check_metadata(path: str | os.PathLike, metadata: object) -> None:
    """Raise CheckpointError unless the library can read the metadata: texts by name, or none."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path} has __metadata__ of type {type(metadata).__name__}; it must be an object"
        )
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{path}: {name} of __metadata__ is a {type(value).__name__}; it must be a string"
            )


def _span(path: str | os.PathLike, name: str, entry: object, data_size: int) -> tuple[int, int]:
    """Check a tensor's entry in the header; return where its bytes begin and end."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype!r}; it must be one of {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{path}: {name} has shape {shape!r}; it must be a list of sizes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{path}: {name} has data_offsets {offsets!r}; {dtype} {shape} takes {needed} bytes"
        )
    if offsets[1] > data_size:
        raise CheckpointError(
            f"{path} is cut short: {name} ends at byte {offsets[1]} of {data_size}"
        )
    return offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(_is_size(n) for n in value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
