"""The learning rate: its schedule, a guard that tells when it is too high, and a test that finds a
good one.

The guard knows the loss of the untouched model: `level` and `noise`, mean and standard deviation
over some batches, noise at least 2 % of the level. Of the last losses it looks at the usual one,
their mean without the highest fifth, and at their `swing`, the median of the steps up and down from
one to the next, so that single spikes do not matter. It says that the rate is too high when

    broken:    the loss or the gradient's norm is not finite;
    diverged:  the usual loss of the last 20 is above best by more than the largest of 0.3 level, half of level - best,
               4 noise, 1.5 swings and 0.1, where best is the least usual loss so far, or level;
    bounces:   the mean of the last 40 to 160, each cut off at 4 swings above their median, is above level by more
               than 4 (swing / sqrt(their number) + noise / sqrt(8)), and the swing is over 3 noise
               and 0.05;

and the loss is not falling: the average (the same) of the newer half is over 0.9 of that of the
older. A loss that just stays where it was is not told from one that falls slowly. Losses are mean
cross entropies: 0.1 is little on any task.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

SCHEDULES = ("constant", "linear", "cosine")
SHORT, LONG, LONGEST = 20, 40, 160  # losses the guard looks back on
UNTOUCHED = 8  # losses before training
RATES = 100  # of a range test


def factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """What the rate is multiplied by at a step, from 0: up in `warmup` steps, then down to nothing by `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        schedule
    ]


class RateTooHigh(Exception):
    """The guard stopped a training."""

    def __init__(self, step: int, rate: float, why: str) -> None:
        self.step, self.rate, self.why, self.proposal = step, rate, why, rounded(rate / 10)
        super().__init__(
            f"the learning rate {rate:g} is too high: at step {step} {why}; try {self.proposal:g}"
        )


def rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


class Guard:
    """Sees every loss, and says when they tell that the rate is too high."""

    def __init__(self, untouched: Sequence[float]) -> None:
        self.level = statistics.fmean(untouched)
        self.noise = max(statistics.pstdev(untouched), 0.02 * self.level)
        self.best, self.losses = self.level, []

    def see(self, loss: float, grad_norm: float) -> str | None:
        """Why the rate is too high, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the {'gradient' if math.isfinite(loss) else 'loss'} is no longer finite"
        self.losses = [*self.losses[1 - LONGEST :], loss]
        recent = self.losses[-SHORT:]
        if len(recent) == SHORT:
            usual = _usual(recent)
            self.best = min(self.best, usual)
            if self._diverges(recent):
                return f"the loss has risen to {usual:.3g} (untrained {self.level:.3g}, best {self.best:.3g})"
        if len(self.losses) >= LONG and self._bounces(self.losses):
            low, high = min(self.losses), max(self.losses)
            return f"the loss jumps between {low:.3g} and {high:.3g}, and falls not below {self.level:.3g}"
        return None

    def calm(self) -> bool:
        """Whether the state with the last loss is worth keeping: that is not too high, nor the way to an alarm half."""
        recent = self.losses[-SHORT:]
        if len(recent) < 2:
            return True
        allowed = self._allowed()
        low = recent[-1] <= self.best + allowed and _usual(recent) <= self.best + allowed / 2
        return low and not self._bounces(recent)

    def _allowed(self) -> float:
        return max(0.3 * self.level, (self.level - self.best) / 2, 4 * self.noise, 0.1)

    def _diverges(self, losses: Sequence[float]) -> bool:
        above = _usual(losses) - self.best > max(self._allowed(), 1.5 * _swing(losses))
        return above and not _falling(losses, _usual)

    def _bounces(self, losses: Sequence[float]) -> bool:
        swing = _swing(losses)
        above = _mean(losses) - self.level > 4 * (
            swing / len(losses) ** 0.5 + self.noise / UNTOUCHED**0.5
        )
        return above and swing > max(3 * self.noise, 0.05) and not _falling(losses, _mean)

    def state(self) -> dict:
        """All it knows, for JSON."""
        return {"level": self.level, "noise": self.noise, "best": self.best, "losses": self.losses}

    @classmethod
    def from_state(cls, state: dict) -> "Guard":
        guard = cls([state["level"]])
        guard.noise, guard.best, guard.losses = state["noise"], state["best"], list(state["losses"])
        return guard


def _swing(losses: Sequence[float]) -> float:
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))


def _usual(losses: Sequence[float]) -> float:
    kept = sorted(losses)[: len(losses) - len(losses) // 5]
    return statistics.fmean(kept)


def _mean(losses: Sequence[float]) -> float:
    highest = statistics.median(losses) + 4 * _swing(losses)
    return statistics.fmean(min(loss, highest) for loss in losses)


def _falling(losses: Sequence[float], average: Callable[[Sequence[float]], float]) -> bool:
    half = len(losses) // 2
    return average(losses[half:]) <= 0.9 * average(losses[:half])


class RangeTest(NamedTuple):
    """A loss for each rate, and the rate to take: None if none lowered the loss."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    proposal: float | None


def range_test(
    step: Callable[[float], float], low: float = 1e-7, high: float = 1.0, steps: int = RATES
) -> RangeTest:
    """Trains by rates from low to high, each the same multiple of the one before, until the loss
    blows up.

    `step` trains one step with a rate and gives its loss. The proposal is a tenth of the rate at
    which the smoothed loss was least: there it was about to rise.
    """
    rates, losses, smoothed, average = [], [], [], 0.0
    for i in range(steps):
        rate = low * (high / low) ** (i / (steps - 1))
        loss = step(rate)
        if not math.isfinite(loss):
            break
        average = 0.9 * average + 0.1 * loss
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average / (1 - 0.9 ** (i + 1)))
        if i >= 10 and smoothed[-1] > 2 * min(smoothed) + 0.1:
            break
    return RangeTest(rates, losses, smoothed, _proposal(rates, losses, smoothed))


def _proposal(rates: list[float], losses: list[float], smoothed: list[float]) -> float | None:
    """None unless the least is lower than the start by more than the start's noise."""
    start = losses[: max(2, len(losses) // 4)]
    if len(losses) < 10:
        return None
    least = min(range(5, len(smoothed)), key=smoothed.__getitem__)
    fallen = statistics.fmean(start) - smoothed[least]
    if fallen < max(statistics.pstdev(start) / 2, 0.01 * statistics.fmean(start)):
        return None
    return rounded(rates[least] / 10)
