"""The spread of what is measured several times."""

import math
import statistics
from collections.abc import Sequence


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    ordered, last = sorted(samples), len(samples) - 1
    return ordered[int(0.2 * last)], statistics.median(ordered), ordered[math.ceil(0.8 * last)]
