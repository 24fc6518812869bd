"""Labellers: which value of an attribute a text has; and how often texts have the value that was asked for."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from lightning_interp.core.measure.statistics import Estimate, proportion_interval
from lightning_interp.errors import DataError, RecipeError

__all__ = [
    "Contains",
    "Labeller",
    "Lexicon",
    "LongerThan",
    "ScoreAbove",
    "StartsWithVowel",
    "compiled",
    "compliance",
    "labels",
    "vader_labeller",
    "words_of",
]


class Labeller(Protocol):
    """Says which value of the attribute texts have."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Sequence[int | None]:
        """0, 1, or None where it cannot be told, for each text and the prompt that it answers."""
        ...


class _ByText:
    label: Callable[..., int | None]

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[int | None]:
        """Label texts; see :class:`Labeller`."""
        return [self.label(text) for text in texts]


@dataclass(frozen=True)
class LongerThan(_ByText):
    """1 for texts longer than a limit.

    Args:
        limit: The limit.
        unit: What is counted.

    Example:
        >>> LongerThan(3)(["abc", "abcd"], ["", ""])
        [0, 1]
    """

    limit: float
    unit: Literal["characters", "words"] = "characters"

    def label(self, text: str) -> int:
        """1 if the text is longer."""
        return int(_length(text, self.unit) > self.limit)

    @classmethod
    def median(cls, texts: Iterable[str], unit: Literal["characters", "words"] = "characters") -> LongerThan:
        """The labeller whose limit is the median length of some texts.

        Args:
            texts: The texts.
            unit: What is counted.

        Returns:
            The labeller.

        Raises:
            DataError: If there is no text.
        """
        lengths = [_length(text, unit) for text in texts]
        if not lengths:
            raise DataError("LongerThan.median got no texts; expected at least one.")
        return cls(statistics.median(lengths), unit)


def _length(text: str, unit: Literal["characters", "words"]) -> int:
    return len(text) if unit == "characters" else len(text.split())


@dataclass(frozen=True)
class StartsWithVowel(_ByText):
    """1 if the first character is one of ``aeiouAEIOU``, 0 if it is another letter, None if it is no letter.

    Args:
        skip: Characters at the beginning that do not count, such as quotation marks; white space never counts.

    Example:
        >>> StartsWithVowel()(["An idea", "The idea", "1 idea"], ["", "", ""])
        [1, 0, None]
    """

    skip: str = ""

    def label(self, text: str) -> int | None:
        """1 if the text begins with a vowel."""
        first = text.strip().lstrip(self.skip + " ")[:1]
        return int(first in "aeiouAEIOU") if first.isalpha() else None


@dataclass(frozen=True)
class Contains(_ByText):
    """1 if a regular expression is found in the text.

    Args:
        pattern: The expression.
        ignore_case: Whether case is ignored.

    Raises:
        RecipeError: If the pattern is no regular expression.

    Example:
        >>> Contains("!")(["Oh!", "Oh."], ["", ""])
        [1, 0]
    """

    pattern: str
    ignore_case: bool = True

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def label(self, text: str) -> int:
        """1 if it is found."""
        return int(compiled(self.pattern, ignore_case=self.ignore_case).search(text) is not None)


@dataclass(frozen=True)
class Lexicon(_ByText):
    """1 if a text has more words of one list than of another, 0 if fewer, None if as many.

    Args:
        one: Words that speak for 1, in lower case.
        zero: Words that speak for 0, in lower case.

    Example:
        >>> Lexicon(frozenset({"good"}), frozenset({"bad"}))(["Good, not bad, good", "A film"], ["", ""])
        [1, None]
    """

    one: frozenset[str]
    zero: frozenset[str]

    def label(self, text: str) -> int | None:
        """1 if more words speak for it."""
        balance = sum((word in self.one) - (word in self.zero) for word in words_of(text))
        return None if balance == 0 else int(balance > 0)


@dataclass(frozen=True)
class ScoreAbove(_ByText):
    """1 if a score of the text is above a threshold, 0 if below, None if it is there.

    Args:
        score: Gives the score of a text.
        threshold: The threshold.

    Example:
        >>> ScoreAbove(len, 2)(["a", "ab", "abc"], ["", "", ""])
        [0, None, 1]
    """

    score: Callable[[str], float]
    threshold: float = 0.0

    def label(self, text: str) -> int | None:
        """1 if the score is above."""
        score = float(self.score(text))
        return None if score == self.threshold else int(score > self.threshold)


def vader_labeller(threshold: float = 0.0) -> ScoreAbove:
    """Sentiment by the lexicon and rules of VADER (Hutto and Gilbert, 2014), which takes "well" for praise.

    Args:
        threshold: Of the compound score, from -1 to 1.

    Returns:
        The labeller.

    Raises:
        RecipeError: If the package ``vaderSentiment`` is not installed.
    """
    try:
        vader = import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise RecipeError(
            "vader_labeller needs the package vaderSentiment, which is not installed. Install it with "
            "`pip install --no-deps vaderSentiment`."
        ) from error
    analyser = vader.SentimentIntensityAnalyzer()
    return ScoreAbove(lambda text: float(analyser.polarity_scores(text)["compound"]), threshold)


def labels(labeller: Labeller, texts: Sequence[str], prompts: Sequence[str]) -> list[int | None]:
    """Ask a labeller, and check that it gave 0, 1 or None for each text."""
    found: list[Any] = list(labeller(texts, prompts))
    wrong = next((label for label in found if label is not None and label not in (0, 1)), None)
    if len(found) != len(texts) or wrong is not None:
        raise DataError(
            f"The labeller {labeller!r:.60} gave {len(found)} labels for {len(texts)} texts"
            f"{f', among them {wrong!r}' if wrong is not None else ''}; expected 0, 1 or None for each."
        )
    return [None if label is None else int(label) for label in found]


def compiled(pattern: str, *, ignore_case: bool = True) -> re.Pattern[str]:
    """A regular expression of a user."""
    try:
        return re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise RecipeError(f"{pattern!r} is no regular expression: {error}. Escape what is meant literally.") from error


def words_of(text: str) -> list[str]:
    """Words of a text in lower case."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())


def compliance(
    found: Sequence[int | None], wanted: Sequence[int], *, units: Sequence[str] | None = None
) -> tuple[Estimate, int]:
    """How often texts have the value that was asked for.

    Args:
        found: Labels; None where a text could not be told, which is not counted.
        wanted: What was asked for.
        units: Which texts belong together, such as draws of one prompt: of these the mean counts once.

    Returns:
        The share with Wilson's interval over units, and how many texts could not be told.

    Raises:
        DataError: If no text could be told.

    Example:
        >>> share, unknown = compliance([1, 0, None], [1, 1, 1])
        >>> share.value, share.n, unknown
        (0.5, 2, 1)
    """
    kept: dict[Any, list[bool]] = {}
    for name, label, asked in zip(range(len(found)) if units is None else units, found, wanted, strict=True):
        if label is not None:
            kept.setdefault(name, []).append(label == asked)
    if not kept:
        raise DataError(f"None of {len(found)} texts could be labelled, so nobody knows whether they comply.")
    return proportion_interval([sum(ok) / len(ok) for ok in kept.values()]), sum(label is None for label in found)
