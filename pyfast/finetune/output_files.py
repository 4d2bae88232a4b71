"""Files of a training's output directory: checkpoints and metrics.

If the process is killed, at any moment, the last good files are still there.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError


class Checkpoint:
    """The state of a training on disk: state.json, and the file of tensors that it names."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state_file = directory, directory / "state.json"

    def write(self, tensors: dict[str, Tensor], fields: dict) -> None:
        """Write a state in place of the last one.

        The tensors come first, under a new name; a new state.json then makes them count.
        """
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"step-{fields['step']}.safetensors"
        file_io.replace(path, lambda aside: safetensors_file.write(aside, tensors))
        write_json(self.state_file, fields | {"tensors": path.name})
        remove_leftovers(self.directory)
        for old in self.directory.glob("step-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """Return the tensors and the fields of the state, or None if none was written."""
        if not self.state_file.exists():
            return None
        fields = read_json(self.state_file, ("step", "best", "guard", "tensors"))
        return safetensors_file.read(self.directory / fields["tensors"]), fields


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (*directory.glob(".new.*"), *directory.glob(".model.*")):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, fields: dict) -> None:
    """Replace a JSON file; at any moment the old one is there or the new one."""
    file_io.replace(path, lambda aside: file_io.write_json(aside, fields))


def read_json(path: Path, keys: Sequence[str]) -> dict:
    """Return the object in a JSON file, or raise CheckpointError if it lacks one of the keys."""
    fields = file_io.read_json(path)
    if not all(key in fields for key in keys):
        raise CheckpointError(f"{path} is incomplete; it must have {', '.join(keys)}")
    return fields


class Metrics:
    """The records of a training in metrics.jsonl, one a line.

    Args:
        path: the file; it may exist.
        after: the step after which the training continues. Records of later steps are dropped.
    """

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        self.records = []
        for record in read_metrics(path):
            if record["step"] <= after and "restored" not in record:
                self.records.append(record)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        file_io.replace(path, lambda aside: aside.write_text(lines))

    def add(self, record: dict) -> None:
        """Append a record."""
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """Return the records of all complete lines; the last line may have been cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
