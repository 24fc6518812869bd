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
    """Pooled standard deviation of the original rewards within the two arms: the unit of standardised effects."""
    if w.all() or not w.any() or w.size < 3:
        return _NAN
    return math.sqrt((squares(r_orig[w]) + squares(r_orig[~w])) / (w.size - 2))


def contrast_points(
    contrast: Vector, w: Mask, *, cluster: Codes | None = None, stratified: bool = False
) -> tuple[Point, Point, Point]:
    """ATE, ATT and ATU of a signed contrast: its mean over all units and within each arm."""
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
    """
    points = contrast_points(np.where(w, r_rw2 - r_rw, r_rw - r_rw2), w)
    with_w, without = np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2)

    def error(arm: Mask) -> float:
        count = int(arm.sum())
        return math.sqrt((variance(with_w[arm]) + variance(without[arm])) / count) if count > 1 else _NAN

    ate, att, atu = (point._replace(se=error(arm)) for point, arm in zip(points, (w | True, w, ~w), strict=True))
    return (ate._replace(se=_NAN) if math.isnan(ate.value) else ate), att, atu
