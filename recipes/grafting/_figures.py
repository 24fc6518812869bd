"""Figures of graft results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.grafting import GraftGrid, GraftResult

_COLOURS = ("#3b6ea5", "#c8743c", "#5b9a68", "#8d6bab")


def plans_figure(result: GraftResult, *, forms: Sequence[str] | None = None, title: str = "") -> Any:
    """Accuracy and target probability of every plan, with intervals over facts.

    Args:
        result: Scores.
        forms: Prompt forms, one colour each; default all.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    shown = list(forms) if forms is not None else result.forms()
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in (
        (left, "top5", f"target among the top {result.top_k} (share of facts)"),
        (right, "target_prob", "probability of the target (mean over facts)"),
    ):
        for f, form in enumerate(shown):
            _bars(axis, result, metric, form, f, len(shown))
        axis.set_xlim(0, 1.02)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(result.plans)), result.plans)
    left.invert_yaxis()
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, title="prompt form", frameon=False, loc="outside lower center", ncols=len(shown))
    n = len(result.values(result.plans[0], "top5", shown[0]))
    figure.suptitle(
        f"{title}\n{n} {'fact' if n == 1 else 'facts'}; bars: 95 % intervals over facts".strip(), fontsize=10
    )
    return figure


def _bars(axis: Any, result: GraftResult, metric: str, form: str, index: int, count: int) -> None:
    estimates = [result.estimate(plan, metric, form=form) for plan in result.plans]
    height = 0.8 / count
    places = [p + (index - (count - 1) / 2) * height for p in range(len(estimates))]
    values = [e.value for e in estimates]
    low = [0.0 if math.isnan(e.low) else max(0.0, e.value - e.low) for e in estimates]
    high = [0.0 if math.isnan(e.high) else max(0.0, e.high - e.value) for e in estimates]
    colour = _COLOURS[index % len(_COLOURS)]
    axis.barh(places, values, height=height, color=colour, alpha=0.85, label=form or "all")
    axis.errorbar(values, places, xerr=[low, high], fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2)


def curves_figure(history: Sequence[Mapping[str, float]], *, metric: str = "target_prob", title: str = "") -> Any:
    """One metric of every plan against the training epoch.

    Args:
        history: ``GraftCallback.history``.
        metric: What to draw.
        title: Above the panel.

    Returns:
        A matplotlib figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    plans = [key.rpartition("/")[0] for key in (history[0] if history else {}) if key.endswith(f"/{metric}")]
    for p, plan in enumerate(plans):
        epochs = [entry["epoch"] for entry in history]
        style = "--" if plan.endswith("^C") else "-"
        colour = colormaps["tab10"](p % 10)
        axis.plot(
            epochs, [entry[f"{plan}/{metric}"] for entry in history], style, marker="o", ms=3, color=colour, label=plan
        )
    axis.set_xlabel("epoch")
    axis.set_ylabel(metric.replace("_", " "))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if plans:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title, fontsize=10)
    return figure


def grid_figure(result: GraftResult, grid: GraftGrid, *, form: str | None = None, title: str = "") -> Any:
    """A map of plans as two heat maps: mean probability of the target, and its median rank.

    Args:
        result: Scores of the grid's plans (and of ``PRE`` and ``SFT``, which the titles give for comparison).
        grid: Which plan belongs in which cell.
        form: Only prompts of this form.
        title: Above the panels.

    Returns:
        A matplotlib figure; layers upwards, as the model computes.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    high = max(3.2, 0.22 * len(grid.rows) + 1.6)
    figure = Figure(figsize=(max(7.0, 1.1 * len(grid.columns) * 2 + 2.5), high), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in (
        (panels[0], "target_prob", "probability of the target"),
        (panels[1], "target_rank", "median rank of the target"),
    ):
        table = [[result.estimate(grid.cells[r, c], metric, form=form).value for c in grid.columns] for r in grid.rows]
        ranks = metric == "target_rank"
        top = max(max(row) for row in table)
        norm = {"norm": LogNorm(1, max(top, 2))} if ranks else {"vmin": 0, "vmax": max(top, 1e-9)}
        image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis_r" if ranks else "viridis", **norm)
        figure.colorbar(image, ax=axis)
        ends = " and ".join(f"{p} {result.estimate(p, metric, form=form).value:.3g}" for p in ("PRE", "SFT"))
        axis.set_title(f"{label}\n({ends})", fontsize=9)
        axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=45, ha="right", fontsize=8)
    every = max(1, len(grid.rows) // 16)
    panels[0].set_yticks(range(0, len(grid.rows), every), grid.rows[::every], fontsize=8)
    panels[0].set_ylabel("layers")
    n = len(result.values("PRE", "target_prob", form))
    figure.suptitle(f"{title}\n{grid.title}; {n} {'fact' if n == 1 else 'facts'}".strip(), fontsize=10)
    return figure


def dose_figure(curve: Sequence[Mapping[str, Any]], *, label: str = "dose of the donor at FE and LT") -> Any:
    """Probability of the target against a dose, with its interval.

    Args:
        curve: Rows ``{"dose": ..., "probability": {"value", "low", "high"}}``.
        label: What is on the horizontal axis.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    doses = [row["dose"] for row in curve]
    values = [row["probability"] for row in curve]
    axis.plot(doses, [v["value"] for v in values], marker="o", color=_COLOURS[0])
    if all(v["low"] is not None and not math.isnan(v["low"]) for v in values):
        axis.fill_between(doses, [v["low"] for v in values], [v["high"] for v in values], alpha=0.2, color=_COLOURS[0])
    axis.set_xlabel(label)
    axis.set_ylabel("probability of the target")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
