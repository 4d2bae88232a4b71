"""Quantiles and ratios of repeated measurements."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A value with its range from p20 to p80, if that is known."""

    value: float
    low: float | None = None
    high: float | None = None


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, the median and p80."""
    ordered, last = sorted(samples), len(samples) - 1
    return ordered[int(0.2 * last)], statistics.median(ordered), ordered[math.ceil(0.8 * last)]


def ratio(
    rounds: Mapping[int, Sequence[float]],
    base_rounds: Mapping[int, Sequence[float]],
    min_shared_rounds: int,
) -> Spread:
    """Return the ratio of two sets of samples, each grouped by round number.

    With at least `min_shared_rounds` rounds in common, the ratio is computed round by round.
    Otherwise it is the ratio of the medians, and its range combines both spreads.
    """
    if len(shared := rounds.keys() & base_rounds.keys()) >= min_shared_rounds:
        ratios = [statistics.median(rounds[n]) / statistics.median(base_rounds[n]) for n in shared]
        low, middle, high = quantiles(ratios)
        return Spread(middle, low, high)
    samples = list(itertools.chain(*rounds.values()))
    base_samples = list(itertools.chain(*base_rounds.values()))
    low, middle, high = quantiles(samples)
    base_low, base_middle, base_high = quantiles(base_samples)
    if min(len(samples), len(base_samples)) < 2:
        return Spread(middle / base_middle)
    return Spread(middle / base_middle, low / base_high, high / base_low)
