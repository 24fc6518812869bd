"""Figures of what a rewriter gave back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_interp.errors import RecipeError
from lightning_interp.rate.checks.rewriter_quality import RewriterQuality

__all__ = ["quality_figure"]

_COLOURS = {"complied": "#3b6ea5", "not complied": "#c8743c", "cannot tell": "#d9c9a3", "unusable": "#9a9a9a"}


def quality_figure(qualities: Sequence[RewriterQuality], *, title: str = "") -> Any:
    """What became of the rewrites, a bar for each pass and direction of each rewriter.

    Args:
        qualities: The counts.
        title: Above the panel.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If no rewrite was asked for.
    """
    from matplotlib.figure import Figure

    bars = [(quality.rewriter, one) for quality in qualities for one in quality.passes]
    if not bars:
        raise RecipeError(f"quality_figure() got {len(qualities)} rewriters without a rewrite. Fill the store first.")
    figure = Figure(figsize=(8.4, 1.5 + 0.34 * len(bars)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(bars)
    for name, colour in _COLOURS.items():
        widths = [one.shares()[name] for _, one in bars]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=name, height=0.72)
        for place, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.07:
                axis.text(start + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize=8, color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{name}, pass {one.number}, {one.direction} ({one.asked})" for name, one in bars]
    axis.set_yticks(range(len(bars)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the rewrites that were asked for (their number in brackets)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
