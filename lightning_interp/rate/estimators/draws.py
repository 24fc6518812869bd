"""Several rewrites of one text: averaged inside the unit, so that units stay the units of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError
from lightning_interp.rate.estimators.columns import check_lengths, codes, label_column, number_column, shown

__all__ = ["UnitRewards", "combine_draws"]


class UnitRewards(NamedTuple):
    """One row a unit, sorted by id: means over its ``draws``, and why it cannot be used (or None)."""

    ids: list[int | str]
    w: list[int | None]
    r_orig: Vector | None
    r_rw: Vector
    r_rw2: Vector
    cluster: list[int | str] | None
    incomplete: list[str | None]
    draws: NDArray[np.int64]

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`~lightning_interp.rate.estimators.effects.rate_effects`, by name."""
        return {name: column for name, column in self._asdict().items() if name != "draws"}


def combine_draws(ids: Any, w: Any, r_orig: Any, r_rw: Any, r_rw2: Any, *, cluster: Any = None) -> UnitRewards:
    """Average several draws of a unit's rewrites.

    The error of an effect then counts units: further draws of a text make it less noisy, they are no further texts. A
    draw that lacks a reward makes its unit incomplete; leaving out single draws would select among rewrites.

    Args:
        ids: Integers or strings, one a draw as everything here; the draws of a unit share its id.
        w: Labels, the same for all draws of a unit; None for an unlabelled unit.
        r_orig: Rewards of the originals, or None.
        r_rw: Rewards of the rewrites. An element that is None is missing.
        r_rw2: Rewards of the rewrites of the rewrites.
        cluster: Integers or strings, the same for all draws of a unit.

    Returns:
        One row a unit, sorted by id; its ``arguments()`` are those of :func:`rate_effects`.

    Raises:
        DataError: If an input cannot be used, or the draws of a unit disagree in their label or cluster.

    Example:
        >>> units = combine_draws(["a", "a", "b"], [1, 1, 0], None, [0.0, 2.0, 3.0], [5.0, 5.0, 1.0])
        >>> units.r_rw.tolist(), units.draws.tolist()
        ([1.0, 3.0], [2, 1])
    """
    names, unit = codes("ids", ids)
    label, unlabelled = label_column("w", w)
    given = {"r_orig": r_orig, "r_rw": r_rw, "r_rw2": r_rw2}
    columns = {name: number_column(name, x) for name, x in given.items() if name != "r_orig" or x is not None}
    coded = {"w": np.where(unlabelled, -1, label.astype(np.int64))}
    clusters: list[int | str] = []
    if cluster is not None:
        clusters, coded["cluster"] = codes("cluster", cluster)
    check_lengths(
        "ids", unit.size, [*coded.items(), *((n, column) for n, (column, _) in columns.items())], one="value a draw"
    )
    shared = {name: _shared(name, names, unit, values) for name, values in coded.items()}
    means = {name: _mean(unit, column, len(names)) for name, (column, _) in columns.items()}
    return UnitRewards(
        ids=names,
        w=[None if one < 0 else one for one in shared["w"]],
        r_orig=means.get("r_orig"),
        r_rw=means["r_rw"],
        r_rw2=means["r_rw2"],
        cluster=[clusters[number] for number in shared["cluster"]] if clusters else None,
        incomplete=_incomplete(unit, columns, len(names)),
        draws=np.bincount(unit, minlength=len(names)),
    )


def _mean(unit: NDArray[np.int64], column: Vector, n: int) -> Vector:
    """Mean of each unit's values; the order of the rows has no part in the rounding."""
    order = np.lexsort((column, unit))
    sums = np.bincount(unit[order], weights=column[order], minlength=n)
    means: Vector = sums / np.bincount(unit, minlength=n)
    return means


def _shared(name: str, names: Sequence[int | str], unit: NDArray[np.int64], values: NDArray[np.int64]) -> list[int]:
    """The one value that all draws of each unit have."""
    first = np.zeros(len(names), dtype=np.int64)
    first[unit[::-1]] = values[::-1]
    wrong = sorted({int(number) for number in unit[values != first[unit]]})
    if wrong:
        raise DataError(
            f"{name} differs between the draws of {shown(names[number] for number in wrong)}; a unit has one {name}. "
            "Give all draws of a unit the value of its original."
        )
    shared: list[int] = first.tolist()
    return shared


def _incomplete(unit: NDArray[np.int64], columns: dict[str, tuple[Vector, Mask]], n: int) -> list[str | None]:
    reasons: list[str | None] = [None] * n
    stages = {"r_orig": "missing_original", "r_rw": "missing_rewrite", "r_rw2": "missing_rewrite2"}
    for name, (_, absent) in columns.items():
        for number in unit[absent]:
            reasons[number] = reasons[number] or stages[name]
    return reasons
