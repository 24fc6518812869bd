"""What was found, what a figure shows, and what the names in tables mean: for readers of a report alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lightning_interp.core.measure.statistics import Estimate, counted
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.report.study_tables import shown

__all__ = ["CAPTIONS", "TERMS", "effect_findings"]

TERMS: Mapping[str, str] = {
    "reward": "the number that the scorer gives a text",
    "attribute": "what a text has (w=1) or has not (w=0); 1->0 is a rewrite that takes it away, 0->1 one that adds it",
    "naive": "mean reward of texts that have the attribute minus that of texts that have not: it blames the attribute "
    "for everything else in which they differ",
    "single rewrite": "originals against once rewritten texts: it blames the attribute for what the rewriter changes "
    "besides",
    "double rewrite (RATE)": "once against twice rewritten texts: both went through the rewriter, so its own style "
    "cancels",
    "round trip": "twice rewritten texts minus their originals: what the rewriter does to the reward; best at zero",
    "ATE": "average effect of the attribute over all texts; ATT: over those that have it, ATU: over the others",
    "in sd": "in standard deviations of the rewards of the originals",
    "se": "standard error over units",
    "unit": "a text, or the group of texts that it comes in",
    "[a, b]": "95 % interval over units",
    "compliance": "share of rewrites that have the value which was asked for",
}

CAPTIONS: Mapping[str, str] = {
    "effects": "A bar is an estimate, the line on it its 95 % interval; from left to right naive, single rewrite, "
    "double rewrite. See whether they differ: what the double rewrite does not show but the others do is not due to "
    "the attribute.",
    "overlay": "Rewards of the originals (whole lines), and of the same texts rewritten twice, back to what they were "
    "(dashed lines); the upright dotted lines are their means. See whether they lie on each other: where not, the "
    "rewriter itself changes the reward.",
    "sensitivity": "The effect if rewriting changed something else too, more in one direction than in the other. See "
    "how far to the side the line meets zero: that large an asymmetry D, of something worth as much as the axis says "
    "(beta), would explain the effect away.",
}


def effect_findings(result: RateResult, *, of: str, on: str) -> list[str]:
    """What the estimators say of one attribute, each number with its interval.

    Args:
        result: The effects.
        of: The attribute, in words.
        on: The reward, in words.

    Returns:
        The sentences.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 1, 0, 0], [1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0])
        >>> effect_findings(result, of="a mark", on="the count")[1]
        'The naive difference of the 2 texts with it and the 2 without is 1.000 [-2.042, 4.042].'
    """
    rate, scaled, counts = result.rate.ate, result.standardized, result.counts
    falls = rate.high < 0
    unit = "" if scaled is None else f" ({_sized(scaled.rate.ate, falls)} standard deviations)"
    said = [
        f"{of[:1].upper()}{of[1:]}: {_moved(rate, on)} {_sized(rate, falls)}{unit}, on average over "
        f"{counted(rate.n, 'unit')}, by the double rewrite.",
    ]
    if result.naive is not None:
        said.append(
            f"The naive difference of the {counted(counts.n1, 'text')} with it and the {counts.n0} without is "
            f"{shown(result.naive)}."
        )
    return said if result.single is None else [*said, f"A single rewrite gives {shown(result.single.ate)}."]


def _moved(effect: Estimate, on: str) -> str:
    """What an effect does to the reward, no more than its interval says."""
    if effect.low <= 0 <= effect.high:
        return f"no effect on {on} is shown, the interval holds zero:"
    if math.isnan(effect.low):
        return f"without an interval, {on} changes by"
    return f"{on} {'falls' if effect.high < 0 else 'rises'} by"


def _sized(effect: Estimate, falls: bool) -> str:
    return shown(replace(effect, value=-effect.value, low=-effect.high, high=-effect.low) if falls else effect)
