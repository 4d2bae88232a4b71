"""Kinds of blocks of the README: what they look up in the results, and how they show it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report.markdown import markdown_table, relative
from bench.report.record import ROOT, Damaged, Record, Row, short

CPU = (
    "AVX512+AVX512-BF16"  # the machine of all blocks, unless they name another: its ISA, or its GPU
)


# --- looking up ---


@dataclass(frozen=True)
class Results:
    """The results of one machine, by what is asked for."""

    records: Sequence[Record]
    machine: str = CPU

    def on(self, machine: str) -> "Results":
        return Results(self.records, machine)

    @property
    def own(self) -> list[Record]:
        return [
            one
            for one in self.records
            if self.machine == one.machine.get("gpu", one.machine.get("isa"))
        ]

    def of(self, kind: str, **where: Any) -> Record:
        """The newest result of a kind that has such a row, or such a fact."""
        found = [
            one
            for one in self.own
            if one.kind == kind and any(_fits(line, where) for line in [one.data, *one.lines])
        ]
        if not found:
            raise Damaged(f"no result of {kind} with {where} on {self.machine}")
        return max(found, key=lambda one: one.date)

    def row(self, kind: str, **where: Any) -> Row:
        found = self.rows(kind, **where)
        if len(found) != 1:
            raise Damaged(
                f"{self.of(kind, **where).path}: {len(found)} timed rows with {where}, where one is wanted"
            )
        return found[0]

    def rows(self, kind: str, **where: Any) -> list[Row]:
        return [row for row in self.of(kind, **where).rows if _fits(vars(row), where)]

    def line(self, kind: str, **where: Any) -> dict[str, Any]:
        return next(line for line in self.of(kind, **where).lines if _fits(line, where))


def _fits(line: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(line.get(key) == value for key, value in where.items())


def link(one: Record, words: str = "record") -> str:
    return f"[{words}]({relative(one.path, ROOT)})"


# --- kinds of blocks ---


@dataclass(frozen=True)
class Line:
    """A line of a table: its rows, and which of their numbers is shown."""

    label: str
    where: dict[str, Any]
    show: str = "ms_p50"
    unit: str = ""


@dataclass(frozen=True)
class Column:
    """The first of these implementations that a line has; in brackets another one."""

    label: str
    impls: tuple[str, ...]
    beside: str = ""
    judged: bool = True  # may be the best of its line, which is bold


@dataclass(frozen=True)
class Comparison:
    """Implementations beside each other: lower is better."""

    kind: str
    corner: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    machine: str = CPU

    def __call__(self, results: Results) -> str:
        results = results.on(self.machine)
        one = results.of(self.kind, **self.lines[0].where)
        head = [f"{self.corner} ({link(one)})", *(column.label for column in self.columns)]
        return markdown_table(head, [self._cells(results, line) for line in self.lines])

    def _cells(self, results: Results, line: Line) -> list[str]:
        rows = {row.impl: getattr(row, line.show) for row in results.rows(self.kind, **line.where)}
        values = [
            next((rows[impl] for impl in column.impls if rows.get(impl)), None)
            for column in self.columns
        ]
        best = min(
            (v for v, column in zip(values, self.columns) if column.judged and v), default=None
        )
        cells = [line.label]
        for value, column in zip(values, self.columns):
            text = "" if value is None else short(value) + line.unit
            text = f"**{text}**" if text and value == best else text
            beside = rows.get(column.beside)
            cells.append(f"{text} ({short(beside)}{line.unit})" if beside else text)
        return cells


@dataclass(frozen=True)
class Pivot:
    """Rows that are no timings, by two of their keys."""

    kind: str
    corner: str
    down: tuple[str, Mapping[str, str]]  # a key, and how its values are called
    across: tuple[str, Mapping[str, str]]
    cell: str

    def __call__(self, results: Results) -> str:
        one = results.of(self.kind)
        (down, downs), (across, acrosses) = self.down, self.across
        cells = {(line[down], line[across]): self.cell.format(**line) for line in one.lines}
        lines = [
            [label, *(cells.get((key, other), "") for other in acrosses)]
            for key, label in downs.items()
        ]
        return markdown_table([f"{self.corner} ({link(one)})", *acrosses.values()], lines)


@dataclass(frozen=True)
class Sentence:
    """Words with places for values, each looked up."""

    words: str
    values: Mapping[str, Callable[[Results], Any]] = field(default_factory=dict)

    def __call__(self, results: Results) -> str:
        return self.words.format(**{name: value(results) for name, value in self.values.items()})


def fact(name: str, kind: str = "nf4") -> Callable[[Results], str]:
    """Of the machine."""
    return lambda results: str(results.of(kind).machine[name])


def file(kind: str, words: str = "record", **where: Any) -> Callable[[Results], str]:
    return lambda results: link(results.of(kind, **where), words)


def picture(kind: str, words: str) -> Callable[[Results], str]:
    """The plot beside a result."""
    return lambda results: f"[{words}]({relative(results.of(kind).path.with_suffix('.png'), ROOT)})"


def timed(
    kind: str, show: str = "ms_p50", machine: str = CPU, **where: Any
) -> Callable[[Results], Any]:
    return lambda results: getattr(results.on(machine).row(kind, **where), show)


def said(kind: str, key: str, scale: float = 1, **where: Any) -> Callable[[Results], float]:
    """Of a row that is no timing."""
    return lambda results: results.line(kind, **where)[key] * scale


def setup(kind: str, key: str, **where: Any) -> Callable[[Results], Any]:
    """How it was run."""
    return lambda results: results.of(kind, **where).data["setup"][key]


def ratio(kind: str, over: str, machine: str = CPU, **where: Any) -> Callable[[Results], float]:
    """pyfast's time over another's."""
    times = timed(kind, "times_pyfast", machine, impl=over, **where)
    return lambda results: 1 / times(results)
