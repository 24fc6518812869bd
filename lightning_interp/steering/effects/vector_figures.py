"""Figures of vector sweeps: maps over layers and strengths, and one layer's effect beside what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.steering.effects.vector_study import Cell

__all__ = ["layer_figure", "sweep_figure"]

_BLUE, _ORANGE = "#3b6ea5", "#c8743c"


def sweep_figure(found: Sequence[Cell], *, chosen: tuple[int, float] | None = None, title: str = "") -> Any:
    """Two maps, layers upwards: how far the preference moves, and what neutral text loses.

    Args:
        found: Cells of every layer and strength.
        chosen: Layer and strength that get a frame.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers = sorted({cell.layer for cell in found})
    strengths = sorted({cell.strength for cell in found})
    by_place = {(cell.layer, cell.strength): cell for cell in found}
    effects = [[by_place[layer, s].effect.value for s in strengths] for layer in layers]
    damage = [[max(by_place[layer, s].damage.value, 1e-3) for s in strengths] for layer in layers]
    largest = max(1e-9, *(abs(value) for row in effects for value in row))
    figure = Figure(figsize=(10, max(3.4, 0.34 * len(layers) + 1.9)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, table, label, look in (
        (panels[0], effects, "effect: preference for the positive ending\n(nats a token, against strength 0)",
         {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}),
        (panels[1], damage, "cost: log-probability that neutral text loses\n(nats a token; below 0.001 shown as 0.001)",
         {"cmap": "viridis", "norm": LogNorm(1e-3, max(1e-2, *(v for row in damage for v in row)))}),
    ):  # fmt: skip
        image = axis.imshow(table, origin="lower", aspect="auto", **look)
        figure.colorbar(image, ax=axis)
        axis.set_title(label, fontsize=9)
        axis.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        axis.set_xlabel("strength (1 = from the negative to the positive mean)")
        if chosen is not None:
            corner = (strengths.index(chosen[1]) - 0.5, layers.index(chosen[0]) - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.8))
    panels[0].set_yticks(range(len(layers)), [str(layer) for layer in layers])
    panels[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=10)
    return figure


def layer_figure(found: Sequence[Cell], *, title: str = "") -> Any:
    """Effect and cost of one layer against the strength, with intervals over items and texts.

    Args:
        found: Cells of one layer.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    ordered = sorted(found, key=lambda cell: cell.strength)
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    strengths = [cell.strength for cell in ordered]
    _band(left, strengths, [cell.effect for cell in ordered], _BLUE)
    left.set_ylabel("effect (nats a token)")
    _band(right, strengths, [cell.damage for cell in ordered], _ORANGE)
    right.set_ylabel("neutral text loses (nats a token)")
    for axis in (left, right):
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.set_xlabel("strength")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    n = ordered[0].effect.n if ordered else 0
    figure.suptitle(f"{title}\n{n} held-out items; bands: 95 % intervals".strip(), fontsize=10)
    return figure


def _band(axis: Any, x: Sequence[float], estimates: Sequence[Estimate], colour: str) -> None:
    values = [e.value for e in estimates]
    axis.plot(x, values, marker="o", ms=4, color=colour)
    low = [v if math.isnan(e.low) else e.low for v, e in zip(values, estimates, strict=True)]
    high = [v if math.isnan(e.high) else e.high for v, e in zip(values, estimates, strict=True)]
    axis.fill_between(x, low, high, alpha=0.2, color=colour)
