"""Result files, read back for the page, the README and comparisons. Needs no torch."""

import functools
import json
import pathlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.measure.spread import quantiles
from bench.report.labels import device_of, machine_title
from bench.report.recorded_goal import RecordedGoal, parse_goal

ROOT = pathlib.Path(__file__).parents[2]
FACTS = "op", "shape", "dtype", "impl"  # every timed row has these
NUMBERS = (
    *("ms_p20", "ms_p50", "ms_p80", "moved_bytes", "flops", "percent", "gb_s", "tflop_s"),
    *("held_mb", "peak_mb", "saved_mb", "max_error", "times_pyfast", "ratio_p20", "ratio_p80"),
    *("m", "calls"),
)
WORDS = {"variant": "", "note": "", "bound": None}
# A file that does not say what it is about is recognized by a key of its rows.
SUBJECTS_BY_KEY = {"% of the softmax seen": "accuracy", "recovered input": "drift"}
# Files of earlier versions spell two operations differently.
OPS_RENAMED = {"quantise": "quantize", "dequantise": "dequantize"}


class Damaged(ValueError):
    """Raised with one line that names the file and what is wrong with it."""


class Row(types.SimpleNamespace):
    """A timed row: the fields of bench.measure.row.Row, None where the file has none."""

    @property
    def added_mb(self) -> float | None:
        return None if self.peak_mb is None else self.peak_mb - (self.held_mb or 0.0)

    @property
    def case(self) -> tuple:
        """The key that all implementations of a case have in common."""
        return self.op, self.shape, self.m, self.dtype, self.variant


@dataclass(frozen=True)
class Record:
    """One result file."""

    path: pathlib.Path
    subject: str  # the bench, or what it measures beside its times
    data: dict[str, Any]
    machine: dict[str, Any]
    parent: pathlib.Path | None = None  # the result that it was written beside

    @classmethod
    def from_data(cls, data: dict[str, Any], path: pathlib.Path | str = "result") -> "Record":
        """Make a record of a file's content; raise Damaged for what no bench writes."""
        path = pathlib.Path(path)
        if fault := _find_fault(data):
            raise Damaged(f"{path}: not a result of `python -m bench`: {fault}")
        record = cls(path, _find_subject(data, path), data, dict(data.get("machine") or {}))
        for name, attribute in (("a goal", "goals"), ("a training step", "comparable")):
            try:
                getattr(record, attribute)  # reading them is the check
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                message = f"{path}: not a result of `python -m bench`: {name}: {error!r}"
                raise Damaged(message) from None
        return record

    @property
    def ceilings(self) -> dict[str, float]:
        return self.data.get("ceilings") or {}

    @property
    def date(self) -> str:
        return str(self.machine.get("date", ""))

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All rows as they are in the file."""
        return self.data.get("rows") or self.data.get("checked") or []

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The rows that say how long an implementation took, or why it did not run."""
        return [_make_row(line) for line in self.lines if _is_timed(line) and line["op"] != "all"]

    @functools.cached_property
    def comparable(self) -> list[Row]:
        """The timed rows or, where there are none, training steps of whole models as rows."""
        return self.rows or _training_steps(self.lines, self.data.get("setup") or {})

    @property
    def has_wrong_rows(self) -> bool:
        """Return whether pyfast was wrong."""
        return any(
            row.note.startswith("WRONG")
            for row in self.comparable
            if row.impl.startswith("pyfast") or row.impl.endswith("+patch")
        )

    @functools.cached_property
    def absent(self) -> dict[str, str]:
        """Implementations that did not run at all, and why."""
        absent_lines = [line for line in self.lines if line.get("op") == "all"]
        return {line["impl"]: line.get("note", "") for line in absent_lines}

    @functools.cached_property
    def goals(self) -> list[RecordedGoal]:
        return [parse_goal(goal) for goal in self.data.get("goals") or []]


def _is_timed(line: Mapping[str, Any]) -> bool:
    return all(key in line for key in ("op", "impl", "ms_p50"))


def _make_row(line: Mapping[str, Any]) -> Row:
    fields = dict.fromkeys(NUMBERS) | WORDS | dict(line)
    return Row(**fields | {"op": OPS_RENAMED.get(fields["op"], fields["op"])})


# Keys by which a line is recognized: one method of training a model, and one model at a length
# and depth.
METHOD_KEYS = "way", "shape", "layers", "batch", "seq", "checkpointing", "seconds", "note"
MODEL_KEYS = "model", "tokens", "depth", "seconds", "note"


def _training_steps(lines: list[dict[str, Any]], setup: Mapping[str, Any]) -> list[Row]:
    """Return training steps of whole models as rows."""
    rows = []
    for line in lines:
        if all(key in line for key in METHOD_KEYS):
            rows.append(_method_row(line))
        elif all(key in line for key in MODEL_KEYS):
            rows.append(_model_row(line, setup))
    return rows


