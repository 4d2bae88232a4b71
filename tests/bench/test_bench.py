"""The benches: what they write, what they refuse to time, and what goes wrong without ending them."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench import options, session
from bench.lora.bench import LoRA
from bench.lora.peers import Frozen, FrozenFloat32
from bench.lora.peers import PyFast as PyFastLoRA
from bench.measure import harness, machine, timing
from bench.measure import peer as peers
from bench.measure.case import BOTH
from bench.measure.progress import Progress
from bench.measure.row import Row
from bench.nf4 import peers as nf4_peers
from bench.nf4.peers import PyFast, Torch
from bench.nf4.problem import Linear
from bench.reformer.duplication import Setup, Training
from bench.report import tables
from bench.report.goals import CaseName, Crossover, Figure, Goal, Growth, Speed, judge
from bench.reversible.peers import Checkpoint
from bench.reversible.peers import Torch as Stored
from bench.reversible.problem import MemoryOnly, Reversible

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "bench"]


def measure_case(case, *implementations):
    return harness.measure_case(case, implementations, "cpu", 0.02, math.inf, harness.Forecast())


def python(*words):
    return subprocess.run([*PYTHON, *words], cwd=ROOT, capture_output=True, text=True)


def timed(impl, ms, m=1, op="linear", **more):
    row = Row(op, "64x64", m, "bf16", impl, ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, **more)
    row.times_pyfast, row.ratio_p20, row.ratio_p80 = ms / 2, ms / 2.5, ms / 1.5
    return row


# --- whole runs ---


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory):
    """Every op, tiny, in one call; peers whose import takes seconds apart."""
    out = tmp_path_factory.mktemp("bench")
    names = "pyfast,pyfast-plain,torch,frozen,sdpa"
    size = ["--shapes", "64x64", "--m", "2", "--dtype", "bf16", "--peers", names, "--budget", "5"]
    done = python("--quick", *size, "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.parametrize("op", bench.OPS)
def test_an_op_is_measured_and_written(op, all_ops):
    out, printed = all_ops
    found = json.loads((out / f"{op}.json").read_text())
    assert found["bench"] == op and "--m 2" in found["flags"] and "stopped" not in found
    assert {"cpu", "torch", "commit", "date"} <= found["machine"].keys() and found["ceilings"][
        "copy"
    ] > 1e8
    mine = [row for row in found["rows"] if row["impl"] == "pyfast"]
    assert mine and "WRONG" not in printed
    for row in mine:
        assert (
            0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            and row["calls"] >= row["rounds"] > 0
        ), row
        assert (
            row["max_error"] <= row["error_limit"] and row["moved_bytes"] > 0 and row["percent"] > 0
        ), row
        assert row["peak_mb"] >= row["held_mb"] >= 0 and row["times_pyfast"] == 1, row
    lines = list(csv.DictReader((out / f"{op}.csv").read_text().splitlines()))
    assert [line["ms_p50"] for line in lines] == [str(row["ms_p50"] or "") for row in found["rows"]]
    assert (out / f"{op}.png").read_bytes().startswith(b"\x89PNG") and f"{op}.json" in printed


def test_beside_the_times(all_ops):
    out, _ = all_ops
    accuracy, drift = (
        json.loads((out / f"{name}.json").read_text())["rows"]
        for name in ("lsh_attention-accuracy", "reversible-drift")
    )
    assert len(accuracy) == 5 and all(line["ms fwd+bwd"] > 0 for line in accuracy)
    assert [line["impl"] for line in drift] == ["pyfast"] and drift[0]["gradients"] == 0


def test_peers_beside_pyfast(all_ops):
    """Each has a ratio with a spread around it."""
    rows = [
        row
        for op in bench.OPS
        for row in json.loads((all_ops[0] / f"{op}.json").read_text())["rows"]
    ]
    others = [row for row in rows if row["impl"] in ("torch", "frozen", "sdpa")]
    assert {row["impl"] for row in others} == {"torch", "frozen", "sdpa"}
    assert all(0 < row["ratio_p20"] <= row["times_pyfast"] <= row["ratio_p80"] for row in others)


TINY = {
    "duplication": ["--length", "32", "--width", "16", "--batch", "2", "--budget", "1"],
    "learning": ["--length", "64", "--width", "24", "--batch", "2", "--steps", "3"],
    "long_attention": ["--tokens", "256"],
}


@pytest.mark.parametrize("name", TINY)
def test_what_is_no_op_runs_too(name, tmp_path):
    assert (
        bench.main([name, "--quick", *TINY[name], "--device", "cpu", "--out", str(tmp_path)]) == 0
    )
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert (
        found["bench"] == name
        and (found.get("rows") or found["checked"])
        and "--quick" in found["flags"]
    )


def test_against_an_older_run(all_ops, tmp_path, capsys):
    """Given as a folder, of results that say that it was a hundred times as fast."""
    out, _ = all_ops
    old = json.loads((out / "adapter.json").read_text())
    for row in old["rows"]:
        if row["impl"] == "pyfast":
            row |= {key: row[key] / 100 for key in ("ms_p20", "ms_p50", "ms_p80")}
    (tmp_path / "adapter.json").write_text(json.dumps(old))
    size = [
        "--shapes",
        "64x64",
        "--m",
        "2",
        "--peers",
        "pyfast,torch",
        "--budget",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert (
        bench.main(["adapter", "--quick", *size, "--device", "cpu", "--compare", str(tmp_path)])
        == 0
    )
    assert "slower" in capsys.readouterr().out
    assert "nothing to compare" in bench.compare_with_older({"adapter": old}, out / "nf4.json")


def test_flags_of_a_record_leave_out_where_it_went():
    assert options._flags(["--quick", "--out", "/tmp/x", "--m", "1"]) == "--quick --m 1"
    assert (
        options._flags(["--out=here", "--full"]) == "--full"
        and options._flags(["--out", "a"]) == ""
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_what_is_finished(number, tmp_path):
    sizes = ",".join(map(str, range(1, 200)))
    words = ["nf4", "--shapes", "64x64", "--m", sizes, "--peers", "pyfast,torch", "--budget", "300"]
    command = [*PYTHON, *words, "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    path, end = tmp_path / "nf4.json", time.monotonic() + 300
    while not path.exists() or len(json.loads(path.read_text())["rows"]) < 8:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped" in said, said
    found = json.loads(path.read_text())
    assert found["stopped"].startswith("after ") and found["stopped"].endswith("of 599 cases")
    assert len(found["rows"]) >= 8 and all(
        row["ms_p50"] for row in found["rows"] if row["impl"] == "pyfast"
    )
    assert (
        "linear 64x64, bf16" in printed
        and found["stopped"] in printed
        and (tmp_path / "nf4.png").exists()
    )
    assert not list(tmp_path.glob(".*"))


# --- the command line ---


@pytest.mark.parametrize(
    "words, said",
    [
        (["nf5"], "unknown bench 'nf5'; there are adapter,"),
        (["nf4", "lora", "nf5"], "unknown bench 'nf5'"),
        (["nf4", "--sizes", "3"], "python -m bench nf4: unrecognized arguments: --sizes 3"),
        (["nf4", "--dtype", "int8"], "--dtype: unknown 'int8'; there are bf16, fp32, fp16"),
        (["nf4", "--peers", "bits"], "--peers: unknown 'bits'; there are pyfast, torch,"),
        (
            ["adapter", "lora", "--peers", "peft"],
            "bench adapter: --peers: none of these; there are pyfast, torch",
        ),
        (["nf4", "--shapes", "64x64,64"], "--shapes: '64' must be 2 numbers, such as 4096x4096"),
        (["nf4", "--shapes", "64xK"], "--shapes: '64xK' must be 2 numbers, such as 4096x4096"),
        (["nf4", "--m", "1,two"], "'two' must be a number such as 512, 16K or 1M"),
        (
            ["long_context", "--tokens", "4K,x"],
            "argument --tokens: 'x' must be a number such as 512, 16K or 1M",
        ),
        (["long_context", "--depth", "two"], "argument --depth: 'two' must be a number such as"),
        (
            ["long_context", "--depth", "6,3"],
            "argument --depth: 3: layers come in pairs, local and LSH",
        ),
        (["nf4", "--budget", "0"], "--budget: 0 must be more than 0"),
        (["nf4", "--quick", "--full"], "not allowed with argument --quick"),
        (["nf4", "--compare", "no/such"], "no/such: there is no such file or folder"),
        (
            ["long_context", "--budget", "3"],
            "bench long_context: unrecognized arguments: --budget 3",
        ),
        (
            ["nf4", "learning", "--compare", "tests"],
            "bench learning: unrecognized arguments: --compare tests",
        ),
        (["training_step", "--compare", "no/such"], "no/such: there is no such file or folder"),
        (["goals", "no/such"], "no/such: there is no such file or folder"),
        (["compare", "tests"], "the following arguments are required: NEW"),
    ],
)
def test_wrong_words(words, said, capsys):
    try:
        code = bench.main(words)
    except SystemExit as error:
        code = error.code
    out, line = capsys.readouterr()
    assert code == 2 and not out and said in line and line.count("\n") == 1, line


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["nf4", "--device", "cuda"])
    assert "--device cuda: this machine shows no CUDA device" in capsys.readouterr().err


def test_the_list(capsys):
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    assert all(
        f"python -m bench {name} " in listed for name in (*bench.OPS, "learning", *bench.COMMANDS)
    )


@pytest.mark.parametrize("words", [[], ["goals", "bench/results"]])
def test_a_reader_that_leaves_early_sees_no_traceback(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PYTHON, *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_goals_of_a_folder(all_ops, tmp_path, capsys):
    assert bench.main(["goals", str(all_ops[0])]) == 0
    assert (
        f"{len(bench.OPS)} goals: {len(bench.OPS)} met" in capsys.readouterr().out
    )  # of the errors alone
    goal = {
        "text": "linear: {:.2f}x as fast",
        "sense": ">=",
        "target": 4,
        "value": 3.0,
        "met": False,
        "why": "",
    }
    (tmp_path / "some.json").write_text(json.dumps({"goals": [goal]}))
    assert bench.main(["goals", str(tmp_path)]) == 0
    assert "MISSED" in capsys.readouterr().out


# --- what is refused, and what fails ---


class Wrong(PyFast):
    """Off by a half, here and there."""

    name = "wrong"
    calls = 0

    def linear(self, layer):
        function, held = super().linear(layer)

        def call(x):
            Wrong.calls += 1
            return function(x) + (torch.arange(len(layer.source)) % 7 == 0) * 0.5

        return call, held


def test_a_wrong_op_is_not_timed():
    Wrong.calls = 0
    right, wrong = measure_case(Linear("64x64", "bf16", "cpu", 4), PyFast(), Wrong())
    assert right.ms_p50 and right.max_error <= right.error_limit
    assert wrong.note.startswith("WRONG: max error") and wrong.ms_p50 is None and wrong.calls == 0
    assert wrong.max_error > 10 * wrong.error_limit and Wrong.calls == 1


def test_where_pyfast_is_wrong_the_exit_status_says_so(tmp_path, monkeypatch):
    words = [
        "nf4",
        "--shapes",
        "64x64",
        "--m",
        "4",
        "--budget",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setitem(nf4_peers.PEERS, "wrong", Wrong())
    assert bench.main([*words, "--peers", "pyfast,wrong"]) == 0
    monkeypatch.setattr(Wrong, "name", "pyfast")
    monkeypatch.setitem(nf4_peers.PEERS, "pyfast", Wrong())
    assert bench.main([*words, "--peers", "pyfast,torch"]) == 1


def test_a_minute_of_bf16_is_skipped_and_said(monkeypatch):
    large = LoRA("4096x4096", "bf16", "cpu", 512, BOTH)
    for fast, skipped in ((False, True), (True, False)):
        monkeypatch.setattr(machine, "has_fast_bf16", lambda fast=fast: fast)
        with pytest.raises(peers.SkippedCase, match="not run") if skipped else nullcontext():
            Frozen().solves(large)
        Frozen().solves(large.copy_with(step="forward"))
        Frozen().solves(large.copy_with(m=1))
        FrozenFloat32().solves(large)


def test_of_brief_cases_only_pyfast_and_torch_run():
    (own,) = measure_case(MemoryOnly("64x16", "bf16", "cpu", 2), Stored(), Checkpoint())
    assert own.impl == "torch" and own.ms_p50
    stored, kept = measure_case(Reversible("64x16", "bf16", "cpu", 2), Stored(), Checkpoint())
    assert stored.ms_p50 and kept.ms_p50


def test_heavy_cases_get_more_of_the_time(monkeypatch):
    """Of 8 s the case of weight 3 gets 6, the others 1, as of two peers each."""
    given = []
    monkeypatch.setattr(
        harness,
        "measure_case",
        lambda case, peers, device, seconds, *rest: given.append(seconds) or [],
    )
    monkeypatch.setattr(time, "monotonic", lambda: 2 * sum(given))
    many = [SimpleNamespace(title="", time_weight=weight) for weight in (1, 3, 1)]
    module = SimpleNamespace(PEERS={"a": peers.Peer(), "b": peers.Peer()}, cases=lambda args: many)
    session._measure(
        "x", module, SimpleNamespace(peers=["a", "b"], device="cpu", budget=10), lambda rows: []
    )
    assert given == pytest.approx([1, 3, 1])


def test_what_is_no_number_is_wrong():
    class NoNumber(PyFast):
        def linear(self, layer):
            return lambda x: x @ layer.dense.T * math.nan, []

    (row,) = measure_case(Linear("64x64", "bf16", "cpu", 4), NoNumber())
    assert row.note.startswith("WRONG") and row.ms_p50 is None and row.max_error is None


def test_wrong_gradients_are_found():
    class Detached(Stored):
        """A block's G sends no gradient back."""

        def network(self, blocks, dtype):
            f, g = blocks[1]
            return super().network([blocks[0], (f, lambda x: g(x.detach()))], dtype)

    right, wrong = measure_case(Reversible("64x16", "bf16", "cpu", 2), Stored(), Detached())
    assert right.ms_p50 and right.max_error <= right.error_limit
    assert wrong.ms_p50 is None and wrong.note.startswith("WRONG")

    class Halved(PyFastLoRA):
        """Right outputs, but half the gradient of A."""

        def build(self, problem):
            model = super().build(problem)
            model.trained[0].register_hook(lambda grad: grad / 2)
            return model

    right, wrong = measure_case(
        LoRA("64x64", "bf16", "cpu", 4, BOTH, rank=4, dropout=0.5), PyFastLoRA(), Halved()
    )
    assert right.ms_p50 and right.saved_mb > 0 and wrong.note.startswith("WRONG")


