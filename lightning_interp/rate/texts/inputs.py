"""Inputs of any kind become clean units, sorted so that the order of the rows changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.columns import codes, label_column, number_column, sort_key, unit_ids
from lightning_interp.rate.estimators.left_out import (
    STAGES,
    Table,
    count_units,
    leave_out_identical,
    notes_of,
    refuse_incomplete,
)
from lightning_interp.rate.estimators.result import Counts, Units
from lightning_interp.rate.estimators.triples import same_text

__all__ = ["Prepared", "Raw", "check_choice", "prepare"]

_REWARDS = ("r_orig", "r_rw", "r_rw2")
Columns = dict[str, tuple[Vector, Mask]]


@dataclass
class Raw:
    """The arguments of ``rate_effects`` that hold one value a unit, unchecked."""

    w: Any
    r_orig: Any
    r_rw: Any
    r_rw2: Any
    ids: Any = None
    cluster: Any = None
    texts: Sequence[Sequence[str | None]] | None = None
    labels: Sequence[Any] | None = None
    incomplete: Sequence[str | None] | None = None


@dataclass
class Prepared:
    """Clean units, sorted by id (without ids by their values), and what became of all.

    Args:
        units: Units to estimate from.
        counts: How many were used and left out.
        notes: What to warn of.
    """

    units: Units
    counts: Counts
    notes: list[str] = field(default_factory=list)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        RecipeError: If it is not.
    """
    if value not in known:
        raise RecipeError(f"{name}={value!r} is unknown; expected one of {', '.join(map(repr, known))}.")


def prepare(raw: Raw, *, missing: str = "raise", identical: str = "keep") -> Prepared:
    """Check the inputs, leave out what cannot be used, and sort what stays.

    Args:
        raw: The inputs.
        missing: ``"raise"`` or ``"drop"`` for units without all their rewards.
        identical: ``"keep"``, ``"drop"`` or ``"raise"`` for units with a rewrite that is the text it was made from.

    Returns:
        Units, counts and notes.

    Raises:
        DataError: If the inputs do not fit together, a value cannot be used, or no unit is left.
        RecipeError: If a policy needs texts and there are none.

    Example:
        >>> found = prepare(Raw([1, None, 0], None, [0.0, 1.0, 2.0], [1.0, 1.0, 1.0], ids=["c", "b", "a"]))
        >>> found.units.ids, found.counts.dropped
        (('a', 'c'), {'unlabelled': 1})
    """
    if identical != "keep" and raw.texts is None:
        raise RecipeError(
            f"identical={identical!r} compares the texts of a unit, but none were given. "
            "Pass texts=(originals, rewrites, rewrites of the rewrites), or identical='keep'."
        )
    table = _read(raw)
    if missing == "raise":
        refuse_incomplete(table)
    if identical != "keep":
        leave_out_identical(table, refuse=identical == "raise")
    if not table.keep.any():
        raise DataError(f"None of the {table.w.size} units can be used: {table.why()}. Check labels and rewards.")
    counts = count_units(table)
    return Prepared(_sorted_units(table, by_id=raw.ids is not None), counts, notes_of(table, counts))


def _read(raw: Raw) -> Table:
    w, unlabelled = label_column("w", raw.w)
    n = w.size
    if n == 0:
        raise DataError("w is empty; expected one label a unit, with its three rewards.")
    given = [name for name in _REWARDS if name != "r_orig" or raw.r_orig is not None]
    columns = {name: number_column(name, getattr(raw, name)) for name in given}
    _check_lengths(n, [*((name, column[0]) for name, column in columns.items()), *_beside(raw)])
    table = Table(
        w=w,
        unlabelled=unlabelled,
        ids=unit_ids(raw.ids, n),
        r_orig=columns["r_orig"][0] if "r_orig" in columns else None,
        r_rw=columns["r_rw"][0],
        r_rw2=columns["r_rw2"][0],
        cluster=None if raw.cluster is None else codes("cluster", raw.cluster)[1],
        reasons=np.full(n, None, dtype=object),
        keep=np.ones(n, dtype=np.bool_),
    )
    _give_reasons(table, raw, columns)
    if raw.texts is not None:
        steps = ((raw.texts[0], raw.texts[1]), (raw.texts[1], raw.texts[2]))
        table.identical = [np.array([_same(*pair) for pair in zip(*step, strict=True)]) for step in steps]
    table.non_compliant = None if raw.labels is None else _non_compliant(raw.labels, w)
    return table


