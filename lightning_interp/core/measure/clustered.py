"""Means and differences with their standard errors, of independent units or of independent clusters of them.

All arrays are float64 on the CPU, one value a unit. Every sample variance divides by n - 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Codes",
    "Mask",
    "Point",
    "Vector",
    "difference_point",
    "mean_point",
    "point_interval",
    "squares",
    "variance",
]

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]
Codes = NDArray[np.int64]

SMALL = 100
"""Below this many units (or clusters), ``ci="auto"`` uses Student's t."""

_NAN = math.nan


class Point(NamedTuple):
    """An estimate before it has an interval; ``smallest`` counts units (clusters) of the smallest sample in ``se``."""

    value: float
    se: float
    df: float
    n: int
    smallest: int


def mean(x: Vector) -> float:
    """Mean of a sample; exact where all values are equal, NaN where there is none."""
    if x.size == 0:
        return _NAN
    return float(x[0]) if (x == x[0]).all() else float(x.mean())


def squares(x: Vector) -> float:
    """Sum of squared deviations from the mean; exactly zero where all values are equal."""
    return 0.0 if x.size == 0 or (x == x[0]).all() else float(np.square(x - x.mean()).sum())


def variance(x: Vector) -> float:
    """Sample variance with n - 1; NaN for fewer than two values."""
    return squares(x) / (x.size - 1) if x.size > 1 else _NAN


def mean_point(x: Vector, cluster: Codes | None = None) -> Point:
    """Mean of one value a unit, with the error of independent units or of independent clusters.

    The cluster error is ``sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n`` (CR1); with one unit a cluster
    it is ``sd / sqrt(n)``.
    """
    if cluster is None:
        return Point(mean(x), math.sqrt(variance(x) / x.size) if x.size > 1 else _NAN, x.size - 1, x.size, x.size)
    return _clustered(mean(x), (x - mean(x)) / max(x.size, 1), cluster, x.size)


def _clustered(value: float, influence: Vector, cluster: Codes, n: int) -> Point:
    """A point whose error is summed over clusters of each unit's influence on it."""
    groups = np.unique(cluster, return_inverse=True)[1]
    count = int(groups.max()) + 1 if groups.size else 0
    if count < 2:
        return Point(value, _NAN, count - 1, n, count)
    sums = np.bincount(groups, weights=influence)
    return Point(value, math.sqrt(count / (count - 1) * float(np.square(sums).sum())), count - 1, n, count)


def difference_point(x: Vector, first: Mask, cluster: Codes | None = None) -> Point:
    """Mean where ``first`` holds minus the mean elsewhere, with Welch's error or the one of independent clusters."""
    one, zero = x[first], x[~first]
    value, smaller = mean(one) - mean(zero), min(one.size, zero.size)
    if smaller < 2:
        return Point(value, _NAN, _NAN, x.size, smaller)
    if cluster is not None:
        influence = np.where(first, (x - mean(one)) / one.size, -(x - mean(zero)) / zero.size)
        return _clustered(value, influence, cluster, x.size)
    parts = variance(one) / one.size, variance(zero) / zero.size
    bottom = parts[0] ** 2 / (one.size - 1) + parts[1] ** 2 / (zero.size - 1)
    df = sum(parts) ** 2 / bottom if bottom > 0 else float(x.size - 2)
    return Point(value, math.sqrt(sum(parts)), df, x.size, smaller)


def point_interval(point: Point, *, ci: str, alpha: float) -> tuple[float, float, str]:
    """Ends of a point's interval and its distribution's name; ``ci`` is ``auto``, ``normal`` or ``t``."""
    from scipy.special import ndtri, stdtrit

    student = ci == "t" or (ci == "auto" and point.smallest < SMALL)
    if math.isnan(point.se):
        return math.nan, math.nan, "none"
    reach = float(stdtrit(point.df, 1 - alpha / 2) if student else ndtri(1 - alpha / 2)) * point.se
    return point.value - reach, point.value + reach, f"t({point.df:.4g})" if student else "normal"
