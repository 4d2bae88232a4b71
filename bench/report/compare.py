"""What became faster or slower between two results of one bench: `python -m bench.report.compare
OLD.json NEW.json`.

A row is the same row where op, shape, M, dtype, implementation and variant are the same. Peers
whose code is the same in both runs tell how much slower or faster the machine was: the median of
their changes is its drift, and how far they spread (p20 to p80) is how well that is known, wider
for a row whose own case's peers moved by more. A row of pyfast is slower, or faster, only where,
without that drift, the p20 to p80 of its old and of its new times do not overlap, and its median
has moved by LEAST or more.
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
from bench.report.record import Damaged, Record, Row, read, short

LEAST = 1.05  # times: a change below that is none
ENOUGH = 3  # peers' rows, for a drift
FEW = 3  # calls: fewer have no spread, and tell no change
# Whose code an implementation is, by the beginning of its name, beside torch's.
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
MACHINE = "gpu", "cpu", "cores", "isa"
ELSEWHERE = " Another machine: what is faster or slower may be its doing."


@dataclass(frozen=True)
class Drift:
    """The machine's: times of the new run over those of the old one, for code that did not change."""

    low: float = 1.0
    middle: float = 1.0
    high: float = 1.0
    rows: int = 0  # that tell it


@dataclass(frozen=True)
class Change:
    """One row in both runs; `ratio` is new over old without the machine's drift, `low` and `high` its spread."""

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
    """The changes of pyfast's rows, and what is to be known about them."""

    changes: list[Change]
    drift: Drift
    warnings: list[str] = field(default_factory=list)
    elsewhere: bool = False  # on another machine

    def __getitem__(self, at):
        return self.changes[at]

    def __len__(self) -> int:
        return len(self.changes)

    def how_many(self, verdict: str) -> int:
        return sum(change.verdict == verdict for change in self.changes)


def between(old: Mapping[str, Any] | Record, new: Mapping[str, Any] | Record) -> Comparison:
    """Of two results of one bench."""
    old, new = (run if isinstance(run, Record) else Record.of(run) for run in (old, new))
    if old.kind != new.kind:
        raise Damaged(
            f"nothing to compare: the old result is of {old.kind}, the new one of {new.kind}"
        )
    for name, run in (("old", old), ("new", new)):
        if not any(row.ms_p50 for row in run.comparable):
            raise Damaged(f"nothing to compare: the {name} result, {run.kind}, has no timed rows")
    before, after = ({(*row.case, row.impl): row for row in run.comparable} for run in (old, new))
    moves, warnings = _moves(before, after, old.machine, new.machine)
    drift = _drift(moves)
    mine = [key for key in dict.fromkeys([*before, *after]) if _ours(key[-1])]
    changes = [
        _change(before.get(key), after.get(key), drift, moves.get(key[:-1], [])) for key in mine
    ]
    lost = Counter(key[-1] for key in before.keys() ^ after.keys() if not _ours(key[-1]))
    if lost:
        names = ", ".join(f"{impl} {count}" for impl, count in lost.items())
        warnings.append(f"rows of peers in one of the runs only: {names}")
    elsewhere = any(old.machine.get(name) != new.machine.get(name) for name in MACHINE)
    return Comparison([change for change in changes if change], drift, warnings, elsewhere)


def _ours(impl: str) -> bool:
    return impl.split("-")[0] == "pyfast" or "+" in impl  # half ours


def _moves(
    before: Mapping, after: Mapping, old: Mapping, new: Mapping
) -> tuple[dict[tuple, list[float]], list[str]]:
    """By case, the logarithms of new over old of peers whose code is the same; and what is to be known about them."""
    changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
    names = dict.fromkeys((*MACHINE, "torch", *itertools.chain(*PACKAGES.values())))
    warnings = [
        f"another {name}: {old[name]} before, {new[name]} now" for name in names if name in changed
    ]
    if "torch" in changed:
        return {}, [
            *warnings,
            "with another torch no peer is the same code: the machine's drift is not taken off",
        ]
    moves: dict[tuple, list[float]] = {}
    for key in before.keys() & after.keys():
        times = before[key].ms_p50, after[key].ms_p50
        if all(times) and not _ours(key[-1]) and not changed.intersection(_packages(key[-1])):
            moves.setdefault(key[:-1], []).append(math.log(times[1] / times[0]))
    if sum(map(len, moves.values())) < ENOUGH:
        return {}, [
            *warnings,
            "too few rows of unchanged peers: the machine's drift is not known, nor taken off",
        ]
    return moves, warnings