def _method_row(line: Mapping[str, Any]) -> Row:
    shape = f"{line['shape']}, {line['layers']} layers"
    variant = f"batch {line['batch']}" + ", checkpointing" * line["checkpointing"]
    tokens = line["batch"] * line["seq"]
    case = {"shape": shape, "m": tokens, "variant": variant, "dtype": "bf16"}
    return _step_row(line, line["way"], line["seconds"], case)


def _model_row(line: Mapping[str, Any], setup: Mapping[str, Any]) -> Row:
    sizes = [f"{key} {value}" for key, value in setup.items() if key not in ("dtype", "device")]
    case = {"shape": f"{line['depth']} layers", "m": line["tokens"], "dtype": setup["dtype"]}
    impl = "pyfast" if line["model"] == "Reformer" else line["model"]
    samples = line.get("samples") or [line["seconds"] or 0]
    return _step_row(line, impl, samples, case | {"variant": ", ".join(sizes)})


def _step_row(
    line: Mapping[str, Any], impl: str, seconds: list[float], case: Mapping[str, Any]
) -> Row:
    times = [1e3 * time for time in quantiles(seconds)] if any(seconds) else [None] * 3
    measured = dict(zip(("ms_p20", "ms_p50", "ms_p80"), times)) | {"calls": len(seconds)}
    return _make_row({"op": "training step", "impl": impl, "note": line["note"]} | measured | case)


# --- reading ---


def read(path: pathlib.Path | str) -> Record:
    """Read one result file; raise Damaged where it is none."""
    path = pathlib.Path(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # not text, or not JSON
        raise Damaged(f"{path}: damaged, no JSON: {error}") from None
    return Record.from_data(data, path)


def _find_fault(data: Any) -> str:
    """Return what keeps the data from being a result; empty if nothing does."""
    if not isinstance(data, dict):
        return f"a {type(data).__name__} where an object must be"
    for key in ("machine", "ceilings"):
        if not isinstance(data.get(key) or {}, dict):
            return f"{key} must be an object"
    lines = data.get("rows", data.get("checked"))
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        return "rows must be a list of objects"
    if not all(_is_number(rate) for rate in (data.get("ceilings") or {}).values()):
        return "ceilings must be numbers"
    faults = (_find_row_fault(number, line) for number, line in enumerate(lines))
    return next(filter(None, faults), "")


def _find_row_fault(number: int, line: Mapping[str, Any]) -> str:
    if not _is_timed(line):
        return ""
    for key in FACTS:
        if not isinstance(line.get(key), str):
            return f"row {number}: {key} must be text, not {line.get(key)!r}"
    for key in NUMBERS:
        if line.get(key) is not None and not _is_number(line[key]):
            return f"row {number}: {key} must be a number, not {line[key]!r}"
    times = [line.get(key) for key in ("ms_p20", "ms_p50", "ms_p80")]
    if line["ms_p50"] is not None and not all(times):
        return f"row {number}: a time needs its ms_p20 and ms_p80, above 0"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find_subject(data: Mapping[str, Any], path: pathlib.Path) -> str:
    if isinstance(data.get("bench"), str):
        return data["bench"]
    if "checked" in data:
        return "long_attention"
    lines = data.get("rows")
    keys = set(lines[0]) if lines else set()
    for key, subject in SUBJECTS_BY_KEY.items():
        if key in keys:
            return subject
    return path.stem


def read_folder(folder: pathlib.Path | str) -> list[Record]:
    """Read all results below a folder."""
    folder = pathlib.Path(folder)
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if not paths:
        raise Damaged(f"{folder}: no results (.json) there")
    records = [read(path) for path in paths]
    return [record if record.machine else _with_parent(record, records) for record in records]


def _with_parent(record: Record, records: list[Record]) -> Record:
    """Return a record that names no machine with the machine of the result it lies beside.

    The name of its file begins with the name of that result's.
    """
    parents = [
        other
        for other in records
        if other.machine
        and other.path.parent == record.path.parent
        and record.path.stem.startswith(other.path.stem)
    ]
    if not parents:
        return record
    parent = max(parents, key=lambda other: len(other.path.stem))
    return replace(record, machine=parent.machine, parent=parent.path)


def group_by_machine(records: list[Record]) -> list[list[Record]]:
    """Group records by machine; the one that was measured last comes first."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = (device_of(record.machine), machine_title(record.machine))
        groups.setdefault(key, []).append(record)
    newest = {key: max(record.date for record in group) for key, group in groups.items()}
    return [groups[key] for key in sorted(groups, key=newest.__getitem__, reverse=True)]
