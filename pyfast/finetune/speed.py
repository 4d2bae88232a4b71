"""The speed and the memory of a training, for its log."""

import resource
import time

import torch


class SpeedMeter:
    """A count of tokens over time, from one record of the log to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._begin, self._tokens = time.monotonic(), 0

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    def measure(self) -> dict[str, float]:
        """Return the interval's tokens per second and the peak memory; start a new interval."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        speed = {"tokens_per_second": round(self._tokens / seconds, 1)}
        self.restart()
        return speed | {"memory": self._peak_megabytes()}

    def _peak_megabytes(self) -> float:
        """Return the largest memory so far in MB: the GPU's, or on a CPU the process's."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)
