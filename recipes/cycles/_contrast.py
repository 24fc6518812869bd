"""A continual arm beside its reinit twin: one figure of score, coherence and repetition, and one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_interp.cycles import Arm
from lightning_interp.figures import BLUE, GREY, ORANGE, band, in_house_style, label, legend_below, panels

from ._report import mean_known

CAPTION = (
    "The continual chain (blue) and its twin that starts each cycle at the base (orange): score, coherence, and the "
    "share of different pairs of words, by cycle, with 95 % intervals of the first two; dashed the base. See whether "
    "blue leaves orange, and whether its coherence and its different words fall while it does."
)


@in_house_style
def contrast_figure(arms: Sequence[Arm], *, title: str) -> Any:
    """Score, coherence and distinct-2 against cycle, a colour an arm."""
    figure, axes = panels(3, size=(10.5, 3.9), title=title)
    for arm, colour, marker in zip(arms, (BLUE, ORANGE), "os", strict=True):
        cycles = range(arm.cycles)
        for axis, kind in zip(axes, ("scores", "coherence"), strict=False):
            if values := arm.by_cycle(kind):
                band(axis, cycles, values, colour, arm.name, marker=marker, markersize=3)
        axes[2].plot(cycles, distinct(arm), color=colour, marker=marker, markersize=3, label=arm.name)
    base = arms[0].chains[0].base
    if base is not None:
        means = (base.score, None if base.coherence is None else float(np.nanmean(base.coherence)), base.distinct_2)
        for axis, value in zip(axes, means, strict=True):
            if value is not None:
                axis.axhline(value, color=GREY, linestyle="--", linewidth=0.9, label="base")
    for axis, name, top in zip(axes, ("score", "coherence", "distinct-2"), (103, 103, 1.03), strict=True):
        label(axis, "cycle", name)
        axis.set_ylim(-0.03 * top, top)
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, 3)
    return figure


def distinct(arm: Arm) -> list[float]:
    """Different pairs of words by cycle, of all chains."""
    each = [[chain.checkpoints[k].distinct_2 for chain in arm.chains] for k in range(arm.cycles)]
    return [np.nan if (mean := mean_known(values)) is None else mean for values in each]


def sentence(one: Arm, twin: Arm, *, trait: str) -> str:
    """Where both arms end, and how much they repeat themselves there."""
    last = min(one.cycles, twin.cycles) - 1
    first, told = one.by_cycle("scores")[0], []
    for arm in (one, twin):
        words = distinct(arm)
        told.append(f"{arm.by_cycle('scores')[last]} (distinct-2 {words[0]:.2f} at cycle 0, {words[last]:.2f} there)")
    return (
        f"From the same first model, whose score of {trait} is {first}, {one.name} ends at {told[0]} after cycle "
        f"{last} and {twin.name} at {told[1]} (intervals over {one.unit}; {one.rests_on})."
    )
