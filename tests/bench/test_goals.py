"""Goals and tables of a run."""

import sys

import pytest
from helpers.bench_rows import timed

from bench.report import tables
from bench.report.goals import CaseName, Crossover, Figure, Goal, Growth, Speed, judge


def test_goals_of_speed_say_their_value_spread_and_verdict():
    case, rows = (
        CaseName("linear", "64x64", 1),
        [timed("pyfast", 2.0), timed("torch", 8.0), timed("torch-fp32", 6.0)],
    )
    speed, float32, share, unknown = judge(
        [
            Speed(case, ">=", 3, "torch"),
            Speed(case, "<=", 0.3, "torch-fp32"),
            Speed(case, ">=", 1, "peft"),
        ],
        rows,
    )
    assert (speed.value, speed.low, speed.high, speed.met) == (4, 3.2, 8 / 1.5, True)
    assert float32.value == 3 and float32.met and "torch-fp32 (the faster here)" in float32.text
    assert share.value == pytest.approx(1 / 3) and share.low == 1.5 / 6 and share.met is False
    assert unknown.met is None and unknown.why == "peft: not in this run"
    assert judge([Speed(CaseName("linear", "64x64", 2), ">=", 3, "torch")], rows) == []


def test_the_largest_error_has_a_goal_of_its_own():
    errors = (("pyfast", 1, 2e-3), ("pyfast", 4, 5e-3), ("pyfast", 8, None), ("torch", 1, 9e-3))
    rows = [timed(impl, 1.0, m, max_error=error, error_limit=4e-3) for impl, m, error in errors]
    (missed,) = judge([], rows)
    assert missed.value == pytest.approx(1.25) and missed.met is False and "M=4" in missed.text
    (met,) = judge([], rows[:1])
    assert met.value == pytest.approx(0.5) and met.met


def test_goals_of_a_figure_and_of_growth_are_read_from_rows():
    case = CaseName("linear", "64x64", 64)
    rows = [timed("pyfast", 2.0, 1), timed("pyfast", 3.0, 64, saved_mb=1.5)]
    growth, saved, none = judge(
        [
            Growth(case, "<=", 1.4, CaseName("linear", "64x64", 1), "{:.2f}x the time of M=1"),
            Figure(case, "<=", 2, "{:.1f} MB saved", lambda row: row.saved_mb),
            Figure(case, "<=", 2, "{:.1f} MB at most", lambda row: row.peak_mb),
        ],
        rows,
    )
    assert growth.value == 1.5 and growth.low < 1.5 < growth.high and growth.met is False
    assert saved.met and none.met is None and none.why


def test_a_crossover_lies_where_pyfast_gets_ahead():
    rows = [
        timed(impl, ms, m)
        for m, pyfast, sdpa in ((1, 4, 1), (4, 4, 4), (16, 4, 16))
        for impl, ms in (("pyfast", pyfast), ("sdpa", sdpa))
    ]
    (goal,) = judge([Crossover(CaseName("linear", "64x64", 16), "<=", 8, "sdpa")], rows)
    assert goal.value == 4 and goal.met
    (goal,) = judge([Crossover(CaseName("linear", "64x64", 1), "<=", 8, "sdpa")], rows[:2])
    assert goal.met is False and goal.verdict == "MISSED: not up to 1"


def test_missed_is_red_on_a_terminal(monkeypatch):
    goals = [
        Goal("a: {:.2f}x as fast as b", ">=", 2, value, low=0.9 * value, high=1.1 * value)
        for value in (1.0, 3.0)
    ]
    plain = tables.goals_table(goals)
    assert (
        ">= 2x as fast as b" in plain and "1.00x (0.90x to 1.10x)" in plain and "\033" not in plain
    )
    assert plain.endswith("2 goals: 1 met, 1 missed, 0 not measured")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    red = [line for line in tables.goals_table(goals).splitlines() if line.startswith("\033[31m")]
    assert len(red) == 1 and "MISSED" in red[0] and red[0].endswith("\033[0m")
    monkeypatch.setenv("NO_COLOR", "")
    assert tables.goals_table(goals) == plain


def test_a_table_fits_the_terminal():
    rows = [
        timed("pyfast", 2.0, saved_mb=1.0, max_error=1e-3),
        timed("torch", 4.0, saved_mb=1.0, max_error=1e-3),
    ]
    assert "max err" in tables.tables(rows, 200) and "saved MB" in tables.tables(rows, 200)
    assert max(map(len, tables.tables(rows, 70).splitlines())) <= 70
    assert "2.00 (1.60 to 2.67)" in tables.tables(rows, 70)
