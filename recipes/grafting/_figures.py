"""Figures of graft results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.core.measure.statistics import Estimate, counted
from lightning_interp.figures import BLUE, COLOURS, band, bars, heat_map, in_house_style, label, legend_below, panels
from lightning_interp.grafting import GraftGrid, GraftResult

_MARKERS = "osD"


@in_house_style
def plans_figure(result: GraftResult, *, forms: Sequence[str] | None = None, title: str = "") -> Any:
    """Accuracy and target probability of every plan, one colour a prompt form, with intervals over facts."""
    shown = list(forms) if forms is not None else result.forms()
    n = len(result.values(result.plans[0], "top5", shown[0]))
    title = f"{title}\n{counted(n, 'fact')}; bars: 95 % intervals over facts"
    figure, (left, right) = panels(2, size=(8.4, max(3.8, 0.24 * len(result.plans) + 1.4)), title=title, sharey=True)
    height = 0.8 / len(shown)
    for axis, metric, across in (
        (left, "top5", f"target among the top {result.top_k} (share of facts)"),
        (right, "target_prob", "probability of the target (mean over facts)"),
    ):
        for f, form in enumerate(shown):
            places = [p + (f - (len(shown) - 1) / 2) * height for p in range(len(result.plans))]
            found = [result.estimate(plan, metric, form=form) for plan in result.plans]
            bars(axis, places, found, COLOURS[f % len(COLOURS)], form or "all", width=height, lying=True)
        axis.set_xlim(0, 1.02)
        label(axis, across)
        axis.grid(False, axis="y")
    left.set_yticks(range(len(result.plans)), result.plans)
    left.invert_yaxis()
    if len(shown) > 1 or shown[0]:
        legend_below(figure, len(shown), title="prompt form")
    return figure


@in_house_style
def curves_figure(history: Sequence[Mapping[str, float]], *, metric: str = "target_prob", title: str = "") -> Any:
    """One metric of every plan against the training epoch, from ``GraftCallback.history``."""
    figure, (axis,) = panels(1, size=(6.5, 4))
    plans = [key.rpartition("/")[0] for key in (history[0] if history else {}) if key.endswith(f"/{metric}")]
    for p, plan in enumerate(plans):
        epochs = [entry["epoch"] for entry in history]
        style = "--" if plan.endswith("^C") else "-"
        values = [entry[f"{plan}/{metric}"] for entry in history]
        axis.plot(
            epochs, values, style, marker=_MARKERS[p // len(COLOURS) % 3], color=COLOURS[p % len(COLOURS)], label=plan
        )
    label(
        axis, "epoch", "probability of the target" if metric == "target_prob" else metric.replace("_", " "), title=title
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    if plans:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@in_house_style
def grid_figure(result: GraftResult, grid: GraftGrid, *, form: str | None = None, title: str = "") -> Any:
    """A map of plans as two heat maps: mean probability and median rank of the target; layers upwards."""
    from matplotlib.colors import LogNorm

    high = max(3.2, 0.22 * len(grid.rows) + 1.6)
    n = len(result.values("PRE", "target_prob", form))
    title = f"{title}\n{grid.title}; {counted(n, 'fact')}"
    figure, axes = panels(2, size=(max(7.0, 0.8 * len(grid.columns) * 2 + 2.5), high), title=title, sharey=True)
    for axis, metric, name in (
        (axes[0], "target_prob", "probability of the target"),
        (axes[1], "target_rank", "median rank of the target"),
    ):
        table = [[result.estimate(grid.cells[r, c], metric, form=form).value for c in grid.columns] for r in grid.rows]
        ranks = metric == "target_rank"
        top = max(max(row) for row in table)
        norm = {"norm": LogNorm(1, max(top, 2))} if ranks else {"vmin": 0, "vmax": max(top, 1e-9)}
        heat_map(axis, table, grid.columns, cmap="viridis_r" if ranks else "viridis", **norm)
        axis.tick_params(axis="x", labelrotation=45)
        ends = " and ".join(f"{p} {result.estimate(p, metric, form=form).value:.3g}" for p in ("PRE", "SFT"))
        label(axis, title=f"{name}\n({ends})")
    every = max(1, len(grid.rows) // 16)
    axes[0].set_yticks(range(0, len(grid.rows), every), grid.rows[::every])
    axes[0].set_ylabel("layers")
    return figure


@in_house_style
def dose_figure(curve: Sequence[Mapping[str, Any]], *, across: str = "dose of the donor at FE and LT") -> Any:
    """Probability of the target against a dose (``{"dose": ..., "probability": ...}`` a row), with its interval."""
    known = [{name: math.nan if v is None else v for name, v in row["probability"].items()} for row in curve]
    found = [Estimate(one["value"], one["low"], one["high"], 0, 0.95, "") for one in known]
    figure, (axis,) = panels(1, size=(5, 3.4))
    band(axis, [row["dose"] for row in curve], found, BLUE)
    label(axis, across, "probability of the target")
    return figure
