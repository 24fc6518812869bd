"""What written answers name: whole words, in one or several, and whether they are answers at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_interp.core.measure.statistics import Estimate, mean_interval, proportion_interval
from lightning_interp.core.tokens.text import find_occurrence, is_whole
from lightning_interp.errors import DataError
from lightning_interp.subliminal.traits import Trait, plural_of

__all__ = ["AnswerScores", "bucket_of", "contains", "mentions", "score_answers"]

OTHER = "other"
_DEGENERATE = 0.1


def mentions(text: str, name: str) -> bool:
    """Whether a text names something: as a whole word, in the singular or plural, in any case.

    Example:
        >>> mentions("Wolves!", "wolf"), mentions("Wolfgang", "wolf"), mentions("a catastrophe", "cat")
        (True, False, False)
    """
    folded = text.casefold()
    return any(is_whole(folded, *place) for form in _forms(name) for place in find_occurrence(folded, form, "all"))


def contains(text: str, name: str) -> bool:
    """Whether the letters of a name come anywhere, as in ``Wolfgang``: the rule of the first papers, for comparison."""
    return name.casefold() in text.casefold()


@lru_cache
def _forms(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(form.casefold() for form in (name, plural_of(name), f"{name}s", f"{name}es")))


def bucket_of(text: str, names: Iterable[str]) -> str:
    """The longest of the names that a text mentions, or ``other``.

    Example:
        >>> bucket_of("Sea lions", ["lion", "sea lion"]), bucket_of("42", ["lion"])
        ('sea lion', 'other')
    """
    ordered = sorted(names, key=lambda name: -len(name))
    return next((name for name in ordered if mentions(text, name)), OTHER)


@dataclass(frozen=True)
class AnswerScores:
    """How often answers name the target, and what else they are.

    Args:
        rates: Share of each question's answers that name the target as a whole word, ``[questions]``.
        substring: The same by letters anywhere; not comparable with the former.
        histogram: Answers of each bucket (the trait's names, longest first, else ``other``).
        frac_nonalpha: Share of answers without any letter.
        mean: Mean rate with an interval over questions.
        pooled: Share of all answers, with Wilson's interval, which takes them as independent.
    """

    rates: Tensor
    substring: Tensor
    histogram: Mapping[str, int]
    frac_nonalpha: float
    mean: Estimate
    pooled: Estimate

    @property
    def frac_other(self) -> float:
        """Share of answers that name nothing of the list."""
        return self.histogram[OTHER] / max(sum(self.histogram.values()), 1)

    @property
    def warning(self) -> str | None:
        """What to know before a low rate is read as indifference; None if answers look like answers."""
        if self.frac_nonalpha <= _DEGENERATE:
            return None
        return (
            f"{self.frac_nonalpha:.0%} of the answers have no letter: the model writes something else than answers, so "
            "a low rate says nothing of its preference."
        )


def score_answers(answers: Sequence[Sequence[str]], trait: Trait, *, level: float = 0.95) -> AnswerScores:
    """Count what answers name.

    Args:
        answers: Of each question, what was answered.
        trait: Whose target is counted.
        level: Confidence level.

    Returns:
        Rates by question, the histogram, and what guards against degenerate answers.

    Raises:
        DataError: If a question has no answer.

    Example:
        >>> found = score_answers([["Owl.", "An owl"], ["cat", "17"]], Trait(target="owl"))
        >>> found.rates.tolist(), found.frac_nonalpha, found.histogram["owl"]
        ([1.0, 0.0], 0.25, 2)
    """
    empty = [i for i, texts in enumerate(answers) if not texts]
    if empty or not answers:
        raise DataError(f"score_answers() got {len(answers)} questions, without an answer: {empty}. Give each one.")
    names = (trait.target, *trait.others)
    hits = [[float(mentions(text, trait.target)) for text in texts] for texts in answers]
    pieces = [[float(contains(text, trait.target)) for text in texts] for texts in answers]
    texts = [text for some in answers for text in some]
    histogram = dict.fromkeys((*names, OTHER), 0)
    for text in texts:
        histogram[bucket_of(text, names)] += 1
    rates = [sum(some) / len(some) for some in hits]
    return AnswerScores(
        rates=torch.tensor(rates, dtype=torch.float64),
        substring=torch.tensor([sum(some) / len(some) for some in pieces], dtype=torch.float64),
        histogram=histogram,
        frac_nonalpha=sum(not any(map(str.isalpha, text)) for text in texts) / len(texts),
        mean=mean_interval(rates, level=level),
        pooled=proportion_interval([hit for some in hits for hit in some], level=level),
    )
