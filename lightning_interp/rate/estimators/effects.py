"""Rewrite-based effects of an attribute on a reward: naive, single-rewrite and double-rewrite estimators.

Reber et al., "RATE: Causal Explainability of Reward Models with Imperfect Counterfactuals", arXiv 2410.11348,
Algorithm 1. Both rewrites that are compared have been through the rewriter, so what it does in either direction
cancels. The estimate is for the intervention that the rewriting instruction describes, and for texts as they look after
the rewriter. It says neither whether the dependence is right nor how accurate the reward is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_interp.core.measure import clustered
from lightning_interp.core.measure.clustered import Mask, Point, Vector, mean_point
from lightning_interp.core.measure.resampling import interval_ends
from lightning_interp.errors import RecipeError
from lightning_interp.rate.estimators.bootstrap import Replicates, bootstrap_effects
from lightning_interp.rate.estimators.result import Counts, Effect, Effects, EffectTable, RateResult, Units
from lightning_interp.rate.estimators.unit_table import UnitTable

__all__ = ["Settings", "effects_of_units", "rate_effects"]

MIN_BOOT = 1000
_CHOICES = {
    "se": ("paired", "stratified", "unpaired", "cluster"),
    "ci": ("auto", "normal", "t", "bootstrap"),
    "boot": ("percentile", "basic"),
    "missing": ("raise", "drop"),
    "identical": ("keep", "drop", "raise"),
}


@dataclass(frozen=True)
class Settings:
    """How errors and intervals are made: the options of :func:`rate_effects`, which says what they are."""

    se: str = "paired"
    ci: str = "auto"
    alpha: float = 0.05
    n_boot: int = 2000
    seed: int = 0
    boot: str = "percentile"
    standardize_inside: bool = False
    standardize: bool = True
    missing: str = "raise"
    identical: str = "keep"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise RecipeError(f"{name}={value!r} is unknown; expected one of {', '.join(map(repr, known))}.")
        if not 0 < self.alpha < 1:
            raise RecipeError(f"alpha={self.alpha!r} is not between 0 and 1; a 95 % interval is alpha=0.05.")
        if self.ci == "bootstrap" and self.n_boot < MIN_BOOT:
            raise RecipeError(
                f"n_boot={self.n_boot!r} is too few for the ends of an interval; use at least {MIN_BOOT}."
            )


def rate_effects(
    w: Any,
    r_orig: Any,
    r_rw: Any,
    r_rw2: Any,
    *,
    ids: Any = None,
    cluster: Any = None,
    texts: Sequence[Sequence[str | None]] | None = None,
    labels: Sequence[Any] | None = None,
    incomplete: Sequence[str | None] | None = None,
    **options: Any,
) -> RateResult:
    """Effects of a binary attribute on a reward, from three rewards a unit.

    With ``s = 1`` where w = 1 and ``-1`` where w = 0, the contrasts are ``s (r_rw2 - r_rw)`` for the double rewrite and
    ``s (r_orig - r_rw)`` for the single one. ATT and ATU are their means where w = 1 and w = 0, ATE the mean over all.
    The single rewrite is off by what a round trip does to the reward, which is reported too. All sums are made in
    float64 on the CPU over units in the order of their ids, so the order of the rows changes nothing.

    Args:
        w: Whether the original has the attribute, ``[n]``: bools, or 0 and 1; None is left out and counted.
        r_orig: Rewards of the originals, ``[n]``; None for the double rewrite alone, without a standard deviation.
        r_rw: Rewards of the rewrites that flip the attribute, ``[n]``. An element that is None is missing.
        r_rw2: Rewards of the rewrites of the rewrites, ``[n]``.
        ids: Integers or strings, one a unit; row numbers if None.
        cluster: Integers or strings, one a unit, such as the prompt, for ``se="cluster"``.
        texts: The three texts, ``3 x [n]``: an empty one makes its unit incomplete, identical ones are counted.
        labels: Measured attribute of both rewrites, ``2 x [n]``, to count those that lack their target value.
        incomplete: Why a unit cannot be used, such as ``"refused"``, or None, ``[n]``.
        **options: How errors and intervals are made:
            ``se``: ``"paired"`` (default) for independent units; ``"stratified"`` where the arms' sizes were fixed by
            design; ``"cluster"`` for independent clusters; ``"unpaired"`` for the errors of the paper's tables, which
            ignore that the two rewards of a unit go together and are too wide (single-rewrite ones are paired there).
            ``ci``: ``"auto"`` (default), the normal interval, or Student's t below 100 units; ``"normal"``; ``"t"``;
            ``"bootstrap"``, which draws units, whole clusters with ``se="cluster"``, units within arms if stratified.
            ``alpha`` (0.05): one minus the confidence level.
            ``n_boot`` (2000, at least 1000), ``seed`` (0) and ``boot`` (``"percentile"`` or ``"basic"``): resampling.
            ``standardize`` (True): also divide by the pooled standard deviation of the originals' rewards within arms.
            ``standardize_inside`` (False): work it out anew in each resample, instead of holding it fixed.
            ``missing``: ``"raise"`` (default), or ``"drop"`` to leave incomplete units out of every estimator.
            ``identical``: ``"keep"`` (default), ``"drop"`` or ``"raise"`` for rewrites that are the text they were made
            from; the last two need ``texts``. Dropping them selects on the outcome of the rewriter.

    Returns:
        Effects, counts and units. Where an arm is empty, its effect and the ATE are NaN; where it has one unit, its
        effect has no error. Standardised effects are NaN where the standard deviation is zero.

    Raises:
        DataError: If the inputs cannot be used; names the argument or the ids.
        RecipeError: If an option is unknown or lacks what it needs.

    Warns:
        UserWarning: If an arm is thin, the deviation is zero, 5 % are left out or identical, or clusters go unused.

    Example:
        >>> w = [1, 1, 1, 0, 0, 0, 0]
        >>> result = rate_effects(w, [3, 2, 4, 1, 0, 2, 1], [1, 0.5, 2, 2, 1.5, 2, 3], [2.5, 1, 3.5, 1.5, 0.5, 2.5, 1])
        >>> print(result.rate.ate, result.naive.value)
        0.93 [0.15, 1.70] 2.0
    """
    settings = Settings(**options)
    beside = {"ids": ids, "cluster": cluster, "texts": texts, "labels": labels, "incomplete": incomplete}
    table = UnitTable.read(w, r_orig, r_rw, r_rw2, **beside)
    table = table.usable(missing=settings.missing, identical=settings.identical)
    result = effects_of_units(table.units(), table.counts(), settings, table.notes())
    for note in result.warnings:
        warnings.warn(note, stacklevel=2)
    return result


def effects_of_units(units: Units, counts: Counts, settings: Settings, notes: Sequence[str] = ()) -> RateResult:
    """All effects of clean units."""
    if settings.se == "cluster" and units.cluster is None:
        raise RecipeError("se='cluster' needs the cluster of every unit, but cluster is None. Pass cluster=prompt_ids.")
    points = _points(units, settings.se)
    replicates = None
    if settings.ci == "bootstrap":
        whole = {"clusters": settings.se == "cluster", "within_arms": settings.se == "stratified"}
        replicates = bootstrap_effects(units, n_boot=settings.n_boot, seed=settings.seed, **whole)
    effects = {name: _effect(name, point, settings, replicates) for name, point in points.items()}
    sd = None if units.r_orig is None else _pooled_sd(units.r_orig, units.w)
    asked = sd if settings.standardize else None
    scaled = None if asked is None else _standardized(effects, points, settings, replicates, asked)
    return RateResult(
        raw=_table(effects),
        standardized=None if scaled is None else _table(scaled),
        reward_std=sd,
        rewrite_effect_w1=effects.get("b1"),
        rewrite_effect_w0=effects.get("b0"),
        counts=counts,
        units=units,
        settings=asdict(settings),
        warnings=(*notes, *_notes(units, settings, asked)),
    )


def _points(units: Units, se: str) -> dict[str, Point]:
    """Every estimate with its error, by the names of ``Replicates``."""
    w, cluster = units.w, units.cluster if se == "cluster" else None
    arms = (w | True, w, ~w)

    def mean_of(values: Vector, arm: Mask) -> Point:
        return mean_point(values[arm], None if cluster is None else cluster[arm])

    def means(name: str, contrast: Vector) -> dict[str, Point]:
        ate, att, atu = (mean_of(contrast, arm) for arm in arms)
        if att.n == 0 or atu.n == 0:
            ate = Point(math.nan, math.nan, math.nan, w.size, 0)
        elif se == "stratified":
            error = math.hypot(att.n / w.size * att.se, atu.n / w.size * atu.se)
            ate = ate._replace(se=error, smallest=min(att.n, atu.n))
        return {f"{name}/ate": ate, f"{name}/att": att, f"{name}/atu": atu}

    found = means("rate", units.delta)
    if se == "unpaired":
        pairs = zip(found.items(), arms, strict=True)
        found = {name: point._replace(se=_unpaired_error(units, point, arm)) for (name, point), arm in pairs}
    if units.r_orig is not None and units.sigma is not None:
        trip = units.r_rw2 - units.r_orig
        found |= {**means("single", units.sigma), "naive": clustered.difference_point(units.r_orig, w, cluster)}
        found |= {"b1": mean_of(trip, w), "b0": mean_of(trip, ~w)}
    return found


def _unpaired_error(units: Units, point: Point, arm: Mask) -> float:
    """The error that the paper's published tables use for the double rewrite: of two separate samples, so too wide."""
    if point.n < 2 or math.isnan(point.value):
        return math.nan
    with_w, without = np.where(units.w, units.r_rw2, units.r_rw), np.where(units.w, units.r_rw, units.r_rw2)
    return math.sqrt((clustered.variance(with_w[arm]) + clustered.variance(without[arm])) / point.n)


