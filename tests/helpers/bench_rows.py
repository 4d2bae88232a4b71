"""Rows and cases for tests of the bench."""

import math

from bench.measure import harness
from bench.measure.row import Row


def measure_case(case, *implementations) -> list[Row]:
    """Measure implementations of a case briefly."""
    return harness.measure_case(case, implementations, "cpu", 0.02, math.inf, harness.Forecast())


def timed(impl, ms, m=1, op="linear", **more) -> Row:
    """Return a row with times; pyfast's time is taken to be 2 ms."""
    row = Row(op, "64x64", m, "bf16", impl, ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, **more)
    row.times_pyfast, row.ratio_p20, row.ratio_p80 = ms / 2, ms / 2.5, ms / 1.5
    return row
