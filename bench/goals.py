"""Goals out of the rows of a run."""

from bench.harness import Row
from bench.report import Goal


class Goals:
    """The figures this package is held against, all in one dtype; `torch` is the peer that is torch's dense layer."""

    def __init__(self, rows: list[Row], torch: str = "torch", dtype: str = "bf16"):
        self.rows = {(r.op, r.shape, r.m, r.impl, r.variant): r for r in rows if r.dtype == dtype}
        self.shapes = list(dict.fromkeys(key[1] for key in self.rows))
        self.absent = {r.impl: r.note for r in rows if r.op == "all"}
        self.torch, self.dtype = torch, dtype
        self.found: list[Goal] = []

    def row(self, op: str, shape: str, m: int | None, impl: str = "pyfast", variant: str = "") -> Row:
        why = self.absent.get(impl, "not in this run")
        missing = Row(op, shape, m, self.dtype, impl, variant, note=why)
        return self.rows.get((op, shape, m, impl, variant), missing)

    def add(self, row: Row, text: str, sense: str, target: float, value=None, why=""):
        """Nothing where the run did not ask for the size."""
        size = (f" M={row.m}" if row.m else "") + (f" {row.variant}" if row.variant else "")
        goal = Goal(f"{row.op} {row.shape} {self.dtype}{size}: {text}", sense, target, value, why)
        if (row.op, row.shape, row.m, "pyfast", row.variant) in self.rows:
            self.found.append(goal)

    def speed(self, op, shape, m, impl, target, sense=">=", remark="", variant=""):
        """pyfast's speed over a peer's (>=), or its time over the peer's (<=)."""
        mine, theirs = self.row(op, shape, m, variant=variant), self.row(op, shape, m, impl, variant)
        text = "{:.2f}x " + ("as fast as" if sense == ">=" else "the time of") + f" {impl}{remark}"
        why = next((f"{r.impl}: {r.note}" for r in (mine, theirs) if not r.ms_p50), "")
        value = None
        if not why:
            value = theirs.ms_p50 / mine.ms_p50
            value = value if sense == ">=" else 1 / value
        self.add(mine, text, sense, target, value, why)

    def dense(self, op, shape, m, target, sense=">=", variant=""):
        """Against torch in bf16 and, where torch is slow at that, in float32 too."""
        self.speed(op, shape, m, self.torch, target, sense, variant=variant)
        impls = (self.torch, f"{self.torch}-fp32")
        bf16, fp32 = (self.row(op, shape, m, impl, variant).ms_p50 for impl in impls)
        if fp32 and not (bf16 and bf16 <= fp32):
            self.speed(op, shape, m, impls[1], target, sense, " (the faster dense layer here)", variant)

    def bandwidth(self, op, shape, m, target):
        row = self.row(op, shape, m)
        value = row.percent if row.bound == "copy" else None
        self.add(row, "{:.0f} % of copy bandwidth", ">=", target, value, row.note)
