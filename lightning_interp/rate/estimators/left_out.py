"""Units that are left out: why, how many, and when that is worth a warning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError
from lightning_interp.rate.estimators import triples
from lightning_interp.rate.estimators.columns import shown
from lightning_interp.rate.estimators.result import Counts

__all__ = ["STAGES", "Table", "count_units", "leave_out_identical", "notes_of", "refuse_incomplete"]

STAGES = triples.STAGES[:3]
"""The texts of a unit that the effects are made of."""

LARGE_SHARE = 0.05
LARGE_GAP = 0.02


@dataclass
class Table:
    """All units, and for each why it cannot be used (None where it can).

    Args:
        w: Whether the original has the attribute, ``[n]``.
        unlabelled: Whether that is unknown, ``[n]``.
        ids: One a unit.
        r_orig: Rewards of the originals, ``[n]``, or None.
        r_rw: Rewards of the rewrites, ``[n]``.
        r_rw2: Rewards of the rewrites of the rewrites, ``[n]``.
        cluster: Number of each unit's cluster, ``[n]``, or None.
        reasons: Why a unit cannot be used, of objects, ``[n]``; see :meth:`mark`.
        keep: Units without a reason, ``[n]``.
        identical: For both rewrites, where it is the text it was made from; None if texts are unknown.
        non_compliant: For both rewrites, where it does not carry its target value; None if that is unknown.
    """

    w: Mask
    unlabelled: Mask
    ids: tuple[int | str, ...]
    r_orig: Vector | None
    r_rw: Vector
    r_rw2: Vector
    cluster: NDArray[np.int64] | None
    reasons: NDArray[np.object_]
    keep: Mask
    identical: list[Mask] | None = None
    non_compliant: list[Mask] | None = None

    def mark(self, reason: str, where: Mask) -> None:
        """Give a reason to the units that have none yet."""
        self.reasons[where & self.keep] = reason
        self.keep &= ~where

    def why(self, *, labelled: bool = False) -> str:
        """The reasons with their counts, for messages; with ``labelled`` only of labelled units."""
        counts = Counter(self.reasons[~self.keep & ~(self.unlabelled & labelled)].tolist())
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def refuse_incomplete(table: Table) -> None:
    """Raise if a labelled unit lacks anything.

    Raises:
        DataError: If one does; lists up to ten ids.
    """
    wrong = np.flatnonzero(~table.keep & (table.reasons != "unlabelled"))
    if wrong.size:
        raise DataError(
            f"{wrong.size} of {table.w.size} units are incomplete ({table.why(labelled=True)}): "
            f"{shown(table.ids[i] for i in wrong)}. Complete them, or pass missing='drop' to leave them out of every "
            "estimator."
        )


def leave_out_identical(table: Table, *, refuse: bool) -> None:
    """Leave out units with a rewrite that is the text it was made from.

    Args:
        table: The units, with ``identical``.
        refuse: Raise instead.

    Raises:
        DataError: If there is one and ``refuse``; lists up to ten ids.
    """
    if table.identical is None:
        return
    first, second = table.identical
    wrong = np.flatnonzero(table.keep & (first | second))
    if wrong.size and refuse:
        raise DataError(
            f"{wrong.size} of {table.w.size} units have a rewrite that is the text it was made from: "
            f"{shown(table.ids[i] for i in wrong)}. Rewrite them again, or pass identical='keep'."
        )
    table.mark("identical_rewrite", first)
    table.mark("identical_rewrite2", second)


def count_units(table: Table) -> Counts:
    """Count what was used, and what was left out by reason and by arm.

    Args:
        table: The units, with the reasons of those that are left out.

    Returns:
        The counts.
    """
    keep = table.keep

    def per_pass(masks: list[Mask] | None) -> dict[str, dict[str, int]] | None:
        if masks is None:
            return None
        return {
            stage: {arm: int((mask & keep & side).sum()) for arm, side in _arms(table)}
            for stage, mask in zip(STAGES[1:], masks, strict=True)
        }

    return Counts(
        given=keep.size,
        n=int(keep.sum()),
        n1=int((keep & table.w).sum()),
        n0=int((keep & ~table.w).sum()),
        clusters=None if table.cluster is None else len(np.unique(table.cluster[keep])),
        dropped=_tally(table.reasons[~keep]),
        dropped_by_arm={arm: _tally(table.reasons[~keep & side]) for arm, side in _arms(table)},
        identical=per_pass(table.identical),
        non_compliant=per_pass(table.non_compliant),
    )


def _arms(table: Table) -> tuple[tuple[str, Mask], tuple[str, Mask]]:
    labelled = ~table.unlabelled
    return ("w1", labelled & table.w), ("w0", labelled & ~table.w)


def _tally(reasons: NDArray[Any]) -> dict[str, int]:
    return dict(sorted(Counter(reasons.tolist()).items()))


def notes_of(table: Table, counts: Counts) -> list[str]:
    """What to warn of: many units left out, or more in one arm than in the other, or many rewrites that are none.

    Args:
        table: The units.
        counts: What became of them.

    Returns:
        One sentence each.
    """
    gone = ~table.keep & ~table.unlabelled
    notes = []
    labelled = int((~table.unlabelled).sum())
    if gone.sum() > LARGE_SHARE * labelled:
        notes.append(f"{int(gone.sum())} of {labelled} labelled units ({gone.sum() / labelled:.1%}) were left out.")
    one, zero = (float(gone[side].mean()) if side.any() else 0.0 for _, side in _arms(table))
    if abs(one - zero) > LARGE_GAP:
        notes.append(
            f"{one:.1%} of the units with w=1 and {zero:.1%} of those with w=0 were left out, so the rest may differ "
            "from the sample."
        )
    return notes + _identical_notes(counts.identical or {}, {"w1": counts.n1, "w0": counts.n0})


def _identical_notes(identical: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]) -> list[str]:
    return [
        f"{count} of {sizes[arm]} units with w={arm[1]} ({count / sizes[arm]:.1%}) have a {stage} that is the text it "
        "was made from; such units pull the effect towards zero."
        for stage, arms in identical.items()
        for arm, count in arms.items()
        if count > LARGE_SHARE * sizes[arm]
    ]
