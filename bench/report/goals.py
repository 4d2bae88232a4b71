"""Goals: what is said beforehand, and what comes out of the rows of a run.

A bench lists, for each device, objects that turn rows into `Goal`s. A size that the run was not
asked for gives none; what was asked for and has no figure gives one that says why.
"""

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from bench.measure.case import Row

RED, PLAIN = "\033[31m", "\033[0m"


@dataclass
class Goal:
    """A figure to reach; `text` has a place for the value."""

    text: str
    sense: str  # ">=" or "<="
    target: float
    value: float | None = None
    why: str = ""  # it was not measured
    measured: str = ""  # what the value was made of
    low: float | None = None  # the spread of the value, p20 to p80
    high: float | None = None
    failed: bool = False  # there is no figure, since pyfast did not get there

    @property
    def met(self) -> bool | None:
        if self.failed:
            return False
        if self.value is None:
            return None
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target

    @property
    def verdict(self) -> str:
        missed = f"MISSED: {self.why}" if self.failed else "MISSED"
        return {True: "met", False: missed, None: f"not measured: {self.why}"}[self.met]

    def show(self, value: float | None) -> str:
        place = re.search(r"\{.*?\}x?", self.text)
        return "-" if value is None else (place[0] if place else "{:.3g}").format(value)

    def line(self) -> dict[str, str]:
        """Of the table."""
        what, _, phrase = self.text.partition(": ")
        aim = re.sub(r"\{.*?\}", f"{self.target:g}", phrase or self.text)
        spread = (
            f" ({self.show(self.low)} to {self.show(self.high)})" if self.low is not None else ""
        )
        ratio = self.show(self.value) + spread
        line = {
            "of": what if phrase else "",
            "goal": f"{self.sense} {aim}",
            "measured": self.measured or "-",
        }
        return line | {"ratio": ratio, "verdict": self.verdict}


def figure(value: float) -> str:
    """Three digits, no exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def red(text: str) -> str:
    """On a terminal, unless NO_COLOR is set."""
    return f"{RED}{text}{PLAIN}" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


@dataclass(frozen=True)
class At:
    """A case, as the rows name it."""

    op: str
    shape: str
    m: int | None = None
    variant: str = ""
    dtype: str = "bf16"

    def __str__(self) -> str:
        size = (f" M={self.m}" if self.m else "") + (f" {self.variant}" if self.variant else "")
        return f"{self.op} {self.shape} {self.dtype}{size}"


class Rows:
    """Those of a run, by what they are of."""

    def __init__(self, rows: list[Row]):
        self.all = rows
        self.found = {(At(r.op, r.shape, r.m, r.variant, r.dtype), r.impl): r for r in rows}
        self.absent = {r.impl: r.note for r in rows if r.op == "all"}

    def get(self, at: At, impl: str = "pyfast") -> Row:
        why = self.absent.get(impl, "not in this run")
        return self.found.get((at, impl)) or Row(
            at.op, at.shape, at.m, at.dtype, impl, at.variant, note=why
        )


@dataclass(frozen=True)
class Aim:
    """One that is held against the rows, if they have its case."""

    at: At
    sense: str
    target: float

    def goals(self, rows: Rows) -> Iterator[Goal]:
        if (self.at, "pyfast") in rows.found:
            failed = rows.get(self.at).failed
            for goal in self.measured(rows):
                text = f"{self.at}: {goal.text}"
                yield replace(
                    goal,
                    text=text,
                    sense=self.sense,
                    target=self.target,
                    failed=failed or goal.failed,
                )

    def measured(self, rows: Rows) -> Iterator[Goal]:
        """Only what was found."""
        raise NotImplementedError

    def found(self, text: str, value: float | None, why: str = "", **more) -> Goal:
        return Goal(text, self.sense, self.target, value, why if value is None else "", **more)


@dataclass(frozen=True)
class Speed(Aim):
    """As fast as another implementation (>=), or its time (<=); as the best, of several."""

    impls: str
    remark: str = ""

    def measured(self, rows):
        mine, theirs = rows.get(self.at), [rows.get(self.at, impl) for impl in self.impls.split()]
        timed = sorted((row for row in theirs if row.ms_p50), key=lambda row: row.ms_p50)
        best = timed[0] if timed else theirs[0]
        absent = ", ".join(row.impl for row in theirs if not row.ms_p50)
        remark = f"{self.remark}, without {absent}" if absent and timed else self.remark
        yield self._against(mine, best, remark)
        # Where torch is slow in 16 bits, its float32 is what to be ahead of.
        wide = rows.get(self.at, f"{best.impl}-fp32")
        if wide.ms_p50 and not (best.ms_p50 and best.ms_p50 <= wide.ms_p50):
            yield self._against(mine, wide, f"{self.remark} (the faster here)")

    def _against(self, mine: Row, theirs: Row, remark: str) -> Goal:
        faster = self.sense == ">="
        text = "{:.2f}x " + ("as fast as " if faster else "the time of ") + theirs.impl + remark
        if not (mine.ms_p50 and theirs.ms_p50):
            return self.found(
                text, None, "; ".join(f"{r.impl}: {r.note}" for r in (mine, theirs) if not r.ms_p50)
            )
        value, low, high = theirs.times_pyfast, theirs.ratio_p20, theirs.ratio_p80
        if not faster:
            value, low, high = 1 / value, high and 1 / high, low and 1 / low
        measured = f"{figure(mine.ms_p50)} ms, {theirs.impl} {figure(theirs.ms_p50)}"
        return self.found(text, value, measured=measured, low=low, high=high)


@dataclass(frozen=True)
class Figure(Aim):
    """What a row says, once scaled."""

    text: str
    of: Callable[[Row], float | bool | None]
    scale: float = 1.0
    impl: str = "pyfast"

    def measured(self, rows):
        row = rows.get(self.at, self.impl)
        value = self.of(row)
        yield self.found(
            self.text,
            None if value is None else self.scale * value,
            row.note or "it has no such figure",
        )


def bandwidth(at: At, percent: float) -> Figure:
    """Of a copy's."""
    text = "{:.0f} % of copy bandwidth"
    return Figure(at, ">=", percent, text, lambda row: row.percent if row.bound == "copy" else None)


