"""Figures of rewrite-based effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_interp.core.measure.clustered import Vector
from lightning_interp.errors import RecipeError
from lightning_interp.rate.checks.diagnostics import SensitivityLine
from lightning_interp.rate.estimators.result import Effect, EffectTable, RateResult

__all__ = ["effects_figure", "overlay_figure", "sensitivity_figure", "trend_figure"]

COLOURS = {"naive": "#9a9a9a", "single": "#c8743c", "rate": "#3b6ea5"}
LABELS = {"naive": "naive (originals of the two arms)", "single": "single rewrite", "rate": "double rewrite (RATE)"}
_ARMS = ("#3b6ea5", "#c8743c")


def effects_figure(
    results: RateResult | Mapping[str, RateResult], *, estimand: str = "ate", standardized: bool = True, title: str = ""
) -> Any:
    """Naive, single-rewrite and double-rewrite effects side by side, with intervals.

    Args:
        results: One result, or several by name, such as one a reward model.
        estimand: ``"ate"``, ``"att"`` or ``"atu"`` for the two rewrite estimators.
        standardized: In standard deviations of the original rewards, so that reward models can be compared.
        title: Above the panel.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If there is no result, the estimand is unknown, or a result holds no standardised effects.
    """
    from matplotlib.figure import Figure

    named = {"": results} if isinstance(results, RateResult) else dict(results)
    if not named or estimand not in ("ate", "att", "atu"):
        raise RecipeError(
            f"effects_figure() got {len(named)} results and estimand={estimand!r}; expected at least one result, and "
            "'ate', 'att' or 'atu'."
        )
    effects = [_three(_scale(name, result, standardized), estimand) for name, result in named.items()]
    figure = Figure(figsize=(max(4.2, 1.6 + 1.5 * len(named)), 4.2), layout="constrained")
    axis = figure.subplots()
    for place, estimator in enumerate(COLOURS):
        at = [g + 0.27 * (place - 1) for g, one in enumerate(effects) if estimator in one]
        if at:
            _bars(axis, estimator, at, [one[estimator] for one in effects if estimator in one])
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xticks(range(len(named)) if any(named) else [], list(named) if any(named) else [])
    axis.set_ylabel(f"effect on the reward ({'standard deviations' if standardized else 'reward units'})")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", fontsize=8)
    sizes = sorted({result.counts.n for result in named.values()})
    count = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    level = 100 * next(iter(effects[0].values())).level
    figure.suptitle(f"{title}\n{estimand.upper()}, {count} units; lines: {level:g} % intervals".strip(), fontsize=10)
    return figure


def _scale(name: str, result: RateResult, standardized: bool) -> EffectTable:
    if not standardized:
        return result.raw
    if result.standardized is None:
        raise RecipeError(
            f"Result {name!r} holds no standardised effects. Make it with standardize=True and original rewards, or "
            "draw it with standardized=False."
        )
    return result.standardized


def _three(table: EffectTable, estimand: str) -> dict[str, Effect]:
    return {name: effect for name, which, effect in table.items() if which in (estimand, "naive")}


def _bars(axis: Any, estimator: str, at: list[float], effects: list[Effect]) -> None:
    values = [effect.value for effect in effects]
    below = [0.0 if math.isnan(e.low) else max(0.0, e.value - e.low) for e in effects]
    above = [0.0 if math.isnan(e.high) else max(0.0, e.high - e.value) for e in effects]
    axis.bar(at, values, width=0.25, color=COLOURS[estimator], alpha=0.9, label=LABELS[estimator])
    axis.errorbar(at, values, yerr=[below, above], fmt="none", ecolor="#222222", elinewidth=1, capsize=3)


def overlay_figure(result: RateResult, *, bins: int = 40, title: str = "") -> Any:
    """Rewards of the originals and of the twice rewritten texts, one panel an arm.

    Both texts have the same value of the attribute, so a difference is what the rewriter did besides. A match of the
    two arms together can hide opposite shifts within them.

    Args:
        result: Effects with original rewards.
        bins: Of the histograms, shared by both panels.
        title: Above the panels.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If the result has no original rewards.
    """
    from matplotlib.figure import Figure

    units = result.units
    if units.r_orig is None:
        raise RecipeError("overlay_figure() compares with the original rewards, but r_orig was None. Pass r_orig too.")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    edges = np.histogram_bin_edges(np.concatenate([units.r_orig, units.r_rw2]), bins=bins)
    arms = ((units.w, 1, result.rewrite_effect_w1), (~units.w, 0, result.rewrite_effect_w0))
    for axis, (arm, value, shift) in zip(panels, arms, strict=True):
        for rewards, label, colour in (
            (units.r_orig, "original", _ARMS[0]),
            (units.r_rw2, "rewritten twice", _ARMS[1]),
        ):
            _histogram(axis, rewards[arm], edges, label, colour)
        moved = "" if shift is None or math.isnan(shift.value) else f"; mean shift {_with_interval(shift)}"
        axis.set_title(f"w = {value}, {int(arm.sum()):,} units{moved}", fontsize=9)
        axis.set_xlabel("reward")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _histogram(axis: Any, rewards: Vector, edges: Vector, label: str, colour: str) -> None:
    if rewards.size == 0:
        axis.plot([], [], color=colour, label=label)
        return
    axis.hist(rewards, bins=edges, density=True, histtype="stepfilled", alpha=0.25, color=colour)
    axis.hist(rewards, bins=edges, density=True, histtype="step", color=colour, label=label)
    axis.axvline(float(rewards.mean()), color=colour, linestyle="--", linewidth=1)


def _with_interval(effect: Effect) -> str:
    ends = "" if math.isnan(effect.low) else f" [{effect.low:.2g}, {effect.high:.2g}]"
    return f"{effect.value:.2g}{ends}"


def sensitivity_figure(line: SensitivityLine, *, title: str = "") -> Any:
    """The effect against an asymmetry of the rewriter that was not measured, with its zero.

    Args:
        line: From :func:`~lightning_interp.rate.checks.diagnostics.asymmetry_line`.
        title: Above the panel.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axis = figure.subplots()
    values, low, high = ([getattr(e, end) for e in line.effect] for end in ("value", "low", "high"))
    axis.plot(line.asymmetry, values, color=COLOURS["rate"])
    if not any(math.isnan(end) for end in low):
        axis.fill_between(line.asymmetry, low, high, color=COLOURS["rate"], alpha=0.2, linewidth=0)
    axis.axhline(0, color="#333333", linewidth=0.8)
    inside = min(line.asymmetry, default=0) <= line.zero <= max(line.asymmetry, default=0)
    if inside:
        axis.plot([line.zero], [0], "o", color=COLOURS["single"], label=f"zero at D = {line.zero:.2g}")
        axis.legend(frameon=False)
    axis.set_xlabel(f"asymmetry D of an off-target feature worth {line.beta:.3g}")
    axis.set_ylabel("ATE - beta D")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    beyond = "" if line.possible else f"zero at D = {line.zero:.2g}, beyond any possible asymmetry"
    axis.set_title("\n".join(part for part in (title, beyond) if part), fontsize=10)
    return figure


