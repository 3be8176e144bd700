"""Intervals of 95 % for what is counted and averaged over pictures."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.96  # the 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """Such as "0.021 (0.012 to 0.030)"."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def wilson(hits: int, count: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of the share ``hits / count`` (Wilson, 1927); (0, 1) if ``count`` is 0."""
    if not count:
        return 0.0, 1.0
    share, extra = hits / count, z * z / count
    middle, half = share + extra / 2, z * math.sqrt(share * (1 - share) / count + extra / count / 4)
    # Rounding may leave an end just outside [0, 1].
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def mean(values: NDArray[np.float64]) -> Interval:
    """The mean of independent values (n,) with n > 0, with the normal interval of their standard error."""
    middle = float(values.mean())
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Interval(middle, middle - half, middle + half)