def test_a_peer_that_fails_is_a_cell():
    class OutOfMemory(Torch):
        name = "big"

        def linear(self, layer):
            raise torch.OutOfMemoryError("tried to allocate 1000 GiB")

    class Late(Torch):
        name = "late"
        calls = iter(range(3))  # of all copies of the layer: the first, for memory, for an estimate

        def linear(self, layer):
            def call(x):
                next(self.calls)
                return x @ layer.dense.T

            return call, []

    mine, big, late = measure_case(
        Linear("64x64", "bf16", "cpu", 4), PyFast(), OutOfMemory(), Late()
    )
    assert mine.ms_p50 and mine.times_pyfast == 1 and not mine.note
    assert (big.note, big.ms_p50) == ("out of memory", None) and late.note.startswith(
        "StopIteration"
    )


def test_a_peer_that_is_not_here_says_so():
    class Absent(Torch):
        module = "no_such_package"

    assert (
        Absent().missing_reason("cpu") == "No module named 'no_such_package'"
        and Torch().missing_reason("cpu") is None
    )


def test_peers_in_a_folder_of_their_own_come_last(tmp_path, monkeypatch):
    (tmp_path / "only_beside.py").write_text("here = True")
    (tmp_path / "json.py").write_text("raise RuntimeError('not the standard library')")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "json")
    peers.append_to_path(tmp_path)
    peers.append_to_path(tmp_path / "no such folder")
    assert peers.load_module("only_beside").here and sys.path[-1] == str(tmp_path)
    assert peers.load_module.__wrapped__("json").dumps


