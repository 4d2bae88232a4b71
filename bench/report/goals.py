"""Goals: set beforehand, and judged by the rows of a run.

A bench lists, for each device, rules that turn rows into `Goal`s. A size that the run was not asked
for gives no goal. A size that was asked for but has no figure gives a goal that says why.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from bench.measure.row import Row


@dataclass
class Goal:
    """A figure to reach; `text` has a placeholder for the value."""

    text: str
    sense: str  # ">=" or "<="
    target: float
    value: float | None = None
    why: str = ""  # the reason why it was not measured
    measured: str = ""  # the figures that the value was computed from
    low: float | None = None  # the spread of the value, p20 to p80
    high: float | None = None
    failed: bool = False  # there is no figure because pyfast did not get there

    @property
    def met(self) -> bool | None:
        """Return whether the goal is met, or None where nothing was measured."""
        if self.failed:
            return False
        if self.value is None:
            return None
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target

    @property
    def verdict(self) -> str:
        missed = f"MISSED: {self.why}" if self.failed else "MISSED"
        return {True: "met", False: missed, None: f"not measured: {self.why}"}[self.met]

    def format_value(self, value: float | None) -> str:
        """Format a value as the placeholder of the text says."""
        if value is None:
            return "-"
        placeholder = re.search(r"\{.*?\}x?", self.text)
        return (placeholder[0] if placeholder else "{:.3g}").format(value)

    def table_cells(self) -> dict[str, str]:
        """Return the goal's line of the table, by column."""
        subject, _, phrase = self.text.partition(": ")
        target = re.sub(r"\{.*?\}", f"{self.target:g}", phrase or self.text)
        ratio = self.format_value(self.value)
        if self.low is not None:
            ratio += f" ({self.format_value(self.low)} to {self.format_value(self.high)})"
        return {
            "of": subject if phrase else "",
            "goal": f"{self.sense} {target}",
            "measured": self.measured or "-",
            "ratio": ratio,
            "verdict": self.verdict,
        }


