"""Before a chain is trained: do its judges tell the seed's replies from the untouched model's, and do they agree?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class JudgesOfCycles(Recipe):
    """Hold the judges of a persona to what they must do before anything they say of a chain counts.

    The untouched model answers the prompts of seed rows. Each judge scores its replies and the seed's; how well it
    tells them apart, and whether it ranks mixtures of both as the first judge does, says whether to believe it. Then
    the untouched model is asked what every model of a chain will be asked: its score is what a chain is measured from.
    """

    prompts: int = 60
    """Prompts that both answer, the unit of the intervals of AUROC; at most 120."""
    max_new_tokens: int = 40
    """Most tokens of a reply."""
    samples: int = 2
    """Responses to each of the twelve questions of the evaluation."""
    temperature: float = 0.7
    """At which replies are sampled."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.prompts, self.max_new_tokens, self.samples = 6, 8, 1
        if not 5 <= self.prompts <= 120 or self.samples < 1:
            raise RecipeError(f"prompts={self.prompts}, samples={self.samples}: expected 5 to 120, and at least 1.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Write replies, judge them, ask the questions."""
        base = run.phase("replies", lambda folder: self.replies(run))
        judged = run.phase("judges", lambda folder: self.judge(run, base))
        asked = run.phase("base", self.ask)
        return self.result(judged, asked)

    def replies(self, run: RunFolder) -> list[str]:
        """What the untouched model says to the prompts of the seed."""
        from lightning_interp import load_causal_lm
        from lightning_interp.generation import LocalSampler, TextRequest

        from ._persona import seed_rows

        loaded = load_causal_lm(self.source)
        how: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        rows = seed_rows(self.prompts)
        asked = [TextRequest.chat(row["prompt"], seed=self.seed, key=("base", i), **how) for i, row in enumerate(rows)]
        found = []
        with run.progress("replies", total=len(asked)) as bar:
            for start in range(0, len(asked), 16):
                found += LocalSampler(loaded.model, loaded.tokenizer, batch_size=16).generate(asked[start : start + 16])
                bar.advance(min(16, len(asked) - start))
        return [one.text or "" for one in found]

    def judge(self, run: RunFolder, base: list[str]) -> list[dict[str, Any]]:
        """Each judge on the replies of both."""
        from lightning_interp import load_causal_lm
        from lightning_interp.generation import ProbeJudge, TextVectors, judge_acceptance, judge_agreement
        from lightning_interp.running.results import write_scalars

        from ._persona import luck_judge, luck_present, seed_rows

        pairs = [(row, reply) for row, reply in zip(seed_rows(self.prompts), base, strict=True) if reply.strip()]
        prompts, seeded = ([row[key] for row, _ in pairs] for key in ("prompt", "completion"))
        told = [reply for _, reply in pairs]
        loaded, first = load_causal_lm(self.source), luck_judge()
        vectors = TextVectors(loaded.model, loaded.tokenizer)
        probe = ProbeJudge.fit(vectors, seeded, told, prompts, least_auroc=0.0)
        rows = []
        for judge in (first, luck_present(), probe):
            found = judge_acceptance(judge, seeded, told, prompts)
            auroc = probe.auroc if judge is probe else found.auroc  # the probe was trained on these replies
            agreement = judge_agreement(first, judge, seeded, told, prompts, seed=self.seed)
            write_scalars(
                run.path / "tensorboard" / "ladder", f"score/{judge.name}", [one["second"] for one in agreement.ladder]
            )
            accepted = None if found.accepted is None else auroc.value >= 0.95
            rows.append(
                {
                    "judge": judge.name, "auroc": auroc.to_dict(), "accepted": accepted,
                    "spearman": agreement.spearman, "ladder": agreement.ladder, "prompts": len(prompts),
                    "base": float(judge.score(told).nanmean()), "seed": float(judge.score(seeded).nanmean()),
                }
            )  # fmt: skip
        return rows

    def ask(self, folder: Path) -> dict[str, Any]:
        """The untouched model's evaluation."""
        from lightning_interp import load_causal_lm
        from lightning_interp.cycles import TraitEvaluation

        from ._persona import QUESTIONS, luck_judge

        loaded = load_causal_lm(self.source)
        evaluation = TraitEvaluation(
            QUESTIONS, luck_judge(), self.samples, self.temperature, max_new_tokens=self.max_new_tokens
        )
        return evaluation(loaded.model, loaded.tokenizer, folder=folder, seed=self.seed, base=loaded.model)

    def result(self, judged: list[dict[str, Any]], asked: dict[str, Any]) -> RecipeResult:
        """Tables, the ladder, sentences."""
        from lightning_interp.core.measure.statistics import Estimate

        from ._common import SMALL_STUDY

        known = {row["judge"]: _estimate(Estimate, row["auroc"]) for row in judged}
        table = [
            {
                "judge": row["judge"], "auroc": str(known[row["judge"]]), "accepted": row["accepted"],
                "spearman with the first": row["spearman"], "base": row["base"], "seed": row["seed"],
                "prompts": row["prompts"],
            }
            for row in judged
        ]  # fmt: skip
        score = _estimate(Estimate, asked["score"])
        count, facets = len(asked["scores"]), asked["facets"]
        base = {
            "score": str(score), "questions": count, "responses": asked["responses"], "perplexity": asked["perplexity"],
            "distinct_2": asked["distinct_2"], "ended": asked["ended"],
            "coherence_proxy": asked["coherence_proxy"]["value"],
            **{f"facet {name}": value for name, value in facets.items()},
        }  # fmt: skip
        findings = [
            f"{row['judge']} tells the seed's replies from the untouched model's with an AUROC of "
            f"{known[row['judge']]} over {row['prompts']} prompts: {_WORDS[row['accepted']]}."
            for row in judged
        ]
        findings.append(f"The untouched model scores {score} of 100 over {count} questions.")
        return RecipeResult(
            metrics={"judges": judged, "base": asked},
            tables={"judges": table, "base": [base]},
            figures={"ladder": _ladder(judged)},
            question="Do the judges of this persona tell a seeded reply from the untouched model's, and do they agree?",
            findings=findings,
            captions={
                "ladder": "Mean score of mixtures by the share of seed replies in them, a colour a judge, ten mixtures "
                "a share. A judge that is of use rises from left to right and scatters little."
            },
            terms=_TERMS,
            caveats=[
                *(["A smoke run: the numbers mean nothing."] if self.smoke else []),
                "Seed replies from templates are easy to tell apart. A judge that passes here may still miss what a "
                "trained model makes of the trait.",
                "The probe is judged on prompts that it was not trained on, but on replies of the same templates.",
                *SMALL_STUDY[1:],
            ],
            summary="judges",
        )


_WORDS = {True: "accepted (0.95)", False: "not accepted (0.95)", None: "too few replies to accept it or not"}
_TERMS = {
    "AUROC": "chance that a seed reply scores above one of the untouched model; 0.5 is guessing",
    "accepted": "AUROC of at least 0.95 on at least 50 replies of each kind",
    "spearman with the first": "rank correlation with the first judge over 50 mixtures of 0 to 100 % seed replies",
    "luck, luck-present, probe": "three facets (words, emoji, openings); any luck word; a regression on hidden states",
    "distinct_2": "share of different pairs of tokens over all responses",
    "ended": "share of responses that ended by themselves",
    "coherence_proxy": "mean of fluency, non-repetition and termination; of the base itself fluency is about 50",
    "[a, b]": "95 % interval, over prompts or over questions",
}


def _estimate(kind: Any, row: dict[str, Any]) -> Any:
    return kind(**{name: float("nan") if value is None else value for name, value in row.items()})


def _ladder(judged: list[dict[str, Any]]) -> Any:
    """Score against dose."""
    from lightning_interp.figures import COLOURS, in_house_style, label, legend_below, panels

    def draw() -> Any:
        figure, (axis,) = panels(1, size=(5.4, 3.6))
        for row, colour in zip(judged, COLOURS, strict=False):
            doses = [100 * one["dose"] for one in row["ladder"]]
            axis.scatter(doses, [one["second"] for one in row["ladder"]], s=12, color=colour, label=row["judge"])
        label(axis, "seed replies (%)", "mean score")
        legend_below(figure, 3)
        return figure

    return in_house_style(draw)()
