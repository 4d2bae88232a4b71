"""Measuring: what is refused, what fails without ending a run, and what is shared out."""

import math
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.bench_rows import measure_case, timed

from bench import __main__ as bench
from bench import session
from bench.lora.peers import Frozen, FrozenFloat32
from bench.lora.peers import PyFast as PyFastLoRA
from bench.lora.problem import LoRA
from bench.measure import harness, machine, timing
from bench.measure import peer as peers
from bench.measure.case import BOTH
from bench.measure.row import Row
from bench.nf4 import peers as nf4_peers
from bench.nf4.peers import PyFast, Torch
from bench.nf4.problem import Linear
from bench.reformer.duplication import Setup, Training
from bench.reversible.peers import Checkpoint
from bench.reversible.peers import Torch as Stored
from bench.reversible.problem import MemoryOnly, Reversible
from pyfast._support.progress import Progress


class Wrong(PyFast):
    """A layer whose outputs are off by a half, here and there."""

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


def test_only_pyfast_and_torch_run_cases_for_memory_alone():
    (row,) = measure_case(MemoryOnly("64x16", "bf16", "cpu", 2), Stored(), Checkpoint())
    assert row.impl == "torch" and row.ms_p50
    stored, kept = measure_case(Reversible("64x16", "bf16", "cpu", 2), Stored(), Checkpoint())
    assert stored.ms_p50 and kept.ms_p50


def test_heavy_cases_get_more_of_the_time(monkeypatch):
    """Of 10 s, 6 s go to the case of weight 3 and 2 s to each other case, shared by two peers."""
    shares = []
    monkeypatch.setattr(
        harness,
        "measure_case",
        lambda case, peers, device, seconds, *rest: shares.append(seconds) or [],
    )
    monkeypatch.setattr(time, "monotonic", lambda: 2 * sum(shares))
    many = [SimpleNamespace(title="", time_weight=weight) for weight in (1, 3, 1)]
    module = SimpleNamespace(PEERS={"a": peers.Peer(), "b": peers.Peer()}, cases=lambda args: many)
    session._measure(
        "x", module, SimpleNamespace(peers=["a", "b"], device="cpu", budget=10), lambda rows: []
    )
    assert shares == pytest.approx([1, 3, 1])


def test_what_is_no_number_is_wrong():
    class NoNumber(PyFast):
        def linear(self, layer):
            return lambda x: x @ layer.dense.T * math.nan, []

    (row,) = measure_case(Linear("64x64", "bf16", "cpu", 4), NoNumber())
    assert row.note.startswith("WRONG") and row.ms_p50 is None and row.max_error is None


def test_wrong_gradients_are_found():
    class Detached(Stored):
        """Blocks whose G sends no gradient back."""

        def network(self, blocks, dtype):
            f, g = blocks[1]
            return super().network([blocks[0], (f, lambda x: g(x.detach()))], dtype)

    right, wrong = measure_case(Reversible("64x16", "bf16", "cpu", 2), Stored(), Detached())
    assert right.ms_p50 and right.max_error <= right.error_limit
    assert wrong.ms_p50 is None and wrong.note.startswith("WRONG")

    class Halved(PyFastLoRA):
        """A layer with right outputs, but half the gradient of A."""

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

    pyfast, big, late = measure_case(
        Linear("64x64", "bf16", "cpu", 4), PyFast(), OutOfMemory(), Late()
    )
    assert pyfast.ms_p50 and pyfast.times_pyfast == 1 and not pyfast.note
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


def test_ratios_are_those_of_the_same_round():
    """Rounds of a machine at half its speed change the times, not the ratio."""
    case, trial = Linear("64x64", "bf16", "cpu", 1), None
    candidates = [
        timing.Candidate(Row(case.op, case.shape, 1, case.dtype, name), trial, 1.0, None)
        for name in ("pyfast", "torch")
    ]
    for candidate, seconds in zip(candidates, (1.0, 3.0)):
        candidate.row.moved_bytes = 1
        candidate.rounds = {n: [seconds * (2 if n % 2 else 1)] * 3 for n in range(1, 11)}
        timing._fill_in_times(candidate)
    for candidate in candidates:
        timing._fill_in_ratio(candidate, candidates[0])
    pyfast, torch_ = (candidate.row for candidate in candidates)
    assert torch_.ms_p80 == 2 * torch_.ms_p20 and (torch_.calls, torch_.rounds) == (30, 10)
    assert (
        torch_.ratio_p20 == torch_.times_pyfast == torch_.ratio_p80 == 3
        and pyfast.times_pyfast == 1
    )


def test_a_ratio_of_few_rounds_has_the_spread_of_both():
    pyfast, torch_, once = (
        timing.Candidate(timed(impl, 1.0), None, 1.0, None, rounds={1: seconds})
        for impl, seconds in (
            ("pyfast", [1.8, 2.0, 2.2]),
            ("torch", [5.0, 6.0, 7.0]),
            ("peft", [6.0]),
        )
    )
    timing._fill_in_ratio(torch_, pyfast)
    assert torch_.row.times_pyfast == 3
    assert (torch_.row.ratio_p20, torch_.row.ratio_p80) == pytest.approx((5 / 2.2, 7 / 1.8))
    timing._fill_in_ratio(once, pyfast)
    assert once.row.times_pyfast == 3 and once.row.ratio_p20 is None


def test_progress_shows_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "monotonic", iter([0.0, 0.0, 40.0, 40.0]).__next__)
    bar = Progress("nf4", 10, budget=300, line_every=30)
    bar.show(0, "quantize")
    bar.show(5, "linear")
    bar.clear()
    first, second, blank, rest = capsys.readouterr().err.split("\r")[1:]
    assert first == "nf4 [........................] 0/10, 5:00 left: quantize"
    assert second == "nf4 [############............] 5/10, 0:40 left: linear  "
    assert not blank.strip() and len(blank) == len(second.rstrip()) and not rest


def test_progress_without_a_terminal_is_a_line_from_time_to_time(capsys, monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter([0.0, 0.0, 29.0, 30.0]).__next__)
    bar = Progress("nf4", 10, budget=300, line_every=30)
    for done, name in enumerate(("quantize", "linear", "backward")):
        bar.show(done, name)
    bar.clear()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["quantize", "backward"]


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
