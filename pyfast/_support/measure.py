"""Memory and time of a call, measured in one way by the demo, the benches and the tests."""

import gc
import itertools
import os
import time
from collections.abc import Callable

import torch
from torch import nn


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, counting shared storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Return the most bytes that torch's allocator holds during the call, above those before it.

    The call's result counts, because it is alive at the end. Memory that a kernel allocates itself
    does not.
    """
    gc.collect()  # so that what the call frees is what it allocated
    if torch.device(device).type == "cuda":
        return _peak_bytes_on_cuda(call, device)
    # Otherwise the profiler reports every start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _peak_bytes_on_cuda(call: Callable[[], object], device: str | torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def seconds(call: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Return the least time of some rounds, after one that does not count."""
    call()
    return min(_seconds_once(call, device) for _ in range(rounds))


def _seconds_once(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin
