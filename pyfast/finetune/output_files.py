"""What a training leaves in its directory: checkpoints, metrics, plots.

A kill at any moment leaves the last good ones.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pyfast.finetune.learning_rate import RangeTest
from pyfast.formats import file_io, safetensors_file
from pyfast.formats.bitsandbytes import CheckpointError


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
        for other in [*self.directory.glob("step-*.safetensors"), *self.directory.glob(".*.new")]:
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
    for path in (*directory.glob(".new.*"), *directory.glob(".model.*"), *directory.glob(".*.new")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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


def plot_training(records: Sequence[dict], path: Path) -> str | None:
    """Draws the losses; why not, if it can't."""
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    judged = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r and "restored" not in r]
    lines = {"training": train, "evaluation": judged}
    return _plot(path, {name: list(zip(*points)) for name, points in lines.items() if points}, xlabel="step")


def plot_range(test: RangeTest, path: Path) -> str | None:
    """Draws the loss by the rate, and the proposal; why not, if it can't."""
    lines = {"loss": (test.rates, test.losses), "smoothed": (test.rates, test.smoothed)}
    return _plot(path, lines, mark=test.proposal, xlabel="learning rate", xscale="log")


def _plot(path: Path, lines: dict[str, tuple], mark: float | None = None, **axes: str) -> str | None:
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(7, 4))
    for name, (x, y) in lines.items():
        plot.plot(x, y, label=name, marker="o" if len(x) < 20 else None, alpha=0.5 if name == "loss" else 1)
    if mark is not None:
        plot.axvline(mark, linestyle="--", color="gray", label=f"proposal: {mark:g}")
    plot.set(ylabel="loss", **axes)
    plot.legend()
    figure.tight_layout()
    file_io.replace(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
    pyplot.close(figure)
    return None
