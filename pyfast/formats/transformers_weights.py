"""Where a directory of transformers has its weights: one file or shards, safetensors or, if allowed, pickles."""

from pathlib import Path

from torch import Tensor

from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def paths(directory: Path, allow_pickle: bool) -> list[Path]:
    """Those that hold the weights, each of them whole."""
    kinds = [
        name
        for name in (SAFE, PICKLED)
        if any((directory / n).exists() for n in (name, f"{name}.index.json"))
    ]
    kind = kinds[0] if kinds else SAFE
    if kind == PICKLED and not allow_pickle:
        raise CheckpointError(
            f"{directory} has weights as pickles only; allow_pickle=True reads them"
        )
    if (directory / kind).exists() or not kinds:
        where = {directory / kind: set()}
    else:
        where = _shards(directory / f"{kind}.index.json")
    for file, expected in where.items() if kind == SAFE else ():
        if lost := expected - set(safetensors_file.names(file)):
            raise CheckpointError(f"{file}: {min(lost)} is missing, which the index has there")
    return list(where)


def read(directory: Path, allow_pickle: bool) -> tuple[Path, dict[str, Tensor]]:
    """All weights by name, and what they are from: the file, or of shards the directory."""
    tensors, where = {}, paths(directory, allow_pickle)
    for path in where:
        tensors |= (
            safetensors_file.read(path)
            if path.suffix == ".safetensors"
            else file_io.read_pickle(path)
        )
    return where[0] if len(where) == 1 else directory, tensors


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files, and what is in each."""
    where = file_io.read_json(index).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(name, str) for name in where.values())
    ):
        raise CheckpointError(f"{index} has no weight_map of names and files")
    found = {}
    for key, name in sorted(where.items(), key=lambda item: item[1]):
        if Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{index} names {name!r}; it must be a file beside it")
        found.setdefault(index.parent / name, set()).add(key)
    return found
