"""What a training leaves in its directory: checkpoints, metrics, plots.

A kill at any moment leaves the last good ones.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError


class Checkpoint:
    """state.json, and beside it the file of tensors that it names."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state = directory, directory / "state.json"

    def write(self, tensors: dict[str, Tensor], fields: dict) -> None:
        """The tensors first, under a new name; state.json makes them the ones that count."""
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"step-{fields['step']}.safetensors"
        file_io.replace(path, lambda aside: safetensors_file.write(aside, tensors))
        write_json(self.state, fields | {"tensors": path.name})
        sweep(self.directory)
        for other in self.directory.glob("step-*.safetensors"):
            if other != path:
                other.unlink(missing_ok=True)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """None where none was written."""
        if not self.state.exists():
            return None
        fields = read_json(self.state, ("step", "best", "guard", "tensors"))
        return safetensors_file.read(self.directory / fields["tensors"]), fields


def sweep(directory: Path) -> None:
    """Removes what a kill left half-written."""
    for path in (*directory.glob(".new.*"), *directory.glob(".model.*")):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, fields: dict) -> None:
    file_io.replace(path, lambda aside: file_io.write_json(aside, fields))


def read_json(path: Path, keys: Sequence[str]) -> dict:
    """An object that has these keys."""
    fields = file_io.read_json(path)
    if not all(key in fields for key in keys):
        raise CheckpointError(f"{path} is incomplete; it must have {', '.join(keys)}")
    return fields


class Metrics:
    """metrics.jsonl: a record a line."""

    def __init__(self, path: Path, after: int) -> None:
        """Goes on after a step: what was noted of later ones is forgotten."""
        self.path = path
        self.records = [r for r in read_metrics(path) if r["step"] <= after and "restored" not in r]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        file_io.replace(path, lambda aside: aside.write_text(lines))

    def add(self, record: dict) -> None:
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All whole lines; the last may have been cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


# --- plots ---
