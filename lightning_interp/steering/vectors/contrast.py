"""Contrasting texts: sets of ours or a user's file, and their division into parts that see each other never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.vectors.contrast_sets import SETS

__all__ = ["ContrastItem", "ContrastSplit", "read_contrasts", "split_contrasts"]

_KEYS = ("prompt", "positive", "negative")
_FEWEST = 6


@dataclass(frozen=True)
class ContrastItem:
    """A prompt with two endings.

    Args:
        positive: The ending that shows the behaviour.
        negative: The one that shows its opposite.
        prompt: What both begin with; may be empty.
    """

    positive: str
    negative: str
    prompt: str = ""

    @property
    def texts(self) -> tuple[str, str]:
        """Both texts in full, the positive one first."""
        return self.prompt + self.positive, self.prompt + self.negative


@dataclass(frozen=True)
class ContrastSplit:
    """Three parts without a common item: to make a vector, to choose how to use it, and to report what it does."""

    train: tuple[ContrastItem, ...]
    choose: tuple[ContrastItem, ...]
    report: tuple[ContrastItem, ...]


def read_contrasts(source: str) -> list[ContrastItem]:
    """Items of one of our sets, or of a user's file.

    Args:
        source: ``mood``, ``formal`` or ``past``; or a JSONL file with ``positive`` and ``negative``, and if wished
            ``prompt``, in each line.

    Returns:
        The items.

    Raises:
        RecipeError: If there is no such set and no such file.
        DataError: With file and line, if one holds something else.

    Example:
        >>> read_contrasts("past")[0].texts[0]
        'The farmer walked to the market and sold his apples.'
    """
    if source in SETS:
        return [ContrastItem(**row) for row in SETS[source]]
    path = Path(source)
    if not path.is_file():
        raise RecipeError(
            f"There is no contrast set {source!r}. Name one of {', '.join(SETS)}, or a JSONL file with 'positive' and "
            "'negative' in each line."
        )
    expected = "one object a line with 'positive' and 'negative'"
    return [_item(row, where) for where, row in json_lines(path, expected=expected)]


def split_contrasts(items: Sequence[ContrastItem], *, seed: int) -> ContrastSplit:
    """Half of the items to make a vector, a quarter to choose with, the rest to report; in a seeded order.

    Args:
        items: At least six.
        seed: Root seed.

    Returns:
        The parts.

    Raises:
        DataError: If there are fewer.

    Example:
        >>> parts = split_contrasts(read_contrasts("mood"), seed=0)
        >>> len(parts.train), len(parts.choose), len(parts.report)
        (18, 9, 9)
    """
    if len(items) < _FEWEST:
        raise DataError(f"There are {len(items)} contrast items, too few to divide; give at least {_FEWEST}.")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(derived_seed(seed, "contrasts")))
    mixed = [items[i] for i in order.tolist()]
    half, quarter = len(mixed) // 2, len(mixed) // 4
    return ContrastSplit(tuple(mixed[:half]), tuple(mixed[half : half + quarter]), tuple(mixed[half + quarter :]))


def _item(row: dict[str, Any], where: str) -> ContrastItem:
    for key, value in row.items():
        if key not in _KEYS or not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is {value!r:.60}; expected strings under {', '.join(_KEYS)}.")
    for key in ("positive", "negative"):
        if not row.get(key, "").strip():
            raise DataError(f"{where}: {key!r} is missing or empty.")
    if row["positive"] == row["negative"]:
        raise DataError(f"{where}: 'positive' and 'negative' are both {row['positive']!r:.60}; expected a contrast.")
    return ContrastItem(**row)