def _same(source: str | None, text: str | None) -> bool:
    return source is not None and text is not None and same_text(source, text)


def _beside(raw: Raw) -> list[tuple[str, Any]]:
    """Everything else that holds one value a unit, by name."""
    named = [("ids", raw.ids), ("cluster", raw.cluster), ("incomplete", raw.incomplete)]
    for name, columns, count in (("texts", raw.texts, 3), ("labels", raw.labels, 2)):
        if columns is None:
            continue
        if len(columns) != count:
            raise DataError(
                f"{name} holds {len(columns)} columns; expected {count}, one for each of "
                f"{', '.join(STAGES[-count:])}, and in each one value a unit."
            )
        named += [(f"{name}[{place}]", column) for place, column in enumerate(columns)]
    return [(name, values) for name, values in named if values is not None]


def _check_lengths(n: int, named: Iterable[tuple[str, Any]]) -> None:
    for name, values in named:
        try:
            count = len(values)
        except TypeError as error:
            raise DataError(
                f"{name} is {values!r:.80}; expected a list, array or tensor of one value a unit."
            ) from error
        if count != n:
            raise DataError(f"{name} has {count} values, but w has {n}; expected one value a unit in each.")


def _give_reasons(table: Table, raw: Raw, columns: Columns) -> None:
    """Say why a unit cannot be used; the first reason counts."""
    table.mark("unlabelled", table.unlabelled)
    given = np.array([*(raw.incomplete or ()), None], dtype=object)[:-1]
    for reason in sorted({reason for reason in given if reason is not None}):
        table.mark(reason, given == reason)
    for stage, column in zip(STAGES, raw.texts or (), strict=False):
        table.mark(f"missing_{stage}", np.array([not (text and text.strip()) for text in column]))
    for stage, name in zip(STAGES, _REWARDS, strict=True):
        if name in columns:
            table.mark(f"missing_{stage}", columns[name][1])
    for values, _ in columns.values():
        table.mark("nonfinite", ~np.isfinite(values))


def _non_compliant(labels: Sequence[Any], w: Mask) -> list[Mask]:
    """Where pass 1 does not carry 1 - w, and where pass 2 does not carry w; an unlabelled rewrite is not counted."""
    found = []
    for place, (values, target) in enumerate(zip(labels, (~w, w), strict=True)):
        label, absent = label_column(f"labels[{place}]", values)
        found.append(~absent & (label != target))
    return found


def _sorted_units(table: Table, *, by_id: bool) -> Units:
    where = np.flatnonzero(table.keep)
    where = np.array(sorted(where, key=lambda i: sort_key(table.ids[i]))) if by_id else where[_by_values(table, where)]
    return Units(
        ids=tuple(table.ids[i] for i in where),
        w=table.w[where],
        r_orig=None if table.r_orig is None else table.r_orig[where],
        r_rw=table.r_rw[where],
        r_rw2=table.r_rw2[where],
        cluster=None if table.cluster is None else table.cluster[where],
    )


def _by_values(table: Table, where: NDArray[np.int64]) -> NDArray[np.int64]:
    columns = (table.cluster, table.r_orig, table.r_rw2, table.r_rw, table.w)  # the last counts most
    order: NDArray[np.int64] = np.lexsort([column[where] for column in columns if column is not None])
    return order