def _effect(name: str, point: Point, settings: Settings, replicates: Replicates | None) -> Effect:
    if replicates is None:
        low, high, how = clustered.point_interval(point, ci=settings.ci, alpha=settings.alpha)
    else:
        low, high = interval_ends(point.value, replicates.values[name], alpha=settings.alpha, kind=settings.boot)
        drawn = {"cluster": "clusters", "stratified": "units within arms"}.get(settings.se, "units")
        how = f"{settings.boot} bootstrap of {drawn}, B={settings.n_boot}"
        if math.isnan(point.se):
            low, high = math.nan, math.nan
    return Effect(point.value, low, high, point.n, 1 - settings.alpha, f"{settings.se}, {how}", se=point.se)


def _standardized(
    effects: dict[str, Effect], points: dict[str, Point], settings: Settings, replicates: Replicates | None, sd: float
) -> dict[str, Effect]:
    """Effects in standard deviations; only a bootstrap can let that unit vary too."""
    scaled = {name: effect.scaled(sd) for name, effect in effects.items()}
    if replicates is None or replicates.reward_std is None or not settings.standardize_inside or not sd > 0:
        return scaled
    with np.errstate(divide="ignore", invalid="ignore"):
        again = Replicates({name: values / replicates.reward_std for name, values in replicates.values.items()}, None)
    return {
        name: _effect(name, points[name]._replace(value=effect.value, se=effect.se), settings, again)
        for name, effect in scaled.items()
    }


