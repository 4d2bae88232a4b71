"""The learning rate: its schedule, a guard against a rate that is too high, and a range test.

The guard knows the loss of the untrained model: `level` and `noise` are its mean and standard
deviation over some batches; noise counts as at least 2 % of the level. The guard looks at two
properties of the last losses, neither of which a single spike changes. The trimmed mean leaves out
the highest fifth of them. The `swing` is the median of the absolute differences between neighbors.
The rate is too high in three cases:

    not finite: the loss or the gradient's norm is not finite.
    diverged:   the trimmed mean of the last 20 losses is above `best` by more than the largest of
                0.3 level, half of level - best, 4 noise, 1.5 swings and 0.1. `best` is the least
                trimmed mean so far, at most the level.
    bounces:    the clipped mean of the last 40 to 160 losses, each cut off at 4 swings above their
                median, is above the level by more than
                4 (swing / sqrt(number of losses) + noise / sqrt(8)),
                and the swing is over 3 noise and over 0.05.

The last two count only if the loss is not falling: the average (trimmed or clipped, as above) of
the newer half of the losses is over 0.9 of that of the older half. The guard cannot tell a loss
that stays where it was from one that falls slowly. Losses are mean cross entropies, for which 0.1
is little in any task.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

SCHEDULES = ("constant", "linear", "cosine")
SHORT_WINDOW, LONG_WINDOW, LONGEST_WINDOW = 20, 40, 160  # losses that the guard looks back on
UNTRAINED_LOSSES = 8  # losses of the untrained model that the guard begins with
RANGE_TEST_STEPS = 100


def schedule_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    The factor rises in `warmup` steps to 1; "linear" and "cosine" then fall to 0 at `steps`.

    Example:
        >>> from pyfast.finetune.learning_rate import schedule_factor
        >>> [schedule_factor("linear", step, steps=4, warmup=0) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2


class RateTooHigh(Exception):
    """The error with which the guard stops a training.

    Attributes:
        step: the step, counted from 1, whose loss gave the alarm.
        rate: the learning rate of the settings.
        reason: what the losses showed.
        proposal: a rate to try instead, a tenth of `rate`.
        advice: the command that continues, or "".
    """

    def __init__(self, step: int, rate: float, reason: str, advice: str = "") -> None:
        self.step, self.rate, self.reason, self.advice = step, rate, reason, advice
        self.proposal = round_rate(rate / 10)
        super().__init__(
            f"the learning rate {rate:g} is too high: at step {step} {reason}; "
            f"try {self.proposal:g}"
        )


def round_rate(rate: float) -> float:
    """Round a learning rate to two significant digits."""
    return float(f"{rate:.1e}")


# --- the guard ---


class Guard:
    """A watch on the losses of a training that tells when the learning rate is too high.

    Args:
        untrained: losses of the model before training, one for each of some batches.

    Example:
        >>> from pyfast.finetune.learning_rate import Guard
        >>> guard = Guard([0.7, 0.68, 0.69])
        >>> guard.observe(float("nan"), grad_norm=1.0)
        'the loss is no longer finite'
    """

    def __init__(self, untrained: Sequence[float]) -> None:
        self.level = statistics.fmean(untrained)
        self.noise = max(statistics.pstdev(untrained), 0.02 * self.level)
        self.best, self.losses = self.level, []

    def observe(self, loss: float, grad_norm: float) -> str | None:
        """Take the loss of a step; return why the rate is too high, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the {'gradient' if math.isfinite(loss) else 'loss'} is no longer finite"
        self.losses = [*self.losses[1 - LONGEST_WINDOW :], loss]
        recent = self.losses[-SHORT_WINDOW:]
        if len(recent) == SHORT_WINDOW:
            average = _trimmed_mean(recent)
            self.best = min(self.best, average)
            if self._has_diverged(recent):
                return (
                    f"the loss has risen to {average:.3g} "
                    f"(untrained {self.level:.3g}, best {self.best:.3g})"
                )
        if len(self.losses) >= LONG_WINDOW and self._is_bouncing(self.losses):
            low, high = min(self.losses), max(self.losses)
            return (
                f"the loss jumps between {low:.3g} and {high:.3g}, "
                f"and does not fall below {self.level:.3g}"
            )
        return None

    def is_calm(self) -> bool:
        """Return whether the state with the last loss is worth saving.

        Its loss must not be too high, and the recent average not half as high as gives an alarm.
        """
        recent = self.losses[-SHORT_WINDOW:]
        if len(recent) < 2:
            return True
        allowed = self._allowed_rise()
        if recent[-1] > self.best + allowed or _trimmed_mean(recent) > self.best + allowed / 2:
            return False
        return not self._is_bouncing(recent)

    def _allowed_rise(self) -> float:
        return max(0.3 * self.level, (self.level - self.best) / 2, 4 * self.noise, 0.1)

    def _has_diverged(self, losses: Sequence[float]) -> bool:
        rise = _trimmed_mean(losses) - self.best
        return rise > max(self._allowed_rise(), 1.5 * _swing(losses)) and not _is_falling(
            losses, _trimmed_mean
        )

    def _is_bouncing(self, losses: Sequence[float]) -> bool:
        swing = _swing(losses)
        uncertainty = swing / len(losses) ** 0.5 + self.noise / UNTRAINED_LOSSES**0.5
        if _clipped_mean(losses) - self.level <= 4 * uncertainty:
            return False
        return swing > max(3 * self.noise, 0.05) and not _is_falling(losses, _clipped_mean)

    def state(self) -> dict:
        """Return all that the guard knows, ready for JSON."""
        return {"level": self.level, "noise": self.noise, "best": self.best, "losses": self.losses}

    @classmethod
    def from_state(cls, state: dict) -> "Guard":
        """Build the guard that had this state."""
        guard = cls([state["level"]])
        guard.noise, guard.best, guard.losses = state["noise"], state["best"], list(state["losses"])
        return guard


