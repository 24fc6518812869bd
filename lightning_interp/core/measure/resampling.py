"""Drawing things again: counts of a plain bootstrap, nested draws, and the interval that replicates give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_interp.core.measure.clustered import Vector
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import DataError

__all__ = ["CHUNK", "draw_counts", "interval_ends", "nested_bootstrap", "shared_replicates"]

CHUNK = 2**18
"""Counts that are held at once: so few that they stay in the cache (each takes 24 bytes while it is made)."""


def draw_counts(
    generator: np.random.Generator, n: int, resamples: int, *, chunk: int = CHUNK
) -> Iterator[NDArray[np.float64]]:
    """Counts ``[rows, n]`` of ``n`` draws with replacement, a block of resamples at a time, alike for any ``chunk``."""
    rows = max(1, chunk // max(n, 1))
    for start in range(0, resamples if n else 0, rows):
        block = min(rows, resamples - start)
        drawn = generator.integers(0, n, size=(block, n))
        drawn += np.arange(block)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n).astype(np.float64)


def interval_ends(value: float, replicates: Vector, *, alpha: float, kind: str = "percentile") -> tuple[float, float]:
    """Ends of a ``percentile`` or ``basic`` (mirrored) interval; NaN if fewer than half of the resamples are finite."""
    usable = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or 2 * usable.size < replicates.size:
        return float("nan"), float("nan")
    low, high = (float(end) for end in np.quantile(usable, [alpha / 2, 1 - alpha / 2]))
    return (low, high) if kind == "percentile" else (2 * value - high, 2 * value - low)


def nested_bootstrap(
    values: ArrayLike,
    *levels: Sequence[Any],
    statistic: Callable[[Vector], float] = np.mean,
    resamples: int = 2000,
    seed: int = 0,
) -> Vector:
    """Draw again at every level: things of the outermost level, in each of these the next level's, at last the values.

    For questions of several datasets and seeds, say. Of an inner level the same name in two outer things means two
    things.
    """
    x = np.asarray(values, dtype=np.float64)
    if not x.size or any(len(level) != x.size for level in levels):
        lengths = ", ".join(str(len(level)) for level in levels)
        raise DataError(f"nested_bootstrap() got {x.size} values and levels of length {lengths}; expected one a value.")
    tree, order = _tree(levels, x.size)
    x = x[order]
    found = np.empty(resamples)
    for number in range(resamples):
        generator = np.random.default_rng(derived_seed(seed, "nested bootstrap", number))
        chosen = np.zeros(1, dtype=np.int64)
        for starts, counts in tree:
            size = counts[chosen]
            chosen = np.repeat(starts[chosen], size) + generator.integers(0, np.repeat(size, size))
        found[number] = statistic(x[chosen])
    return found


def _tree(levels: Sequence[Sequence[Any]], n: int) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], Any]:
    """For each level the first child and the number of children of what is above it; the order of units for this."""
    codes = [np.unique(np.asarray(level), return_inverse=True)[1].ravel() for level in levels]
    order = np.lexsort(codes[::-1]) if codes else np.arange(n)
    path = np.zeros(n, dtype=np.int64)  # which thing of the level above, in order
    tree = []
    for level in [*(code[order] for code in codes), np.arange(n)]:
        change = np.concatenate([[True], (path[1:] != path[:-1]) | (level[1:] != level[:-1])])
        parents = path[change]
        starts = np.searchsorted(parents, np.arange(parents[-1] + 1)).astype(np.int64)
        tree.append((starts, np.bincount(parents).astype(np.int64)))
        path = np.cumsum(change) - 1
    return tree, order


def shared_replicates(
    tables: Sequence[NDArray[np.float64]], *, resamples: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Means of several tables under the same draws: of rows, and in each drawn row of its cells.

    Row and column of a cell mean the same in every table (a question and its sample, say), so that whatever is computed
    of several means in one resample, such as a difference, is paired.

    Args:
        tables: Float64 ``[rows, columns]``, alike in shape; NaN where a value is missing.
        resamples: How many.
        seed: Of the draws.

    Returns:
        Float64 ``[resamples, tables]``; NaN where a resample met missing values alone.

    Example:
        >>> one = np.array([[1.0, 3.0], [5.0, np.nan]])
        >>> found = shared_replicates([one, one + 2])
        >>> found.shape, float(np.nanmax(found[:, 1] - found[:, 0]).round(6))
        ((2000, 2), 2.0)
    """
    rows, columns = tables[0].shape
    values = np.stack([table.ravel() for table in tables], axis=1)
    there = np.isfinite(values)
    sums_of = np.concatenate([np.where(there, values, 0.0), there], axis=1)
    generator = np.random.default_rng(derived_seed(seed, "shared replicates"))
    found, block = [], max(1, CHUNK // max(values.shape[0], 1))
    for start in range(0, resamples, block):
        many = min(block, resamples - start)
        cells = generator.integers(0, rows, size=(many, rows, 1)) * columns
        cells = cells + generator.integers(0, columns, size=(many, rows, columns))
        cells += np.arange(many)[:, None, None] * values.shape[0]
        counts = np.bincount(cells.ravel(), minlength=many * values.shape[0]).reshape(many, -1)
        found.append(counts.astype(np.float64) @ sums_of)
    sums, n = np.split(np.concatenate(found), 2, axis=1)
    means: NDArray[np.float64] = np.divide(sums, n, out=np.full_like(sums, np.nan), where=n > 0)
    return means
