"""Figures of rewrite-based effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_interp.core.measure.clustered import Vector
from lightning_interp.errors import RecipeError
from lightning_interp.figures import BLUE, GREY, INK, ORANGE, band, bars, in_house_style, label, legend_below, panels
from lightning_interp.rate.checks.diagnostics import SensitivityLine
from lightning_interp.rate.estimators.result import Effect, RateResult

__all__ = ["effects_figure", "overlay_figure", "sensitivity_figure", "trend_figure"]

COLOURS = {"naive": GREY, "single": ORANGE, "rate": BLUE}
MARKERS = {"naive": "s", "single": "^", "rate": "o"}
_UNITS = {True: "effect on the reward (standard deviations)", False: "effect on the reward (reward units)"}
LABELS = {"naive": "naive (originals of the two arms)", "single": "single rewrite", "rate": "double rewrite (RATE)"}


@in_house_style
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
    named = {"": results} if isinstance(results, RateResult) else dict(results)
    effects, heading = _effects("effects_figure", named, estimand, standardized)
    sizes = sorted({result.counts.n for result in named.values()})
    count = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    title = f"{title}\n{estimand.upper()}, {count} units; lines: {heading}"
    figure, (axis,) = panels(1, size=(max(4.2, 1.6 + 1.5 * len(named)), 4.2), title=title)
    for place, (estimator, colour) in enumerate(COLOURS.items()):
        if drawn := {g + 0.27 * (place - 1): one[estimator] for g, one in enumerate(effects) if estimator in one}:
            bars(axis, list(drawn), list(drawn.values()), colour, LABELS[estimator], width=0.25)
    label(axis, up=_UNITS[standardized], zero=True)
    axis.set_xticks(range(len(named)) if any(named) else [], list(named) if any(named) else [])
    axis.grid(False, axis="x")
    legend_below(figure, 1)
    return figure


def _effects(
    caller: str, named: Mapping[Any, RateResult], estimand: str, standardized: bool
) -> tuple[list[dict[str, Effect]], str]:
    """For each result its effects by estimator; and what their intervals are."""
    if not named or estimand not in ("ate", "att", "atu"):
        raise RecipeError(
            f"{caller}() got {len(named)} results and estimand={estimand!r}; expected at least one result, and 'ate', "
            "'att' or 'atu'."
        )
    found = []
    for name, result in named.items():
        table = result.standardized if standardized else result.raw
        if table is None:
            raise RecipeError(
                f"Result {name!r} holds no standardised effects. Make it with standardize=True and original rewards, "
                "or draw it with standardized=False."
            )
        found.append({estimator: effect for estimator, which, effect in table.items() if which in (estimand, "naive")})
    return found, f"{100 * found[0]['rate'].level:g} % intervals"


@in_house_style
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
    units = result.units
    if units.r_orig is None:
        raise RecipeError("overlay_figure() compares with the original rewards, but r_orig was None. Pass r_orig too.")
    figure, axes = panels(2, size=(9, 3.8), title=title, sharex=True, sharey=True)
    edges = np.histogram_bin_edges(np.concatenate([units.r_orig, units.r_rw2]), bins=bins)
    arms = ((units.w, 1, result.rewrite_effect_w1), (~units.w, 0, result.rewrite_effect_w0))
    for axis, (arm, value, shift) in zip(axes, arms, strict=True):
        _histogram(axis, units.r_orig[arm], edges, "original", BLUE, "-")
        _histogram(axis, units.r_rw2[arm], edges, "rewritten twice", ORANGE, "--")
        moved = ""
        if shift is not None and not math.isnan(shift.value):
            ends = "" if math.isnan(shift.low) else f" [{shift.low:.2g}, {shift.high:.2g}]"
            moved = f"; mean shift {shift.value:.2g}{ends}"
        label(axis, "reward", title=f"w = {value}, {int(arm.sum()):,} units{moved}")
    axes[0].set_ylabel("density")
    legend_below(figure, 2)
    return figure


def _histogram(axis: Any, rewards: Vector, edges: Vector, name: str, colour: str, style: str) -> None:
    if rewards.size == 0:
        axis.plot([], [], color=colour, linestyle=style, label=name)
        return
    axis.hist(rewards, bins=edges, density=True, histtype="stepfilled", alpha=0.25, color=colour)
    axis.hist(rewards, bins=edges, density=True, histtype="step", color=colour, linestyle=style, label=name)
    axis.axvline(float(rewards.mean()), color=colour, linestyle=":")


@in_house_style
def sensitivity_figure(line: SensitivityLine, *, title: str = "") -> Any:
    """The effect against an asymmetry of the rewriter that was not measured, with its zero.

    Args:
        line: From :func:`~lightning_interp.rate.checks.diagnostics.asymmetry_line`.
        title: Above the panel.

    Returns:
        A matplotlib figure.
    """
    beyond = "" if line.possible else f"zero at D = {line.zero:.2g}, beyond any possible asymmetry"
    figure, (axis,) = panels(1, size=(5.4, 3.8))
    band(axis, line.asymmetry, line.effect, COLOURS["rate"], marker="")
    across = f"asymmetry D of an off-target feature worth {line.beta:.3g}"
    label(
        axis,
        across,
        "effect that is left (ATE - beta D)",
        title="\n".join(part for part in (title, beyond) if part),
        zero=True,
    )
    if min(line.asymmetry, default=0) <= line.zero <= max(line.asymmetry, default=0):
        axis.plot([line.zero], [0], "o", color=COLOURS["single"], label=f"zero at D = {line.zero:z.2g}")
        axis.legend()
    return figure


@in_house_style
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
        truth: The true effect in reward units, where it is known; standardised it is drawn by the first number's unit.
        title: Above the panel.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If there is no result, the estimand is unknown, or a result holds no standardised effects.
    """
    places = sorted(results)
    tables, heading = _effects(
        "trend_figure", {f"{place:g}": results[place] for place in places}, estimand, standardized
    )
    figure, (axis,) = panels(1, size=(6.4, 4.4), title=f"{title}\n{estimand.upper()}; bands: {heading}")
    for estimator, colour in COLOURS.items():
        line = {place: table[estimator] for place, table in zip(places, tables, strict=True) if estimator in table}
        if line:
            band(axis, list(line), list(line.values()), colour, LABELS[estimator], marker=MARKERS[estimator])
    label(axis, across, _UNITS[standardized], zero=True)
    if truth is not None:
        unit = (results[places[0]].reward_std or math.nan) if standardized else 1.0
        axis.axhline(truth / unit, color=INK, linestyle=":", zorder=5, label="true effect")
    legend_below(figure, 2)
    return figure
