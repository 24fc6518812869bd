"""Rewrite-based effects with their intervals, counts and units, as text, plain data and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lightning_interp.core.measure.clustered import Codes, Mask, Vector, mean_point, point_interval
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import RecipeError

__all__ = ["Counts", "Effect", "EffectTable", "Effects", "Finding", "RateResult", "Units", "mean_effect", "plain"]


def plain(value: Any) -> Any:
    """Numbers, estimates and mappings of them as plain data; NaN and infinity become None."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Finding:
    """What a dataclass of estimates inherits, to be written down."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None."""
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Effect(Estimate):
    """An estimate with its interval and its standard error.

    Args:
        se: Standard error, in the unit of the estimate; NaN where the sample carries none.

    Example:
        >>> Effect(0.5, 0.3, 0.7, 40, 0.95, "paired, t(39)", se=0.1).to_dict()["ci_low"]
        0.3
    """

    se: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data: estimate, se, ci_low, ci_high, n, method; NaN becomes None."""
        found = {"estimate": self.value, "se": self.se, "ci_low": self.low, "ci_high": self.high}
        return {**plain(found), "n": self.n, "method": self.method}

    def scaled(self, unit: float) -> Effect:
        """The same effect in another unit of measure: everything divided by ``unit``, NaN where that is no unit."""
        by = unit if math.isfinite(unit) and unit > 0 else math.nan
        return Effect(self.value / by, self.low / by, self.high / by, self.n, self.level, self.method, se=self.se / by)


def mean_effect(
    values: Vector, how: str, *, cluster: Codes | None = None, ci: str = "auto", alpha: float = 0.05
) -> Effect:
    """Mean of one value a unit, as an effect with its interval."""
    point = mean_point(values, cluster)
    low, high, kind = point_interval(point, ci=ci, alpha=alpha)
    return Effect(point.value, low, high, point.n, 1 - alpha, f"{how}, {kind}", se=point.se)


class Effects(NamedTuple):
    """One estimator's effect over all units, over those with the attribute (w = 1), and over those without."""

    ate: Effect
    att: Effect
    atu: Effect


