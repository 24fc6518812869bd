"""Numbers of a series and of several: its slope, its noise, and how one value carries over to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_interp.core.measure.clustered import mean_point
from lightning_interp.core.measure.statistics import Estimate, counted, t_interval
from lightning_interp.errors import DataError

__all__ = [
    "FIRST_LATE",
    "Gain",
    "fixed_rows_error",
    "gain",
    "late_change",
    "line",
    "noise_ratio",
    "number_table",
    "prefix_slope",
    "retention",
    "slope",
]

Values = NDArray[np.float64]

FIRST_LATE = 4
"""The first late cycle; a chain that has none gets no class."""


def line(x: Values, y: Values) -> tuple[Values, Values]:
    """Slope and intercept of least squares of ``y`` on ``x``, both ``[..., n]``; NaN where all ``x`` are equal."""
    around = x - x.mean(axis=-1, keepdims=True)
    squares = np.square(around).sum(axis=-1)
    rise = (around * (y - y[..., :1])).sum(axis=-1)
    value = np.divide(rise, squares, out=np.full_like(squares, np.nan), where=squares > 0)
    return value, y.mean(axis=-1) - value * x.mean(axis=-1)


def slope(scores: ArrayLike, *, first: int = 1) -> Values:
    """Slope of least squares of scores on cycles, in points a cycle.

    Args:
        scores: ``[..., K]``, from cycle 0 on.
        first: The first cycle that counts. 1 leaves out the step from seed data to own text; 0 has it in.

    Returns:
        Float64 ``[...]``; NaN with fewer than two cycles left.

    Example:
        >>> float(slope([10, 40, 42, 44])), float(slope([10, 40, 42, 44], first=0)) > 10
        (2.0, True)
    """
    y = np.asarray(scores, dtype=np.float64)[..., first:]
    if y.shape[-1] < 2:
        return np.full(y.shape[:-1], math.nan)
    k = np.arange(y.shape[-1]) - (y.shape[-1] - 1) / 2
    found: Values = (y - y[..., :1]) @ k / (k @ k)  # exactly 0 where all are equal
    return found


def prefix_slope(scores: ArrayLike) -> Values:
    """Mean of the slopes over cycles 0 to 1, 0 to 2, up to all: a spike at the end counts for little.

    A jump from cycle 0 to 1 counts for much. The code of Roe et al. 2026 calls 1.67 points a cycle amplified.

    Args:
        scores: ``[..., K]``, from cycle 0 on.

    Returns:
        Float64 ``[...]``; NaN for one cycle.

    Example:
        >>> float(prefix_slope([40, 42, 44]))
        2.0
    """
    y = np.asarray(scores, dtype=np.float64)
    ends = range(2, y.shape[-1] + 1)
    if not ends:
        return np.full(y.shape[:-1], math.nan)
    found: Values = np.mean([slope(y[..., :end], first=0) for end in ends], axis=0)
    return found


def late_change(scores: ArrayLike, *, anchor: int = 1) -> tuple[Values, Values, Values] | None:
    """Highest, lowest and mean of ``s_j`` - ``s_anchor`` over the late cycles, ``j`` from 4 on.

    Args:
        scores: ``[..., K]``, from cycle 0 on.
        anchor: 0 or 1. The step from 0 to 1 changes where the data come from, and often jumps: look at both.

    Returns:
        Float64 ``[...]`` each; None under five cycles, which have no late one.

    Example:
        >>> [float(x) for x in late_change([20, 60, 50, 45, 40, 38, 36], anchor=1)]
        [-20.0, -24.0, -22.0]
        >>> late_change([20, 60, 50, 45])
    """
    y = np.asarray(scores, dtype=np.float64)
    if y.shape[-1] <= FIRST_LATE:
        return None
    late = y[..., FIRST_LATE:] - y[..., anchor, None]
    return late.max(axis=-1), late.min(axis=-1), late.mean(axis=-1)


def noise_ratio(scores: ArrayLike, errors: ArrayLike) -> float:
    """How far scores move from cycle to cycle, as a multiple of how far they would if nothing moved.

    Args:
        scores: ``[K]``.
        errors: Standard errors of the scores ``[K]`` on these questions, such as :attr:`Checkpoint.error`.

    Returns:
        Mean of |s_k - s_{k-1}| over that of sqrt(2/pi) sqrt(SE_k^2 + SE_{k-1}^2): 1 for independent noise about a
        constant, less where common random numbers make responses alike, more where the score moves. NaN without
        errors.

    Example:
        >>> round(noise_ratio([50, 54, 50], [2, 2, 2]), 2)
        1.77
    """
    y, e = np.asarray(scores, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    expected = math.sqrt(2 / math.pi) * np.hypot(e[1:], e[:-1]).sum()
    return float(np.abs(np.diff(y)).sum() / expected) if expected > 0 else math.nan


def number_table(what: str, rows: Any) -> Values:
    """Nested lists as a table.

    Args:
        what: What they are, for messages.
        rows: Lists of one length, of numbers and None.

    Returns:
        Float64 ``[rows, columns]``, NaN for None.

    Raises:
        DataError: If there are no lists, they are empty or of several lengths, or a value is no finite number.

    Example:
        >>> number_table("scores", [[80, None], [60, 70]]).tolist()
        [[80.0, nan], [60.0, 70.0]]
    """
    widths = {len(row) for row in rows or ()}
    if len(widths) != 1 or widths == {0}:
        raise DataError(f"{what}: expected lists of one length, at least 1, got {rows!r:.80}.")
    try:
        table = np.array([[math.nan if x is None else x for x in row] for row in rows], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: expected numbers and None, got {rows!r:.80} ({error}).") from error
    if np.isinf(table).any():
        raise DataError(f"{what}: infinite value among {rows!r:.80}; expected numbers and None.")
    return table


def fixed_rows_error(table: Values) -> float:
    """Standard error of the mean of all values of a table whose rows are fixed: each row's own values are a sample.

    Args:
        table: ``[rows, columns]``, NaN where a value is missing.

    Returns:
        Root of the sum over rows of their share squared times the variance of their mean; NaN if a row has one value.

    Example:
        >>> fixed_rows_error(np.array([[1.0, 3.0], [51.0, 53.0]])) == 0.5**0.5
        True
    """
    rows = [row[np.isfinite(row)] for row in table]
    n = sum(row.size for row in rows)
    if not n or any(row.size == 1 for row in rows):
        return math.nan
    return math.sqrt(sum((row.size / n) ** 2 * mean_point(row).se ** 2 for row in rows if row.size))


def retention(scores: ArrayLike, base: ArrayLike) -> Values:
    """What is left of the seed's effect: ``(s_k - s_B) / (s_0 - s_B)``.

    Args:
        scores: ``[..., K]``.
        base: The base's score ``[...]``.

    Returns:
        Float64 ``[..., K]``, 1 at cycle 0; NaN where the seed had no effect.

    Example:
        >>> retention([50, 30, 10], 10).tolist()
        [1.0, 0.5, 0.0]
    """
    above = np.asarray(scores, dtype=np.float64) - np.asarray(base, dtype=np.float64)[..., None]
    start = above[..., :1]
    return np.divide(above, start, out=np.full_like(above, np.nan), where=start != 0)


@dataclass(frozen=True)
class Gain:
    """How scores carry over to the next cycle: ``s_{k+1} = intercept + gain s_k``.

    Args:
        gain: Pooled over chains; its interval is Student's, by leaving out one chain at a time (jackknife), and
            one chain has none.
        intercept: In points.
        fixed_point: Where a score would stay, ``intercept / (1 - gain)``; chains go there if the gain lies between -1
            and 1, and away from it otherwise. None for a gain of 1.
        steps: From how many.
    """

    gain: Estimate
    intercept: float
    fixed_point: float | None
    steps: int


def gain(chains: Sequence[ArrayLike], *, level: float = 0.95) -> Gain:
    """Fit how scores carry over, by least squares over all steps of all chains of one condition.

    Noise in the scores makes the gain come out too small.

    Args:
        chains: Scores ``[K]`` each.
        level: Of the interval.

    Returns:
        The fit; NaN where all steps begin at one score.

    Raises:
        DataError: If there is no step.

    Example:
        >>> found = gain([[80, 50, 35, 27.5]])
        >>> round(found.gain.value, 6), round(found.intercept, 6), round(found.fixed_point, 6)
        (0.5, 10.0, 20.0)
    """
    ys = [np.asarray(scores, dtype=np.float64) for scores in chains]
    pairs = [np.stack([y[:-1], y[1:]]) for y in ys if y.size > 1]
    if not pairs:
        raise DataError(f"gain() got {counted(len(ys), 'chain')} without a step; expected two cycles or more.")
    value, intercept = _carried(pairs)
    n = len(pairs)
    left_out = [_carried(pairs[:i] + pairs[i + 1 :])[0] for i in range(n)] if n > 1 else []
    spread = t_interval([(n - 1) * each for each in left_out] or [value], level=level)
    reach = (spread.high - spread.low) / 2
    estimate = Estimate(value, value - reach, value + reach, n, level, f"jackknife over chains, {spread.method}")
    settles = math.isfinite(value) and not math.isclose(value, 1.0, abs_tol=1e-12)
    return Gain(estimate, intercept, intercept / (1 - value) if settles else None, sum(pair.shape[1] for pair in pairs))


def _carried(pairs: Sequence[Values]) -> tuple[float, float]:
    """Slope and intercept of what follows on what was."""
    value, intercept = line(*np.concatenate(pairs, axis=1))
    return float(value), float(intercept)