# --- numbers ---


def test_ratios_are_those_of_the_same_round():
    """Rounds of a machine at half its speed change the times, not the ratio."""
    case, trial = Linear("64x64", "bf16", "cpu", 1), None
    lives = [
        timing.Candidate(Row(case.op, case.shape, 1, case.dtype, name), trial, 1.0, None)
        for name in ("pyfast", "torch")
    ]
    for live, seconds in zip(lives, (1.0, 3.0)):
        live.row.moved_bytes = 1
        live.rounds = {n: [seconds * (2 if n % 2 else 1)] * 3 for n in range(1, 11)}
        timing._fill_in_times(live)
    for live in lives:
        timing._fill_in_ratio(live, lives[0])
    mine, theirs = (live.row for live in lives)
    assert theirs.ms_p80 == 2 * theirs.ms_p20 and (theirs.calls, theirs.rounds) == (30, 10)
    assert (
        theirs.ratio_p20 == theirs.times_pyfast == theirs.ratio_p80 == 3 and mine.times_pyfast == 1
    )


def test_a_ratio_of_few_rounds_has_the_spread_of_both():
    mine, theirs, once = (
        timing.Candidate(timed(impl, 1.0), None, 1.0, None, rounds={1: seconds})
        for impl, seconds in (
            ("pyfast", [1.8, 2.0, 2.2]),
            ("torch", [5.0, 6.0, 7.0]),
            ("peft", [6.0]),
        )
    )
    timing._fill_in_ratio(theirs, mine)
    assert theirs.row.times_pyfast == 3
    assert (theirs.row.ratio_p20, theirs.row.ratio_p80) == pytest.approx((5 / 2.2, 7 / 1.8))
    timing._fill_in_ratio(once, mine)
    assert once.row.times_pyfast == 3 and once.row.ratio_p20 is None


