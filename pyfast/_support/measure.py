"""Memory and time as the demo measures them."""

import gc
import itertools
import os
import time
from collections.abc import Callable

import torch
from torch import nn


def held_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that the call has allocated at a time."""
    gc.collect()  # what is given back during the call must be its own
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or every start and end is told on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in sizes), initial=0))


def seconds(call: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The least of some rounds, after one that does not count."""
    call()
    return min(_once(call, device) for _ in range(rounds))


def _once(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin
