"""Rewrite-based attribute treatment effects: how much a reward changes because of one attribute of a text.

A text is rewritten twice, to flip the attribute and to flip it back, and the two rewrites are compared: what the
rewriter does in either direction cancels. ``estimators`` turns three rewards a unit into effects with intervals
(``standard_errors``, ``bootstrap`` and ``result`` are its parts), ``diagnostics``, ``placebo`` and ``off_target`` ask
whether the assumptions hold, ``metric`` gathers rewards over batches and processes, and ``figures`` draws what was
found. ``scoring`` asks for rewards, ``reward`` does so in bulk (``rewards`` is its file), and ``callback`` watches the
effect while a reward model trains.

The name is that of Reber et al., "RATE: Causal Explainability of Reward Models with Imperfect Counterfactuals",
arXiv 2410.11348; it has nothing to do with the rank-weighted average treatment effect.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.rate.batch_files import export_batch, import_batch
    from lightning_interp.rate.callback import RewardAttributeEffect
    from lightning_interp.rate.compliance import (
        Contains,
        Lexicon,
        LongerThan,
        ScoreAbove,
        StartsWithVowel,
        compliance_rates,
        label_units,
        vader_labeller,
    )
    from lightning_interp.rate.diagnostics import asymmetry_line, attenuation_hint, third_rewrite_check
    from lightning_interp.rate.draws import combine_draws
    from lightning_interp.rate.driver import RewriteReport, RewriteRun
    from lightning_interp.rate.endpoint import OpenAICompatibleRewriter
    from lightning_interp.rate.estimators import rate_effects
    from lightning_interp.rate.export import export_records, export_units, to_dataset
    from lightning_interp.rate.figures import effects_figure, overlay_figure, sensitivity_figure, trend_figure
    from lightning_interp.rate.local_model import LocalRewriter
    from lightning_interp.rate.metric import RewriteTreatmentEffect
    from lightning_interp.rate.off_target import text_changes
    from lightning_interp.rate.own_files import read_own
    from lightning_interp.rate.package_texts import Review, Tweet, read_reviews, read_tweets
    from lightning_interp.rate.placebo import dummy_outcome_check, permutation_check
    from lightning_interp.rate.plan import Prices, RewritePlan
    from lightning_interp.rate.readers import read_batch, read_effects, read_rewrites
    from lightning_interp.rate.records import RewriteResult, Unit
    from lightning_interp.rate.result import Effect, RateResult
    from lightning_interp.rate.reward import RewardScorer
    from lightning_interp.rate.rewards import RewardTable, read_rewards
    from lightning_interp.rate.rewriters import CallableRewriter, ReplayRewriter, Rewriter
    from lightning_interp.rate.rules import (
        Drop,
        MarkToggle,
        OpenerToggle,
        RepairTranspositions,
        RuleRewriter,
        swap_letters,
    )
    from lightning_interp.rate.scoring import CallableScorer, TripleScores, as_scorer, score_triples, vader_scorer
    from lightning_interp.rate.store import RewriteStore
    from lightning_interp.rate.study import EffectStudy, study_effects
    from lightning_interp.rate.study_files import read_triples, write_effects, write_triples
    from lightning_interp.rate.study_tables import effects_rows
    from lightning_interp.rate.templates import RewriteTemplate, rewrite_template
    from lightning_interp.rate.triples import RewriteTriples
    from lightning_interp.rate.words import Fluency, fluency_scorer, word_counts

# One line a module: its public names. ``__all__`` and the lazy look-up follow from it.
_MODULES = {
    "batch_files": ("export_batch", "import_batch"),
    "callback": ("RewardAttributeEffect",),
    "compliance": (
        "Contains",
        "Lexicon",
        "LongerThan",
        "ScoreAbove",
        "StartsWithVowel",
        "compliance_rates",
        "label_units",
        "vader_labeller",
    ),
    "diagnostics": ("asymmetry_line", "attenuation_hint", "third_rewrite_check"),
    "draws": ("combine_draws",),
    "driver": ("RewriteReport", "RewriteRun"),
    "endpoint": ("OpenAICompatibleRewriter",),
    "estimators": ("rate_effects",),
    "export": ("export_records", "export_units", "to_dataset"),
    "figures": ("effects_figure", "overlay_figure", "sensitivity_figure", "trend_figure"),
    "local_model": ("LocalRewriter",),
    "metric": ("RewriteTreatmentEffect",),
    "off_target": ("text_changes",),
    "own_files": ("read_own",),
    "package_texts": ("Review", "Tweet", "read_reviews", "read_tweets"),
    "placebo": ("dummy_outcome_check", "permutation_check"),
    "plan": ("Prices", "RewritePlan"),
    "readers": ("read_batch", "read_effects", "read_rewrites"),
    "records": ("RewriteResult", "Unit"),
    "result": ("Effect", "RateResult"),
    "reward": ("RewardScorer",),
    "rewards": ("RewardTable", "read_rewards"),
    "rewriters": ("CallableRewriter", "ReplayRewriter", "Rewriter"),
    "rules": ("Drop", "MarkToggle", "OpenerToggle", "RepairTranspositions", "RuleRewriter", "swap_letters"),
    "scoring": ("CallableScorer", "TripleScores", "as_scorer", "score_triples", "vader_scorer"),
    "store": ("RewriteStore",),
    "study": ("EffectStudy", "study_effects"),
    "study_files": ("read_triples", "write_effects", "write_triples"),
    "study_tables": ("effects_rows",),
    "templates": ("RewriteTemplate", "rewrite_template"),
    "triples": ("RewriteTriples",),
    "words": ("Fluency", "fluency_scorer", "word_counts"),
}

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CallableRewriter",
    "CallableScorer",
    "Contains",
    "Drop",
    "Effect",
    "EffectStudy",
    "Fluency",
    "Lexicon",
    "LocalRewriter",
    "LongerThan",
    "MarkToggle",
    "OpenAICompatibleRewriter",
    "OpenerToggle",
    "Prices",
    "RateResult",
    "RepairTranspositions",
    "ReplayRewriter",
    "Review",
    "RewardAttributeEffect",
    "RewardScorer",
    "RewardTable",
    "RewritePlan",
    "RewriteReport",
    "RewriteResult",
    "RewriteRun",
    "RewriteStore",
    "RewriteTemplate",
    "RewriteTreatmentEffect",
    "RewriteTriples",
    "Rewriter",
    "RuleRewriter",
    "ScoreAbove",
    "StartsWithVowel",
    "TripleScores",
    "Tweet",
    "Unit",
    "as_scorer",
    "asymmetry_line",
    "attenuation_hint",
    "combine_draws",
    "compliance_rates",
    "dummy_outcome_check",
    "effects_figure",
    "effects_rows",
    "export_batch",
    "export_records",
    "export_units",
    "fluency_scorer",
    "import_batch",
    "label_units",
    "overlay_figure",
    "permutation_check",
    "rate_effects",
    "read_batch",
    "read_effects",
    "read_own",
    "read_reviews",
    "read_rewards",
    "read_rewrites",
    "read_triples",
    "read_tweets",
    "rewrite_template",
    "score_triples",
    "sensitivity_figure",
    "study_effects",
    "swap_letters",
    "text_changes",
    "third_rewrite_check",
    "to_dataset",
    "trend_figure",
    "vader_labeller",
    "vader_scorer",
    "word_counts",
    "write_effects",
    "write_triples",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
