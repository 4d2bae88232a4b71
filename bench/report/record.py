"""Result files, read back: what the page, the figures and the comparison are made of. Needs no torch."""

import functools
import json
import math
import pathlib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.measure.spread import quantiles

ROOT = pathlib.Path(__file__).parents[2]
FACTS = "op", "shape", "dtype", "impl"  # of any timed row
NUMBERS = "ms_p20", "ms_p50", "ms_p80", "moved_bytes", "flops", "percent", "gb_s", "tflop_s"
NUMBERS += (
    "held_mb",
    "peak_mb",
    "saved_mb",
    "max_error",
    "times_pyfast",
    "ratio_p20",
    "ratio_p80",
    "m",
    "calls",
)
WORDS = {"variant": "", "note": "", "bound": None}
# A file that doesn't say what it is, is told by a key of its rows.
KINDS = {"% of the softmax seen": "accuracy", "recovered input": "drift"}


class Damaged(ValueError):
    """The file and what is wrong with it, in one line."""


class Row(types.SimpleNamespace):
    """A timed row: the fields of bench.measure.harness.Row, None where the file has none."""

    @property
    def added_mb(self) -> float | None:
        return None if self.peak_mb is None else self.peak_mb - (self.held_mb or 0.0)

    @property
    def case(self) -> tuple:
        """What all implementations of a row are measured at."""
        return self.op, self.shape, self.m, self.dtype, self.variant


@dataclass(frozen=True)
class Goal:
    """A goal as a reader wants it."""

    sentence: str
    measured: str  # what the figure is made of, where the file says it
    figure: str  # to be held against the goal, with its spread where the file has one
    margin: float | None  # 1 or more where it is met
    met: bool | None
    why: str  # there is no figure

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


@dataclass(frozen=True)
class Record:
    """One result file."""

    path: pathlib.Path
    kind: str  # the bench, or what it measures beside its times
    data: dict[str, Any]
    machine: dict[str, Any]
    parent: pathlib.Path | None = None  # the result that it was written beside

    @classmethod
    def of(cls, data: dict[str, Any], path: pathlib.Path | str = "result") -> "Record":
        """From what a file holds; refuses what no bench writes."""
        path = pathlib.Path(path)
        if what := _fault(data):
            raise Damaged(f"{path}: not a result of `python -m bench`: {what}")
        found = cls(path, _kind(data, path), data, dict(data.get("machine") or {}))
        for name, part in (("a goal", "goals"), ("a training step", "comparable")):
            try:
                getattr(found, part)  # reading them is the check
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise Damaged(
                    f"{path}: not a result of `python -m bench`: {name}: {error!r}"
                ) from None
        return found

    @property
    def ceilings(self) -> dict[str, float]:
        return self.data.get("ceilings") or {}

    @property
    def date(self) -> str:
        return str(self.machine.get("date", ""))

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All rows, whatever they hold."""
        return self.data.get("rows") or self.data.get("checked") or []

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Those that say how long an implementation took, or why it did not."""
        return [_row(line) for line in self.lines if _is_timed(line) and line["op"] != "all"]

    @functools.cached_property
    def comparable(self) -> list[Row]:
        """Those; or training steps of whole models, as such rows."""
        return self.rows or _steps(self.lines, self.data.get("setup") or {})

    @property
    def wrong(self) -> bool:
        """Whether pyfast was."""
        own = (
            row
            for row in self.comparable
            if row.impl.startswith("pyfast") or row.impl.endswith("+patch")
        )
        return any(row.note.startswith("WRONG") for row in own)

    @functools.cached_property
    def absent(self) -> dict[str, str]:
        """Implementations that did not run at all, and why."""
        return {
            line["impl"]: line.get("note", "") for line in self.lines if line.get("op") == "all"
        }

    @functools.cached_property
    def goals(self) -> list[Goal]:
        return [_goal(goal) for goal in self.data.get("goals") or []]


def _is_timed(line: Mapping[str, Any]) -> bool:
    return all(key in line for key in ("op", "impl", "ms_p50"))


def _row(line: Mapping[str, Any]) -> Row:
    return Row(**dict.fromkeys(NUMBERS) | WORDS | dict(line))


# What a line says that is of a way to train one model, and of one model of many lengths and depths.
WAY = "way", "shape", "layers", "batch", "seq", "checkpointing", "seconds", "note"
MODEL = "model", "tokens", "depth", "seconds", "note"


def _steps(lines: list[dict[str, Any]], setup: Mapping[str, Any]) -> list[Row]:
    """Training steps of whole models, as rows."""
    found = []
    for line in lines:
        if all(key in line for key in WAY):
            size = {
                "shape": f"{line['shape']}, {line['layers']} layers",
                "m": line["batch"] * line["seq"],
            }
            size["variant"] = f"batch {line['batch']}" + ", checkpointing" * line["checkpointing"]
            found.append(_step(line, line["way"], line["seconds"], size | {"dtype": "bf16"}))
        elif all(key in line for key in MODEL):
            size = {
                "shape": f"{line['depth']} layers",
                "m": line["tokens"],
                "dtype": setup["dtype"],
            }
            size["variant"] = ", ".join(
                f"{k} {v}" for k, v in setup.items() if k not in ("dtype", "device")
            )
            impl = "pyfast" if line["model"] == "Reformer" else line["model"]
            found.append(_step(line, impl, line.get("samples") or [line["seconds"] or 0], size))
    return found


