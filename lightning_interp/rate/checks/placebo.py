"""What the estimators find where there is nothing to find: exchanged rewrites, and rewards of no meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate, proportion_interval
from lightning_interp.errors import RecipeError
from lightning_interp.rate.estimators.effects import Settings, effects_of_units
from lightning_interp.rate.estimators.result import Effect, Finding, RateResult, Units, mean_effect

__all__ = ["DummyOutcome", "PermutationCheck", "dummy_outcome_check", "permutation_check"]

CHUNK = 2**21
"""Signs that are held at once."""

_ROUNDING = 1e-12


@dataclass(frozen=True)
class PermutationCheck(Finding):
    """Two-sided p-values of the exchange of each unit's two rewrites, NaN for an empty arm.

    They rest on so many ``resamples``, in which ``"units"`` or ``"clusters"`` were ``exchanged``.
    """

    ate: float
    att: float
    atu: float
    resamples: int
    exchanged: str


def permutation_check(result: RateResult, *, resamples: int = 9999, seed: int = 0) -> PermutationCheck:
    """How often effects as large come up if each unit's two rewrites are exchanged at random.

    Without any effect, and without rewrites that depend on their direction, the two rewards of a unit could have come
    in either order; exchanging them flips the sign of its contrast. With clustered errors clusters are exchanged whole.

    Args:
        result: The effects.
        resamples: Random exchanges.
        seed: Of the exchanges; the global random state is not used.

    Returns:
        ``(1 + exchanges with an effect at least as large) / (1 + resamples)`` for each estimand.

    Raises:
        RecipeError: If ``resamples`` is not positive.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 0] * 8, None, [0.0, 1.0] * 8, [1.0, 0.0] * 8)
        >>> permutation_check(result, resamples=99).ate
        0.01
    """
    if resamples < 1:
        raise RecipeError(f"resamples={resamples!r}; expected a positive number of random exchanges.")
    units, clustered = result.units, result.settings["se"] == "cluster"
    columns = np.stack([units.delta, units.delta * units.w, units.delta * ~units.w], axis=1)
    if clustered and units.cluster is not None:
        groups = np.unique(units.cluster, return_inverse=True)[1]
        columns = np.stack([np.bincount(groups, weights=column) for column in columns.T], axis=1)
    seen = np.abs(columns.sum(axis=0))
    reach = seen - _ROUNDING * np.abs(columns).sum(axis=0)  # an equal effect may differ in its last digits
    generator = np.random.default_rng(derived_seed(seed, "rewrite-based permutation"))
    rows, above = max(1, CHUNK // len(columns)), np.zeros(3, dtype=np.int64)
    for start in range(0, resamples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resamples - start), len(columns)), dtype=np.int8)
        above += (np.abs((2.0 * signs - 1.0) @ columns) >= reach).sum(axis=0)
    there = (units.w.any() and not units.w.all(), units.w.any(), not units.w.all())
    ate, att, atu = np.where(np.array(there), (above + 1) / (resamples + 1), np.nan).tolist()
    return PermutationCheck(ate, att, atu, resamples, "clusters" if clustered else "units")


@dataclass(frozen=True)
class DummyOutcome(Finding):
    """What the estimators make of rewards that have nothing to do with the texts, by estimator.

    ``covered`` is the share of the repeats whose interval of the ATE (or naive difference) holds the truth, zero, with
    Wilson's interval; it should be ``level``. ``mean`` is the mean estimate in standard deviations of the rewards.
    """

    covered: Mapping[str, Estimate]
    mean: Mapping[str, Effect]
    level: float


def dummy_outcome_check(result: RateResult, *, repeats: int = 200, seed: int = 0) -> DummyOutcome:
    """Estimate effects on rewards that are drawn at random from all rewards of the result.

    Arms, clusters and the kind of error stay, so this shows whether such intervals hold what they promise for this
    sample's size and tails. Bootstrap intervals are replaced by those of ``ci="auto"``.

    Args:
        result: The effects; both arms need at least two units.
        repeats: Random sets of rewards.
        seed: Of the draws; the global random state is not used.

    Returns:
        Coverage and mean by estimator: ``rate``, and with original rewards ``naive`` and ``single``.

    Raises:
        RecipeError: If ``repeats`` is below two, an arm has fewer than two units, or all rewards are equal.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 0] * 8, None, [0.0, 1.0] * 8, [1.0, 0.0] * 8)
        >>> dummy_outcome_check(result, repeats=50).covered["rate"].n
        50
    """
    units = result.units
    pool = np.concatenate([part for part in (units.r_orig, units.r_rw, units.r_rw2) if part is not None])
    spread = float(pool.std())
    smaller = min(int(units.w.sum()), int((~units.w).sum()))
    if repeats < 2 or smaller < 2 or spread == 0:
        raise RecipeError(
            f"dummy_outcome_check() got repeats={repeats!r}, {smaller} units in the smaller arm and rewards with "
            f"standard deviation {spread:g}; expected at least two repeats, two units in each arm, and rewards that "
            "differ."
        )
    ci = "auto" if result.settings["ci"] == "bootstrap" else result.settings["ci"]
    settings = Settings(**{**result.settings, "ci": ci, "standardize": False})
    found: dict[str, list[Effect]] = {}
    for repeat in range(repeats):
        generator = np.random.default_rng(derived_seed(seed, "rewrite-based dummy outcome", repeat))
        again = effects_of_units(_dummy(units, pool, generator), result.counts, settings).raw
        for name, estimand, effect in again.items():
            if estimand in ("ate", "naive"):
                found.setdefault(name, []).append(effect)
    zero = {name: [float(e.low <= 0 <= e.high) for e in effects] for name, effects in found.items()}
    means = {name: np.array([effect.value for effect in effects]) for name, effects in found.items()}
    return DummyOutcome(
        covered={name: proportion_interval(shares) for name, shares in zero.items()},
        mean={name: mean_effect(values, "mean over repeats").scaled(spread) for name, values in means.items()},
        level=1 - settings.alpha,
    )


def _dummy(units: Units, pool: Any, generator: np.random.Generator) -> Units:
    def draw() -> Any:
        return generator.choice(pool, size=units.w.size)

    return replace(units, r_orig=None if units.r_orig is None else draw(), r_rw=draw(), r_rw2=draw())
