"""Measurement of a case's implementations: each is checked first, then all are timed in turns.

Memory is what an implementation holds plus the peak that a call adds. On a GPU that peak is
max_memory_allocated. On a CPU it comes from the profiler's memory events, which see torch's
allocator but not a kernel's own malloc.

The error is the largest absolute difference to a float64 reference, over the reference's largest
value.
"""

import gc
import math
from typing import Any

import torch

from bench.measure.case import Case
from bench.measure.peer import MissingOperation, Peer, SkippedCase, describe_error, silence
from bench.measure.row import Row
from bench.measure.timing import LONG_CALL, Candidate, time_call, time_in_turns
from pyfast._support.measure import peak_bytes

WRONG_FACTOR = 10  # an error of so many times the limit is wrong, and not timed
WARM_UP_SECONDS = 5.0  # a call that takes more than its share, but less than this, is repeated


def measure_case(
    case: Case,
    peers: list[Peer],
    device: str,
    seconds: float,
    patience: float,
    forecast: "Forecast",
) -> list[Row]:
    """Measure all implementations of a case; an error of one is the note of its row.

    Each gets `seconds` of timing. One that is forecast to take longer than `patience` for a single
    call is not run, unless it is pyfast.
    """
    rows, candidates = [], []
    for peer in peers:
        row = Row(case.op, case.shape, case.m, case.dtype, peer.name, case.variant)
        expected = forecast.seconds(case, peer.name)
        try:
            if expected > patience and peer.name != "pyfast":
                raise SkippedCase(f"about {expected:.2g} s a call: not run")
            candidates.append(_prepare(case, peer, row, device, seconds))
        except MissingOperation:
            continue
        except Exception as error:
            row.note = describe_error(error)
            _release_memory(device)
        rows.append(row)
    _compare_bits(candidates)
    time_in_turns(candidates, device, seconds)
    for row in rows:
        forecast.add(row)
    candidates.clear()
    _release_memory(device)
    return rows


def _prepare(case: Case, peer: Peer, row: Row, device: str, seconds: float) -> Candidate:
    """Build an implementation, check its first result and measure its memory."""
    with silence():
        trial = case.build(peer)
        result, first = time_call(trial.calls[0], device)
        if device == "cuda" and first > LONG_CALL:  # it was compiled
            first = time_call(trial.calls[0], device)[1]
    result = trial.decode(result)
    _check(case, peer, row, result)
    candidate = Candidate(row, trial, first, result)
    row.moved_bytes, row.flops = trial.moved_bytes, case.flops
    row.held_mb = trial.held_bytes / 1e6
    row.saved_mb = None if trial.saved_bytes is None else trial.saved_bytes / 1e6
    is_called_once = first > max(seconds, LONG_CALL)
    if not is_called_once or peer.name == "pyfast":
        row.peak_mb = (trial.held_bytes + peak_bytes(trial.calls[0], device)) / 1e6
    if is_called_once:
        is_repeated = first < WARM_UP_SECONDS  # then the first call was the warm-up
        call_seconds = time_call(trial.calls[-1], device)[1] if is_repeated else first
        candidate.rounds = {0: [call_seconds]}
        row.note = row.note or ("one call" if is_repeated else "one call, the first")
    else:
        candidate.seconds = time_call(trial.calls[-1], device)[1]
    return candidate


def _check(case: Case, peer: Peer, row: Row, result: Any) -> None:
    """Note an error above the limit, and raise SkippedCase for one far above it."""
    error = case.error(peer, result)
    row.max_error = error if math.isfinite(error) else None
    row.error_limit = case.limit_for(peer)
    excess = error / row.error_limit
    if not excess <= WRONG_FACTOR:
        raise SkippedCase(f"WRONG: max error {error:.1e}, limit {row.error_limit:.1e}")
    if excess > 1:
        row.note = f"error {excess:.1f}x the limit"
    elif peer.has_different_format:
        row.note = "a 4-bit format of its own"


def _compare_bits(candidates: list[Candidate]) -> None:
    """Note whether a peer's single result equals pyfast's bit for bit, then drop the results."""
    results = {candidate.row.impl: candidate.result for candidate in candidates}
    expected = results.get("pyfast")
    for candidate in candidates:
        result, candidate.result = candidate.result, None
        if result is None or expected is None or not len(expected) == len(result) == 1:
            continue
        a, b = (t[0].detach().contiguous().view(torch.uint8) for t in (expected, result))
        has_same_dtype = expected[0].dtype == result[0].dtype
        candidate.row.same_bits = has_same_dtype and torch.equal(a, b)


def _release_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def compare_with_ceilings(rows: list[Row], ceilings: dict[str, float]) -> None:
    """Fill in how near each row is to the ceiling that binds it: the one with the longer time."""
    for row in rows:
        if row.ms_p50:
            floors = {"copy": row.moved_bytes / ceilings["copy"]}
            if rate := ceilings.get(f"ceiling {row.dtype}"):  # only the dtypes asked for have one
                floors["gemm"] = row.flops / rate
            row.bound = max(floors, key=floors.__getitem__)
            row.percent = 1e5 * floors[row.bound] / row.ms_p50


class Forecast:
    """Forecast of call times, so that a peer that takes minutes does not use up all the time."""

    def __init__(self) -> None:
        self.times: dict[tuple, dict[str, dict[int, float]]] = {}

    def add(self, row: Row) -> None:
        """Record the time of a measured row."""
        if row.m and row.ms_p50:
            variants = self.times.setdefault((row.op, row.shape, row.dtype, row.impl), {})
            variants.setdefault(row.variant, {})[row.m] = row.ms_p50 / 1e3

    def seconds(self, case: Case, impl: str) -> float:
        """Return the seconds expected of a call, 0 where nothing is known.

        They lie on the line through the last two sizes, or through 0 and the only size; they are
        at least the last size's time. Sizes are those of the case's variant or, while there are
        none, of another variant. Few rows alone forecast nothing, since they take the time of
        reading the weight, or of starting.
        """
        expected = 0.0
        for op in (case.op, *case.parts):
            variants = self.times.get((op, case.shape, case.dtype, impl), {})
            points = variants.get(case.variant) or next(iter(variants.values()), {})
            smaller = sorted(point for point in points.items() if point[0] <= case.m)
            if smaller:
                (m0, t0), (m1, t1) = [(0, 0.0), *smaller][-2:]
                per_row = (t1 - t0) / (m1 - m0) if m0 or m1 >= 16 else 0.0
                expected = max(expected, t1, t1 + per_row * (case.m - m1))
        return expected