def format_figure(value: float) -> str:
    """Format a value with three digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class CaseName:
    """A case, as the rows name it."""

    op: str
    shape: str
    m: int | None = None
    variant: str = ""
    dtype: str = "bf16"

    @classmethod
    def of_row(cls, row: Row) -> "CaseName":
        return cls(row.op, row.shape, row.m, row.variant, row.dtype)

    def __str__(self) -> str:
        size = (f" M={self.m}" if self.m else "") + (f" {self.variant}" if self.variant else "")
        return f"{self.op} {self.shape} {self.dtype}{size}"


class Rows:
    """The rows of a run, indexed by case and implementation."""

    def __init__(self, rows: list[Row]):
        self.all = rows
        self.by_case = {(CaseName.of_row(row), row.impl): row for row in rows}
        self.absent = {row.impl: row.note for row in rows if row.op == "all"}

    def get(self, case: CaseName, impl: str = "pyfast") -> Row:
        """Return the row, or an empty one whose note says why there is none."""
        row = self.by_case.get((case, impl))
        if row is not None:
            return row
        note = self.absent.get(impl, "not in this run")
        return Row(case.op, case.shape, case.m, case.dtype, impl, case.variant, note=note)


@dataclass(frozen=True)
class GoalRule:
    """A rule that makes goals of the rows, if they have its case."""

    case: CaseName
    sense: str
    target: float

    def goals(self, rows: Rows) -> Iterator[Goal]:
        if (self.case, "pyfast") not in rows.by_case:
            return
        failed = rows.get(self.case).failed
        for goal in self.measure(rows):
            yield replace(goal, text=f"{self.case}: {goal.text}", failed=failed or goal.failed)

    def measure(self, rows: Rows) -> Iterator[Goal]:
        """Yield goals whose text does not name the case yet."""
        raise NotImplementedError

    def make_goal(self, text: str, value: float | None, why: str = "", **more) -> Goal:
        return Goal(text, self.sense, self.target, value, why if value is None else "", **more)


@dataclass(frozen=True)
class Speed(GoalRule):
    """Speed beside another implementation (>=), or time over its time (<=).

    `impls` may name several, separated by spaces; the fastest of them counts.
    """

    impls: str
    remark: str = ""

    def measure(self, rows):
        pyfast, peers = rows.get(self.case), [rows.get(self.case, i) for i in self.impls.split()]
        timed = sorted((row for row in peers if row.ms_p50), key=lambda row: row.ms_p50)
        best = timed[0] if timed else peers[0]
        absent = ", ".join(row.impl for row in peers if not row.ms_p50)
        remark = f"{self.remark}, without {absent}" if absent and timed else self.remark
        yield self._compare(pyfast, best, remark)
        # Where torch is slow in 16 bits, its float32 is the one to be ahead of.
        float32 = rows.get(self.case, f"{best.impl}-fp32")
        if float32.ms_p50 and not (best.ms_p50 and best.ms_p50 <= float32.ms_p50):
            yield self._compare(pyfast, float32, f"{self.remark} (the faster here)")

    def _compare(self, pyfast: Row, peer: Row, remark: str) -> Goal:
        is_speed = self.sense == ">="
        text = "{:.2f}x " + ("as fast as " if is_speed else "the time of ") + peer.impl + remark
        if not (pyfast.ms_p50 and peer.ms_p50):
            untimed = [row for row in (pyfast, peer) if not row.ms_p50]
            return self.make_goal(text, None, "; ".join(f"{r.impl}: {r.note}" for r in untimed))
        value, low, high = peer.times_pyfast, peer.ratio_p20, peer.ratio_p80
        if not is_speed:
            value, low, high = 1 / value, high and 1 / high, low and 1 / low
        pyfast_ms, peer_ms = format_figure(pyfast.ms_p50), format_figure(peer.ms_p50)
        measured = f"{pyfast_ms} ms, {peer.impl} {peer_ms}"
        return self.make_goal(text, value, measured=measured, low=low, high=high)


@dataclass(frozen=True)
class Figure(GoalRule):
    """A figure that a function reads from a row, then scaled."""

    text: str
    read: Callable[[Row], float | bool | None]
    scale: float = 1.0
    impl: str = "pyfast"

    def measure(self, rows):
        row = rows.get(self.case, self.impl)
        value = self.read(row)
        scaled = None if value is None else self.scale * value
        yield self.make_goal(self.text, scaled, row.note or "it has no such figure")


def bandwidth_goal(case: CaseName, percent: float) -> Figure:
    """Return the rule for a share of the copy bandwidth."""
    text = "{:.0f} % of copy bandwidth"
    return Figure(
        case, ">=", percent, text, lambda row: row.percent if row.bound == "copy" else None
    )


@dataclass(frozen=True)
class Growth(GoalRule):
    """The ratio of one field of a row at two sizes."""

    base: CaseName
    text: str
    field: str = "ms_p50"

    def measure(self, rows):
        row, base = rows.get(self.case), rows.get(self.base)
        value, base_value = getattr(row, self.field), getattr(base, self.field)
        if value is None or not base_value:
            yield self.make_goal(self.text, None, row.note or base.note or "it has no such figure")
            return
        spread = {}
        if self.field == "ms_p50":
            spread = {"low": row.ms_p20 / base.ms_p80, "high": row.ms_p80 / base.ms_p20}
        measured = f"{format_figure(value)}, from {format_figure(base_value)}"
        yield self.make_goal(self.text, value / base_value, measured=measured, **spread)


@dataclass(frozen=True)
class Crossover(GoalRule):
    """The size from which pyfast is ahead of an implementation, whatever the case's size."""

    impl: str

    def measure(self, rows):
        name = (self.case.op, self.case.shape, self.case.variant)
        sizes = [row for row in rows.all if (row.op, row.shape, row.variant) == name]
        value, words = find_crossover(sizes, self.impl)
        failed = words.startswith("not up to")
        yield self.make_goal(f"ahead of {self.impl} from {{:.0f}} on", value, words, failed=failed)


def find_crossover(rows: list[Row], impl: str) -> tuple[float | None, str]:
    """Return the size from which pyfast is ahead, and words for it.

    Between two sizes it lies on a line through the logarithms.
    """
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


def judge(rules: Iterable[GoalRule], rows: list[Row]) -> list[Goal]:
    """Return all goals of the rules, and last the goal for pyfast's errors."""
    indexed = Rows(rows)
    return [*itertools.chain(*(rule.goals(indexed) for rule in rules)), *error_goals(rows)]


def error_goals(rows: list[Row]) -> list[Goal]:
    """Return the goal that the worst of pyfast's rows errs no more than it may."""
    checked = [row for row in rows if row.impl == "pyfast" and row.max_error is not None]
    if not checked:
        return []
    row = max(checked, key=lambda row: row.max_error / row.error_limit)
    text = f"{CaseName.of_row(row)}: {{:.2f}}x its limit is the largest error"
    measured = f"{row.max_error:.1e}, limit {row.error_limit:.1e}"
    return [Goal(text, "<=", 1.0, row.max_error / row.error_limit, measured=measured)]
