"""A pool of prompts: read once each, cut into slices, and drawn from by a seed."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.jsonl import text_lines
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.rows import form_of, raw_rows, read_rows, turns_of

__all__ = ["Pool", "drawn", "normalised", "order", "prompt_slices", "read_prompts", "title_prompts"]

_FORMS = (("prompt",), ("messages",), ("text",))
_EXPECTED = '{"prompt": ...}, {"messages": [...]} or {"text": ...}'


def normalised(text: str) -> str:
    r"""A text as it is compared: NFKC, lower case, white space collapsed.

    Args:
        text: The text.

    Example:
        >>> normalised("  Oh\n\tNO ")
        'oh no'
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unicodedata.normalize("NFKC", lower).split())


@dataclass(frozen=True)
class Pool:
    """Prompts, and the slices that they are cut into; without slices every draw is from all of them.

    Args:
        prompts: Rows with ``prompt`` or ``messages``.
        slices: First prompt of each slice, and the first behind it.

    Example:
        >>> pool = Pool([{"prompt": letter} for letter in "abcd"], [(0, 2), (2, 4)])
        >>> sorted(pool.drawn(1, seed=0))
        [2, 3]
    """

    prompts: Sequence[Mapping[str, Any]]
    slices: Sequence[Sequence[int]]

    def drawn(self, place: int, *, seed: int, passes: int = 1) -> list[int]:
        """Numbers of all prompts of a slice in a random order, so many times over.

        Args:
            place: Number of the slice.
            seed: Of the order.
            passes: How many times each.
        """
        start, stop = self.slices[place] if self.slices else (0, len(self.prompts))
        return [start + index for index in drawn(passes * (stop - start), stop - start, seed)]


def read_prompts(source: Any) -> tuple[list[dict[str, Any]], int]:
    """Read a pool of prompts, each once.

    Args:
        source: A file of rows with ``prompt``, ``messages`` or ``text``, one of plain lines (``.txt``), or a list of
            texts or rows.

    Returns:
        Rows with ``prompt`` or ``messages``, and how many were left out because their normalised text was there before.

    Raises:
        DataError: With file and line of a row that is none.

    Example:
        >>> read_prompts(["Why?", "why? ", "How?"])
        ([{'prompt': 'Why?'}, {'prompt': 'How?'}], 1)
    """
    found: dict[str, dict[str, Any]] = {}
    count = 0
    for count, (where, row) in enumerate(_raw_prompts(source), start=1):  # noqa: B007
        form = form_of(row, where, _FORMS, _EXPECTED, alone=True)[0]
        if form == "messages":
            turns = turns_of(row["messages"], "messages", where, expected="a list of turns")
            found.setdefault(normalised("\n".join(str(turn["content"]) for turn in turns)), {"messages": turns})
        elif not isinstance(row[form], str) or not row[form].strip():
            raise DataError(f"{where}: {form!r} is {row[form]!r:.60}; expected a text that is not empty.")
        else:
            found.setdefault(normalised(row[form]), {"prompt": row[form]})
    return list(found.values()), count - len(found)


def _raw_prompts(source: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(source, str | os.PathLike):
        if Path(source).suffix == ".txt":
            return ((where, {"prompt": text}) for where, text in text_lines(source))
        return raw_rows(source, name="prompts", expected=_EXPECTED)
    rows = [{"prompt": one} if isinstance(one, str) else one for one in source]
    return raw_rows(rows, name="prompts", expected=_EXPECTED)


def title_prompts(source: Any, n_seed: int | None) -> tuple[list[dict[str, Any]], int]:
    """First lines of the documents that cycle 0 is not trained on, as prefixes; they carry the seed's topics."""
    texts = [str(row.content.get("text", "")) for row in read_rows(source, name="data")][n_seed:]
    return read_prompts([{"prompt": text.strip().splitlines()[0]} for text in texts if text.strip()])


def prompt_slices(size: int, parts: int) -> list[tuple[int, int]]:
    """Cut a pool into equal contiguous slices in its order, one for each cycle that writes; the last has the remainder.

    Args:
        size: Prompts of the pool.
        parts: Slices.

    Returns:
        First prompt of each slice, and the first behind it.

    Raises:
        RecipeError: If a slice would be empty.

    Example:
        >>> prompt_slices(29_283, 6)[-1]
        (24400, 29283)
    """
    if not 1 <= parts <= size:
        raise RecipeError(f"A pool of {size} prompts cannot be cut into {parts} slices. Give more prompts.")
    width = size // parts
    return [(part * width, size if part == parts - 1 else (part + 1) * width) for part in range(parts)]


def order(size: int, seed: int) -> list[int]:
    """A random order of so many things."""
    found: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def drawn(count: int, size: int, seed: int) -> list[int]:
    """So many of ``size`` things at random: whole passes over them, and a part of one.

    Example:
        >>> sorted(drawn(4, 2, 0))
        [0, 0, 1, 1]
    """
    passes = -(-count // size) if count else 0
    return [index for number in range(passes) for index in order(size, derived_seed(seed, number))][:count]
