"""Frequencies of English words, read from an installed package and never stored here, and fluency by them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.jsonl import text_lines
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.scoring.scores import CallableScorer
from lightning_interp.rate.texts.package_texts import given_or_of_package

__all__ = ["Fluency", "fluency_scorer", "word_counts"]

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


def word_counts(path: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Read how often each word occurs in a collection of English texts.

    Args:
        path: A file with a word and its count a line (``;`` begins remarks); None takes 29,000 words of ``textblob``.

    Returns:
        Counts by word, in lower case.

    Raises:
        RecipeError: If no path is given and ``textblob`` is not installed.
        DataError: If the file cannot be read or a line is no word and count; names file and line.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "counts.txt"
        >>> _ = file.write_text("film 90")
        >>> word_counts(file)
        {'film': 90}
    """
    file = given_or_of_package(path, "textblob", "en", "en-spelling.txt", call="word_counts(path)")
    counts: dict[str, int] = {}
    for where, line in text_lines(file, expected="a word and its count a line"):
        if line.startswith(";"):
            continue
        word, _, count = line.rpartition(" ")
        if not word or not count.isdecimal():
            raise DataError(f"{where}: {line!r:.80}; expected a word, a space and a count.")
        counts[word.lower()] = counts.get(word.lower(), 0) + int(count)
    return counts


@dataclass(frozen=True)
class Fluency:
    """How common the words of a text are: the mean logarithm of their counts, 0 for a text without words.

    A misspelt word is mostly an unknown one, so typos cost. A change of one word adds the same to any text that long.

    Args:
        counts: Of known words, in lower case; see :func:`word_counts`.
        unknown: Count that an unknown word is given.

    Raises:
        RecipeError: If there are no words, or ``unknown`` is not positive.

    Example:
        >>> fluency = Fluency({"the": 100, "film": 10}, unknown=1.0)
        >>> round(fluency("The film"), 3), round(fluency("The flim"), 3)
        (3.454, 2.303)
    """

    counts: Mapping[str, int]
    unknown: float = 0.5

    def __post_init__(self) -> None:
        if not self.counts or not self.unknown > 0:
            raise RecipeError(
                f"Fluency of {len(self.counts)} words with unknown={self.unknown!r}: expected at least one word, and a "
                "positive count for unknown ones."
            )

    def __call__(self, text: str) -> float:
        """The fluency of one text."""
        words = _WORD.findall(text.lower())
        return sum(math.log(self.counts.get(word) or self.unknown) for word in words) / max(1, len(words))

    def misspelt(self, text: str) -> int:
        """How many words of a text are not known.

        Args:
            text: The text.
        """
        return sum(word not in self.counts for word in _WORD.findall(text.lower()))


def fluency_scorer(counts: Mapping[str, int] | None = None) -> CallableScorer:
    """Fluency as a reward.

    Args:
        counts: Of known words; those of :func:`word_counts` if None.

    Returns:
        The scorer; its name says of which words.

    Raises:
        RecipeError: If no counts are given and ``textblob`` is not installed.

    Example:
        >>> fluency_scorer({"film": 10}).score([""], ["Film"]).tolist() == [math.log(10)]
        True
    """
    known = word_counts() if counts is None else counts
    name = "fluency" if counts is None else f"fluency:{digest(dict(counts))[:8]}"
    return CallableScorer(Fluency(known), name=name, each=True)
