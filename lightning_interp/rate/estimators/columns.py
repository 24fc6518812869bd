"""One value a unit from a list, an array or a tensor, checked: rewards, labels, ids and clusters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import Mask, Vector
from lightning_interp.errors import DataError

__all__ = ["check_lengths", "codes", "label_column", "number_column", "shown", "sort_key", "unit_ids"]


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
