"""Figures of effects whose truth is known: while a reward model trains, and at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import RecipeError
from lightning_interp.figures import INK, band, in_house_style, label, legend_below, panels
from lightning_interp.rate.estimators.result import Effect, RateResult
from lightning_interp.rate.report.figures import COLOURS, LABELS, MARKERS, effects_figure

_ERRORS = {"naive": "naive_se", "single": "single_se", "ate": "ate_se"}
_NAMES = {"naive": "naive", "single": "single", "ate": "rate"}
_TRUTH = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1.2, "label": "truth (exact edit of the originals)"}
_Z = 1.959963984540054

History = Sequence[Mapping[str, float]]


@in_house_style
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
    if not any(histories.values()):
        raise RecipeError(f"training_figure() got {len(histories)} histories without an entry. Train with validation.")
    figure, axes = panels(len(histories), size=(4.8 * len(histories), 3.9), title=title)
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        for key, estimator in _NAMES.items():
            _band(axis, history, key, estimator)
        if truths.get(name):
            axis.plot(*_scaled(truths[name], "ate"), **_TRUTH)
        label(axis, "training step", title=name, zero=True)
    axes[0].set_ylabel("ATE (standard deviations of the reward)")
    legend_below(figure, 2)
    return figure


def _band(axis: Any, history: History, key: str, estimator: str) -> None:
    steps, values = _scaled(history, key)
    reach = [_Z * se for se in _scaled(history, _ERRORS[key])[1]]
    found = [Estimate(v, v - r, v + r, 0, 0.95, "normal") for v, r in zip(values, reach, strict=True)]
    band(axis, steps, found, COLOURS[estimator], LABELS[estimator], marker=MARKERS[estimator])


def _scaled(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values in standard deviations; NaN where rewards do not differ yet, or a value was not kept."""
    units = [entry.get("reward_std") or math.nan for entry in history]
    values = [float(entry.get(key, math.nan)) / unit for entry, unit in zip(history, units, strict=True)]
    return [float(entry["step"]) for entry in history], values


@in_house_style
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
    legend_below(figure, 2)
    return figure