def test_goals():
    at, rows = (
        CaseName("linear", "64x64", 1),
        [timed("pyfast", 2.0), timed("torch", 8.0), timed("torch-fp32", 6.0)],
    )
    four, wide, within, lost = judge(
        [
            Speed(at, ">=", 3, "torch"),
            Speed(at, "<=", 0.3, "torch-fp32"),
            Speed(at, ">=", 1, "peft"),
        ],
        rows,
    )
    assert (four.value, four.low, four.high, four.met) == (4, 3.2, 8 / 1.5, True)
    assert wide.value == 3 and wide.met and "torch-fp32 (the faster here)" in wide.text
    assert within.value == pytest.approx(1 / 3) and within.low == 1.5 / 6 and within.met is False
    assert lost.met is None and lost.why == "peft: not in this run"
    assert judge([Speed(CaseName("linear", "64x64", 2), ">=", 3, "torch")], rows) == []


def test_the_largest_error_has_a_goal_of_its_own():
    errors = (("pyfast", 1, 2e-3), ("pyfast", 4, 5e-3), ("pyfast", 8, None), ("torch", 1, 9e-3))
    rows = [timed(impl, 1.0, m, max_error=error, error_limit=4e-3) for impl, m, error in errors]
    (missed,) = judge([], rows)
    assert missed.value == pytest.approx(1.25) and missed.met is False and "M=4" in missed.text
    (met,) = judge([], rows[:1])
    assert met.value == pytest.approx(0.5) and met.met


