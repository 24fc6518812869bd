"""Scores of graft plans as a table, with intervals over facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_interp.core.measure.statistics import (
    Estimate,
    mean_interval,
    median_interval,
    proportion_interval,
    ratio_interval,
)
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.metrics import METRICS

__all__ = ["GraftResult"]

_SHARES = ("top1", "top5")


@dataclass
class GraftResult:
    """What :class:`~lightning_interp.grafting.evaluate.GraftEvaluator` measured.

    Args:
        plans: Names of the plans, in order.
        top_k: The k of the column ``top5``.
        rows: One a prompt and plan: prompt, unit, form, plan, switches, text, target, predicted token, and the metrics.
        dropped: Prompts that could not be scored, and why.
        located: One row a prompt and span that a plan names: its text, the columns of its tokens, and these tokens.
    """

    plans: list[str]
    top_k: int = 5
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    located: list[dict[str, Any]] = field(default_factory=list)

    def values(self, plan: str, metric: str, form: str | None = None) -> list[float]:
        """One value a unit: the mean over its prompts.

        Args:
            plan: Name of a plan.
            metric: A column of ``METRICS``.
            form: Only prompts of this form.

        Returns:
            Values in the order of first appearance of the units.

        Raises:
            RecipeError: If the plan, metric or form is unknown.
        """
        if plan not in self.plans or metric not in METRICS:
            raise RecipeError(
                f"No scores for plan {plan!r} and metric {metric!r}. Plans: {', '.join(self.plans)}; "
                f"metrics: {', '.join(METRICS)}."
            )
        if form is not None and form not in self.forms():
            known = ", ".join(map(repr, self.forms()))
            raise RecipeError(f"No prompt has the form {form!r}. Forms: {known or 'none'}.")
        units: dict[str, list[float]] = {}
        for row in self.rows:
            if row["plan"] == plan and (form is None or row["form"] == form):
                units.setdefault(row["unit"], []).append(row[metric])
        return [sum(values) / len(values) for values in units.values()]

    def estimate(self, plan: str, metric: str, *, form: str | None = None, level: float = 0.95) -> Estimate:
        """One number with its interval over units.

        Shares use Wilson's interval, the rank is a median, everything else a mean, both with a bootstrap.
        """
        values = self.values(plan, metric, form)
        if metric in _SHARES:
            return proportion_interval(values, level=level)
        return (median_interval if metric == "target_rank" else mean_interval)(values, level=level)

    def recovery(
        self, plan: str, metric: str = "target_logprob", *, form: str | None = None, level: float = 0.95
    ) -> Estimate:
        """Share of the finetuning effect that a plan brings back.

        ``(m(plan) - m(PRE)) / (m(SFT) - m(PRE))`` over the means of a metric, with a bootstrap over units.
        """
        plain, tuned, here = (self.values(p, metric, form) for p in ("PRE", "SFT", plan))
        gained = [a - b for a, b in zip(here, plain, strict=True)]
        possible = [a - b for a, b in zip(tuned, plain, strict=True)]
        return ratio_interval(gained, possible, level=level)

    def forms(self) -> list[str]:
        """Prompt forms, in order of appearance."""
        return list(dict.fromkeys(row["form"] for row in self.rows))

    def summary(self, *, form: str | None = None, level: float = 0.95) -> list[dict[str, Any]]:
        """One row a plan: every metric with its interval, recovery, and the number of units.

        Args:
            form: Only prompts of this form.
            level: Confidence level.

        Returns:
            Flat rows: ``<metric>``, ``<metric>_low``, ``<metric>_high``.
        """
        table = []
        for plan in self.plans:
            row: dict[str, Any] = {"plan": plan, "form": "all" if form is None else form}
            row["n"] = len(self.values(plan, METRICS[0], form))
            estimates = {metric: self.estimate(plan, metric, form=form, level=level) for metric in METRICS}
            estimates["recovery"] = self.recovery(plan, form=form, level=level)
            for name, estimate in estimates.items():
                for key, value in zip(
                    ("", "_low", "_high"), (estimate.value, estimate.low, estimate.high), strict=True
                ):
                    row[name + key] = None if math.isnan(value) else value
            table.append(row)
        return table

    def tidy(self, metrics: Sequence[str] = METRICS) -> list[dict[str, Any]]:
        """One row a prompt, plan and metric."""
        keys = ("prompt", "unit", "form", "plan", "head", "final_norm")
        return [
            {**{key: row[key] for key in keys}, "metric": metric, "value": row[metric]}
            for row in self.rows
            for metric in metrics
        ]
