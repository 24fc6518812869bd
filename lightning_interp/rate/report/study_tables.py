"""Tables of rewrite-based effects, as rows of plain values."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.rate.checks.diagnostics import Attenuation, SensitivityLine, ThirdRewrite
from lightning_interp.rate.checks.placebo import DummyOutcome, PermutationCheck
from lightning_interp.rate.estimators.result import Effect, RateResult
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.assembly import FLAGS, rewrite_flags
from lightning_interp.rate.scoring.scores import TripleScores

__all__ = ["check_rows", "effects_rows", "example_rows", "flag_rows", "used_rows"]

_LABELS = {"naive": "naive", "single": "single rewrite", "rate": "double rewrite (RATE)"}

Row = dict[str, Any]


def effects_rows(results: RateResult | Mapping[str, RateResult], *, key: str = "case") -> list[Row]:
    """Every estimate with its interval as text, to be printed.

    Args:
        results: One result, or several by name.
        key: What the names are, the first column of several results.

    Returns:
        Rows with ``estimator``, ``estimand``, ``in sd`` (of the original rewards), ``raw``, ``se`` and ``units``.

    Example:
        >>> from lightning_interp.rate import rate_effects
        >>> result = rate_effects([1, 1, 0, 0], [1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0])
        >>> [row["estimator"] for row in effects_rows(result)][:2], effects_rows({"one": result})[0]["case"]
        (['naive', 'single rewrite'], 'one')
    """
    named: Mapping[str, RateResult] = {"": results} if isinstance(results, RateResult) else results
    return [
        ({} if isinstance(results, RateResult) else {key: name})
        | _effect_row(_LABELS.get(estimator, estimator), "ATE" if estimand == "NAIVE" else estimand, raw, scaled)
        for name, result in named.items()
        for estimator, estimand, raw, scaled in result.lines()
    ]


def _effect_row(estimator: str, estimand: str, raw: Effect, scaled: Effect | None) -> Row:
    return {
        "estimator": estimator,
        "estimand": estimand,
        "in sd": "" if scaled is None or math.isnan(scaled.value) else shown(scaled),
        "raw": shown(raw),
        "se": "" if math.isnan(raw.se) else f"{raw.se:.3g}",
        "units": raw.n,
    }


def shown(effect: Estimate) -> str:
    """An effect with its interval."""
    return effect.text(3)


def used_rows(triples: RewriteTriples, result: RateResult) -> list[Row]:
    """How many units were used, and how many were left out and why, by arm."""
    counts = result.counts
    left = list(triples.dropped.items())
    left += [(why, {arm: tally.get(why, 0) for arm, tally in counts.dropped_by_arm.items()}) for why in counts.dropped]
    rows: list[tuple[object, ...]] = [("used", counts.n1, counts.n0, 0)]
    rows += [(f"left out: {why}", *(arms.get(arm, 0) for arm in ("w1", "w0", "none"))) for why, arms in left]
    return [dict(zip(("units", "w=1", "w=0", "no label"), row, strict=True)) for row in rows]


def flag_rows(triples: RewriteTriples, *, changes_length: bool = False) -> list[Row]:
    """How many rewrites of each pass and direction look wrong, by what looks wrong."""
    rows = []
    for before, stage in pairwise(triples.stages):
        asked = list(zip(triples.targets(stage), triples.texts(before), triples.texts(stage), strict=True))
        for target in (0, 1):
            if pairs := [pair for wanted, *pair in asked if wanted == target]:
                flags = Counter(flag for pair in pairs for flag in rewrite_flags(*pair, changes_length=changes_length))
                shown = {flag: flags[flag] for flag in FLAGS if flag != "empty"}
                rows.append({"stage": stage, "direction": f"{1 - target}->{target}", "rewrites": len(pairs), **shown})
    return rows


def check_rows(
    scores: TripleScores,
    permutation: PermutationCheck,
    third: ThirdRewrite | None = None,
    dummy: DummyOutcome | None = None,
    attenuation: Attenuation | None = None,
    line: SensitivityLine | None = None,
) -> list[Row]:
    """The checks of a study, one number a row."""
    exchanged = f"{permutation.resamples} exchanges of {permutation.exchanged}"
    rows = [
        _row("p-value of exchanged rewrites", name.upper(), getattr(permutation, name), method=exchanged)
        for name in ("ate", "att", "atu")
    ]
    if third is not None:
        names = {"ate": "rewrites 1 and 2", "ate_third": "rewrites 2 and 3", "difference": "difference"}
        rows += [_estimate_row("third rewrite", shown, getattr(third, name)) for name, shown in names.items()]
    if dummy is not None:
        what = f"rewards at random: {dummy.level:.0%} intervals that hold zero"
        rows += [_estimate_row(what, name, share) for name, share in dummy.covered.items()]
        rows += [_estimate_row("rewards at random: mean, in sd", name, mean) for name, mean in dummy.mean.items()]
    if attenuation is not None:
        what = "hint: factor if failed rewrites changed nothing"
        rows += [_row(what, name.upper(), factor) for name, factor in attenuation.factor.items()]
    if line is not None:
        of = f"an off-target feature worth {line.beta:g} sd"
        ends = {"low": line.zero_low, "high": line.zero_high}
        rows.append(_row("asymmetry that makes the effect zero", of, line.zero, **ends))
    return rows + [_row("share cut by the scorer", stage, cut) for stage, cut in scores.truncation().items()]


def _estimate_row(check: str, of: str, found: Estimate) -> Row:
    return _row(check, of, found.value, low=found.low, high=found.high, n=found.n, method=found.method)


def _row(check: str, of: str, value: float, **more: Any) -> Row:
    row = {"check": check, "of": of, "value": value, "low": None, "high": None, "n": None, "method": ""} | more
    return {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in row.items()}


def example_rows(triples: RewriteTriples, scores: TripleScores, *, each: int = 10, seed: int = 0) -> list[Row]:
    """Units to be read: some at random, and those whose contrast is farthest from the mean."""
    draws = random.Random(derived_seed(seed, "examples of rewrites", 0))  # noqa: S311 - examples, no secrets
    drawn = sorted(draws.sample(range(len(triples)), min(each, len(triples))))
    first, second = (scores.reward[stage].tolist() for stage in ("rewrite", "rewrite2"))
    delta = [(b - a) * (1 if w else -1) for w, a, b in zip(triples.w, first, second, strict=True)]
    known = [index for index in range(len(triples)) if math.isfinite(delta[index])]
    middle = sum(delta[index] for index in known) / len(known) if known else 0.0
    far = sorted(known, key=lambda index: -abs(delta[index] - middle))[:each]
    found = []
    for chosen, index in [*(("at random", index) for index in drawn), *(("largest contrast", index) for index in far)]:
        row: Row = {"chosen": chosen, "id": triples.ids[index], "w": triples.w[index]}
        for stage in triples.stages:
            row |= {stage: triples.texts(stage)[index], f"reward of {stage}": float(scores.reward[stage][index])}
        found.append(row)
    return found
