"""What was found, what a figure shows, and what the names in tables mean: for readers of a report alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.report.study_tables import shown

__all__ = ["CAPTIONS", "TERMS", "effect_findings"]

TERMS: Mapping[str, str] = {
    "reward": "the number that the scorer gives a text",
    "attribute": "what a text has (1) or has not (0), such as a vowel at its beginning",
    "naive": "mean reward of texts that have the attribute minus that of texts that have not: it blames the attribute "
    "for everything else in which they differ",
    "single rewrite": "originals against once rewritten texts: it blames the attribute for what the rewriter changes "
    "besides",
    "double rewrite (RATE)": "once against twice rewritten texts: both went through the rewriter, so its own style "
    "cancels",
    "round trip": "twice rewritten texts minus their originals: what the rewriter does to the reward; best at zero",
    "ATE": "average effect of the attribute over all texts; ATT: over those that have it, ATU: over the others",
    "in sd": "in standard deviations of the rewards of the originals",
    "[a, b]": "95 % interval over units (texts, or the groups that they come in)",
    "compliance": "share of rewrites that have the value which was asked for",
}

CAPTIONS: Mapping[str, str] = {
    "effects": "A point is an estimate, the line its 95 % interval. See whether the three estimators differ: what the "
    "double rewrite does not show but the others do is not due to the attribute.",
    "overlay": "Rewards of the originals, and of the same texts rewritten twice, back to what they were. See whether "
    "they lie on each other: where not, the rewriter itself changes the reward.",
    "sensitivity": "The effect if rewriting changed something else too, more in one direction than in the other. See "
    "how far to the side the line meets zero: that large an asymmetry would explain the effect away.",
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
        'The naive difference of texts with and without it is 1.000 [-2.042, 4.042].'
    """
    rate = result.rate.ate
    unit = "" if result.standardized is None else f" ({shown(result.standardized.rate.ate)} standard deviations)"
    said = [
        f"{of[:1].upper()}{of[1:]} changes {on} by {shown(rate)}{unit} on average over {rate.n} units, by the double "
        f"rewrite: {_sign(rate)}.",
    ]
    if result.naive is not None:
        said.append(f"The naive difference of texts with and without it is {shown(result.naive)}.")
    return said if result.single is None else [*said, f"A single rewrite gives {shown(result.single.ate)}."]


def _sign(effect: Estimate) -> str:
    if effect.low <= 0 <= effect.high:
        return "the interval holds zero"
    return "no interval" if math.isnan(effect.low) else f"the interval is {'above' if effect.low > 0 else 'below'} zero"
