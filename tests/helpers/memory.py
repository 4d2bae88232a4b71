"""The memory that a call allocates."""

from torch.profiler import ProfilerActivity, profile


def peak_of_allocations(run) -> int:
    """Bytes that torch's CPU allocator held at most during run(), above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
