"""Means over seeds with their uncertainty, and values between evaluations.

With three seeds no interval says much. The bootstrap resamples the seeds that there are, so its
interval can only span what they span, and is too narrow by about sqrt((n - 1) / n) besides. The t
interval assumes normal values and is honest about n: 4.3 standard errors to each side with three
seeds. Both are shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, fsum, pi, sin, sqrt, tan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values, one per seed, with its standard error sd / sqrt(n) (sd with n - 1)
    and two intervals of 95 %; these are None for one value."""

    values: tuple[float, ...]
    mean: float
    se: float | None
    bootstrap: Interval | None
    t: Interval | None

    @property
    def n(self) -> int:
        return len(self.values)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with its uncertainty."""
    n = len(values)
    mean = fsum(values) / n
    if n == 1:
        return Estimate(tuple(values), mean, None, None, None)
    se = sqrt(fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = t_quantile(n - 1) * se
    return Estimate(tuple(values), mean, se, bootstrap(values), (mean - half, mean + half))


def bootstrap(values: Sequence[float]) -> Interval:
    """The percentile interval of the mean over 10,000 resamples of the values, drawn with a fixed
    seed: the same values give the same interval."""
    import numpy as np

    means = np.asarray(values, dtype=np.float64)[_resamples(len(values))].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return low, high


@cache
def _resamples(n: int) -> NDArray[Any]:
    """int64 [10000, n]: which values each resample takes."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(0)).integers(n, size=(RESAMPLES, n))


@cache
def t_quantile(freedom: int) -> float:
    """The t for which |T| <= t with 95 % under ``freedom`` >= 1 degrees of freedom: 12.706, 4.303,
    3.182, ... By bisection of the distribution function, which is a finite sum for whole degrees
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    low, high = 0.0, pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _central(middle, freedom) < CONFIDENCE else (low, middle)
    return sqrt(freedom) * tan(low)


def _central(angle: float, freedom: int) -> float:
    """P(|T| <= t) for t = sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
    if not odd:
        return sin(angle) * total
    return 2 / pi * (angle + sin(angle) * total)


def between(places: Sequence[float], values: Sequence[float], at: float) -> float | None:
    """The value at a place, on the straight line between its neighbours; ``places`` ascend. None
    outside them."""
    if not places[0] <= at <= places[-1]:
        return None
    right = bisect_left(places, at)
    if places[right] == at:
        return values[right]
    share = (at - places[right - 1]) / (places[right] - places[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