def test_goals_of_a_row():
    at = CaseName("linear", "64x64", 64)
    rows = [timed("pyfast", 2.0, 1), timed("pyfast", 3.0, 64, saved_mb=1.5)]
    growth, saved, none = judge(
        [
            Growth(at, "<=", 1.4, CaseName("linear", "64x64", 1), "{:.2f}x the time of M=1"),
            Figure(at, "<=", 2, "{:.1f} MB saved", lambda row: row.saved_mb),
            Figure(at, "<=", 2, "{:.1f} MB at most", lambda row: row.peak_mb),
        ],
        rows,
    )
    assert growth.value == 1.5 and growth.low < 1.5 < growth.high and growth.met is False
    assert saved.met and none.met is None and none.why


def test_a_crossover():
    rows = [
        timed(impl, ms, m)
        for m, mine, theirs in ((1, 4, 1), (4, 4, 4), (16, 4, 16))
        for impl, ms in (("pyfast", mine), ("sdpa", theirs))
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


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "monotonic", iter([0.0, 0.0, 40.0, 40.0]).__next__)
    bar = Progress("nf4", 10, 300)
    bar.show(0, "quantize")
    bar.show(5, "linear")
    first, second = capsys.readouterr().err.split("\r\033[K")[1:]
    assert first == "nf4 [....................] 0/10, 5:00 left: quantize"
    assert second == "nf4 [##########..........] 5/10, 0:40 left: linear"


def test_a_training_resumes_exactly(tmp_path):
    setup = Setup(length=32, symbols=3, width=16, heads=2, chunk=16, batch=2, steps=6)
    whole = Training(setup, "lsh-2", "cpu", tmp_path / "whole.pt")
    whole.run(math.inf)
    half = Training(setup, "lsh-2", "cpu", tmp_path / "half.pt")
    for _ in range(3):
        half.step()
    half.save()
    half = Training(setup, "lsh-2", "cpu", half.path)
    half.resume()
    half.run(math.inf)
    assert half.steps == whole.steps == 6 and half.curve == whole.curve[3:]
    assert all(
        map(torch.equal, half.model.state_dict().values(), whole.model.state_dict().values())
    )