def _step(line: Mapping[str, Any], impl: str, seconds: list[float], size: Mapping[str, Any]) -> Row:
    times = [1e3 * one for one in quantiles(seconds)] if any(seconds) else [None] * 3
    measured = dict(zip(("ms_p20", "ms_p50", "ms_p80"), times)) | {"calls": len(seconds)}
    return _row({"op": "training step", "impl": impl, "note": line["note"]} | measured | size)


PLACE = re.compile(r"\{[^}]*\}x?")  # of the value in a goal's text; x: times


def _goal(goal: Mapping[str, Any]) -> Goal:
    text, target, value = goal["text"], goal["target"], goal.get("value")
    sign = {">=": "≥", "<=": "≤"}[goal["sense"]]
    place = (PLACE.search(text) or ["{:.4g}"])[0]
    sentence = PLACE.sub(f"{sign} {target:g}{'x' if place.endswith('x') else ''}", text)
    measured = goal.get("measured") or ""
    if value is None:
        missed = bool(goal.get("failed"))
        why = goal.get("why", "")
        return Goal(
            sentence,
            measured,
            why if missed else "",
            0.0 if missed else None,
            False if missed else None,
            why,
        )
    met = value >= target if sign == "≥" else value <= target
    shown = place.format(value)
    if not met and shown == place.format(target):
        shown = re.sub(r"\{.*\}", f"{value:.4g}", place)  # missed by less than is shown
    if goal.get("low") is not None and goal.get("high") is not None:
        shown += f" ({place.format(goal['low'])} to {place.format(goal['high'])})"
    over, under = (value, target) if sign == "≥" else (target, value)
    return Goal(sentence, measured, shown, over / under if under else math.inf, met, "")


# --- reading ---


def read(path: pathlib.Path | str) -> Record:
    path = pathlib.Path(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # not text, or not JSON
        raise Damaged(f"{path}: damaged, no JSON: {error}") from None
    return Record.of(data, path)


def _fault(data: Any) -> str:
    """What keeps it from being a result; empty if nothing does."""
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
    return next(filter(None, (_row_fault(i, line) for i, line in enumerate(lines))), "")


def _row_fault(number: int, line: Mapping[str, Any]) -> str:
    if not _is_timed(line):
        return ""
    for key in FACTS:
        if not isinstance(line.get(key), str):
            return f"row {number}: {key} must be text, not {line.get(key)!r}"
    for key in NUMBERS:
        if line.get(key) is not None and not _is_number(line[key]):
            return f"row {number}: {key} must be a number, not {line[key]!r}"
    if line["ms_p50"] is not None and not all(
        line.get(key) for key in ("ms_p20", "ms_p50", "ms_p80")
    ):
        return f"row {number}: a time needs its ms_p20 and ms_p80, above 0"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(data: Mapping[str, Any], path: pathlib.Path) -> str:
    if isinstance(data.get("bench"), str):
        return data["bench"]
    if "checked" in data:
        return "long_attention"
    lines = data.get("rows", data.get("checked"))
    keys = set(lines[0]) if lines else set()
    for key, kind in KINDS.items():
        if key in keys:
            return kind
    return path.stem


def walk(folder: pathlib.Path | str) -> list[Record]:
    """All results below a folder, those of a machine together."""
    folder = pathlib.Path(folder)
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if not paths:
        raise Damaged(f"{folder}: no results (.json) there")
    return adopt([read(path) for path in paths])


def adopt(records: list[Record]) -> list[Record]:
    """A file that names no machine was written beside one that does, under a longer name."""

    def whole(record: Record) -> Record:
        if record.machine:
            return record
        beside = [
            other for other in records if other.machine and other.path.parent == record.path.parent
        ]
        parents = [other for other in beside if record.path.stem.startswith(other.path.stem)]
        if not parents:
            return record
        parent = max(parents, key=lambda other: len(other.path.stem))
        return replace(record, machine=parent.machine, parent=parent.path)

    return [whole(record) for record in records]


def by_machine(records: list[Record]) -> list[list[Record]]:
    """The machine that was measured last comes first."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault((device(record.machine), title(record.machine)), []).append(record)
    return sorted(found.values(), key=lambda own: max(record.date for record in own), reverse=True)


# --- how things are called ---


def device(machine: Mapping[str, Any]) -> str:
    return "cuda" if "gpu" in machine else "cpu"


def title(machine: Mapping[str, Any]) -> str:
    """What it is, and what it can do."""
    if not machine:
        return "a machine not named"
    if "gpu" in machine:
        return str(machine["gpu"])
    cores = str(machine.get("cores", "")).partition(",")[0]
    return ", ".join(part for part in (str(machine.get("cpu", "")), cores, isa(machine)) if part)


def isa(machine: Mapping[str, Any]) -> str:
    return str(machine.get("isa", "")).replace("+", " + ")


def rate(value: float) -> str:
    """Of FLOPs."""
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def short(value: float) -> str:
    """A measured number with the digits that mean something."""
    if value == 0:
        return "0"
    if abs(value) >= 99.5:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:#.2g}"
