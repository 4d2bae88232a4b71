"""Comparison of two results of one bench: what became faster or slower.

A row is the same row where op, shape, M, dtype, implementation and variant are the same.

Peers whose code is the same in both runs tell how much slower or faster the machine was. The
median of their changes is its drift. Their spread (p20 to p80) is how well the drift is known; it
is larger for a row whose own case's peers moved by more.

A row of pyfast is slower, or faster, under two conditions: without the drift, the p20 to p80 of its
old and new times do not overlap, and its median has moved by MIN_CHANGE or more.
"""

import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.measure.spread import quantiles
from bench.report.labels import format_number
from bench.report.record import Damaged, Record, Row, read

MIN_CHANGE = 1.05  # a ratio nearer to 1 is no change
MIN_DRIFT_ROWS = 3  # rows of peers, for a drift
MIN_CALLS = 3  # fewer have no spread, and show no change
# Packages beside torch whose code an implementation is, by the beginning of its name.
PACKAGES = {
    "bnb": ["bitsandbytes"],
    "full": ["transformers"],
    "peft": ["peft", "bitsandbytes", "transformers"],
    "hf": ["transformers"],
    "lucidrains": ["reformer-pytorch"],
    "revtorch": ["revtorch"],
    "revlib": ["revlib"],
    "memcnn": ["memcnn"],
    "unsloth": ["unsloth", "transformers"],
    "torchao": ["torchao"],
    "gemlite": ["gemlite"],
    "hqq": ["hqq"],
}
MACHINE_KEYS = "gpu", "cpu", "cores", "isa"
OTHER_MACHINE = " Another machine: what is faster or slower may be its doing."
RANKS = "failed", "slower", "faster", "gone", "new", "same"  # of verdicts in the table

Moves = dict[tuple, list[float]]  # logarithms of new over old time, by case


@dataclass(frozen=True)
class Drift:
    """The machine's change: new times over old ones, for code that did not change."""

    low: float = 1.0
    middle: float = 1.0
    high: float = 1.0
    rows: int = 0  # rows of peers that it was measured by


@dataclass(frozen=True)
class Change:
    """One row in both runs; `ratio` is new over old without drift, with its spread."""

    row: Row
    verdict: str  # faster, slower, same, new, gone, failed
    old_ms: float | None = None
    new_ms: float | None = None
    low: float | None = None
    ratio: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def name(self) -> str:
        row = self.row
        words = (row.op, row.shape, row.dtype, f"M={row.m}" if row.m else "", row.variant)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Comparison(Sequence):
    """The changes of pyfast's rows, with warnings about what they were compared with."""

    changes: list[Change]
    drift: Drift
    warnings: list[str] = field(default_factory=list)
    is_other_machine: bool = False

    def __getitem__(self, at):
        return self.changes[at]

    def __len__(self) -> int:
        return len(self.changes)

    def count(self, verdict: str) -> int:
        return sum(change.verdict == verdict for change in self.changes)


def between(old: Mapping[str, Any] | Record, new: Mapping[str, Any] | Record) -> Comparison:
    """Compare two results of one bench."""
    old, new = (run if isinstance(run, Record) else Record.from_data(run) for run in (old, new))
    if old.subject != new.subject:
        subjects = f"the old result is of {old.subject}, the new one of {new.subject}"
        raise Damaged(f"nothing to compare: {subjects}")
    for name, run in (("old", old), ("new", new)):
        if not any(row.ms_p50 for row in run.comparable):
            raise Damaged(
                f"nothing to compare: the {name} result, {run.subject}, has no timed rows"
            )
    old_rows, new_rows = ({(*row.case, row.impl): row for row in r.comparable} for r in (old, new))
    moves, warnings = _measure_moves(old_rows, new_rows, old.machine, new.machine)
    drift = _measure_drift(moves)
    changes = []
    for key in dict.fromkeys([*old_rows, *new_rows]):
        if _is_pyfast(key[-1]):
            case_moves = moves.get(key[:-1], [])
            changes.append(_judge(old_rows.get(key), new_rows.get(key), drift, case_moves))
    unmatched = Counter(key[-1] for key in old_rows.keys() ^ new_rows if not _is_pyfast(key[-1]))
    if unmatched:
        names = ", ".join(f"{impl} {count}" for impl, count in unmatched.items())
        warnings.append(f"rows of peers in one of the runs only: {names}")
    is_other = any(old.machine.get(name) != new.machine.get(name) for name in MACHINE_KEYS)
    return Comparison([change for change in changes if change], drift, warnings, is_other)


def _is_pyfast(impl: str) -> bool:
    """Return whether an implementation is pyfast's, or a peer's patched by it."""
    return impl.split("-")[0] == "pyfast" or "+" in impl


