"""Estimates with their interval, the number of units they rest on, and how the interval was made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import mean_point, point_interval
from lightning_interp.core.measure.resampling import interval_ends, nested_bootstrap
from lightning_interp.errors import RecipeError

__all__ = [
    "Estimate",
    "bootstrap_interval",
    "columns",
    "counted",
    "direction",
    "listed",
    "mean_interval",
    "median_interval",
    "nested_interval",
    "proportion_interval",
    "ratio_interval",
    "resampled",
    "t_interval",
    "text_of",
]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval (NaN without one); ``n`` counts units of sampling (facts, contexts), not rows."""

    value: float
    low: float
    high: float
    n: int
    level: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return self.text()

    def text(self, decimals: int = 2) -> str:
        """The number and its interval; of small ones two digits of the largest, as they would else read as zero."""
        numbers = [self.value] if math.isnan(self.low) else [self.value, self.low, self.high]
        largest = max(map(abs, numbers))
        needed = 1 - math.floor(math.log10(largest)) if 0 < largest < math.inf else 0
        value, *ends = (f"{number:z.{min(max(decimals, needed), 8)}f}" for number in numbers)
        return f"{value} [{', '.join(ends)}]" if ends else value


def columns(name: str, number: Estimate | None) -> dict[str, float | None]:
    """A number and the ends of its interval as columns of a table; None if there is no number.

    Example:
        >>> columns("score", Estimate(2.0, 1.0, 3.0, 9, 0.95, "example"))
        {'score': 2.0, 'score_low': 1.0, 'score_high': 3.0}
    """
    found = (None,) * 3 if number is None else (number.value, number.low, number.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def direction(change: Estimate) -> str:
    """What may be said of a change's sign.

    Example:
        >>> direction(Estimate(2.0, -1.0, 3.0, 9, 0.95, "example"))
        'its interval has 0 in it'
    """
    if math.isnan(change.low):
        return "no interval"
    return "it rises" if change.low > 0 else "it falls" if change.high < 0 else "its interval has 0 in it"


def text_of(number: Estimate | None) -> str | None:
    """A number with its interval; None if it is not known.

    Example:
        >>> text_of(Estimate(2.0, 1.0, 3.0, 9, 0.95, "example")), text_of(None)
        ('2.00 [1.00, 3.00]', None)
    """
    return None if number is None or math.isnan(number.value) else str(number)


def counted(count: int, noun: str) -> str:
    """A number with what is counted, in the plural unless it is one.

    Example:
        >>> counted(1, "fact"), counted(1200, "fact")
        ('1 fact', '1,200 facts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def proportion_interval(shares: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean of shares in [0, 1], one a unit, with Wilson's interval (conservative where a unit has several trials)."""
    from scipy.stats import norm

    _check_level(level)
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise RecipeError(f"proportion_interval() got {wrong[0]!r}; expected shares between 0 and 1, one a unit.")
    n = len(shares)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, level, "wilson")
    p, z = float(np.mean(shares)), float(norm.ppf(0.5 + level / 2))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(p, min(low, p), max(high, p), n, level, "wilson")  # rounding may put 1 - 1e-16 for 1


def mean_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean with a percentile bootstrap over units (see :func:`bootstrap_interval`)."""
    return bootstrap_interval(lambda x: x.mean(axis=-1), [values], level=level, seed=seed)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean with Student's interval: for few units, of which a bootstrap makes too narrow a one.

    Example:
        >>> str(t_interval([0.1, 0.2, 0.3])), str(t_interval([0.1]))
        ('0.20 [-0.05, 0.45]', '0.10')
    """
    _check_level(level)
    point = mean_point(np.asarray(values, dtype=np.float64))
    low, high, method = point_interval(point, ci="t", alpha=1 - level)
    return Estimate(point.value, low, high, point.n, level, method)


def median_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Median with a percentile bootstrap over units (see :func:`bootstrap_interval`)."""
    return bootstrap_interval(lambda x: np.median(x, axis=-1), [values], level=level, seed=seed)


def nested_interval(
    values: Sequence[float], *levels: Sequence[Any], level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Mean of units inside of ``n`` things that were sampled too, such as datasets > seeds > questions."""
    _check_level(level)
    spread = nested_bootstrap(values, *levels, resamples=resamples, seed=seed)
    n, value = len(set(levels[0])) if levels else len(values), float(np.mean(values))
    low, high = interval_ends(value, spread, alpha=1 - level) if n > 1 else (math.nan, math.nan)
    return Estimate(value, low, high, n, level, "nested bootstrap")


def ratio_interval(top: Sequence[float], bottom: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Ratio of two means over the same units, with a paired percentile bootstrap; NaN where the bottom's is zero."""

    def ratio(x: Values, y: Values) -> Values:
        bottoms = y.mean(axis=-1)
        shares: Values = np.divide(x.mean(axis=-1), bottoms, out=np.full_like(bottoms, np.nan), where=bottoms != 0)
        return shares

    return bootstrap_interval(ratio, [top, bottom], level=level, seed=seed)


def bootstrap_interval(
    statistic: Callable[..., Any], samples: Sequence[Sequence[float]], *, level: float, seed: int, resamples: int = 2000
) -> Estimate:
    """A statistic of arrays ``[..., n]``, with a percentile bootstrap that draws the same units in every sample."""
    _check_level(level)
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if len({len(array) for array in arrays}) != 1:
        lengths = ", ".join(str(len(array)) for array in arrays)
        raise RecipeError(f"A paired bootstrap needs one value a unit in each sample, but their lengths are {lengths}.")
    n = len(arrays[0])
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, level, "bootstrap")
    value = float(statistic(*arrays))
    if n < 2:
        return Estimate(value, math.nan, math.nan, n, level, "bootstrap")
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    spread = np.asarray(statistic(*(array[draws] for array in arrays)))
    return Estimate(value, *interval_ends(value, spread, alpha=1 - level), n, level, "bootstrap")


def resampled(values: NDArray[Any], spread: NDArray[Any], *, n: int, level: float, method: str) -> tuple[Estimate, ...]:
    """Estimates of values ``[...]`` from replicates of each, ``[resamples, ...]``; no interval over one unit.

    Example:
        >>> str(resampled(np.array(2.0), np.array([1.0, 2.0, 3.0]), n=2, level=0.5, method="example")[0])
        '2.00 [1.50, 2.50]'
    """
    found = []
    for value, draws in zip(np.atleast_1d(values), np.reshape(spread, (len(spread), -1)).T, strict=True):
        ends = interval_ends(float(value), draws, alpha=1 - level) if n > 1 else (math.nan, math.nan)
        found.append(Estimate(float(value), *ends, n, level, method))
    return tuple(found)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise RecipeError(f"Confidence level {level!r} is not between 0 and 1; 95 % is level=0.95.")
