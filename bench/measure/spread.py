"""The spread of what is measured several times."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A value and, if it is known, from where to where it goes."""

    value: float
    low: float | None = None
    high: float | None = None


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    ordered, last = sorted(samples), len(samples) - 1
    return ordered[int(0.2 * last)], statistics.median(ordered), ordered[math.ceil(0.8 * last)]


def ratio(
    own: Mapping[int, Sequence[float]], base: Mapping[int, Sequence[float]], paired: int
) -> Spread:
    """Of what was measured in rounds: by pairs of these, if both ran in so many; else of all, with both spreads."""
    if len(both := own.keys() & base.keys()) >= paired:
        low, middle, high = quantiles(
            [statistics.median(own[n]) / statistics.median(base[n]) for n in both]
        )
        return Spread(middle, low, high)
    mine, theirs = (list(itertools.chain(*rounds.values())) for rounds in (own, base))
    (low, middle, high), (least, half, most) = quantiles(mine), quantiles(theirs)
    known = min(len(mine), len(theirs)) > 1
    return Spread(middle / half, low / most, high / least) if known else Spread(middle / half)
