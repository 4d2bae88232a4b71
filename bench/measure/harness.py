"""Measures the implementations of a case side by side: right first, then timed in turns.

Memory: what an implementation holds plus the peak a call adds: on a GPU by max_memory_allocated, on
a CPU from the profiler's memory events, which see torch's allocator but not a kernel's own malloc.

Error: the largest absolute difference to a float64 reference, over the reference's largest value.
"""

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from bench.measure.case import Case, Row
from bench.measure.peer import Lacks, Peer, Skip, quiet, reason
from bench.measure.timing import LONG, Live, take_turns, timed_call

WRONG = 10  # times the limit: not timed
TWICE = 5.0  # seconds: what takes more than its share, but less than this, is called twice


def run_case(
    case: Case,
    peers: list[Peer],
    device: str,
    seconds: float,
    patience: float,
    forecast: "Forecast",
) -> list[Row]:
    """All implementations of a case; whatever goes wrong with one is the note of its row.

    Each is given `seconds` of timing; one that is foretold to take longer than `patience` for a
    single call is not run, unless it is pyfast.
    """
    rows, lives = [], []
    for peer in peers:
        row = Row(case.op, case.shape, case.m, case.dtype, peer.name, case.variant)
        expected = forecast.seconds(case, peer.name)
        try:
            if expected > patience and peer.name != "pyfast":
                raise Skip(f"about {expected:.2g} s a call: not run")
            lives.append(_start(case, peer, row, device, seconds))
        except Lacks:
            continue
        except Exception as error:
            row.note = reason(error)
            _release(device)
        rows.append(row)
    _compare_bits(lives)
    take_turns(lives, device, seconds)
    for row in rows:
        forecast.add(row)
    lives.clear()
    _release(device)
    return rows


def _start(case: Case, peer: Peer, row: Row, device: str, seconds: float) -> Live:
    """Builds an implementation, checks its first result, measures its memory."""
    with quiet():
        trial = case.build(peer)
        result, first = timed_call(trial.calls[0], device)
        if device == "cuda" and first > LONG:  # it was compiled
            first = timed_call(trial.calls[0], device)[1]
    result = trial.read(result)
    _check(case, peer, row, result)
    live = Live(row, trial, first, result)
    row.moved_bytes, row.flops = trial.moved, case.flops
    row.held_mb = trial.held / 1e6
    row.saved_mb = None if trial.saved is None else trial.saved / 1e6
    once = first > max(seconds, LONG)
    if not once or peer.name == "pyfast":
        row.peak_mb = (trial.held + peak_bytes(trial.calls[0], device)) / 1e6
    if once:
        warm = first < TWICE  # then the first only warmed up
        live.rounds = {0: [timed_call(trial.calls[-1], device)[1] if warm else first]}
        row.note = row.note or ("one call, the first", "one call")[warm]
    else:
        live.seconds = timed_call(trial.calls[-1], device)[1]
    return live


def _check(case: Case, peer: Peer, row: Row, result: Any) -> None:
    """Notes an error above the limit; one far above it must not be timed."""
    error = case.error(peer, result)
    row.max_error = error if math.isfinite(error) else None
    row.error_limit = case.limit_of(peer)
    excess = error / row.error_limit
    if not excess <= WRONG:
        raise Skip(f"WRONG: max error {error:.1e}, limit {row.error_limit:.1e}")
    if excess > 1:
        row.note = f"error {excess:.1f}x the limit"
    elif peer.own_format:
        row.note = "a 4-bit format of its own"


def _compare_bits(lives: list[Live]) -> None:
    """Of what has one result only: with pyfast's. Then results are let go."""
    found = {live.row.impl: live.result for live in lives}
    mine = found.get("pyfast")
    for live in lives:
        theirs, live.result = live.result, None
        if theirs is not None and mine is not None and len(mine) == len(theirs) == 1:
            a, b = (t[0].detach().contiguous().view(torch.uint8) for t in (mine, theirs))
            live.row.same_bits = mine[0].dtype == theirs[0].dtype and torch.equal(a, b)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that one call has allocated at a time, its result included."""
    if device == "cpu":
        return _peak_cpu(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    sizes.sort(key=lambda event: event[0])
    return max(itertools.accumulate((size for _, size in sizes), initial=0))


def hold_against(rows: list[Row], ceilings: dict[str, float]) -> None:
    """How near each row is to the ceiling that binds it: the one with the longer floor."""
    for row in rows:
        if row.ms_p50:
            floors = {"copy": row.moved_bytes / ceilings["copy"]}
            if rate := ceilings.get(f"ceiling {row.dtype}"):  # of the dtypes asked for
                floors["gemm"] = row.flops / rate
            row.bound = max(floors, key=floors.__getitem__)
            row.percent = 1e5 * floors[row.bound] / row.ms_p50


class Forecast:
    """Keeps a peer that takes minutes at a large M from eating the time of all others."""

    def __init__(self) -> None:
        self.seen: dict[tuple, dict[str, dict[int, float]]] = {}

    def add(self, row: Row) -> None:
        if row.m and row.ms_p50:
            variants = self.seen.setdefault((row.op, row.shape, row.dtype, row.impl), {})
            variants.setdefault(row.variant, {})[row.m] = row.ms_p50 / 1e3

    def seconds(self, case: Case, impl: str) -> float:
        """On the line through the last two sizes, or through 0 and the only one; at least the last
        one's time.

        Of the case's own variant, or while there is none, of another.
        A few rows alone foretell nothing: they take the time of reading the weight, or of starting.
        """
        found = 0.0
        for op in (case.op, *case.parts):
            variants = self.seen.get((op, case.shape, case.dtype, impl), {})
            points = variants.get(case.variant) or next(iter(variants.values()), {})
            smaller = sorted(point for point in points.items() if point[0] <= case.m)
            if smaller:
                (m0, t0), (m1, t1) = [(0, 0.0), *smaller][-2:]
                slope = (t1 - t0) / (m1 - m0) if m0 or m1 >= 16 else 0.0
                found = max(found, t1, t1 + slope * (case.m - m1))
        return found