def _table(effects: dict[str, Effect]) -> EffectTable:
    def three(name: str) -> Effects:
        return Effects(*(effects[f"{name}/{estimand}"] for estimand in Effects._fields))

    naive = effects.get("naive")
    return EffectTable(three("rate"), None if naive is None else three("single"), naive)


def _notes(units: Units, settings: Settings, sd: float | None) -> list[str]:
    notes = []
    for arm, value, name in ((units.w, 1, "ATT"), (~units.w, 0, "ATU")):
        count = int(arm.sum())
        if count == 0:
            gone = f"{name}, ATE, the naive difference and the standard deviation are NaN"
            notes.append(f"No unit has w={value}, so {gone}.")
        elif count == 1:
            notes.append(f"One unit has w={value}, so {name} has neither an error nor an interval.")
    if sd is not None and not 0 < sd < math.inf and not notes:
        notes.append(
            f"The original rewards' standard deviation within arms is {sd:g}, so standardised effects are NaN."
        )
    clusters = 0 if units.cluster is None else np.unique(units.cluster).size
    if settings.se != "cluster" and 0 < clusters < units.w.size:
        notes.append(
            f"{units.w.size} units come from {clusters} clusters, but se={settings.se!r} takes them as independent; "
            "se='cluster' does not."
        )
    if settings.se == "cluster" and clusters < 2:
        notes.append("All units come from one cluster, so no effect has an error or an interval.")
    return notes


def _pooled_sd(r_orig: Vector, w: Mask) -> float:
    """Pooled standard deviation of the original rewards within the two arms: the unit of standardised effects."""
    if w.all() or not w.any() or w.size < 3:
        return math.nan
    return math.sqrt((clustered.squares(r_orig[w]) + clustered.squares(r_orig[~w])) / (w.size - 2))