def _swing(losses: Sequence[float]) -> float:
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))


def _trimmed_mean(losses: Sequence[float]) -> float:
    """Return the mean without the highest fifth."""
    return statistics.fmean(sorted(losses)[: len(losses) - len(losses) // 5])


def _clipped_mean(losses: Sequence[float]) -> float:
    """Return the mean of the losses, each cut off at 4 swings above their median."""
    highest = statistics.median(losses) + 4 * _swing(losses)
    return statistics.fmean(min(loss, highest) for loss in losses)


def _is_falling(losses: Sequence[float], average: Callable[[Sequence[float]], float]) -> bool:
    half = len(losses) // 2
    return average(losses[half:]) <= 0.9 * average(losses[:half])


# --- the range test ---


class RangeTest(NamedTuple):
    """The loss at each learning rate, and the rate to take; None if no rate lowered the loss."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    proposal: float | None


def range_test(
    train_step: Callable[[float], float],
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = RANGE_TEST_STEPS,
) -> RangeTest:
    """Train with rates from low to high until the loss blows up, and propose a rate.

    Each rate is the same multiple of the one before. The proposal is a tenth of the rate at which
    the smoothed loss was least, because there the loss was about to rise.

    Args:
        train_step: trains one step with a rate and returns its loss.
        low: the first rate.
        high: the last rate.
        steps: number of rates.
    """
    rates, losses, smoothed, average = [], [], [], 0.0
    for i in range(steps):
        rate = low * (high / low) ** (i / (steps - 1))
        loss = train_step(rate)
        if not math.isfinite(loss):
            break
        average = 0.9 * average + 0.1 * loss
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average / (1 - 0.9 ** (i + 1)))
        if i >= 10 and smoothed[-1] > 2 * min(smoothed) + 0.1:
            break
    return RangeTest(rates, losses, smoothed, _propose_rate(rates, losses, smoothed))


def _propose_rate(rates: list[float], losses: list[float], smoothed: list[float]) -> float | None:
    """Return the rate to take, or None unless the loss fell by more than its noise at the start."""
    if len(losses) < 10:
        return None
    start = losses[: max(2, len(losses) // 4)]
    least = min(range(5, len(smoothed)), key=smoothed.__getitem__)
    drop = statistics.fmean(start) - smoothed[least]
    if drop < max(statistics.pstdev(start) / 2, 0.01 * statistics.fmean(start)):
        return None
    return round_rate(rates[least] / 10)
