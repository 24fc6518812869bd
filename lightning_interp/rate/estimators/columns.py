"""One value a unit from a list, an array or a tensor, checked: rewards, labels, ids, clusters; and means over draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError

__all__ = [
    "UnitRewards",
    "check_lengths",
    "codes",
    "combine_draws",
    "label_column",
    "number_column",
    "shown",
    "sort_key",
    "unit_ids",
]


def shown(items: Iterable[Any]) -> str:
    """The first ten items for a message, and how many more there are."""
    every = list(items)
    return ", ".join(map(repr, every[:10])) + (f" and {len(every) - 10} more" if len(every) > 10 else "")


def number_column(name: str, values: Any) -> tuple[Vector, Mask]:
    """Numbers, one a unit, as float64 on the CPU (NaN where absent), and where they are absent, ``[n]`` both."""
    array = _array(name, values)
    if array.dtype.kind in "fiub":
        return array.astype(np.float64), np.zeros(array.size, dtype=np.bool_)
    elements = array.tolist()
    absent = np.array([element is None for element in elements], dtype=np.bool_)
    numbers = np.full(len(elements), np.nan)
    for place, element in enumerate(elements):
        try:
            if isinstance(element, str | bytes | complex):
                raise TypeError
            numbers[place] = np.nan if element is None else float(element)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{name}[{place}] is {element!r:.80}, which is no real number. Give one number a unit, or None where "
                "there is none."
            ) from error
    return numbers, absent


def _array(name: str, values: Any, *, exact: bool = False) -> NDArray[Any]:
    """An array of one axis; of the elements as they are with ``exact``, and where numpy cannot make numbers of them."""
    if not isinstance(values, np.ndarray) and hasattr(values, "tolist"):
        values = values.tolist()  # tensors and series, of whatever type and wherever they are
    listed = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    array = _from_sequence(values, exact) if listed else np.asarray(values)
    if array.ndim != 1:
        shape = "a single value" if array.ndim == 0 else f"an array of shape {array.shape}"
        raise DataError(
            f"{name} is {shape}; expected one axis, one value a unit. "
            "Average several draws of a text with combine_draws()."
        )
    return array


def _from_sequence(values: Sequence[Any], exact: bool) -> NDArray[Any]:
    try:
        array = np.asarray(values)
        if array.ndim != 1 or (array.dtype.kind in "fiub" and not exact):
            return array
    except (TypeError, ValueError, RuntimeError):  # ragged, or tensors of a type that numpy lacks
        pass
    objects = np.empty(len(values), dtype=object)
    objects[:] = [element.item() if getattr(element, "ndim", None) == 0 else element for element in values]
    return objects


def label_column(name: str, values: Any) -> tuple[Mask, Mask]:
    """Where a label is 1, and where there is none, ``[n]`` both."""
    numbers, absent = number_column(name, values)
    wrong = np.flatnonzero(~absent & (numbers != 0) & (numbers != 1))
    if wrong.size:
        raise DataError(
            f"{name}[{wrong[0]}] is {numbers[wrong[0]]!s}; expected 0 or 1 (or None for an unlabelled unit), and "
            f"{wrong.size} of {numbers.size} labels are neither. Make a graded attribute binary first."
        )
    return numbers == 1, absent


def unit_ids(values: Any, n: int) -> tuple[int | str, ...]:
    """Ids, one a unit: integers or strings, each once; row numbers where none are given."""
    if values is None:
        return tuple(range(n))
    ids = _keys("ids", values)
    if twice := [key for key, count in Counter(ids).items() if count > 1]:
        raise DataError(
            f"ids holds {shown(twice)} more than once; every unit needs an id of its own. "
            "Average several draws of a text with combine_draws()."
        )
    return ids


def _keys(name: str, values: Any) -> tuple[int | str, ...]:
    keys = tuple(_array(name, values, exact=True).tolist())
    for place, key in enumerate(keys):
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise DataError(f"{name}[{place}] is {key!r:.80}; expected integers or strings, one a unit.")
    return keys


def sort_key(key: int | str) -> tuple[bool, int | str]:
    """Orders integers before strings."""
    return isinstance(key, str), key


def codes(name: str, values: Any) -> tuple[list[int | str], NDArray[np.int64]]:
    """The different names, integers before strings, and the number of each row's name, ``[n]``."""
    keys = _keys(name, values)
    names = sorted(set(keys), key=sort_key)
    numbers = {key: number for number, key in enumerate(names)}
    return names, np.array([numbers[key] for key in keys], dtype=np.int64)


def check_lengths(of: str, n: int, named: Iterable[tuple[str, Any]], *, one: str = "value a unit") -> None:
    """Refuse a column that is shorter or longer than another one; None is no column."""
    for name, values in named:
        try:
            count = n if values is None else len(values)
        except TypeError as error:
            raise DataError(f"{name} is {values!r:.80}; expected a list, array or tensor of one {one}.") from error
        if count != n:
            raise DataError(f"{name} has {count} values, but {of} has {n}; expected one {one} in each.")


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
    return np.asarray(sums / np.bincount(unit, minlength=n))


def _shared(name: str, names: Sequence[int | str], unit: NDArray[np.int64], values: NDArray[np.int64]) -> list[int]:
    """The one value that all draws of each unit have."""
    first = np.zeros(len(names), dtype=np.int64)
    first[unit[::-1]] = values[::-1]
    if wrong := sorted({int(number) for number in unit[values != first[unit]]}):
        raise DataError(
            f"{name} differs between the draws of {shown(names[number] for number in wrong)}; a unit has one {name}. "
            "Give all draws of a unit the value of its original."
        )
    return [int(value) for value in first]


def _incomplete(unit: NDArray[np.int64], columns: dict[str, tuple[Vector, Mask]], n: int) -> list[str | None]:
    reasons: list[str | None] = [None] * n
    stages = {"r_orig": "missing_original", "r_rw": "missing_rewrite", "r_rw2": "missing_rewrite2"}
    for name, (_, absent) in columns.items():
        for number in unit[absent]:
            reasons[number] = reasons[number] or stages[name]
    return reasons
