"""Do the assumptions hold? Third rewrites, failed rewrites, and what an asymmetry would do.

The double rewrite is unbiased if what a rewrite changes besides the attribute does not depend on its direction, and
adds to the reward (Reber et al., arXiv 2410.11348, Theorem 4.1). Rewards alone can at best show that this fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_interp.core.measure.clustered import Mask
from lightning_interp.core.measure.statistics import Estimate, proportion_interval
from lightning_interp.errors import RecipeError
from lightning_interp.rate.estimators.columns import check_lengths, label_column, number_column
from lightning_interp.rate.estimators.effects import Settings
from lightning_interp.rate.estimators.result import Effect, Finding, RateResult, mean_effect, plain
from lightning_interp.rate.estimators.unit_table import UnitTable

__all__ = [
    "Attenuation",
    "SensitivityLine",
    "ThirdRewrite",
    "asymmetry_line",
    "attenuation_hint",
    "third_rewrite_check",
]


@dataclass(frozen=True)
class ThirdRewrite(Finding):
    """The ATE from rewrites 1 and 2, from rewrites 2 and 3, and the first minus the second, paired by unit.

    If the assumptions hold, both estimate the same. If every pass only removes a share ``q`` of the flaws left, the
    first is off by ``-(1 - q) B`` and the second by ``(1 - q)^2 B``, with ``B`` the bias of the single rewrite.
    """

    ate: Effect
    ate_third: Effect
    difference: Effect


def third_rewrite_check(
    w: Any, r_rw: Any, r_rw2: Any, r_rw3: Any, *, ids: Any = None, cluster: Any = None, **options: Any
) -> ThirdRewrite:
    """Estimate the effect once more from a third rewrite, which flips the attribute again.

    Args:
        w: Labels, ``[n]``.
        r_rw: Rewards of the rewrites, ``[n]``.
        r_rw2: Rewards of the rewrites of the rewrites, ``[n]``.
        r_rw3: Rewards of the third rewrites, ``[n]``.
        ids: Integers or strings, one a unit.
        cluster: One a unit, for errors of independent clusters; None for independent units.
        **options: ``ci`` (but ``"bootstrap"``), ``alpha`` and ``missing`` of
            :func:`~lightning_interp.rate.estimators.effects.rate_effects`.

    Returns:
        Both effects and their difference, of which an interval without zero speaks against the assumptions.

    Raises:
        DataError: If the inputs cannot be used.
        RecipeError: If an option is unknown.

    Example:
        >>> found = third_rewrite_check([1, 1, 0], [0.0, 1.0, 2.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0])
        >>> found.ate.value, found.ate_third.value, found.difference.value
        (1.0, 1.0, 0.0)
    """
    settings = Settings(se="paired" if cluster is None else "cluster", **options)
    if settings.ci == "bootstrap":
        raise RecipeError("third_rewrite_check() has ci='bootstrap'; expected 'auto', 'normal' or 't'.")
    third, absent = number_column("r_rw3", r_rw3)
    kinds = zip(absent, np.isfinite(third), strict=True)
    lacking = ["missing_rewrite3" if gone else None if finite else "nonfinite" for gone, finite in kinds]
    check_lengths("w", len(w), [("r_rw3", third)])
    held = np.where(np.isfinite(third), third, 0.0)  # carried in the place of the originals, which are not needed
    table = UnitTable.read(w, held, r_rw, r_rw2, ids=ids, cluster=cluster, incomplete=lacking)
    units = table.usable(missing=settings.missing).units()
    last: Any = units.r_orig
    later = np.where(units.w, units.r_rw2 - last, last - units.r_rw2)
    gap = np.where(units.w, last - units.r_rw, units.r_rw - last)
    how: dict[str, Any] = {"cluster": units.cluster, "ci": settings.ci, "alpha": settings.alpha}
    return ThirdRewrite(*(mean_effect(contrast, settings.se, **how) for contrast in (units.delta, later, gap)))


@dataclass(frozen=True)
class Attenuation(Finding):
    """How often a rewrite has the value it was asked for, by direction ``"1->0"`` and ``"0->1"``, and a ``factor``.

    ``factor`` is, by estimand, ``1 / ((1 - a) (1 - b))`` with the shares ``a`` and ``b`` of failed first and second
    rewrites of its units: what the effect would have to be multiplied by if a failed rewrite changed nothing and every
    other was perfect. It is never applied. NaN where no rewrite succeeded.
    """

    rewrite: Mapping[str, Estimate]
    rewrite2: Mapping[str, Estimate]
    factor: Mapping[str, float]


def attenuation_hint(w: Any, label_rw: Any, label_rw2: Any, *, level: float = 0.95) -> Attenuation:
    """Compare the measured attribute of the rewrites with what they were asked for.

    Args:
        w: Labels of the originals, ``[n]``; unlabelled units (None) are left out.
        label_rw: Measured attribute of the rewrites, which should be ``1 - w``, ``[n]``; None where not measured.
        label_rw2: Measured attribute of the rewrites of the rewrites, which should be ``w``, ``[n]``.
        level: Confidence level.

    Returns:
        Rates with Wilson's intervals over the measured rewrites, and the factors.

    Raises:
        DataError: If a label is neither 0 nor 1, or the lengths differ.

    Example:
        >>> found = attenuation_hint([1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0])
        >>> print(found.rewrite["1->0"], found.factor["att"], round(found.factor["ate"], 3))
        0.50 [0.09, 0.91] 2.0 1.333
    """
    target, unlabelled = label_column("w", w)
    kept: list[tuple[Mask, Mask]] = []
    for name, values, wanted in (("label_rw", label_rw, ~target), ("label_rw2", label_rw2, target)):
        label, absent = label_column(name, values)
        check_lengths("w", target.size, [(name, label)])
        kept.append((label == wanted, ~absent & ~unlabelled))
    arms = {"att": target, "atu": ~target, "ate": target | True}
    (first, first_known), (second, second_known) = kept
    return Attenuation(
        rewrite=_rates(first, first_known, {"1->0": target, "0->1": ~target}, level),
        rewrite2=_rates(second, second_known, {"1->0": ~target, "0->1": target}, level),
        factor={name: _factor(first[first_known & arm], second[second_known & arm]) for name, arm in arms.items()},
    )


def _rates(fine: Mask, known: Mask, directions: Mapping[str, Mask], level: float) -> dict[str, Estimate]:
    found = {direction: fine[known & where].astype(float).tolist() for direction, where in directions.items()}
    return {direction: proportion_interval(shares, level=level) for direction, shares in found.items()}


def _factor(first: Mask, second: Mask) -> float:
    share = float(first.mean() * second.mean()) if first.size and second.size else 0.0
    return 1 / share if share > 0 else math.nan


@dataclass(frozen=True)
class SensitivityLine(Finding):
    """What the effect would be if rewrites had an off-target side effect that depends on their direction.

    The feature is worth ``beta``; ``asymmetry`` are values of ``D``, the share of rewrites to 1 minus that of rewrites
    to 0 which show it; ``effect`` is the estimate minus ``beta * D``, zero at ``zero`` (its ends: ``zero_low, _high``).
    """

    beta: float
    asymmetry: tuple[float, ...]
    effect: tuple[Effect, ...]
    zero: float
    zero_low: float
    zero_high: float

    @property
    def possible(self) -> bool:
        """Whether any asymmetry can bring the effect to zero: a difference of two shares lies between -1 and 1."""
        return abs(self.zero) <= 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {name: plain(getattr(self, name)) for name in ("beta", "zero", "zero_low", "zero_high", "possible")}
        line = [{"asymmetry": d, **e.to_dict()} for d, e in zip(self.asymmetry, self.effect, strict=True)]
        return {**found, "line": line}


def asymmetry_line(
    result: RateResult, beta: float, *, asymmetry: Sequence[float] | None = None, standardized: bool = False
) -> SensitivityLine:
    """How the ATE depends on an asymmetry of the rewriter that was not measured.

    If the rewards hold ``beta`` for an off-target feature, and rewrites to 1 show it more often by ``D`` than rewrites
    to 0, then ATE, ATT and ATU are off by ``beta * D``, however the data are confounded.

    Args:
        result: The effects.
        beta: What the feature adds to the reward; in standard deviations with ``standardized``.
        asymmetry: Values of ``D`` between -1 and 1; 41 evenly spaced ones if None.
        standardized: Use the standardised effect.

    Returns:
        The line and its zero.

    Raises:
        RecipeError: If ``beta`` is zero or not finite, a ``D`` is out of range, or there is no standardised effect.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 1, 0, 0], None, [0.0, 1.0, 2.0, 2.0], [1.0, 2.0, 1.0, 1.0])
        >>> asymmetry_line(result, beta=2.0).zero
        0.5
    """
    if not math.isfinite(beta) or beta == 0:
        raise RecipeError(f"beta={beta!r}: expected what the off-target feature adds to the reward, a number but zero.")
    points = tuple(np.linspace(-1, 1, 41).tolist() if asymmetry is None else map(float, asymmetry))
    if wrong := [point for point in points if not -1 <= point <= 1]:
        raise RecipeError(f"asymmetry holds {wrong[0]!r}; a difference of two shares lies between -1 and 1.")
    table = result.standardized if standardized else result.raw
    if table is None:
        raise RecipeError(
            "standardized=True, but the result holds no standardised effects. Make it with standardize=True and with "
            "original rewards."
        )
    ate = table.rate.ate
    ends = sorted((ate.low / beta, ate.high / beta))
    return SensitivityLine(beta, points, tuple(_moved(ate, beta * d) for d in points), ate.value / beta, *ends)


def _moved(effect: Effect, by: float) -> Effect:
    return replace(effect, value=effect.value - by, low=effect.low - by, high=effect.high - by)
