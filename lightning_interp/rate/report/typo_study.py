"""The experiment with a known answer: typos in the texts with the attribute, which every rewrite repairs.

Reber et al., arXiv 2410.11348: the attribute is that a review starts with a vowel, which should mean nothing to a
reward. Only such reviews are misspelt. The rewriter changes the first word and repairs typos on its way. The naive
difference and the single rewrite then blame the vowel for the typos; the double rewrite should not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_interp.errors import DataError
from lightning_interp.rate.checks.compliance import StartsWithVowel, label_units
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rules import OpenerToggle, swap_letters
from lightning_interp.rate.texts.own_files import read_own
from lightning_interp.rate.texts.package_texts import Review, read_reviews

__all__ = ["exact_effect", "made_up_reviews", "misspelt_units", "own_reviews", "slope", "slope_rows"]


def made_up_reviews() -> list[Review]:
    """Sentences put together from a few words, for runs that are to show nothing but that they work.

    Returns:
        96 sentences of eight made-up films; a third of them begin with a vowel.

    Example:
        >>> made_up_reviews()[0].text
        'A patient comedy about seven strangers who never quite meet.'
    """
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


def own_reviews(path: str | os.PathLike[str]) -> list[Review]:
    """Read reviews of the user's own.

    Args:
        path: A CSV file as ``read_reviews`` takes it, or JSONL with ``text``
            and, if wished, ``cluster`` (what texts that are not independent share).

    Returns:
        The reviews.

    Raises:
        DataError: If the file cannot be read; names the line.
    """
    if Path(path).suffix == ".jsonl":
        units = read_own(path).units
        return [Review(unit.text.strip(), "fresh", unit.cluster or unit.id) for unit in units]
    return read_reviews(path=path)


def misspelt_units(
    reviews: Sequence[Review], percent: float, *, seed: int, count: int | None = None, clusters: bool = True
) -> list[Unit]:
    """Units of the experiment at one rate of typos.

    Only reviews that start with a vowel are misspelt. Their first word is left alone, so that no label changes. The
    same words are misspelt, and more, at a higher rate.

    Args:
        reviews: Those that begin with a letter are used.
        percent: Share of the words that are misspelt.
        seed: Of the typos.
        count: Use the first so many; all if None.
        clusters: Units of one film share a cluster.

    Returns:
        One unit a review, the same reviews at every rate.

    Raises:
        DataError: If there are no reviews that begin with a vowel, or none that begin with another letter.

    Example:
        >>> unit, = misspelt_units(made_up_reviews(), 50, seed=0)[:1]
        >>> unit.w, unit.text.split()[0], unit.text == made_up_reviews()[0].text
        (1, 'A', False)
    """
    chosen = [review for review in reviews if review.text[:1].isalpha()][:count]
    units = label_units(
        [review.text for review in chosen],
        StartsWithVowel(),
        clusters=[review.movie for review in chosen] if clusters else None,
    )
    arms = [sum(unit.w == value for unit in units) for value in (0, 1)]
    if min(arms) < 2:
        raise DataError(
            f"Of {len(reviews)} reviews {arms[1]} begin with a vowel and {arms[0]} with another letter; expected at "
            "least two of each. Give more reviews."
        )
    return [
        Unit(id=unit.id, text=_misspelt(unit.text, percent, seed, unit.id), w=1, cluster=unit.cluster)
        if unit.w
        else unit
        for unit in units
    ]


def _misspelt(text: str, percent: float, seed: int, key: str) -> str:
    first, space, rest = text.partition(" ")
    return first + space + swap_letters(rest, percent, seed=seed, key=key)


def exact_effect(units: Sequence[Unit], openers: OpenerToggle, score: Callable[[str], float]) -> float:
    """What the openers do to the reward of texts without typos: the answer that an estimator should give.

    Args:
        units: Texts without typos.
        openers: What makes a text begin with a vowel, or not.
        score: Reward of a text.

    Returns:
        Mean over the units of the reward with the opening for 1 minus that with the one for 0.
    """
    return float(np.mean([score(openers(unit.text, 1)) - score(openers(unit.text, 0)) for unit in units]))


def slope(results: Mapping[float, RateResult], estimator: str) -> float:
    """Least-squares slope of an ATE over the numbers, a description of these points and nothing else.

    All points rest on the same texts and are not independent, and they need not lie on a line; so no error is given.

    Args:
        results: By number; at least two.
        estimator: ``"naive"``, ``"single"`` or ``"rate"``.

    Returns:
        Standard deviations of the original rewards a unit of the number.
    """
    at = sorted(results)
    values = [_ate(results[place], estimator) for place in at]
    return float(np.polyfit(at, values, 1)[0])


def _ate(result: RateResult, estimator: str) -> float:
    table = result.standardized or result.raw
    found = {name: effect.value for name, which, effect in table.items() if which in ("naive", "ate")}
    return found[estimator]


def slope_rows(results: Mapping[float, RateResult]) -> list[dict[str, Any]]:
    """Slopes of the three estimators.

    Args:
        results: By number; at least two.

    Returns:
        Rows with ``estimator``, ``sd per percentage point``, and the largest difference between two points.
    """
    rows = []
    for estimator in ("naive", "single", "rate"):
        values = [_ate(result, estimator) for result in results.values()]
        reach = max(values) - min(values)
        rows.append(
            {"estimator": estimator, "sd per percentage point": slope(results, estimator), "range of ATE (sd)": reach}
        )
    return rows
