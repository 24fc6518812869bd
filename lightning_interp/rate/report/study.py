"""One attribute and one reward in full: the effects, and all that speaks for or against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_interp.core.measure.statistics import counted
from lightning_interp.errors import DataError
from lightning_interp.generation.labellers import Labeller, labels
from lightning_interp.rate.checks import diagnostics
from lightning_interp.rate.checks.compliance import Compliance, compliance_rates
from lightning_interp.rate.checks.off_target import MEASURES, TextChange, text_changes
from lightning_interp.rate.checks.placebo import DummyOutcome, PermutationCheck, dummy_outcome_check, permutation_check
from lightning_interp.rate.estimators.columns import combine_draws
from lightning_interp.rate.estimators.result import RateResult, plain
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.report import study_tables
from lightning_interp.rate.report.explained import CAPTIONS, effect_findings
from lightning_interp.rate.report.figures import effects_figure, overlay_figure, sensitivity_figure
from lightning_interp.rate.scoring.scores import TripleScores

__all__ = ["EffectStudy", "study_effects"]


@dataclass(frozen=True, kw_only=True)
class EffectStudy:
    """Effects of an attribute on a reward with every check that its texts and rewards allow.

    Args:
        triples, scores, result: The texts, their rewards, and the effects.
        compliance, attenuation: How often rewrites have the value that was asked for, and what failed ones would do to
            the effects; empty and None without a labeller.
        changes: What rewrites change besides, by pass and direction.
        third: The effect once more from third rewrites; None if there are none.
        permutation, dummy: How often effects as large come up by chance, and what the estimators make of rewards
            without meaning; None for an arm of one unit, or if all rewards are equal.
        line: What an asymmetry of the rewriter would do; None without a finite standardised effect.
        changes_length: The attribute is the length.
    """

    triples: RewriteTriples
    scores: TripleScores
    result: RateResult
    compliance: Sequence[Compliance]
    attenuation: diagnostics.Attenuation | None
    changes: Sequence[TextChange]
    third: diagnostics.ThirdRewrite | None
    permutation: PermutationCheck
    dummy: DummyOutcome | None
    line: diagnostics.SensitivityLine | None
    changes_length: bool = False

    def metrics(self) -> dict[str, Any]:
        """Everything as plain values, without the single units."""
        return {
            "attribute": self.triples.attr,
            "scorer": self.scores.scorer,
            "effects": self.result.to_dict(units=False),
            "left_out": self.triples.dropped,
            "identical": self.triples.identical(),
            "truncated": self.scores.truncation(),
            "compliance": [row.to_dict() for row in self.compliance],
            "attenuation": plain(self.attenuation),
            "text_changes": [row.to_dict() for row in self.changes],
            "third_rewrite": plain(self.third),
            "permutation": plain(self.permutation),
            "dummy_outcome": plain(self.dummy),
            "sensitivity": plain(self.line),
        }

    def tables(self, prefix: str = "") -> dict[str, list[dict[str, Any]]]:
        """Rows by name, all of them tables with at least one row.

        Args:
            prefix: Put in front of each name, for several studies in one run.

        Returns:
            ``effects`` (short, to be printed), ``estimates`` (every number), ``units_used``, ``text_changes``,
            ``rewrites_with_flags``, ``checks``, ``examples``, and with a labeller ``compliance``.
        """
        checks = (self.permutation, self.third, self.dummy, self.attenuation, self.line)
        found = {
            "effects": study_tables.effects_rows(self.result),
            "estimates": self.result.rows(),
            "units_used": study_tables.used_rows(self.triples, self.result),
            "text_changes": [row.to_dict() for row in self.changes],
            "rewrites_with_flags": study_tables.flag_rows(self.triples, changes_length=self.changes_length),
            "compliance": [row.to_dict() for row in self.compliance],
            "checks": study_tables.check_rows(self.scores, *checks),
            "examples": study_tables.example_rows(self.triples, self.scores),
        }
        return {f"{prefix}{name}": rows for name, rows in found.items() if rows}

    def figures(self, title: str = "", prefix: str = "") -> dict[str, Any]:
        """Matplotlib figures by name.

        Args:
            title: Above each.
            prefix: Put in front of each name.

        Returns:
            ``effects``, ``overlay`` and, where there is one, ``sensitivity``.
        """
        found = {
            "effects": effects_figure(self.result, standardized=self.line is not None, title=title),
            "overlay": overlay_figure(self.result, title=title),
        }
        if self.line is not None:
            found["sensitivity"] = sensitivity_figure(self.line, title=title)
        return {f"{prefix}{name}": figure for name, figure in found.items()}

    def captions(self, prefix: str = "") -> dict[str, str]:
        """What to see in each of the :meth:`figures`."""
        shown = ("effects", "overlay") if self.line is None else ("effects", "overlay", "sensitivity")
        return {f"{prefix}{name}": CAPTIONS[name] for name in shown}

    def findings(self, named: str = "") -> list[str]:
        """What was found, each number with its interval; ``named`` is the attribute in words."""
        return effect_findings(
            self.result, of=named or f"the attribute {self.triples.attr!r}", on=f"the reward {self.scores.scorer!r}"
        )

    def caveats(self) -> list[str]:
        """What the numbers may not be used for, and what was seen that speaks against them."""
        counts = self.result.counts
        notes = [
            f"{counted(counts.n, 'unit')}, {counts.n1} with the attribute and {counts.n0} without; scorer "
            f"{self.scores.scorer!r}.",
            "The instruction of the rewriter defines what was changed: another wording is another effect.",
            "The effect is one on texts as they look after the rewriter. It says neither whether the dependence is "
            "right nor how accurate the reward is.",
        ]
        low = [row for row in self.compliance if row.share.value < 0.95]
        if low:
            shares = ", ".join(f"{row.share} to {row.target} in {row.stage}" for row in low)
            hint = float("nan") if self.attenuation is None else self.attenuation.factor["ate"]
            notes.append(
                f"Rewrites that have the value asked for: {shares}. Failed ones pull the effect towards zero; if they "
                f"changed nothing and all else were perfect, the ATE would be {hint:.2f} times as large."
            )
        gap = None if self.third is None else self.third.difference
        if gap is not None and (gap.low > 0 or gap.high < 0):
            notes.append(f"A third rewrite gives another effect: the difference of the two is {gap}.")
        cut = {stage: share for stage, share in self.scores.truncation().items() if share}
        if cut:
            notes.append(f"Cut to the scorer's limit: {', '.join(f'{s:.1%} of {stage}' for stage, s in cut.items())}.")
        return [*notes, *self.result.warnings]


def study_effects(
    triples: RewriteTriples,
    scores: TripleScores,
    *,
    labeller: Labeller | None = None,
    measures: Mapping[str, Callable[[str], float]] = MEASURES,
    beta: float = 1.0,
    seed: int = 0,
    changes_length: bool = False,
    drop_truncated: bool = False,
    **options: Any,
) -> EffectStudy:
    """Estimate the effects, and check all that can be checked.

    Args:
        triples: Complete units, with a third rewrite if there is one.
        scores: Their rewards.
        labeller: Says which value of the attribute a text has.
        measures: What to count in texts; see :func:`~lightning_interp.rate.checks.off_target.text_changes`.
        beta: Reward of an off-target feature, in standard deviations of the original rewards, for the sensitivity line.
        seed: Of random exchanges and draws.
        changes_length: The attribute is the length, so a change of length is no flaw.
        drop_truncated: Leave out units of which a text was cut.
        **options: Of :func:`~lightning_interp.rate.estimators.effects.rate_effects`.

    Returns:
        The study.

    Raises:
        DataError: If there is no complete unit, or rewards cannot be used.

    Example:
        >>> from lightning_interp.rate import score_triples
        >>> texts = {"a": ("oh!", "oh"), "b": ("ah", "ah!"), "c": ("oh! oh!", "oh oh"), "d": ("ah ah", "ah ah!")}
        >>> triples = RewriteTriples.from_rows({"id": name, "w": name in "ac", "original": text, "rewrite": other,
        ...     "rewrite2": text} for name, (text, other) in texts.items())
        >>> scores = score_triples(lambda prompts, texts: [text.count("!") for text in texts], triples)
        >>> study_effects(triples, scores).result.rate.ate.value
        1.25
    """
    if not len(triples):
        raise DataError(
            f"Attribute {triples.attr!r} has no complete unit: {triples.dropped or 'none was given'}. Finish the "
            "rewrites."
        )
    options.setdefault("seed", seed)
    result = scores.effects(triples, drop_truncated=drop_truncated, **options)
    stages = triples.stages[:3]
    found = [] if labeller is None else [labels(labeller, triples.texts(s), triples.prompts) for s in stages[1:]]
    return EffectStudy(
        triples=triples,
        scores=scores,
        result=result,
        compliance=[] if labeller is None else compliance_rates(triples, labeller),
        attenuation=diagnostics.attenuation_hint(triples.w, *found) if found else None,
        changes=text_changes(triples.w, *map(triples.texts, stages), measures=measures),
        third=_third(triples, scores, result),
        permutation=permutation_check(result, seed=seed),
        dummy=_dummy(result, seed),
        line=_line(result, beta),
        changes_length=changes_length,
    )


def _third(triples: RewriteTriples, scores: TripleScores, result: RateResult) -> diagnostics.ThirdRewrite | None:
    if triples.rewrite3 is None:
        return None
    used, settings = set(result.ids), result.settings
    keep = [row for row, name in enumerate(triples.ids) if name in used]
    few, rewards = triples.select(keep), scores.select(keep).reward
    later = [rewards[stage].double().numpy() for stage in triples.stages[1:]]
    units = combine_draws(few.ids, few.w, *later, cluster=few.cluster)
    given = {"alpha": settings["alpha"], "missing": settings["missing"], "ids": units.ids}
    cluster = units.cluster if settings["se"] == "cluster" else None
    # r_orig are the first of the three rewards handed in: those of the first rewrites.
    return diagnostics.third_rewrite_check(units.w, units.r_orig, units.r_rw, units.r_rw2, cluster=cluster, **given)


def _dummy(result: RateResult, seed: int) -> DummyOutcome | None:
    units = result.units
    rewards = np.concatenate([units.r_rw, units.r_rw2, units.r_rw if units.r_orig is None else units.r_orig])
    enough = min(result.counts.n1, result.counts.n0) > 1 and np.ptp(rewards) > 0
    return dummy_outcome_check(result, seed=seed) if enough else None


def _line(result: RateResult, beta: float) -> diagnostics.SensitivityLine | None:
    known = result.standardized is not None and np.isfinite(result.standardized.rate.ate.value)
    return diagnostics.asymmetry_line(result, beta, standardized=True) if known else None
