"""Reading files that may hold anything, and writing files that are complete or not there at all.

Files are written in a directory `.new.*` beside their place, then moved. What a kill leaves is in
such a directory.
"""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pyfast.formats.errors import CheckpointError

_WRITE_LOCK = threading.Lock()


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, or raise a CheckpointError that says what is wrong."""
    try:
        fields = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {type(fields).__name__}; it must be an object")
    return fields


def write_json(path: Path, fields: Mapping) -> None:
    """Write a JSON file and wait until it is on the disk."""
    path.write_bytes(json.dumps(fields, indent=2, sort_keys=True).encode())
    sync(path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled file by name, without running the code that is in it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a file of tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(
            f"{path} holds {type(tensors).__name__}; it must be a dict of tensors by name"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is a {type(tensor).__name__}; it must be a dense tensor"
            )
    return tensors


def replace(path: Path, write_to: Callable[[Path], None]) -> None:
    """Write a file; at any moment, even after a kill, the old one or the new one is complete.

    `write_to` is called with another path, in a directory that no other process writes to.
    """
    with tempfile.TemporaryDirectory(prefix=".new.", dir=path.parent) as directory:
        new = Path(directory) / path.name
        write_to(new)
        os.replace(new, path)
    sync(path.parent)


def write_together(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write several files, then move all to their places; if a move fails, restore the old files.

    The files are in one directory, which is made if it does not exist. Readers must open the last
    file first: it is away while the others move, so that nobody reads a mixed set.
    """
    *_, last = writers
    last.parent.mkdir(parents=True, exist_ok=True)
    with _WRITE_LOCK, tempfile.TemporaryDirectory(prefix=".new.", dir=last.parent) as directory:
        new = {path: Path(directory) / f"{path.name}.new" for path in writers}
        old = {path: Path(directory) / f"{path.name}.old" for path in writers}
        for path, write_to in writers.items():
            write_to(new[path])
        for path in writers:
            with suppress(FileNotFoundError):  # also when another process is writing here
                shutil.copy2(path, old[path])
        try:
            last.unlink(missing_ok=True)
            for path in writers:
                os.replace(new[path], path)
            sync(last.parent)
        except BaseException:
            for path in writers:
                if old[path].exists():
                    os.replace(old[path], path)
                else:
                    path.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file's contents, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
