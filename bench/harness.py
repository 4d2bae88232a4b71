"""Measures the implementations of a case side by side: right first, then timed in turns.

Time: rounds over all implementations (A B C A B C ...), so that a slow spell of the machine hits
all of them; p20, median and p80 over the calls. Every call takes the next of several sets of
buffers that together exceed the last cache, as the layers of a model do. On a GPU time is between
CUDA events, and calls short enough for launches to matter run from a CUDA graph.

Memory: what an implementation holds plus the peak a call adds: on a GPU by max_memory_allocated, on
a CPU from the profiler's memory events, which see torch's allocator but not a kernel's own malloc.

Error: the largest absolute difference to a float64 reference, over the reference's largest value.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import machine
from bench.peers import Lacks, Peer, Skip, quiet, reason

BLOCK = 0.02  # seconds an implementation runs before it is the next one's turn
ROUNDS = 30
LEAST = 3  # calls, whatever the share of time, unless they take longer than
LONG = 0.4  # seconds each
GRAPH_BELOW = 5e-4  # launch gaps are noise to calls longer than this
OWN_FORMAT_LIMIT = 0.25  # other 4-bit numbers than the reference's: only nonsense is caught


@dataclass
class Row:
    """One implementation of one case: a line of the table, the CSV and the JSON."""

    op: str
    shape: str
    m: int | None
    dtype: str
    impl: str
    variant: str = ""  # what else the case is: a rank, a rate of dropout
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    calls: int = 0
    graph: bool = False
    moved_bytes: int | None = None
    flops: float = 0.0
    gb_s: float | None = None
    tflop_s: float | None = None
    bound: str | None = None  # "copy" or "gemm": the ceiling that is nearer
    percent: float | None = None  # of that ceiling
    held_mb: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None  # for the backward, beside parameters and weights
    max_error: float | None = None
    error_limit: float | None = None
    same_bits: bool | None = None  # as pyfast's result
    times_pyfast: float | None = None
    note: str = ""

    @property
    def added_mb(self) -> float | None:
        """By a call, to what is held."""
        return None if self.peak_mb is None else self.peak_mb - self.held_mb


@dataclass
class Trial:
    """The same call on several sets of buffers, the bytes it must move, the weight it holds and what it saves."""

    calls: list[Callable[[], Any]]
    moved: int
    held: int
    saved: int | None = None


class Case:
    """What a bench module subclasses: one operation at one size."""

    op: str
    shape: str
    m: int | None
    dtype: str
    flops: float
    limit: float  # errors above it are marked, ten times it is wrong
    variant = ""
    parts: tuple[str, ...] = ()  # operations no slower than this one, measured before it

    def build(self, peer: Peer) -> Trial:
        raise NotImplementedError

    def error(self, peer: Peer, result: Any) -> float:
        raise NotImplementedError

    def limit_of(self, peer: Peer) -> float:
        return OWN_FORMAT_LIMIT if peer.own_format else self.limit

    def close(self) -> None:
        """Frees what the case computed on the way."""
        vars(self).clear()


@dataclass
class Live:
    """An implementation that has passed the check and waits to be timed."""

    row: Row
    trial: Trial
    seconds: float  # of one call, estimated
    result: Any  # of the first call
    sample: Callable[[int], list[float]] | None = None
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0


def rotation(moved: int, device: str) -> int:
    """Sets of buffers that together are twice the last cache."""
    return max(1, min(64, math.ceil(2 * machine.cache_bytes(device) / moved)))


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """NaN where the result has one."""
    worst = (result.detach().double() - reference).abs().max()
    return float(worst / reference.abs().max())


def _compare_bits(lives: list["Live"]) -> None:
    """Every first result with pyfast's; then they are let go."""
    mine = next((live.result for live in lives if live.row.impl == "pyfast"), None)
    for live in lives:
        theirs, live.result = live.result, None
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
            a, b = (t.detach().contiguous().view(torch.uint8) for t in (mine, theirs))
            live.row.same_bits = mine.dtype == theirs.dtype and torch.equal(a, b)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_cpu(call: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    sizes.sort(key=lambda event: event[0])
    return max(itertools.accumulate((size for _, size in sizes), initial=0))


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that one call has allocated at a time, its result included."""
    if device == "cpu":
        return _peak_cpu(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], Any], given: Iterable[torch.Tensor]) -> int:
    """What a forward saves for its backward, each storage once, without the tensors it was given."""
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in given:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def _capture(calls: list[Callable[[], Any]]) -> Callable[[], None] | None:
    """A graph of all calls, or None where one of them can't be captured."""
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # On the current stream: autograd runs a backward on the stream of its forward.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


# Libraries bring OpenMP runtimes of their own, whose idle threads spin for some milliseconds after a call and would
# take a core from whoever is timed next.
SETTLE = 0.02


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
    replay = _capture(live.trial.calls) if live.seconds < GRAPH_BELOW else None
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


def timed_call(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    _sync(device)
    start = time.perf_counter()
    result = call()
    _sync(device)
    return result, time.perf_counter() - start


def _check(case: Case, peer: Peer, row: Row, result: Any) -> None:
    """Notes an error above the limit; one far above it must not be timed."""
    error = case.error(peer, result)
    row.max_error = error if math.isfinite(error) else None
    row.error_limit = case.limit_of(peer)
    excess = error / row.error_limit
    if not excess <= 10:
        raise Skip(f"WRONG: max error {error:.1e}, limit {row.error_limit:.1e}")
    if excess > 1:
        row.note = f"error {excess:.1f}x the limit"
    elif peer.own_format:
        row.note = "a 4-bit format of its own"


def _start(case: Case, peer: Peer, row: Row, device: str, seconds: float) -> Live:
    """Builds an implementation, checks its first result, measures its memory."""
    with quiet():
        trial = case.build(peer)
        result, first = timed_call(trial.calls[0], device)
        if device == "cuda" and first > LONG:  # it was compiled
            first = timed_call(trial.calls[0], device)[1]
    _check(case, peer, row, result)
    live = Live(row, trial, first, result)
    row.moved_bytes, row.flops = trial.moved, case.flops
    row.held_mb = trial.held / 1e6
    row.saved_mb = None if trial.saved is None else trial.saved / 1e6
    if first > max(seconds, LONG):
        live.samples = [first]
        row.note = row.note or "one call"
    else:
        row.peak_mb = (trial.held + peak_bytes(trial.calls[0], device)) / 1e6
        live.seconds = timed_call(trial.calls[-1], device)[1]
    return live


def _rounds(lives: list[Live], device: str, seconds: float) -> None:
    """Takes turns until each has had its share of the time."""
    sampler = _sampler_cuda if device == "cuda" else _sampler_cpu
    for live in lives:
        live.sample = sampler(live)
    for _ in range(ROUNDS):
        for live in lives:
            enough = len(live.samples) >= (LEAST if live.seconds < LONG else 1)
            if enough and live.spent + live.seconds > seconds:
                continue
            block = max(1, round(min(BLOCK, seconds - live.spent) / live.seconds))
            start = time.perf_counter()
            try:
                live.samples += live.sample(block)
            except Exception as error:
                live.row.note, live.seconds = reason(error), math.inf
            live.spent += time.perf_counter() - start


def _finish(live: Live) -> None:
    if not live.samples:
        return
    row, samples = live.row, sorted(live.samples)
    row.calls = len(samples)
    median = statistics.median(samples)
    row.ms_p50 = 1e3 * median
    row.ms_p20 = 1e3 * samples[int(0.2 * (len(samples) - 1))]
    row.ms_p80 = 1e3 * samples[math.ceil(0.8 * (len(samples) - 1))]
    row.gb_s = row.moved_bytes / median / 1e9
    row.tflop_s = row.flops / median / 1e12


def compare(rows: list[Row], ceilings: dict[str, float]) -> None:
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
        """On the line through the last two sizes, or through 0 and the only one; at least the last one's time.

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


def run_case(
    case: Case,
    peers: list[Peer],
    device: str,
    seconds: float,
    patience: float,
    forecast: Forecast,
) -> list[Row]:
    """All implementations of a case; whatever goes wrong with one is the note of its row.

    Each is given `seconds` of timing; one that is foretold to take longer than `patience` for a
    single call is not run.
    """
    rows, lives = [], []
    for peer in peers:
        row = Row(case.op, case.shape, case.m, case.dtype, peer.name, case.variant)
        expected = forecast.seconds(case, peer.name)
        try:
            if expected > patience:
                raise Skip(f"about {expected:.2g} s a call: not run")
            lives.append(_start(case, peer, row, device, seconds))
        except Lacks:
            continue
        except Exception as error:
            row.note = reason(error)
            _release(device)
        rows.append(row)
    _compare_bits(lives)
    _rounds(lives, device, seconds)
    for live in lives:
        _finish(live)
        forecast.add(live.row)
    base = next((row.ms_p50 for row in rows if row.impl == "pyfast"), None)
    for row in rows:
        row.times_pyfast = row.ms_p50 / base if row.ms_p50 and base else None
    lives.clear()
    case.close()
    _release(device)
    return rows