def _drift(moves: Mapping[tuple, list[float]]) -> Drift:
    found = [*itertools.chain(*moves.values())]
    return Drift(*map(math.exp, quantiles(found)), len(found)) if found else Drift()


def _packages(impl: str) -> list[str]:
    return next((names for start, names in PACKAGES.items() if impl.startswith(start)), [])


def _change(
    old: Row | None, new: Row | None, drift: Drift, beside: Sequence[float]
) -> Change | None:
    """Of one row; `beside` is how its own case's peers moved, for they were timed in turns with it."""
    was, now = (row.ms_p50 if row else None for row in (old, new))
    if not was and not now:
        return None  # not measured, then as now
    if not now:
        why = new.note if new else "not in the new run"
        return Change(old, "failed" if why.startswith("WRONG") else "gone", old_ms=was, why=why)
    if not was:
        return Change(new, "new", new_ms=now, why=old.note if old else "not in the old run")
    local = math.exp(statistics.median(beside)) if beside else drift.middle
    ratio = now / was / drift.middle
    low = new.ms_p20 / old.ms_p80 / max(drift.high, local)
    high = new.ms_p80 / old.ms_p20 / min(drift.low, local)
    moved = (low > 1 and ratio >= LEAST) or (high < 1 and ratio <= 1 / LEAST)
    few = min(row.calls or FEW for row in (old, new)) < FEW
    verdict = "same" if few or not moved else "slower" if low > 1 else "faster"
    return Change(
        new, verdict, was, now, low, ratio, high, f"fewer than {FEW} calls" if moved and few else ""
    )


def table(found: Comparison) -> str:
    """Changed rows first, most changed on top, and a sentence that says it all, last."""
    ranks = ("failed", "slower", "faster", "gone", "new", "same")
    ordered = sorted(
        found, key=lambda change: (ranks.index(change.verdict), -abs(math.log(change.ratio or 1)))
    )
    head = ("row", "impl", "old ms", "new ms", "new / old", "p20 to p80", "verdict")
    lines = [head, *(_cells(change) for change in ordered)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    shown = [_aligned(line, widths) for line in lines]
    return "\n".join(
        [*shown, "", *(f"note: {warning}" for warning in found.warnings), sentence(found)]
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Numbers, the third to the fifth, to the right."""
    padded = (
        c.rjust(w) if 2 <= at <= 4 else c.ljust(w) for at, (c, w) in enumerate(zip(cells, widths))
    )
    return "  ".join(padded).rstrip()


def _cells(change: Change) -> tuple[str, ...]:
    ms = ("-" if ms is None else short(ms) for ms in (change.old_ms, change.new_ms))
    ratio, spread = "-", "-"
    if change.ratio is not None:
        ratio, spread = f"{change.ratio:.3f}", f"{change.low:.2f} to {change.high:.2f}"
    verdict = f"{change.verdict}: {change.why}" if change.why else change.verdict
    return change.name, change.row.impl, *ms, ratio, spread, verdict


def sentence(found: Comparison) -> str:
    drift = found.drift
    counts = {
        verdict: found.how_many(verdict)
        for verdict in ("faster", "slower", "same", "new", "gone", "failed")
    }
    compared = counts["faster"] + counts["slower"] + counts["same"]
    parts = [
        f"of {compared} rows of pyfast in both, {counts['slower']} slower, {counts['faster']} faster"
    ]
    parts += [
        f"{counts[verdict]} {verdict}" for verdict in ("new", "gone", "failed") if counts[verdict]
    ]
    about = f"a change counts from {100 * (LEAST - 1):.0f} % and beyond the spread of both runs"
    if drift.rows:
        spread = f"{drift.low:.2f} to {drift.high:.2f}"
        about += f"; the machine's drift, {drift.middle:.2f}x ({spread}, {drift.rows} rows of peers), is taken off"
    return f"{', '.join(parts)} ({about}).{ELSEWHERE if found.elsewhere else ''}"


def main(old: Any, new: Any) -> int:
    """Prints the table; 0, or 1 where something is slower or failed, or 2 where nothing can be compared."""
    try:
        found = between(read(old), read(new))
    except Damaged as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return int(found.how_many("slower") + found.how_many("failed") > 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m bench.report.compare OLD.json NEW.json")
    raise SystemExit(main(*sys.argv[1:]))
