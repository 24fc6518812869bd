"""Contrasts of rewards and their standard errors: paired, stratified, unpaired, and by cluster.

``w`` is True where the original has the attribute. The estimators are Algorithm 1 of Reber et al. (arXiv 2410.11348).
"""

from __future__ import annotations

import math

import numpy as np

from lightning_interp.core.measure.clustered import Codes, Mask, Point, Vector, mean_point, squares, variance

__all__ = ["contrast_points", "pooled_sd", "unpaired_points"]

_NAN = math.nan


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
