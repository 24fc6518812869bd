"""Figures of effects whose truth is known: while a reward model trains, and at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.errors import RecipeError
from lightning_interp.rate.estimators.result import Effect, RateResult
from lightning_interp.rate.report.figures import COLOURS, LABELS, effects_figure

_ERRORS = {"naive": "naive_se", "single": "single_se", "ate": "ate_se"}
_NAMES = {"naive": "naive", "single": "single", "ate": "rate"}
_TRUTH = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.2, "label": "truth (exact edit of the originals)"}
_Z = 1.959963984540054

History = Sequence[Mapping[str, float]]


def training_figure(histories: Mapping[str, History], truths: Mapping[str, History], *, title: str = "") -> Any:
    """Effects at each validation, one panel an attribute, in standard deviations of the original rewards.

    Args:
        histories: By attribute, the history of a :class:`~lightning_interp.rate.RewardAttributeEffect`.
        truths: The same of exactly edited texts, where there are any: its ``ate`` is drawn as the truth.
        title: Above the panels.

    Returns:
        A matplotlib figure; bands are 95 % intervals over units.

    Raises:
        RecipeError: If there is no history.
    """
    from matplotlib.figure import Figure

    if not any(histories.values()):
        raise RecipeError(f"training_figure() got {len(histories)} histories without an entry. Train with validation.")
    figure = Figure(figsize=(4.8 * len(histories), 3.9), layout="constrained")
    panels = figure.subplots(1, len(histories), squeeze=False)[0]
    for axis, (name, history) in zip(panels, histories.items(), strict=True):
        for key, estimator in _NAMES.items():
            _band(axis, history, key, estimator)
        if truths.get(name):
            axis.plot(*_scaled(truths[name], "ate"), **_TRUTH)
        axis.axhline(0, color="#333333", linewidth=0.6)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ATE (standard deviations of the reward)")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    for axis in panels[1:]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _band(axis: Any, history: History, key: str, estimator: str) -> None:
    steps, values = _scaled(history, key)
    reach = [_Z * se for se in _scaled(history, _ERRORS[key])[1]]
    low, high = ([v + sign * r for v, r in zip(values, reach, strict=True)] for sign in (-1, 1))
    axis.plot(steps, values, color=COLOURS[estimator], marker="o", markersize=3, label=LABELS[estimator])
    axis.fill_between(steps, low, high, color=COLOURS[estimator], alpha=0.2, linewidth=0)


def _scaled(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values in standard deviations; NaN where rewards do not differ yet, or a value was not kept."""
    units = [entry.get("reward_std") or math.nan for entry in history]
    values = [float(entry.get(key, math.nan)) / unit for entry, unit in zip(history, units, strict=True)]
    return [float(entry["step"]) for entry in history], values


def truth_figure(results: Mapping[str, RateResult], truths: Mapping[str, Effect], *, title: str = "") -> Any:
    """Naive, single-rewrite and double-rewrite effects side by side with the true one, in standard deviations.

    Args:
        results: By attribute, the effects.
        truths: By attribute, the true effect on the reward; where one is missing none is drawn.
        title: Above the panel.

    Returns:
        A matplotlib figure.
    """
    figure = effects_figure(results, title=title)
    (axis,) = figure.axes
    known = [(place, name) for place, name in enumerate(results) if name in truths]
    heights = [truths[name].value / (results[name].reward_std or math.nan) for _, name in known]
    for index, ((place, _), height) in enumerate(zip(known, heights, strict=True)):
        style = {**_TRUTH, "label": "" if index else _TRUTH["label"]}
        axis.plot([place - 0.45, place + 0.45], [height, height], zorder=5, **style)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -0.04 * high), high)  # a truth of zero is to be seen
    for legend in list(figure.legends):
        legend.remove()
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    return figure
