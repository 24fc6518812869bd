"""The table that effects are made of: inputs of any kind become checked units, and why a unit is left out is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators import columns as checked
from lightning_interp.rate.estimators import triples
from lightning_interp.rate.estimators.result import Counts, Units

__all__ = ["STAGES", "UnitTable"]

STAGES = triples.STAGES[:3]
"""The texts of a unit that the effects are made of."""

LARGE_SHARE, LARGE_GAP = 0.05, 0.02
_REWARDS = ("r_orig", "r_rw", "r_rw2")


@dataclass(eq=False)
class UnitTable:
    """All units, ``[n]`` each, and for each why it cannot be used (None where it can); see :meth:`mark`.

    ``by_id`` says whether ids were given, so that units are sorted by them. ``identical`` and ``non_compliant`` say for
    both rewrites where it is the text it was made from and where it lacks its target value; None if that is unknown.
    """

    w: Mask
    unlabelled: Mask
    ids: tuple[int | str, ...]
    by_id: bool
    r_orig: Vector | None
    r_rw: Vector
    r_rw2: Vector
    cluster: NDArray[np.int64] | None
    reasons: NDArray[np.object_]
    identical: list[Mask] | None = None
    non_compliant: list[Mask] | None = None

    @classmethod
    def read(
        cls,
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
    ) -> UnitTable:
        """Check the arguments of ``rate_effects`` that hold one value a unit, which say what each of them is."""
        label, unlabelled = checked.label_column("w", w)
        if not (n := label.size):
            raise DataError("w is empty; expected one label a unit, with its three rewards.")
        given = {"r_orig": r_orig, "r_rw": r_rw, "r_rw2": r_rw2}
        columns = {
            name: checked.number_column(name, x) for name, x in given.items() if name != "r_orig" or x is not None
        }
        lists = [("ids", ids), ("cluster", cluster), ("incomplete", incomplete)]
        lists += [*_each("texts", texts, 3), *_each("labels", labels, 2)]
        checked.check_lengths("w", n, [*((name, column) for name, (column, _) in columns.items()), *lists])
        table = cls(
            w=label,
            unlabelled=unlabelled,
            ids=checked.unit_ids(ids, n),
            by_id=ids is not None,
            cluster=None if cluster is None else checked.codes("cluster", cluster)[1],
            reasons=np.full(n, None, dtype=object),
            identical=None if texts is None else [_same(texts[0], texts[1]), _same(texts[1], texts[2])],
            non_compliant=None if labels is None else _non_compliant(labels, label),
            **{"r_orig": None, **{name: column for name, (column, _) in columns.items()}},  # type: ignore[arg-type]
        )
        table._mark_incomplete(columns, texts or (), incomplete or ())
        return table

    @property
    def keep(self) -> Mask:
        """Units without a reason."""
        return np.asarray(self.reasons == np.array(None), dtype=np.bool_)

    def mark(self, reason: str, where: Mask) -> None:
        """Give a reason to the units that have none yet."""
        if where.any():
            self.reasons[where & self.keep] = reason

    def _mark_incomplete(
        self,
        columns: Mapping[str, tuple[Vector, Mask]],
        texts: Sequence[Sequence[str | None]],
        incomplete: Sequence[str | None],
    ) -> None:
        self.mark("unlabelled", self.unlabelled)
        given = np.array([*incomplete, None], dtype=object)[:-1]
        for reason in sorted({reason for reason in given if reason is not None}):
            self.mark(reason, given == reason)
        for stage, column in zip(STAGES, texts, strict=False):
            self.mark(f"missing_{stage}", np.array([not (text and text.strip()) for text in column]))
        for stage, name in zip(STAGES, _REWARDS, strict=True):
            if name in columns:
                self.mark(f"missing_{stage}", columns[name][1])
        for values, _ in columns.values():
            self.mark("nonfinite", ~np.isfinite(values))

    def _why(self, among: Mask) -> str:
        """The reasons with their counts."""
        return ", ".join(f"{count} {reason}" for reason, count in _tally(self.reasons[~self.keep & among]).items())

    def usable(self, *, missing: str = "raise", identical: str = "keep") -> UnitTable:
        """This table with the policies of ``rate_effects`` applied to what cannot be used."""
        if identical != "keep" and self.identical is None:
            raise RecipeError(
                f"identical={identical!r} compares the texts of a unit, but none were given. "
                "Pass texts=(originals, rewrites, rewrites of the rewrites), or identical='keep'."
            )
        if missing == "raise":
            what = f"are incomplete ({self._why(~self.unlabelled)})"
            instead = "Complete them, or pass missing='drop' to leave them out of every estimator."
            self._refuse(~self.keep & ~self.unlabelled, what, instead)
        if identical != "keep" and self.identical is not None:
            if identical == "raise":
                what = "have a rewrite that is the text it was made from"
                instead = "Rewrite them again, or pass identical='keep'."
                self._refuse(self.keep & np.any(self.identical, axis=0), what, instead)
            for stage, same in zip(STAGES[1:], self.identical, strict=True):
                self.mark(f"identical_{stage}", same)
        if not self.keep.any():
            raise DataError(
                f"None of the {self.w.size} units can be used: {self._why(~self.keep)}. Check labels and rewards."
            )
        return self

    def _refuse(self, where: Mask, what: str, instead: str) -> None:
        if wrong := [self.ids[i] for i in np.flatnonzero(where)]:
            raise DataError(f"{len(wrong)} of {self.w.size} units {what}: {checked.shown(wrong)}. {instead}")

    def units(self) -> Units:
        """The units that can be used, sorted by id (without ids by their values)."""
        where = np.flatnonzero(self.keep)
        if self.by_id:
            where = np.array(sorted(where.tolist(), key=lambda i: checked.sort_key(self.ids[i])))
        else:  # the last counts most
            columns = (self.cluster, self.r_orig, self.r_rw2, self.r_rw, self.w)
            where = where[np.lexsort([column[where] for column in columns if column is not None])]
        named = {name: getattr(self, name) for name in ("w", *_REWARDS, "cluster")}
        taken: dict[str, Any] = {name: None if column is None else column[where] for name, column in named.items()}
        return Units(ids=tuple(self.ids[i] for i in where.tolist()), **taken)

    def counts(self) -> Counts:
        """How many were used, and what was left out by reason and by arm."""
        keep, arms = self.keep, self._arms()

        def per_pass(masks: list[Mask] | None) -> dict[str, dict[str, int]] | None:
            found = zip(STAGES[1:], masks or [], strict=masks is not None)
            tally = {name: {arm: int((m & keep & side).sum()) for arm, side in arms.items()} for name, m in found}
            return None if masks is None else tally

        return Counts(
            given=keep.size,
            n=int(keep.sum()),
            n1=int((keep & self.w).sum()),
            n0=int((keep & ~self.w).sum()),
            clusters=None if self.cluster is None else len(np.unique(self.cluster[keep])),
            dropped=_tally(self.reasons[~keep]),
            dropped_by_arm={arm: _tally(self.reasons[~keep & side]) for arm, side in arms.items()},
            identical=per_pass(self.identical),
            non_compliant=per_pass(self.non_compliant),
        )

    def notes(self) -> list[str]:
        """What to warn of: many units left out, more in one arm than in the other, or many rewrites that are none."""
        gone, labelled = ~self.keep & ~self.unlabelled, int((~self.unlabelled).sum())
        notes = []
        if gone.sum() > LARGE_SHARE * labelled:
            notes.append(f"{int(gone.sum())} of {labelled} labelled units ({gone.sum() / labelled:.1%}) were left out.")
        one, zero = (float(gone[side].mean()) if side.any() else 0.0 for side in self._arms().values())
        if abs(one - zero) > LARGE_GAP:
            notes.append(
                f"{one:.1%} of the units with w=1 and {zero:.1%} of those with w=0 were left out, so the rest may "
                "differ from the sample."
            )
        counts = self.counts()
        sizes = {"w1": counts.n1, "w0": counts.n0}
        return notes + [
            f"{count} of {sizes[arm]} units with w={arm[1]} ({count / sizes[arm]:.1%}) have a {stage} that is the text "
            "it was made from; such units pull the effect towards zero."
            for stage, arms in (counts.identical or {}).items()
            for arm, count in arms.items()
            if count > LARGE_SHARE * sizes[arm]
        ]

    def _arms(self) -> dict[str, Mask]:
        return {"w1": ~self.unlabelled & self.w, "w0": ~self.unlabelled & ~self.w}


def _each(name: str, columns: Sequence[Any] | None, count: int) -> list[tuple[str, Any]]:
    """The columns of an argument that holds several."""
    if columns is None:
        return []
    if len(columns) != count:
        raise DataError(
            f"{name} holds {len(columns)} columns; expected {count}, one for each of "
            f"{', '.join(STAGES[-count:])}, and in each one value a unit."
        )
    return [(f"{name}[{place}]", column) for place, column in enumerate(columns)]


def _same(sources: Sequence[str | None], texts: Sequence[str | None]) -> Mask:
    pairs = zip(sources, texts, strict=True)
    return np.array([a is not None and b is not None and triples.same_text(a, b) for a, b in pairs])


def _non_compliant(labels: Sequence[Any], w: Mask) -> list[Mask]:
    """Where pass 1 does not carry 1 - w, and where pass 2 does not carry w; an unlabelled rewrite is not counted."""
    found = (checked.label_column(f"labels[{place}]", values) for place, values in enumerate(labels))
    return [~absent & (label != target) for (label, absent), target in zip(found, (~w, w), strict=True)]


def _tally(reasons: NDArray[Any]) -> dict[str, int]:
    return dict(sorted(Counter(reasons.tolist()).items()))