def trend_figure(
    results: Mapping[float, RateResult],
    *,
    across: str,
    estimand: str = "ate",
    standardized: bool = True,
    truth: float | None = None,
    title: str = "",
) -> Any:
    """Naive, single-rewrite and double-rewrite effects against a number, with bands for the intervals.

    Args:
        results: By that number, such as the share of misspelt words.
        across: What the number is.
        estimand: ``"ate"``, ``"att"`` or ``"atu"`` for the two rewrite estimators.
        standardized: In standard deviations of the original rewards.
        truth: The true effect in reward units, where it is known; in standard deviations it is drawn in those of the
            first number.
        title: Above the panel.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If there is no result, the estimand is unknown, or a result holds no standardised effects.
    """
    from matplotlib.figure import Figure

    if not results or estimand not in ("ate", "att", "atu"):
        raise RecipeError(
            f"trend_figure() got {len(results)} results and estimand={estimand!r}; expected at least one result, and "
            "'ate', 'att' or 'atu'."
        )
    places = sorted(results)
    tables = [_three(_scale(f"{place:g}", results[place], standardized), estimand) for place in places]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for estimator, colour in COLOURS.items():
        line = [(place, table[estimator]) for place, table in zip(places, tables, strict=True) if estimator in table]
        if line:
            at, effects = zip(*line, strict=True)
            axis.plot(at, [e.value for e in effects], "o-", color=colour, label=LABELS[estimator], markersize=4)
            axis.fill_between(at, [e.low for e in effects], [e.high for e in effects], color=colour, alpha=0.2)
    axis.axhline(0, color="#333333", linewidth=0.8)
    if truth is not None:
        unit = (results[places[0]].reward_std or math.nan) if standardized else 1.0
        axis.axhline(truth / unit, color="#111111", linewidth=1, linestyle=":", label="true effect")
    axis.set_xlabel(across)
    axis.set_ylabel(f"effect on the reward ({'standard deviations' if standardized else 'reward units'})")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", fontsize=8, ncols=2)
    level = 100 * next(iter(tables[0].values())).level
    figure.suptitle(f"{title}\n{estimand.upper()}; bands: {level:g} % intervals".strip(), fontsize=10)
    return figure