@dataclass(frozen=True)
class EffectTable:
    """All estimators on one scale; without original rewards there is the double rewrite alone."""

    rate: Effects
    single: Effects | None = None
    naive: Effect | None = None

    def items(self) -> Iterator[tuple[str, str, Effect]]:
        """Every effect with the name of its estimator and estimand, naive first."""
        if self.naive is not None:
            yield "naive", "naive", self.naive
        for name, effects in (("single", self.single), ("rate", self.rate)):
            for estimand in Effects._fields if effects is not None else ():
                yield name, estimand, getattr(effects, estimand)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``naive``, ``single`` and ``rate``, the last two with ``ate``, ``att`` and ``atu``."""
        return {name: plain(getattr(self, name)) for name in ("naive", "single", "rate")}


@dataclass(frozen=True, eq=False)
class Units:
    """The units that the effects rest on, ``[n]`` each, sorted by id (without ids by their values)."""

    ids: tuple[int | str, ...]
    w: Mask
    r_orig: Vector | None
    r_rw: Vector
    r_rw2: Vector
    cluster: Codes | None = None

    @property
    def delta(self) -> Vector:
        """Signed contrast of the double rewrite: reward with the attribute minus reward without, ``[n]``."""
        return np.where(self.w, self.r_rw2 - self.r_rw, self.r_rw - self.r_rw2)

    @property
    def sigma(self) -> Vector | None:
        """Signed contrast of the single rewrite, ``[n]``; None without original rewards."""
        if self.r_orig is None:
            return None
        return np.where(self.w, self.r_orig - self.r_rw, self.r_rw - self.r_orig)


@dataclass(frozen=True)
class Counts(Finding):
    """How many units there were: ``given``, and ``n`` used, of which ``n1`` have the attribute and ``n0`` have not.

    ``dropped`` counts those left out by reason, ``identical`` and ``non_compliant`` used ones, by pass and arm, whose
    rewrite is the text it was made from, or lacks its target value; None where that is unknown.
    """

    given: int
    n: int
    n1: int
    n0: int
    clusters: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_by_arm: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    identical: Mapping[str, Mapping[str, int]] | None = None
    non_compliant: Mapping[str, Mapping[str, int]] | None = None


@dataclass(frozen=True, eq=False)
class RateResult:
    """What :func:`~lightning_interp.rate.estimators.effects.rate_effects` found.

    Args:
        raw: Effects in the unit of the reward.
        standardized: The same divided by ``reward_std``; None if not asked for or without original rewards.
        reward_std: Pooled standard deviation of the original rewards; None without them.
        rewrite_effect_w1, rewrite_effect_w0: What a round trip does to the reward by arm: mean of ``r_rw2 - r_orig``.
        counts, units: Units used and left out, and the used ones themselves.
        settings, warnings: How the errors and intervals were made, and what was warned of.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 1, 0, 0], [1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0])
        >>> result.rate.att.value, result.naive.value, result.counts.n1
        (1.5, 1.0, 2)
    """

    raw: EffectTable
    standardized: EffectTable | None
    reward_std: float | None
    rewrite_effect_w1: Effect | None
    rewrite_effect_w0: Effect | None
    counts: Counts
    units: Units
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def naive(self) -> Effect | None:
        """Difference of the arms' mean original rewards."""
        return self.raw.naive

    @property
    def single(self) -> Effects | None:
        """Effects from original and rewrite."""
        return self.raw.single

    @property
    def rate(self) -> Effects:
        """Effects from rewrite and rewrite of the rewrite."""
        return self.raw.rate

    @property
    def ids(self) -> tuple[int | str, ...]:
        """Ids of the used units, in the order of ``delta``."""
        return self.units.ids

    @property
    def delta(self) -> Vector:
        """Signed contrast of each used unit, ``[n]``."""
        return self.units.delta

    def rows(self) -> list[dict[str, Any]]:
        """One flat row an effect: scale, estimator, estimand, estimate, se, ci_low, ci_high, n, method."""
        tables = [("raw", self.raw), ("standardized", self.standardized)]
        return [
            {"scale": scale, "estimator": estimator, "estimand": estimand, **effect.to_dict()}
            for scale, table in tables
            if table is not None
            for estimator, estimand, effect in table.items()
        ]

    def to_frame(self) -> Any:
        """:meth:`rows` as a pandas DataFrame.

        Raises:
            RecipeError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            message = "RateResult.to_frame() needs pandas, which is missing. Install it or use rows()."
            raise RecipeError(message) from error
        return pd.DataFrame(self.rows())

    def to_dict(self, *, units: bool = True) -> dict[str, Any]:
        """Everything as plain data that JSON can hold; NaN becomes None.

        Args:
            units: With the contrast of every unit and its id.
        """
        names = ("raw", "standardized", "reward_std", "rewrite_effect_w1", "rewrite_effect_w0", "counts", "settings")
        found = {name: plain(getattr(self, name)) for name in names} | {"warnings": list(self.warnings)}
        if units:
            arms = self.units.w.astype(int).tolist()
            found["units"] = {"ids": list(self.ids), "w": arms, "delta": self.delta.tolist()}
        return found

    def numbers(self) -> dict[str, float]:
        """Raw ``ate``, ``att``, ``atu``, ``naive`` and ``single`` (an ATE), their ``_se``, ``reward_std`` and ``n``."""
        effects = self.rate._asdict()
        if self.naive is not None and self.single is not None:
            effects |= {"naive": self.naive, "single": self.single.ate}
        found = {name: effect.value for name, effect in effects.items()}
        found |= {f"{name}_se": effect.se for name, effect in effects.items()}
        spread = {} if self.reward_std is None else {"reward_std": self.reward_std}
        return {**found, **spread, "n": float(self.counts.n)}

    def lines(self) -> Iterator[tuple[str, str, Effect, Effect | None]]:
        """Every effect and round trip: estimator, estimand or arm, raw, and in standard deviations if standardised."""
        scaled = {} if self.standardized is None else {(a, b): e for a, b, e in self.standardized.items()}
        for estimator, estimand, effect in self.raw.items():
            yield estimator, estimand.upper(), effect, scaled.get((estimator, estimand))
        for arm, trip in (("w=1", self.rewrite_effect_w1), ("w=0", self.rewrite_effect_w0)):
            if trip is not None:
                yield "round trip", arm, trip, trip.scaled(self.reward_std or math.nan) if scaled else None

    def summary(self) -> str:
        """A table of every effect for the terminal, with the counts above and the warnings below."""
        counts = self.counts
        head = f"Rewrite-based effects: {counts.n} units, {counts.n1} with w=1 and {counts.n0} with w=0"
        left = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
        rows = [("", "", "estimate", "se", f"{100 * (1 - self.settings['alpha']):g} % interval", "in sd")]
        for estimator, estimand, effect, scaled in self.lines():
            ends = "-" if math.isnan(effect.low) else f"[{_short(effect.low)}, {_short(effect.high)}]"
            in_sd = "" if scaled is None or estimator == "round trip" else _short(scaled.value)
            name = "" if estimator == "naive" else estimand
            rows.append((estimator, name, _short(effect.value), _short(effect.se), ends, in_sd))
        table = (
            f"{a:<11}{b:<5}{value:>11}{se:>11}  {ends:<24}{in_sd:>9}".rstrip() for a, b, value, se, ends, in_sd in rows
        )
        return "\n".join([head + (f" ({left} left out)" if left else ""), *table, *(f"! {w}" for w in self.warnings)])


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
