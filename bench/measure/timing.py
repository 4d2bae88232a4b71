"""Times implementations in turns: rounds over all of them (A B C A B C ...), so that a slow spell
of the machine hits all of them, and so that two can be compared round by round.

Every call takes the next of several sets of buffers that together exceed the last cache, as the
layers of a model do. On a GPU time is between CUDA events, and calls short enough for launches to
matter run from a CUDA graph.
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

from bench.measure.case import Row, Trial
from bench.measure.peer import reason
from bench.measure.spread import quantiles, ratio

BLOCK = 0.02  # seconds an implementation runs before it is the next one's turn
ROUNDS = 30
LEAST = 3  # calls, whatever the share of time, unless they take longer than
LONG = 0.4  # seconds each
PAIRED = 5  # rounds that two need in common to be compared in pairs
GRAPH_BELOW = 2e-2  # by the clock of the host, whose launches may take longer than what they launch
LAUNCHES = 20  # timed on the host
# Libraries bring OpenMP runtimes of their own, whose idle threads spin for some milliseconds after
# a call and would take a core from whoever is timed next.
SETTLE = 0.02


@dataclass
class Live:
    """An implementation that has passed the check and waits to be timed."""

    row: Row
    trial: Trial
    seconds: float  # of one call, estimated
    result: Any  # of the first call
    sample: Callable[[int], list[float]] | None = None
    rounds: dict[int, list[float]] = field(default_factory=dict)  # the calls of each
    spent: float = 0.0

    @property
    def samples(self) -> list[float]:
        return list(itertools.chain(*self.rounds.values()))


def timed_call(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    _sync(device)
    start = time.perf_counter()
    result = call()
    _sync(device)
    return result, time.perf_counter() - start


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(lives: list[Live], device: str, seconds: float) -> None:
    """Until each has had its share of the time; then the rows are filled in."""
    sampler = _sampler_cuda if device == "cuda" else _sampler_cpu
    for live in lives:
        live.sample = sampler(live)
    for number in range(1, ROUNDS + 1):
        for live in lives:
            if not _is_done(live, seconds):
                _take_turn(live, number, seconds)
    mine = next((live for live in lives if live.row.impl == "pyfast"), None)
    for live in lives:
        _fill_in(live)
    for live in lives:
        if mine and mine.row.ms_p50 and live.row.ms_p50:
            _compare(live, mine)


def _compare(live: Live, mine: Live) -> None:
    times = (1.0,) * 3 if live is mine else ratio(live.rounds, mine.rounds, PAIRED)
    live.row.times_pyfast, live.row.ratio_p20, live.row.ratio_p80 = times


def _is_done(live: Live, seconds: float) -> bool:
    if math.isinf(live.seconds):
        return True  # it failed
    enough = len(live.samples) >= (LEAST if live.seconds < LONG else 1)
    return enough and live.spent + live.seconds > seconds


def _take_turn(live: Live, number: int, seconds: float) -> None:
    block = max(1, round(min(BLOCK, seconds - live.spent) / live.seconds))
    start = time.perf_counter()
    try:
        live.rounds[number] = live.sample(block)
    except Exception as error:
        live.row.note, live.seconds = reason(error), math.inf
    live.spent += time.perf_counter() - start


def _fill_in(live: Live) -> None:
    row, samples = live.row, live.samples
    if not samples:
        return
    row.calls, row.rounds = len(samples), len(live.rounds)
    row.ms_p20, row.ms_p50, row.ms_p80 = (1e3 * seconds for seconds in quantiles(samples))
    row.gb_s = row.moved_bytes / row.ms_p50 / 1e6
    row.tflop_s = row.flops / row.ms_p50 / 1e9


def _sampler_cpu(live: Live) -> Callable[[int], list[float]]:
    calls = itertools.cycle(live.trial.calls)

    def sample(count: int) -> list[float]:
        time.sleep(SETTLE)
        if live.seconds < SETTLE:
            next(calls)()  # wakes this implementation's own threads
        seconds = []
        for call in itertools.islice(calls, count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return sample


def _sampler_cuda(live: Live) -> Callable[[int], list[float]]:
    replay = None
    if live.seconds < LONG:  # the least of a few: one alone may have been held up
        few = itertools.islice(itertools.cycle(live.trial.calls), LEAST)
        live.seconds = min(live.seconds, *(timed_call(call, "cuda")[1] for call in few))
    if live.seconds < GRAPH_BELOW:
        live.row.launch_ms = 1e3 * _launch(live.trial.calls)
        replay = _capture(live.trial.calls)
        if replay is None:
            live.row.note = live.row.note or "no CUDA graph: launched call by call"
    live.row.graph = replay is not None
    calls = itertools.repeat(replay) if replay else itertools.cycle(live.trial.calls)
    share = len(live.trial.calls) if replay else 1

    def sample(count: int) -> list[float]:
        pairs = []
        for call in itertools.islice(calls, math.ceil(count / share)):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / share for start, end in pairs]

    return sample


def _launch(calls: list[Callable[[], Any]]) -> float:
    """The host's seconds for a call, with nothing on the device to wait for."""
    seconds = []
    for call in itertools.islice(itertools.cycle(calls), LAUNCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def _capture(calls: list[Callable[[], Any]]) -> Callable[[], None] | None:
    """A graph of all calls, or None where one of them can't be captured."""
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
        # Else torch's allocator holds that the capture goes on, and gives no memory back from here
        # on.
        with contextlib.suppress(RuntimeError):  # that it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        return None
