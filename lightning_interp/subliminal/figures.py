"""Figures of subliminal learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_interp.figures import COLOURS, GREY, band, in_house_style, label, legend_below, panels
from lightning_interp.subliminal.alignment import AlignmentResult

__all__ = ["alignment_figure"]


@in_house_style
def alignment_figure(results: Sequence[AlignmentResult], *, title: str = "") -> Any:
    """Cosine and projection by layer, a line a shift, with the band of permuted rows of the first.

    Args:
        results: Shifts that are compared with the same direction.
        title: Above the panels.
    """
    figure, (left, right) = panels(2, size=(9.4, 4.0), title=title)
    low, high = results[0].band()
    left.fill_between(results[0].layers, low, high, color=GREY, alpha=0.3, linewidth=0, label="permuted rows")
    for found, colour in zip(results, COLOURS * len(results), strict=False):
        band(left, found.layers, found.cosine, colour, found.name, markersize=2.5)
        band(right, found.layers, found.projection, colour, found.name, markersize=2.5)
    label(left, "layer", "cosine with the trait's direction", zero=True)
    label(right, "layer", "projection (1: as far as the teacher)", zero=True)
    lowest, highest = left.get_ylim()
    left.set_ylim(max(lowest, -1.05), min(highest, 1.05))  # an interval over few seeds may be wider than cosines are
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, 4)
    return figure
