"""The experiment with a known answer: its texts, the true effect, and how estimates move with the typos."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_interp.rate import OpenerToggle, RateResult, Review, Unit, read_own, read_reviews


def own_reviews(path: str | os.PathLike[str]) -> list[Review]:
    """Read reviews of the user's own.

    Args:
        path: A CSV file as ``read_reviews`` takes it, or rows of another form with ``text``
            and, if wished, ``cluster`` (what texts that are not independent share).

    Returns:
        The reviews.

    Raises:
        DataError: If the file cannot be read; names the line.
    """
    if Path(path).suffix != ".csv":
        units = read_own(path).units
        return [Review(unit.text.strip(), "fresh", unit.cluster or unit.id) for unit in units]
    return read_reviews(path=path)


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
