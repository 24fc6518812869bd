"""Means of contrasts and their standard errors: paired, stratified, unpaired, and by cluster.

All arrays are float64 on the CPU, one value a unit; ``w`` is True where the original has the attribute. Every sample
variance divides by n - 1. The estimators are Algorithm 1 of Reber et al. (arXiv 2410.11348).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mask", "Point", "Vector", "contrast_points", "mean_point", "naive_point", "pooled_sd", "unpaired_points"]

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]
Codes = NDArray[np.int64]

_NAN = math.nan


class Point(NamedTuple):
    """An estimate before it has an interval.

    Args:
        value: The estimate.
        se: Its standard error; NaN where the sample carries none.
        df: Degrees of freedom for Student's t.
        n: Units that it rests on.
        smallest: Units (or clusters) in the smallest sample that the error is estimated from.
    """

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


def pooled_sd(r_orig: Vector, w: Mask) -> float:
    """Pooled standard deviation of the original rewards within the two arms: the unit of standardised effects.

    Args:
        r_orig: Rewards of the originals, ``[n]``.
        w: Arms, ``[n]``.

    Returns:
        The square root of ``((n1 - 1) var1 + (n0 - 1) var0) / (n1 + n0 - 2)``; NaN if an arm is empty.

    Example:
        >>> round(pooled_sd(np.array([3.0, 2.0, 4.0, 1.0, 0.0, 2.0, 1.0]), np.arange(7) < 3), 9)
        0.894427191
    """
    if w.all() or not w.any() or w.size < 3:
        return _NAN
    return math.sqrt((squares(r_orig[w]) + squares(r_orig[~w])) / (w.size - 2))


def mean_point(x: Vector, cluster: Codes | None = None) -> Point:
    """Mean of one value a unit, with the error of independent units or of independent clusters.

    The cluster error is ``sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n`` (CR1); with one unit a cluster
    it is ``sd / sqrt(n)``.

    Args:
        x: Values, ``[n]``.
        cluster: Number of each unit's cluster, ``[n]``.

    Returns:
        The mean and its error.

    Example:
        >>> mean_point(np.array([1.0, 2.0, 3.0])).se ** 2 * 3
        1.0
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


def naive_point(r_orig: Vector, w: Mask, cluster: Codes | None = None) -> Point:
    """Difference of the arms' mean rewards, with Welch's error or the one of independent clusters.

    Args:
        r_orig: Rewards of the originals, ``[n]``.
        w: Arms, ``[n]``.
        cluster: Number of each unit's cluster, ``[n]``.

    Returns:
        The difference and its error; NaN if an arm is empty.

    Example:
        >>> naive_point(np.array([3.0, 2.0, 4.0, 1.0, 0.0, 2.0, 1.0]), np.arange(7) < 3).value
        2.0
    """
    one, zero = r_orig[w], r_orig[~w]
    value, smaller = mean(one) - mean(zero), min(one.size, zero.size)
    if smaller < 2:
        return Point(value, _NAN, _NAN, w.size, smaller)
    if cluster is not None:
        influence = np.where(w, (r_orig - mean(one)) / one.size, -(r_orig - mean(zero)) / zero.size)
        return _clustered(value, influence, cluster, w.size)
    parts = variance(one) / one.size, variance(zero) / zero.size
    bottom = parts[0] ** 2 / (one.size - 1) + parts[1] ** 2 / (zero.size - 1)
    df = sum(parts) ** 2 / bottom if bottom > 0 else float(w.size - 2)
    return Point(value, math.sqrt(sum(parts)), df, w.size, smaller)


def contrast_points(
    contrast: Vector, w: Mask, *, cluster: Codes | None = None, stratified: bool = False
) -> tuple[Point, Point, Point]:
    """ATE, ATT and ATU of a signed contrast: its mean over all units and within each arm.

    Args:
        contrast: Signed contrast of each unit, ``[n]``.
        w: Arms, ``[n]``.
        cluster: Number of each unit's cluster, ``[n]``.
        stratified: The arms' sizes were fixed by design, so the error of the ATE holds them fixed.

    Returns:
        The points of ATE, ATT and ATU. With an empty arm its own and the ATE are NaN.

    Example:
        >>> [point.value for point in contrast_points(np.array([1.0, 2.0, 6.0]), np.array([True, True, False]))]
        [3.0, 1.5, 6.0]
    """
    att, atu = (mean_point(contrast[arm], None if cluster is None else cluster[arm]) for arm in (w, ~w))
    ate = mean_point(contrast, cluster)
    if att.n == 0 or atu.n == 0:
        ate = Point(_NAN, _NAN, _NAN, w.size, 0)
    elif stratified:
        error = math.hypot(att.n / w.size * att.se, atu.n / w.size * atu.se)
        ate = ate._replace(se=error, smallest=min(att.n, atu.n))
    return ate, att, atu


def unpaired_points(r_rw: Vector, r_rw2: Vector, w: Mask) -> tuple[Point, Point, Point]:
    """ATE, ATT and ATU with the errors that the paper's published tables use for the double rewrite.

    They treat the two sides of each contrast as separate samples, so they are too wide wherever the two rewards of a
    unit go together.

    Args:
        r_rw: Rewards of the rewrites, ``[n]``.
        r_rw2: Rewards of the rewrites of the rewrites, ``[n]``.
        w: Arms, ``[n]``.

    Returns:
        The points of ATE, ATT and ATU.

    Example:
        >>> r_rw, r_rw2 = np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 0.0, 1.0])
        >>> ate = unpaired_points(r_rw, r_rw2, np.array([True, True, False, False]))[0]
        >>> ate.value, round(ate.se, 4)
        (1.0, 0.4082)
    """
    points = contrast_points(np.where(w, r_rw2 - r_rw, r_rw - r_rw2), w)
    with_w, without = np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2)

    def error(arm: Mask) -> float:
        count = int(arm.sum())
        return math.sqrt((variance(with_w[arm]) + variance(without[arm])) / count) if count > 1 else _NAN

    ate, att, atu = (point._replace(se=error(arm)) for point, arm in zip(points, (w | True, w, ~w), strict=True))
    return (ate._replace(se=_NAN) if math.isnan(ate.value) else ate), att, atu
