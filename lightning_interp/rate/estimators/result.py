"""Rewrite-based effects with their intervals, counts and units, as text, plain data and a table."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import RecipeError

__all__ = ["Counts", "Effect", "EffectTable", "Effects", "RateResult", "Units"]


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
        names = {"estimate": self.value, "se": self.se, "ci_low": self.low, "ci_high": self.high}
        return {**{key: _finite(value) for key, value in names.items()}, "n": self.n, "method": self.method}

    def scaled(self, unit: float) -> Effect:
        """The same effect in another unit of measure: everything divided by ``unit``, NaN where that is no unit."""
        by = unit if math.isfinite(unit) and unit > 0 else math.nan
        return Effect(self.value / by, self.low / by, self.high / by, self.n, self.level, self.method, se=self.se / by)


class Effects(NamedTuple):
    """One estimator's effect over all units, over those with the attribute, and over those without.

    Args:
        ate: Average over all units.
        att: Average over the units whose original has the attribute (w = 1).
        atu: Average over the units whose original does not (w = 0).
    """

    ate: Effect
    att: Effect
    atu: Effect


@dataclass(frozen=True)
class EffectTable:
    """All estimators on one scale.

    Args:
        rate: Rewrite against rewrite of the rewrite.
        single: Original against rewrite; None without original rewards.
        naive: Originals of one arm against those of the other; None without original rewards.
    """

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
        plain: dict[str, Any] = {"naive": None, "single": None}
        for name, estimand, effect in self.items():
            if name == "naive":
                plain[name] = effect.to_dict()
            else:
                plain[name] = {**(plain.get(name) or {}), estimand: effect.to_dict()}
        return plain


@dataclass(frozen=True, eq=False)
class Units:
    """The units that the effects rest on, sorted by id (without ids by their values).

    Args:
        ids: One a unit; row numbers where none were given.
        w: Whether the original has the attribute, ``[n]``.
        r_orig: Rewards of the originals, ``[n]``, or None.
        r_rw: Rewards of the rewrites, ``[n]``.
        r_rw2: Rewards of the rewrites of the rewrites, ``[n]``.
        cluster: Number of each unit's cluster, ``[n]``, or None.
    """

    ids: tuple[int | str, ...]
    w: Mask
    r_orig: Vector | None
    r_rw: Vector
    r_rw2: Vector
    cluster: NDArray[np.int64] | None = None

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
class Counts:
    """How many units there were, and what became of them.

    Args:
        given: Units handed in.
        n: Units used.
        n1: Of these, with the attribute.
        n0: Of these, without.
        clusters: Clusters among the used units, or None where none were given.
        dropped: Units left out, by reason.
        dropped_by_arm: The same for labelled units, as ``{"w1": {...}, "w0": {...}}``.
        identical: Used units whose rewrite is the text it was made from, ``{"rewrite": {"w1", "w0"}, "rewrite2":
            {...}}``; None where no texts were given.
        non_compliant: Used units whose rewrite does not carry its target value, in the same form; None where no
            labels were given.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True, eq=False)
class RateResult:
    """What :func:`~lightning_interp.rate.estimators.effects.rate_effects` found.

    Args:
        raw: Effects in the unit of the reward.
        standardized: The same divided by ``reward_std``; None if not asked for or without original rewards.
        reward_std: Pooled standard deviation of the original rewards; None without them.
        rewrite_effect_w1: What a round trip does to the reward where w = 1: mean of ``r_rw2 - r_orig``.
        rewrite_effect_w0: The same where w = 0.
        counts: Units used and left out.
        units: The used units themselves.
        settings: How the errors and intervals were made.
        warnings: What was warned of.

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
            pandas: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise RecipeError(
                "RateResult.to_frame() needs pandas, which is missing. Install it or use rows()."
            ) from error
        return pandas.DataFrame(self.rows())

    def to_dict(self, *, units: bool = True) -> dict[str, Any]:
        """Everything as plain data that JSON can hold; NaN becomes None.

        Args:
            units: With the contrast of every unit and its id.
        """
        plain: dict[str, Any] = {
            "raw": self.raw.to_dict(),
            "standardized": None if self.standardized is None else self.standardized.to_dict(),
            "reward_std": _finite(self.reward_std),
            "rewrite_effect_w1": None if self.rewrite_effect_w1 is None else self.rewrite_effect_w1.to_dict(),
            "rewrite_effect_w0": None if self.rewrite_effect_w0 is None else self.rewrite_effect_w0.to_dict(),
            "counts": self.counts.to_dict(),
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
        }
        if units:
            plain["units"] = {
                "ids": list(self.ids),
                "w": self.units.w.astype(int).tolist(),
                "delta": self.delta.tolist(),
            }
        return plain

    def summary(self) -> str:
        """A table of every effect for the terminal, with the counts above and the warnings below."""
        counts = self.counts
        level = 100 * (1 - self.settings["alpha"])
        head = f"Rewrite-based effects: {counts.n} units, {counts.n1} with w=1 and {counts.n0} with w=0"
        left = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
        lines = [
            head + (f" ({left} left out)" if left else ""),
            _line("", "", "estimate", "se", f"{level:g} % interval", "in sd"),
        ]
        standard = {} if self.standardized is None else {(a, b): e for a, b, e in self.standardized.items()}
        for estimator, estimand, effect in self.raw.items():
            in_sd = standard.get((estimator, estimand))
            lines.append(_effect_line(estimator, "" if estimator == "naive" else estimand.upper(), effect, in_sd))
        trips = (("w=1", self.rewrite_effect_w1), ("w=0", self.rewrite_effect_w0))
        lines += [_effect_line("round trip", label, trip, None) for label, trip in trips if trip is not None]
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])


def _effect_line(estimator: str, estimand: str, effect: Effect, in_sd: Effect | None) -> str:
    interval = "-" if math.isnan(effect.low) else f"[{_short(effect.low)}, {_short(effect.high)}]"
    return _line(
        estimator,
        estimand,
        _short(effect.value),
        _short(effect.se),
        interval,
        "" if in_sd is None else _short(in_sd.value),
    )


def _line(estimator: str, estimand: str, value: str, se: str, interval: str, in_sd: str) -> str:
    return f"{estimator:<11}{estimand:<5}{value:>11}{se:>11}  {interval:<24}{in_sd:>9}".rstrip()


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value
