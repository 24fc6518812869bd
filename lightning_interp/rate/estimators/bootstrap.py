"""Bootstrap intervals of rewrite-based effects: whole units, whole clusters, or units within arms are drawn again.

All statistics are functions of a few sums over units. A resample is a vector of counts, so many resamples at once are
one matrix product of counts with those columns, and no array of units by resamples is held whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Vector
from lightning_interp.core.measure.resampling import CHUNK, draw_counts
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.rate.estimators.result import Units

__all__ = ["Replicates", "bootstrap_effects"]

Block = tuple[slice, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Replicates:
    """What each resample gave."""

    values: Mapping[str, Vector]
    reward_std: Vector | None


def bootstrap_effects(
    units: Units, *, n_boot: int, seed: int, clusters: bool = False, within_arms: bool = False, chunk: int = CHUNK
) -> Replicates:
    """Draw units again and estimate everything from each resample.

    A unit goes with its three rewards, so the two sides of a contrast are never drawn apart.
    """
    blocks, width = _blocks(units, clusters)
    together = [blocks] if not within_arms else [[block] for block in blocks]
    sums = np.zeros((n_boot, width))
    for number, drawn in enumerate(together):
        generator = np.random.default_rng(derived_seed(seed, "rewrite-based bootstrap", number))
        start = 0
        for counts in draw_counts(generator, sum(len(part) for _, part in drawn), n_boot, chunk=chunk):
            first = 0
            for where, part in drawn:
                sums[start : start + len(counts), where] = counts[:, first : first + len(part)] @ part
                first += len(part)
            start += len(counts)
    return _statistics(sums, original=units.r_orig is not None)


def _blocks(units: Units, clusters: bool) -> tuple[list[Block], int]:
    """What is drawn: clusters, with sums in both halves of the columns, or the units of each arm, with sums in one.

    The statistics are sums of one, of a unit's contrasts, and of its original reward and the square of that.
    """
    columns = [np.ones(units.w.size), units.delta]
    if units.r_orig is not None and units.sigma is not None:
        centred = units.r_orig - units.r_orig.mean()  # squares of rewards far from zero would cancel
        columns += [units.sigma, centred, np.square(centred)]
    table, width = np.stack(columns, axis=1), len(columns)
    if not clusters or units.cluster is None:
        return [(slice(0, width), table[units.w]), (slice(width, 2 * width), table[~units.w])], 2 * width
    groups = np.unique(units.cluster, return_inverse=True)[1]
    sums = [np.bincount(groups, weights=column * arm) for arm in (units.w, ~units.w) for column in columns]
    return [(slice(0, 2 * width), np.stack(sums, axis=1))], 2 * width


def _statistics(sums: NDArray[np.float64], *, original: bool) -> Replicates:
    with np.errstate(divide="ignore", invalid="ignore"):
        (n1, d1, *one), (n0, d0, *zero) = np.split(sums.T, 2)
        found = _effects("rate", d1, d0, n1, n0)
        if not original:
            return Replicates(found, None)
        (s1, r1, q1), (s0, r0, q0) = one, zero
        found |= _effects("single", s1, s0, n1, n0)
        found["naive"] = r1 / n1 - r0 / n0
        found["b1"] = found["rate/att"] - found["single/att"]
        found["b0"] = found["single/atu"] - found["rate/atu"]
        within = q1 - r1**2 / n1 + q0 - r0**2 / n0
        return Replicates(found, np.sqrt(np.maximum(within, 0.0) / (n1 + n0 - 2)))


def _effects(name: str, one: Vector, zero: Vector, n1: Vector, n0: Vector) -> dict[str, Vector]:
    return {f"{name}/ate": (one + zero) / (n1 + n0), f"{name}/att": one / n1, f"{name}/atu": zero / n0}
