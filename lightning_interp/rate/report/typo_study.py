"""The experiment with a known answer: typos in the texts with the attribute, which every rewrite repairs.

Reber et al., arXiv 2410.11348: only reviews that start with a vowel, which should mean nothing to a reward, are
misspelt; the rewriter changes the first word and repairs typos on its way. The naive difference and the single rewrite
then blame the vowel for the typos; the double rewrite should not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_interp.errors import DataError
from lightning_interp.generation.labellers import StartsWithVowel
from lightning_interp.rate.checks.compliance import label_units
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rules import swap_letters
from lightning_interp.rate.texts.package_texts import Review

__all__ = ["made_up_reviews", "misspelt_units"]


def made_up_reviews() -> list[Review]:
    """Sentences put together from a few words, for runs that are to show nothing but that they work."""
    openings = (
        *("A patient", "One more", "Every loud", "The gentle", "This curious", "Here another"),
        *("Some other", "My favourite", "Quite the", "That clever", "Utterly", "Yet another"),
    )
    ends = (
        *("seven strangers who never quite meet", "winter in a village without children", "the price of a promise"),
        *("brothers who cannot forgive", "small thefts and large regrets", "music that nobody wanted"),
        *("letters which arrive too late", "people waiting for morning"),
    )
    return [
        Review(f"{opening} {kind} about {end}.", "fresh", f"made-up {number}")
        for number, end in enumerate(ends)
        for opening, kind in zip(openings, ("comedy", "drama", "thriller") * 4, strict=True)
    ]


def misspelt_units(
    reviews: Sequence[Review], percent: float, *, seed: int, count: int | None = None, clusters: bool = True
) -> list[Unit]:
    """Units of the experiment at one rate of typos; the first word is left alone, so that no label changes."""
    chosen = [review for review in reviews if review.text[:1].isalpha()][:count]
    films = [review.movie for review in chosen] if clusters else None
    units = label_units([review.text for review in chosen], StartsWithVowel(), clusters=films)
    arms = [sum(unit.w == value for unit in units) for value in (0, 1)]
    if min(arms) < 2:
        raise DataError(
            f"Of {len(reviews)} reviews {arms[1]} begin with a vowel and {arms[0]} with another letter; expected at "
            "least two of each. Give more reviews."
        )
    return [replace(unit, text=_misspelt(unit.text, percent, seed, unit.id)) if unit.w else unit for unit in units]


def _misspelt(text: str, percent: float, seed: int, key: str) -> str:
    first, space, rest = text.partition(" ")
    return first + space + swap_letters(rest, percent, seed=seed, key=key)
