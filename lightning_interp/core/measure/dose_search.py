"""How much seed gives a trait: the smallest doses whose models reach given scores, found by halving a grid.

After the procedure in the code of Roe et al. 2026, arXiv 2605.01130: thresholds in rising order, a binary search for
each, scores kept for all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import DataError, RecipeError

__all__ = ["THRESHOLDS", "Calibration", "calibrate_dose", "dose_grid"]

THRESHOLDS = (5.0, 20.0, 40.0, 60.0, 80.0)
"""Scores after cycle 0 that the authors look for."""
_SCANNED = 8  # a grid of fewer doses is scanned from below
_NORMAL = 1.959963984540054


def dose_grid(step: int = 2, largest: int = 200) -> list[int]:
    """Doses that are whole batches of seed rows.

    Args:
        step: Rows of a batch: 2 in the authors' finetuning, 4 with documents.
        largest: The largest dose, or a little more than it.

    Returns:
        ``step, 2 step, ...``, none above ``largest``.

    Raises:
        RecipeError: If there is no such dose.

    Example:
        >>> dose_grid(4, 18)
        [4, 8, 12, 16]
    """
    if step < 1 or largest < step:
        raise RecipeError(f"dose_grid(step={step}, largest={largest}): expected a step of 1 or more, and a dose of it.")
    return list(range(step, largest + 1, step))


@dataclass(frozen=True)
class Calibration:
    """What a search has found.

    Args:
        doses: The dose of each threshold; the largest of the grid where none reaches it.
        reached: Whether that dose reaches the threshold.
        scored: The score of every dose that was trained, or known before, by dose.
        warnings: Where a larger dose scored clearly less: the search takes it that none does.
    """

    doses: Mapping[float, int]
    reached: Mapping[float, bool]
    scored: Mapping[int, Estimate]
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row a dose: its score, and for which thresholds it was chosen."""
        return [
            {
                "n_seed": dose, "score": found.value, "low": found.low, "high": found.high, "n": found.n,
                "chosen for": ", ".join(f"{t:g}" for t, at in self.doses.items() if at == dose and self.reached[t]),
            }
            for dose, found in self.scored.items()
        ]  # fmt: skip


def calibrate_dose(
    score: Callable[[int], Estimate],
    grid: Sequence[int] | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    known: Mapping[int, Estimate] | None = None,
) -> Calibration:
    """Find for each threshold the smallest dose whose model reaches it.

    The search takes it that scores rise with the dose; where one is clearly lower than that of a smaller dose, a
    warning says so. A dose is trained once at most, and what one threshold has shown narrows the search for the next.

    Args:
        score: Trains a model on the first ``n`` rows of the seed and evaluates it. If it keeps what it found (as a
            phase of a run, say), a search that was stopped goes on.
        grid: Doses in rising order; by default ``dose_grid()``. One of fewer than 8 is scanned from below.
        thresholds: Scores to be reached.
        known: Scores that are known already, by dose.

    Returns:
        Doses and all scores.

    Raises:
        RecipeError: If the grid is empty or does not rise, or there is no threshold.
        DataError: If a score is not a finite number.

    Example:
        >>> def score(n):
        ...     return Estimate(float(n), n - 1.0, n + 1.0, 12, 0.95, "example")
        >>> found = calibrate_dose(score, range(2, 101, 2), thresholds=[5, 40, 300])
        >>> dict(found.doses), found.reached[300], len(found.scored)
        ({5: 6, 40: 40, 300: 100}, False, 15)
    """
    doses = list(dose_grid() if grid is None else grid)
    if not doses or sorted(set(doses)) != doses:
        raise RecipeError(f"calibrate_dose(grid={doses!r:.80}): expected doses in rising order, at least one.")
    if not thresholds:
        raise RecipeError("calibrate_dose(thresholds=()): expected at least one score to reach.")
    scored = dict(known or {})

    def reaches(place: int, threshold: float) -> bool:
        dose = doses[place]
        found = scored[dose] = scored[dose] if dose in scored else score(dose)
        if not math.isfinite(found.value):
            raise DataError(
                f"The model of n_seed={dose} has the score {found.value!r}; expected a finite number. Look at its "
                "evaluation: a judge that refuses every response gives none."
            )
        return found.value >= threshold

    chosen, reached, lowest = {}, {}, 0
    for threshold in sorted(thresholds):
        lowest, reached[threshold] = _smallest(doses, threshold, lowest, reaches, scored)
        chosen[threshold] = doses[lowest]
    by_dose = {dose: scored[dose] for dose in sorted(scored)}
    notes = tuple(_falls(by_dose))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Calibration(chosen, reached, by_dose, notes)


def _smallest(
    doses: Sequence[int],
    threshold: float,
    lowest: int,
    reaches: Callable[[int, float], bool],
    scored: Mapping[int, Estimate],
) -> tuple[int, bool]:
    """Place of the smallest dose from ``lowest`` on that reaches a threshold, the last one if none; whether it does."""
    last = len(doses) - 1
    if len(doses) < _SCANNED:
        place = next((i for i in range(lowest, last + 1) if reaches(i, threshold)), None)
        return (last, False) if place is None else (place, True)
    enough = [i for i in range(lowest, last + 1) if doses[i] in scored and reaches(i, threshold)]
    high = min(enough, default=last + 1)  # a place that is known to reach it, or one past the end
    low = 1 + max(
        (i for i in range(lowest, high) if doses[i] in scored and not reaches(i, threshold)), default=lowest - 1
    )
    while low < high:
        middle = (low + min(high, last)) // 2
        if reaches(middle, threshold):
            high = middle
        else:
            low = middle + 1
    return (last, False) if high > last else (high, True)


def _falls(scored: Mapping[int, Estimate]) -> list[str]:
    """A warning for each dose that scored more than two standard errors less than a smaller one."""
    notes, best = [], None
    for dose, found in scored.items():
        if best is not None:
            fall = scored[best].value - found.value
            error = math.hypot(*((each.high - each.low) / (2 * _NORMAL) for each in (scored[best], found)))
            if fall > 2 * error:
                notes.append(
                    f"n_seed={dose} scored {found.value:.4g}, more than two standard errors below "
                    f"{scored[best].value:.4g} at n_seed={best}: scores do not always rise with the dose here, so that "
                    "the search may have passed by a smaller one."
                )
        if best is None or found.value > scored[best].value:
            best = dose
    return notes
