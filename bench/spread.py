"""The spread of what is measured several times."""

import math
import statistics
from collections.abc import Sequence
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
