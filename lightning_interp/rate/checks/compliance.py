"""Labellers: which value of an attribute a text has; and whether rewrites have the value that was asked for."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from lightning_interp.core.measure.statistics import Estimate, proportion_interval
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit

__all__ = [
    "Compliance",
    "Contains",
    "Labeller",
    "Lexicon",
    "LongerThan",
    "ScoreAbove",
    "StartsWithVowel",
    "compliance_rates",
    "label_units",
    "labels",
    "vader_labeller",
]


class Labeller(Protocol):
    """Says which value of the attribute texts have."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Sequence[int | None]:
        """Label texts.

        Args:
            texts: The texts.
            prompts: What each of them answers.

        Returns:
            0, 1, or None where it cannot be told, one a text.
        """
        ...


class _ByText:
    """Labels each text on its own."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[int | None]:
        """Label texts; see :class:`Labeller`."""
        return [self.label(text) for text in texts]

    def label(self, text: str) -> int | None:
        """The value of one text."""
        raise NotImplementedError


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
        return int(self._length(text) > self.limit)

    def _length(self, text: str) -> int:
        return len(text) if self.unit == "characters" else len(text.split())

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
        lengths = [cls(0, unit)._length(text) for text in texts]
        if not lengths:
            raise DataError("LongerThan.median got no texts; expected at least one.")
        return cls(statistics.median(lengths), unit)


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
        first = text.strip().lstrip(self.skip + " ")[:1] if self.skip else text.strip()[:1]
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
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RecipeError(
                f"Contains({self.pattern!r}) is no regular expression: {error}. Escape what is meant literally."
            ) from error

    def label(self, text: str) -> int:
        """1 if it is found."""
        return int(re.search(self.pattern, text, re.IGNORECASE if self.ignore_case else 0) is not None)


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
        words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
        balance = sum(word in self.one for word in words) - sum(word in self.zero for word in words)
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
    """Ask a labeller, and check that it answered.

    Args:
        labeller: The labeller.
        texts: The texts.
        prompts: What each of them answers.

    Returns:
        0, 1 or None, one a text.

    Raises:
        DataError: If there are too few or too many labels, or one is something else.
    """
    found: list[Any] = list(labeller(texts, prompts))
    wrong = next((label for label in found if label is not None and label not in (0, 1)), None)
    if len(found) != len(texts) or wrong is not None:
        raise DataError(
            f"The labeller {labeller!r:.60} gave {len(found)} labels for {len(texts)} texts"
            f"{f', among them {wrong!r}' if wrong is not None else ''}; expected 0, 1 or None for each."
        )
    return [None if label is None else int(label) for label in found]


def label_units(
    texts: Sequence[str],
    labeller: Labeller,
    *,
    prompts: Sequence[str] | str = "",
    ids: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
) -> list[Unit]:
    """Make units of texts.

    Args:
        texts: The originals.
        labeller: Says which value of the attribute they have.
        prompts: What each of them answers, or one prompt for all.
        ids: Their names; the numbers of the texts if None.
        clusters: What units that are not independent share.

    Returns:
        One unit a text.

    Raises:
        DataError: If lengths differ, or a label is not 0, 1 or None.

    Example:
        >>> [unit.w for unit in label_units(["An idea", "The idea"], StartsWithVowel())]
        [1, 0]
    """
    asked = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
    names = [str(index) for index in range(len(texts))] if ids is None else list(ids)
    groups = [None] * len(texts) if clusters is None else list(clusters)
    for name, values in (("prompts", asked), ("ids", names), ("clusters", groups)):
        if len(values) != len(texts):
            raise DataError(f"{name} has {len(values)} values and texts has {len(texts)}; expected as many.")
    found = labels(labeller, list(texts), asked)
    rows = zip(names, texts, found, asked, groups, strict=True)
    return [Unit(id=name, text=text, w=w, prompt=prompt, cluster=group) for name, text, w, prompt, group in rows]


@dataclass(frozen=True, kw_only=True)
class Compliance:
    """How often rewrites of one pass and one direction have the value that was asked for.

    Args:
        stage: ``"rewrite"``, ``"rewrite2"`` or ``"rewrite3"``.
        target: The value that was asked for.
        share: Share of the rewrites that have it, with Wilson's interval; of several draws of a unit the mean.
        unknown: Rewrites that the labeller could not tell; they are not counted.
    """

    stage: str
    target: int
    share: Estimate
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"stage": self.stage, "target": self.target, "unknown": self.unknown, **self.share.to_dict()}


def compliance_rates(triples: RewriteTriples, labeller: Labeller) -> list[Compliance]:
    """Compliance of each pass in each direction.

    Nothing is corrected by it. If the first pass fails with probability ``a`` and the second with ``b``, and both are
    perfect otherwise, the double-rewrite effect is ``(1-a)(1-b)`` times the true one.

    Args:
        triples: Complete units.
        labeller: Says which value of the attribute a text has.

    Returns:
        One row a pass and direction that occurs and can be told.

    Raises:
        DataError: If the labeller gives something else than 0, 1 or None for each text.

    Example:
        >>> triples = RewriteTriples(attr="mark", ids=["a"], w=[1], prompts=[""], original=["oh!"], rewrite=["oh!"],
        ...     rewrite2=["oh!"], draw=[0])
        >>> [(row.stage, row.target, row.share.value) for row in compliance_rates(triples, Contains("!"))]
        [('rewrite', 0, 0.0), ('rewrite2', 1, 1.0)]
    """
    rows = []
    for stage in triples.stages[1:]:
        found = labels(labeller, triples.texts(stage), triples.prompts)
        targets = triples.targets(stage)
        for target in (0, 1):
            asked = [
                (name, label)
                for name, label, wanted in zip(triples.ids, found, targets, strict=True)
                if wanted == target
            ]
            units: dict[str, list[bool]] = {}
            for name, label in asked:
                if label is not None:
                    units.setdefault(name, []).append(label == target)
            if units:
                share = proportion_interval([sum(kept) / len(kept) for kept in units.values()])
                unknown = sum(label is None for _, label in asked)
                rows.append(Compliance(stage=stage, target=target, share=share, unknown=unknown))
    return rows