def _measure_moves(
    old_rows: Mapping, new_rows: Mapping, old: Mapping, new: Mapping
) -> tuple[Moves, list[str]]:
    """Return how the peers moved whose code is the same in both runs, and warnings."""
    changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
    names = dict.fromkeys((*MACHINE_KEYS, "torch", *itertools.chain(*PACKAGES.values())))
    warnings = [
        f"another {name}: {old[name]} before, {new[name]} now" for name in names if name in changed
    ]
    if "torch" in changed:
        reason = "with another torch no peer is the same code"
        return {}, [*warnings, f"{reason}: the machine's drift is not taken off"]
    moves: Moves = {}
    for key in old_rows.keys() & new_rows.keys():
        times = old_rows[key].ms_p50, new_rows[key].ms_p50
        is_same_code = not changed.intersection(_packages_of(key[-1]))
        if all(times) and is_same_code and not _is_pyfast(key[-1]):
            moves.setdefault(key[:-1], []).append(math.log(times[1] / times[0]))
    if sum(map(len, moves.values())) < MIN_DRIFT_ROWS:
        reason = "too few rows of unchanged peers"
        return {}, [*warnings, f"{reason}: the machine's drift is not known, nor taken off"]
    return moves, warnings


def _packages_of(impl: str) -> list[str]:
    return next((names for start, names in PACKAGES.items() if impl.startswith(start)), [])


def _measure_drift(moves: Moves) -> Drift:
    logarithms = [*itertools.chain(*moves.values())]
    if not logarithms:
        return Drift()
    return Drift(*map(math.exp, quantiles(logarithms)), len(logarithms))


def _judge(
    old: Row | None, new: Row | None, drift: Drift, case_moves: Sequence[float]
) -> Change | None:
    """Judge one row; None where neither run measured it.

    `case_moves` is how the peers of its case moved, which were timed in turns with it.
    """
    old_ms, new_ms = (row.ms_p50 if row else None for row in (old, new))
    if not old_ms and not new_ms:
        return None
    if not new_ms:
        why = new.note if new else "not in the new run"
        verdict = "failed" if why.startswith("WRONG") else "gone"
        return Change(old, verdict, old_ms=old_ms, why=why)
    if not old_ms:
        return Change(new, "new", new_ms=new_ms, why=old.note if old else "not in the old run")
    case_drift = math.exp(statistics.median(case_moves)) if case_moves else drift.middle
    ratio = new_ms / old_ms / drift.middle
    low = new.ms_p20 / old.ms_p80 / max(drift.high, case_drift)
    high = new.ms_p80 / old.ms_p20 / min(drift.low, case_drift)
    has_moved = (low > 1 and ratio >= MIN_CHANGE) or (high < 1 and ratio <= 1 / MIN_CHANGE)
    has_few_calls = min(row.calls or MIN_CALLS for row in (old, new)) < MIN_CALLS
    verdict = "same"
    if has_moved and not has_few_calls:
        verdict = "slower" if low > 1 else "faster"
    why = f"fewer than {MIN_CALLS} calls" if has_moved and has_few_calls else ""
    return Change(new, verdict, old_ms, new_ms, low, ratio, high, why)


def table(comparison: Comparison) -> str:
    """Return a table, most changed rows first, and last a sentence that sums it up."""

    def rank(change: Change) -> tuple[int, float]:
        return RANKS.index(change.verdict), -abs(math.log(change.ratio or 1))

    head = ("row", "impl", "old ms", "new ms", "new / old", "p20 to p80", "verdict")
    lines = [head, *(_cells(change) for change in sorted(comparison, key=rank))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    shown = [_align(line, widths) for line in lines]
    notes = [f"note: {warning}" for warning in comparison.warnings]
    return "\n".join([*shown, "", *notes, sentence(comparison)])


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align cells; numbers, the third to the fifth cell, to the right."""
    padded = [
        cell.rjust(width) if 2 <= at <= 4 else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(cells, widths))
    ]
    return "  ".join(padded).rstrip()


def _cells(change: Change) -> tuple[str, ...]:
    times = ["-" if ms is None else format_number(ms) for ms in (change.old_ms, change.new_ms)]
    ratio, spread = "-", "-"
    if change.ratio is not None:
        ratio, spread = f"{change.ratio:.3f}", f"{change.low:.2f} to {change.high:.2f}"
    verdict = f"{change.verdict}: {change.why}" if change.why else change.verdict
    return change.name, change.row.impl, *times, ratio, spread, verdict


def sentence(comparison: Comparison) -> str:
    """Return a sentence that counts the verdicts, with the rule and the drift."""
    drift = comparison.drift
    counts = {verdict: comparison.count(verdict) for verdict in RANKS}
    compared = counts["faster"] + counts["slower"] + counts["same"]
    slower, faster = counts["slower"], counts["faster"]
    parts = [f"of {compared} rows of pyfast in both, {slower} slower, {faster} faster"]
    for verdict in ("new", "gone", "failed"):
        if counts[verdict]:
            parts.append(f"{counts[verdict]} {verdict}")
    percent = 100 * (MIN_CHANGE - 1)
    rule = f"a change counts from {percent:.0f} % and beyond the spread of both runs"
    if drift.rows:
        spread = f"{drift.low:.2f} to {drift.high:.2f}, {drift.rows} rows of peers"
        rule += f"; the machine's drift, {drift.middle:.2f}x ({spread}), is taken off"
    return f"{', '.join(parts)} ({rule}).{OTHER_MACHINE if comparison.is_other_machine else ''}"


def main(old: Any, new: Any) -> int:
    """Print the table of two files.

    Returns 0, or 1 where something is slower or failed, or 2 where nothing can be compared.
    """
    try:
        comparison = between(read(old), read(new))
    except Damaged as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(table(comparison))
    return int(comparison.count("slower") + comparison.count("failed") > 0)
