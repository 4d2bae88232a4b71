"""safetensors files: 8 bytes of length, a JSON header, raw bytes. Every offset is checked before it is used."""

import json
import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from pyfast.formats.errors import CheckpointError

_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file and waits for the disk to have it."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of the file, or a CheckpointError that says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            raw = bytearray(file.read())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    length = _header_length(path, raw[:8], len(raw))
    header, spans = _checked(path, raw[8 : 8 + length], len(raw) - 8 - length)
    data = torch.frombuffer(raw, dtype=torch.uint8)[8 + length :]
    return {name: _tensor(data[begin:end], header[name]) for (begin, end), name in spans}


def names(path: str | os.PathLike) -> list[str]:
    """The tensors' names, all but the data having been checked; nothing of that is read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            _, spans = _checked(path, file.read(length), size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return [name for _, name in spans]


def _header_length(path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(f"{path} is cut short: {size} bytes, and its header claims {length}")
    return length


def _checked(path, text: bytes, size: int) -> tuple[dict, list]:
    """The header's entries, and where each tensor's bytes are in `size` bytes of data."""
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} has a header of type {type(header).__name__}; it must be an object"
        )
    header.pop("__metadata__", None)
    spans = sorted((_span(path, name, entry, size), name) for name, entry in header.items())
    reached = 0
    for (begin, end), name in spans:
        if begin != reached:
            raise CheckpointError(
                f"{path}: {name} begins at byte {begin}; it must begin at {reached}"
            )
        reached = end
    if reached != size:
        raise CheckpointError(f"{path} holds {size} bytes of data; its tensors take {reached}")
    return header, spans


def _span(path, name: str, entry: object, size: int) -> tuple[int, int]:
    """Where a tensor's bytes are, its entry having been checked."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype!r}; it must be one of {', '.join(_DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > 8:
        raise CheckpointError(f"{path}: {name} has shape {shape!r}; it must be a list of sizes")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{path}: {name} has data_offsets {offsets!r}; {dtype} {shape} takes {needed} bytes"
        )
    if offsets[1] > size:
        raise CheckpointError(f"{path} is cut short: {name} ends at byte {offsets[1]} of {size}")
    return offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    whole = isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in value
    )
    return whole and all(0 <= n < 2**48 for n in value)


def _tensor(data: Tensor, entry: dict) -> Tensor:
    dtype = _DTYPES[entry["dtype"]]  # the copy is aligned, and lets the file's bytes go
    return (
        data.clone().view(dtype).reshape(entry["shape"])
        if len(data)
        else torch.empty(entry["shape"], dtype=dtype)
    )
