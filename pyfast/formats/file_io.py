"""Files that are there whole or not at all, and files that may hold anything."""

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

_WRITING = threading.Lock()


def read_json(path: Path) -> dict:
    """The object in the file, or a CheckpointError that says what is wrong with it."""
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
    """Writes the file and waits for the disk to have it."""
    with open(path, "wb") as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True).encode())
        file.flush()
        os.fsync(file.fileno())


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, without running what is in it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a file of tensors: {why}") from None
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
    """Writes one file; at any moment, a kill's too, the old one is there or the new one."""
    aside = path.with_name(
        f".{path.name}.{threading.get_native_id()}.new"
    )  # another process may be writing, too
    try:
        write_to(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_together(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Writes every file aside, then moves all to their places; if a move fails, what was there
    comes back.

    They are in one directory, made if need be. The last, which is read first, is away while the
    others move: a torn set is not read.
    """
    *_, last = writers
    last.parent.mkdir(parents=True, exist_ok=True)
    with _WRITING, tempfile.TemporaryDirectory(prefix=".new.", dir=last.parent) as aside:
        new = {path: Path(aside) / f"{path.name}.new" for path in writers}
        old = {path: Path(aside) / f"{path.name}.old" for path in writers}
        for path, write_to in writers.items():
            write_to(new[path])
        for path in writers:
            with suppress(FileNotFoundError):  # also when another process is writing here
                shutil.copy2(path, old[path])
        try:
            last.unlink(missing_ok=True)
            for path in writers:
                os.replace(new[path], path)
            sync_directory(last.parent)
        except BaseException:
            for path in writers:
                if old[path].exists():
                    os.replace(old[path], path)
                else:
                    path.unlink(missing_ok=True)
            raise


def sync_directory(directory: Path) -> None:
    """Waits for the disk to have the names in it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
