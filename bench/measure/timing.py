"""Timing in turns: rounds over all implementations (A B C A B C ...).

So a slow spell of the machine hits all of them, and two can be compared round by round. Every call
takes the next of several sets of buffers that together exceed the last cache, as the layers of a
model do. On a GPU the time is measured between CUDA events, and calls that are short enough for
launches to matter run from a CUDA graph.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.measure.case import Trial
from bench.measure.peer import describe_error
from bench.measure.row import Row
from bench.measure.spread import quantiles, ratio

TURN_SECONDS = 0.02  # that an implementation runs before it is the next one's turn
ROUNDS = 30
LONG_CALL = 0.4  # seconds
MIN_CALLS = 3  # whatever the share of time; one is enough of a long call
MIN_SHARED_ROUNDS = 5  # that two need to be compared in pairs
# By the clock of the host, whose launches may take longer than what they launch.
GRAPH_BELOW = 2e-2
TIMED_LAUNCHES = 20
# Libraries bring their own OpenMP runtimes. Their idle threads spin for some milliseconds after a
# call, and would take a core from whoever is timed next.
SETTLE_SECONDS = 0.02


@dataclass
class Candidate:
    """An implementation that has passed the check and waits to be timed."""

    row: Row
    trial: Trial
    seconds: float  # of one call, estimated
    result: Any  # of the first call
    sample: Callable[[int], list[float]] | None = None
    rounds: dict[int, list[float]] = field(default_factory=dict)  # seconds of calls, by round
    spent: float = 0.0

    @property
    def samples(self) -> list[float]:
        return list(itertools.chain(*self.rounds.values()))


def time_call(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Return the result of a call and the seconds that it took."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turns(candidates: list[Candidate], device: str, seconds: float) -> None:
    """Time all candidates until each has had its share of the time, then fill in their rows."""
    make_sampler = _sampler_cuda if device == "cuda" else _sampler_cpu
    for candidate in candidates:
        candidate.sample = make_sampler(candidate)
    for number in range(1, ROUNDS + 1):
        for candidate in candidates:
            if not _is_done(candidate, seconds):
                _take_turn(candidate, number, seconds)
    pyfast = next((c for c in candidates if c.row.impl == "pyfast"), None)
    for candidate in candidates:
        _fill_in_times(candidate)
    for candidate in candidates:
        if pyfast and pyfast.row.ms_p50 and candidate.row.ms_p50:
            _fill_in_ratio(candidate, pyfast)


def _fill_in_ratio(candidate: Candidate, pyfast: Candidate) -> None:
    if candidate is pyfast:
        ratios = (1.0, 1.0, 1.0)
    else:
        ratios = ratio(candidate.rounds, pyfast.rounds, MIN_SHARED_ROUNDS)
    candidate.row.times_pyfast, candidate.row.ratio_p20, candidate.row.ratio_p80 = ratios


def _is_done(candidate: Candidate, seconds: float) -> bool:
    if math.isinf(candidate.seconds):
        return True  # it failed
    least = MIN_CALLS if candidate.seconds < LONG_CALL else 1
    has_enough_calls = len(candidate.samples) >= least
    return has_enough_calls and candidate.spent + candidate.seconds > seconds


def _take_turn(candidate: Candidate, number: int, seconds: float) -> None:
    turn = min(TURN_SECONDS, seconds - candidate.spent)
    calls = max(1, round(turn / candidate.seconds))
    start = time.perf_counter()
    try:
        candidate.rounds[number] = candidate.sample(calls)
    except Exception as error:
        candidate.row.note, candidate.seconds = describe_error(error), math.inf
    candidate.spent += time.perf_counter() - start


def _fill_in_times(candidate: Candidate) -> None:
    row, samples = candidate.row, candidate.samples
    if not samples:
        return
    row.calls, row.rounds = len(samples), len(candidate.rounds)
    row.ms_p20, row.ms_p50, row.ms_p80 = (1e3 * seconds for seconds in quantiles(samples))
    row.gb_s = row.moved_bytes / row.ms_p50 / 1e6
    row.tflop_s = row.flops / row.ms_p50 / 1e9


def _sampler_cpu(candidate: Candidate) -> Callable[[int], list[float]]:
    calls = itertools.cycle(candidate.trial.calls)

    def sample(count: int) -> list[float]:
        time.sleep(SETTLE_SECONDS)
        if candidate.seconds < SETTLE_SECONDS:
            next(calls)()  # wakes this implementation's own threads
        seconds = []
        for call in itertools.islice(calls, count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return sample


def _sampler_cuda(candidate: Candidate) -> Callable[[int], list[float]]:
    trial_calls, replay = candidate.trial.calls, None
    if candidate.seconds < LONG_CALL:  # the shortest of a few: one alone may have been held up
        few = itertools.islice(itertools.cycle(trial_calls), MIN_CALLS)
        candidate.seconds = min(candidate.seconds, *(time_call(call, "cuda")[1] for call in few))
    if candidate.seconds < GRAPH_BELOW:
        candidate.row.launch_ms = 1e3 * _time_launch(trial_calls)
        replay = _capture(trial_calls)
        if replay is None:
            candidate.row.note = candidate.row.note or "no CUDA graph: launched call by call"
    candidate.row.graph = replay is not None
    calls = itertools.repeat(replay) if replay else itertools.cycle(trial_calls)
    calls_per_replay = len(trial_calls) if replay else 1

    def sample(count: int) -> list[float]:
        pairs = []
        for call in itertools.islice(calls, math.ceil(count / calls_per_replay)):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / calls_per_replay for start, end in pairs]

    return sample


def _time_launch(calls: list[Callable[[], Any]]) -> float:
    """Return the host's seconds for a call, with nothing on the device to wait for."""
    seconds = []
    for call in itertools.islice(itertools.cycle(calls), TIMED_LAUNCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _capture(calls: list[Callable[[], Any]]) -> Callable[[], None] | None:
    """Capture all calls in one graph; return its replay, or None where that is impossible."""
    pool = torch.cuda.graph_pool_handle()
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # On the current stream: autograd runs a backward on the stream of its forward.
        with torch.cuda.graph(graph, pool, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        # Otherwise torch's allocator assumes that the capture goes on, and never gives memory
        # back. It raises a RuntimeError where the capture has ended.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        return None
