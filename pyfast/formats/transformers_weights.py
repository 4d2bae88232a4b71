"""The files of a transformers checkpoint that hold its weights.

There is one file or several shards with an index, in safetensors or, if allowed, as pickles.
"""

from pathlib import Path

from torch import Tensor

from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def paths(directory: Path, allow_pickle: bool) -> list[Path]:
    """Return the files that hold the weights, after checking that safetensors files are complete.

    If there are no weights, return the path where they must be: reading it fails.
    """
    formats = [name for name in (SAFETENSORS, PICKLE) if _has_weights(directory, name)]
    file_name = formats[0] if formats else SAFETENSORS
    if file_name == PICKLE and not allow_pickle:
        raise CheckpointError(
            f"{directory} has weights as pickles only; allow_pickle=True reads them"
        )
    if (directory / file_name).exists() or not formats:
        keys_by_file = {directory / file_name: set()}
    else:
        keys_by_file = _read_index(directory / f"{file_name}.index.json")
    if file_name == SAFETENSORS:
        for file, keys in keys_by_file.items():
            if missing := keys - set(safetensors_file.names(file)):
                raise CheckpointError(
                    f"{file}: {min(missing)} is missing, which the index has there"
                )
    return list(keys_by_file)


def read(directory: Path, allow_pickle: bool) -> tuple[Path, dict[str, Tensor]]:
    """Return the path to name in messages, and all weights by name.

    The path is that of the file or, if there are shards, of their directory.
    """
    tensors, files = {}, paths(directory, allow_pickle)
    for path in files:
        is_safetensors = path.suffix == ".safetensors"
        tensors |= safetensors_file.read(path) if is_safetensors else file_io.read_pickle(path)
    return files[0] if len(files) == 1 else directory, tensors


def _has_weights(directory: Path, file_name: str) -> bool:
    return (directory / file_name).exists() or (directory / f"{file_name}.index.json").exists()


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Return the names of the tensors in each shard."""
    weight_map = file_io.read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index} has no weight_map of names and files")
    keys_by_file = {}
    for key, name in sorted(weight_map.items(), key=lambda item: item[1]):
        if Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{index} names {name!r}; it must be a file beside it")
        keys_by_file.setdefault(index.parent / name, set()).add(key)
    return keys_by_file