@dataclass(frozen=True)
class Growth(Aim):
    """What a row says, over what that of another size does."""

    base: At
    text: str
    field: str = "ms_p50"

    def measured(self, rows):
        row, base = rows.get(self.at), rows.get(self.base)
        a, b = getattr(row, self.field), getattr(base, self.field)
        known = a is not None and b
        measured = f"{figure(a)}, from {figure(b)}" if known else ""
        spread = {}
        if known and self.field == "ms_p50":
            spread = {"low": row.ms_p20 / base.ms_p80, "high": row.ms_p80 / base.ms_p20}
        why = row.note or base.note or "it has no such figure"
        yield self.found(self.text, a / b if known else None, why, measured=measured, **spread)


@dataclass(frozen=True)
class Crossover(Aim):
    """The size from which pyfast is ahead of an implementation, whatever the size of the case."""

    impl: str

    def measured(self, rows):
        sizes = [row for row in rows.all if (row.op, row.shape) == (self.at.op, self.at.shape)]
        value, words = crossover(
            [row for row in sizes if row.variant == self.at.variant], self.impl
        )
        failed = words.startswith("not up to")
        yield self.found(f"ahead of {self.impl} from {{:.0f}} on", value, words, failed=failed)


def crossover(rows: list[Row], impl: str) -> tuple[float | None, str]:
    """Between two sizes it is on a line through the logarithms."""
    times = {(row.m, row.impl): row.ms_p50 for row in rows if row.ms_p50}
    sizes = sorted(n for n, name in times if name == "pyfast" and (n, impl) in times)
    leads = [math.log(times[n, impl] / times[n, "pyfast"]) for n in sizes]
    if not sizes:
        return None, "not measured"
    if leads[-1] < 0:
        return None, f"not up to {sizes[-1]}"
    behind = [i for i, lead in enumerate(leads) if lead < 0]
    if not behind:
        return sizes[0], f"from {sizes[0]} or fewer"
    last = behind[-1]
    share = leads[last] / (leads[last] - leads[last + 1])
    n = sizes[last] * (sizes[last + 1] / sizes[last]) ** share
    return n, f"from {n:.0f}"


def judge(aims: Iterable[Aim], rows: list[Row]) -> list[Goal]:
    known = Rows(rows)
    return [*itertools.chain(*(aim.goals(known) for aim in aims)), *accuracy(rows)]


def accuracy(rows: list[Row]) -> list[Goal]:
    """That pyfast errs no more than it may, in the worst of its rows."""
    checked = [row for row in rows if row.impl == "pyfast" and row.max_error is not None]
    if not checked:
        return []
    row = max(checked, key=lambda row: row.max_error / row.error_limit)
    text = f"{At(row.op, row.shape, row.m, row.variant, row.dtype)}: {{:.2f}}x its limit is the largest error"
    measured = f"{row.max_error:.1e}, limit {row.error_limit:.1e}"
    return [Goal(text, "<=", 1.0, row.max_error / row.error_limit, measured=measured)]
