"""What rewrites change besides the attribute: length, markup and variety of words, by pass and direction.

If the off-target changes of a rewrite do not depend on its direction, they are much the same in both, and the second
pass, which starts from a rewrite, changes little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_interp.core.measure.clustered import mean
from lightning_interp.errors import RecipeError
from lightning_interp.rate.estimators.columns import check_lengths, label_column
from lightning_interp.rate.estimators.result import Effect, mean_effect, plain

__all__ = ["MEASURES", "TextChange", "text_changes"]

_TAG = re.compile(r"<[^<>\s][^<>]*>")
_MARKUP = re.compile(rf"{_TAG.pattern}|\*\*|__|`+|^#+\s|^\s*[-*]\s", re.MULTILINE)
_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")


def _words(text: str) -> list[str]:
    return _WORD.findall(_TAG.sub(" ", text).lower())


def _variety(text: str) -> float:
    words = _words(text)
    return len(set(words)) / len(words) if words else math.nan


MEASURES: Mapping[str, Callable[[str], float]] = {
    "characters": lambda text: float(len(text)),
    "words": lambda text: float(len(_words(text))),
    "type_token_ratio": _variety,
    "markup": lambda text: float(len(_MARKUP.findall(text))),
}
"""What is counted in a text: characters, words, different words a word, and pieces of HTML or Markdown markup."""


@dataclass(frozen=True)
class TextChange:
    """Mean change of one measure in one pass and direction, and its mean ``before``, over the texts rewritten."""

    measure: str
    stage: str
    direction: str
    before: float
    change: Effect

    def to_dict(self) -> dict[str, Any]:
        """A flat row of plain data."""
        head = {name: plain(getattr(self, name)) for name in ("measure", "stage", "direction", "before")}
        return {**head, **self.change.to_dict()}


def text_changes(
    w: Any,
    original: Sequence[str],
    rewrite: Sequence[str],
    rewrite2: Sequence[str],
    *,
    measures: Mapping[str, Callable[[str], float]] = MEASURES,
    alpha: float = 0.05,
) -> list[TextChange]:
    """Compare each text with the one that it was made from.

    Args:
        w: Whether the original has the attribute, ``[n]``; unlabelled units (None) are left out.
        original: Texts as they were found, ``[n]``.
        rewrite: Originals with the attribute flipped, ``[n]``.
        rewrite2: Rewrites with the attribute flipped back, ``[n]``.
        measures: By name, a function of a text; NaN where it has no value. A count of misspellings can be added here.
        alpha: One minus the confidence level.

    Returns:
        One row a measure, pass and direction that occurs.

    Raises:
        DataError: If the lengths differ.
        RecipeError: If there is no measure.

    Example:
        >>> rows = text_changes([1, 1], ["good <br/>", "fine"], ["bad", "poor"], ["good", "fine"])
        >>> [(row.stage, row.direction, row.change.value) for row in rows if row.measure == "markup"]
        [('rewrite', '1->0', -0.5), ('rewrite2', '0->1', 0.0)]
    """
    if not measures:
        raise RecipeError(f"measures is {measures!r}; expected at least one function of a text, by name.")
    arm, unlabelled = label_column("w", w)
    texts = {"original": original, "rewrite": rewrite, "rewrite2": rewrite2}
    check_lengths("w", arm.size, texts.items(), one="text a unit")
    rows = []
    for measure, count in measures.items():
        values = [np.array([count(text) for text in column], dtype=np.float64) for column in texts.values()]
        for stage, before, after in (("rewrite", values[0], values[1]), ("rewrite2", values[1], values[2])):
            down = arm if stage == "rewrite" else ~arm
            for direction, where in (("1->0", down & ~unlabelled), ("0->1", ~down & ~unlabelled)):
                if where.any():
                    known = where & np.isfinite(before) & np.isfinite(after)
                    change = mean_effect((after - before)[known], "paired", alpha=alpha)
                    rows.append(TextChange(measure, stage, direction, mean(before[known]), change))
    return rows
