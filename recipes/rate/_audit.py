"""An audit of the user's own texts: rewrite them as far as agreed, and see how estimates settle as texts are added."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.row_files import file_rows, holds_a_list
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.labellers import Labeller, labels
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.rewriting.driver import RewriteReport, RewriteRun
from lightning_interp.rate.texts.readers import ForeignRewrites, read_own, read_rewrites


def read_any(path: str | os.PathLike[str]) -> ForeignRewrites:
    """Read texts in whichever layout they are.

    Args:
        path: ``.json`` or JSONL of the paper's authors (records with ``completions``), or rows of the user's own.

    Returns:
        Units, texts and rewards.

    Raises:
        DataError: If the file cannot be read; names file and line.
    """
    file = Path(path)
    if file.suffix == ".json" and not holds_a_list(file):
        return read_rewrites(file)
    first = next(file_rows(file), None)
    return read_rewrites(file) if first is not None and "completions" in first[1] else read_own(file)


def labelled(given: ForeignRewrites, labeller: Labeller | None) -> ForeignRewrites:
    """Label the originals anew, if a labeller is given.

    Args:
        given: Units with or without labels.
        labeller: Says which value of the attribute a text has; None keeps the labels.

    Returns:
        The same texts and rewards.

    Raises:
        DataError: If no unit has a label.
    """
    units = given.units
    if labeller is not None:
        found = labels(labeller, [unit.text for unit in units], [unit.prompt for unit in units])
        units = [replace(unit, w=w) for unit, w in zip(units, found, strict=True)]
    if all(unit.w is None for unit in units):
        raise DataError(
            f"{given.source}: none of the {len(units)} texts has a label. Give a column w with 0 and 1, or "
            "a labeller that can tell."
        )
    return replace(given, units=list(units))


def agreed(*runs: RewriteRun, max_calls: int | None, max_cost: float | None) -> str:
    """Refuse to call a service before somebody has agreed to what that may cost.

    Args:
        *runs: What would be asked for.
        max_calls: Calls that are agreed to.
        max_cost: Money that is agreed to.

    Returns:
        The plan, to be shown.

    Raises:
        RecipeError: If calls are to be made and neither is given; says what they would be.
    """
    plans = [run.plan() for run in runs]
    calls, costs = sum(plan.total_calls for plan in plans), [plan.cost for plan in plans if plan.cost is not None]
    if calls and max_calls is None and max_cost is None:
        cost = f", {sum(costs):.2f} in money" if costs else ""
        raise RecipeError(
            f"{runs[0].rewriter.name} would be called up to {calls} times: about "
            f"{sum(plan.tokens_in for plan in plans):,} tokens read and {sum(plan.tokens_out for plan in plans):,} "
            f"written{cost}. Nothing was called; agree with --max_calls={calls}, or with --max_cost=... and prices."
        )
    return "\n".join(map(str, plans))


def left_of(budget: Any, spent: Sequence[float], least: float) -> Any:
    """What is left of a budget, and never less than the least that can be one; None without one."""
    return None if budget is None else max(budget - sum(spent), least)


def check_spent(run: RewriteRun, reports: Sequence[RewriteReport], **budgets: Any) -> None:
    """Refuse to go on where the attributes before this one have used up the budget of the whole run."""
    spent = {"max_calls": sum(one.calls for one in reports), "max_cost": sum(one.cost or 0.0 for one in reports)}
    for name, budget in budgets.items():
        if budget is not None and spent[name] >= budget and run.plan().total_calls:
            raise RecipeError(
                f"The rewriting ended at {name}={budget} before attribute {run.attr!r}. All answers are kept: start "
                "the same command again to go on, with another budget if you like."
            )


def rewrite_all(run: RewriteRun, advance: Callable[[int], object] | None = None) -> RewriteReport:
    """Rewrite, and stop with an error if the budget ended it; all answers are kept.

    Args:
        run: What is to be asked for.
        advance: Called with the number of answers that were just kept.

    Returns:
        What was done.

    Raises:
        RecipeError: If something is still to be asked for because the run was stopped.
    """
    report = run.run(advance)
    if report.stopped:
        limit = {"max_calls": f"max_calls={run.max_calls}", "max_cost": f"max_cost={run.max_cost}"}.get(report.stopped)
        why = limit or f"too many errors, the last of them {report.last_error!r}"
        raise RecipeError(
            f"The rewriting ended at {why} after {report.calls} calls; {report.missing} texts can be asked for now. "
            f"All answers are in {str(run.store.folder)!r}: start the same command again to go on, "
            "with another budget if you like."
        )
    return report


def running_estimates(result: RateResult, *, steps: int = 10, seed: int = 0) -> list[dict[str, float | int]]:
    """The estimates from ever more of the units, in an order drawn at random: do they settle?

    Args:
        result: The effects.
        steps: How many sizes.
        seed: Of the order.

    Returns:
        Rows with ``units``, ``naive``, ``single`` and ``rate`` (ATE), in reward units; NaN while an arm is empty. The
        last row is the result itself.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 0] * 4, [2.0, 1.0] * 4, [1.0, 2.0] * 4, [3.0, 1.0] * 4)
        >>> running_estimates(result, steps=2)[-1]
        {'units': 8, 'naive': 1.0, 'single': 1.0, 'rate': 1.5}
    """
    units = result.units
    order = list(range(len(units.ids)))
    random.Random(derived_seed(seed, "running estimates", 0)).shuffle(order)  # noqa: S311 - an order, no secrets
    rows = []
    for size in sorted({max(1, round(len(order) * step / steps)) for step in range(1, steps + 1)}):
        chosen = np.array(order[:size])
        w = units.w[chosen]
        both = bool(w.any() and not w.all())
        row: dict[str, float | int] = {"units": size}
        if units.r_orig is not None and units.sigma is not None:
            r = units.r_orig[chosen]
            row["naive"] = float(r[w].mean() - r[~w].mean()) if both else float("nan")
            row["single"] = float(units.sigma[chosen].mean()) if both else float("nan")
        row["rate"] = float(units.delta[chosen].mean()) if both else float("nan")
        rows.append(row)
    return rows
