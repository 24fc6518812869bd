"""Bring your own texts and reward: how much does the reward change because of one attribute?"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

from ._scored import ScoredBy, read_rows, told


@dataclass(kw_only=True)
class RateAudit(ScoredBy, Recipe):
    """Estimate the effect of one attribute of your texts on your reward, with all checks that they allow.

    Texts are JSONL: `text`, and if you like `prompt`, `w` (1 if the text has the attribute, 0 if not), `id`, `cluster`;
    `rewrite` and `rewrite2`, if they are rewritten already; `reward`, `reward_rewrite` and `reward_rewrite2`, if they
    are scored. The layouts of the paper's authors are read too. Without texts an example with a known answer is run.
    With `attributes` or `rewards` one run estimates the effect of each attribute on each reward.
    """

    not_identity: ClassVar[tuple[str, ...]] = ("requests_per_minute", "max_calls", "max_cost", "reward_device")
    said_before: ClassVar[tuple[str, ...]] = ("dtype", "max_length")
    phases = ("rewrite", "score", "effects")  # no fields: where an audit lies among those of a run with several
    prefix = ""
    called = ("", "")
    reports = tuple[Any, ...]()

    model: str = "smollm2-135m-instruct"
    """The language model that rewrites: a source for rewriter=local, its name at the endpoint for rewriter=endpoint."""
    data: str = ""
    """JSONL of your own, or .json and .jsonl of the paper's authors; by default an example made of real reviews."""
    attribute: str = "attribute"
    """What to call the attribute; for rewriter=replay the name that it has in the store."""
    attributes: list[dict[str, str | list[str]]] = field(default_factory=list)
    """Several: of each its name (attribute) and what is its own of data, label, check, toggle, always, template, store
    and whose, such as {attribute: length, template: length, label: length}."""
    label: str = ""
    """Label the texts by vowel, length, length:200, words:40, contains:PATTERN or vader; by default the column w."""
    check: str = ""
    """Look by such a labeller whether rewrites have the value asked for; by default the one that labels."""
    rewriter: Literal["", "rules", "replay", "local", "endpoint"] = ""
    """Nobody (the rewrites are in the file), rules, a finished store, a model of this machine, or an endpoint."""
    toggle: str = ""
    """For rules: mark:!!! or opener:Well,|Also, (for 0 and for 1)."""
    always: list[str] = field(default_factory=list)
    """For rules, done whichever way the attribute goes: mentions, links, markup, typos, phrase:WORDS."""
    template: str = ""
    """For a language model: sentiment, length, complexity, helpfulness, vowel, or a JSON file with your wording."""
    kind: Literal["text", "chat", "question"] = "text"
    """For a language model: what is rewritten."""
    temperature: float = 0.7
    """For a language model: of the sampling."""
    base_url: str = ""
    """For an endpoint: its address, such as http://localhost:8000/v1; OpenAI's own by default."""
    max_calls: int | None = None
    """For a language model: texts to ask for at most; an endpoint is called only with this or max_cost."""
    max_cost: float | None = None
    """For an endpoint: most that may be spent; needs both prices."""
    price_read: float | None = None
    """For an endpoint: price of a million tokens read."""
    price_written: float | None = None
    """For an endpoint: price of a million tokens written."""
    requests_per_minute: float | None = None
    """For an endpoint: its limit."""
    store: str = ""
    """Folder of the rewrites; by default in the run folder. What is there is not asked for again."""
    whose: str = ""
    """For replay: the rewriter's name, if several wrote."""
    passes: int = 2
    """3 for a third rewrite too, which can show that the assumptions fail."""
    draws: int = 1
    """For a language model: rewrites of each text, averaged inside it."""
    reward: str = "vader"
    """vader, fluency, columns (of the file), a model of the authors' file, a reward model (id, folder, .ckpt), or
    module:function of prompts and texts, of a module named with --import."""
    rewards: list[str | dict[str, str | int | bool]] = field(default_factory=list)
    """Several: names, or of each its name (reward) and what is its own of the settings reward_*, dtype and max_length,
    such as {reward: org/model, reward_output: helpful}."""
    drop_truncated: bool = False
    """Leave out units of which a text was cut."""
    missing: Literal["raise", "drop"] = "raise"
    """What to do with units that lack a text or a finite reward."""
    identical: Literal["keep", "drop", "raise"] = "keep"
    """What to do with rewrites that say the same as their source; dropping them selects on the outcome."""
    se: Literal["paired", "stratified", "cluster", "unpaired"] | None = None
    """Errors; by default for whole clusters where the texts have them, else paired."""
    ci: Literal["auto", "normal", "t", "bootstrap"] = "auto"
    """Intervals."""
    beta: float = 1.0
    """For the sensitivity line: reward of an off-target feature, in standard deviations."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        from ._rewriters import rewriter_settings
        from ._scored import output_of

        super().__post_init__()
        if self.several:
            self.cells()  # refuses what one of them cannot be
            return
        defaults = {name: entry.default for name, entry in type(self).__dataclass_fields__.items()}
        defaults |= {"always": [], "model": self.model if self.model == self.smoke_model else defaults["model"]}
        self._told = rewriter_settings(self, defaults)
        if not self.data and self.rewriter != "replay" and (self.label or self.reward == "columns"):
            raise RecipeError(
                f"label={self.label!r} and reward={self.reward!r} are of a file, and no data is given. Give --data=..."
            )
        output_of(self.reward_output)  # a wrong one is said before anything is done
        if self.passes not in (2, 3) or self.draws < 1:
            raise RecipeError(f"passes={self.passes}, draws={self.draws}: expected 2 or 3 passes and at least 1 draw.")

    def config(self) -> dict[str, Any]:
        """The recipe's fields; those for several are left out where they say nothing, as in runs that knew none."""
        kept = {"attributes", "rewards"}
        return {name: value for name, value in super().config().items() if name not in kept or value}

    @property
    def several(self) -> bool:
        """Whether there are several attributes or rewards."""
        return bool(self.attributes or self.rewards)

    def cells(self) -> list[list[RateAudit]]:
        """An audit for each attribute and reward; see :func:`cells_of`."""
        from ._audit_cells import cells_of

        return cells_of(self)

    def study(self, run: RunFolder) -> RecipeResult:
        """Rewrite, score, estimate."""
        from ._audit_cells import scores, study_cells

        if self.several:
            return study_cells(self.cells(), run)
        texts = run.phase("rewrite", lambda folder: self.rewrite(run, folder))
        scored = run.phase("score", lambda folder: scores([self], run, folder)[0], every_rank=True)
        return self.result(run, texts, scored, self.effects(run, scored))

    @property
    def example(self) -> bool:
        """Whether the worked example is run."""
        return not self.data and self.rewriter == ""

    @cached_property
    def given(self) -> Any:
        """The user's texts, labelled."""
        from ._audit import labelled, read_any
        from ._named import named_labeller

        read = read_any(self.data)
        texts = [unit.text for unit in read.units]
        return labelled(read, named_labeller(self.label, texts) if self.label else None)

    def rewrite(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """The three texts of every complete unit."""
        from lightning_interp.rate import write_triples

        how: dict[str, Any] = {"missing": self.missing, "identical": self.identical}
        plan, calls, reads = "", 0, list[dict[str, str]]()
        if self.rewriter == "" and not self.example:
            triples = self.given.triples(self.attribute, **how)
        else:
            if self.rewriter not in ("", "replay") and not self.prefix:  # before anything is paid for
                reads = self.tried()
                print(told(reads))
            store, by, plan, calls = self.stored(run, folder)
            triples = store.triples(self.attribute, rewriter=by, passes=self.passes, **how)
        write_triples(folder, triples)
        return {"plan": "\n".join(filter(None, (plan, told(reads)))), "calls": calls, "rows": len(triples)}

    def tried(self) -> list[dict[str, str]]:
        """Load the reward and let it score one text, so that what cannot work is said before texts are asked for."""
        from lightning_interp.errors import DataError
        from lightning_interp.models.scoring.text_scorer import TextScorer
        from lightning_interp.rate.texts.readers import OWN_REWARDS

        if self.reward == OWN_REWARDS:
            raise DataError(
                f"reward={self.reward!r}, but rewriter={self.rewriter!r} makes texts that the file has no rewards of. "
                "Name a reward that can score them."
            )
        scorer, units = self.scorer(), self.units()
        if isinstance(scorer, TextScorer):
            scorer.scores([units[0].prompt], [units[0].text])
        return read_rows(scorer, units)

    def scorer(self) -> Any:
        """The reward; a made-up one for a smoke run of the example."""
        from ._example import made_up_scorer

        made_up = self.example and self.smoke and self.reward == "vader"
        return made_up_scorer() if made_up else self.scorer_of(self.reward)

    @property
    def written(self) -> dict[str, list[str]]:
        """Stores that are not only read."""
        each = [own.get("store", "") for own in self.attributes if own.get("rewriter", self.rewriter) != "replay"]
        return {"store": [] if self.rewriter == "replay" else [self.store], "attributes": [str(one) for one in each]}

    def units(self) -> list[Any]:
        """The texts that are rewritten."""
        from lightning_interp.rate import RewriteStore

        from ._example import emphatic_units
        from ._rewriters import Replay

        if isinstance(self._told, Replay):
            return RewriteStore.open(self._told.store).units(self.attribute)
        return emphatic_units(self.reviews(), seed=self.seed) if self.example else list(self.given.units)

    def job(self, folder: Path) -> Any:
        """What would be asked for, with what is left of the budget; the store is in the folder, if none is named."""
        from lightning_interp.rate import RewriteRun, RewriteStore

        from ._audit import left_of
        from ._example import emphasis_rewriter
        from ._rewriters import Endpoint

        told: Any = self._told
        writer = told.rewriter(self.source, self.seed) if told else emphasis_rewriter()
        store = RewriteStore.create(self.store or folder / "store", self.units(), attr=self.attribute)
        return RewriteRun(
            store, writer, attr=self.attribute, passes=self.passes, draws=self.draws,
            prices=told.prices if isinstance(told, Endpoint) else None,
            max_calls=left_of(self.max_calls, [report.calls for report in self.reports], 1),
            max_cost=left_of(self.max_cost, [report.cost or 0.0 for report in self.reports], 1e-9),
        )  # fmt: skip

    def agreed(self, *jobs: Any) -> str:
        """What would be asked for; refused where an endpoint has to be paid and nobody has said how much."""
        from ._audit import agreed
        from ._rewriters import Endpoint

        if isinstance(self._told, Endpoint):
            return agreed(*jobs, max_calls=self.max_calls, max_cost=self.max_cost)
        return "\n".join(str(job.plan()) for job in jobs)

    def stored(self, run: RunFolder, folder: Path) -> tuple[Any, Any, str, int]:
        """The store, who wrote, what was planned and how often was asked; the plan is shown before that."""
        from lightning_interp.rate import RewriteStore

        from ._audit import check_spent, rewrite_all
        from ._rewriters import Replay, first_plan, written

        told = self._told
        if isinstance(told, Replay):
            return RewriteStore.open(told.store), told.whose or None, "", 0
        job = self.job(folder)
        check_spent(job, self.reports, max_calls=self.max_calls, max_cost=self.max_cost)
        print(self.agreed(job))
        plan, there = first_plan(folder, job)
        with run.progress("rewriting", total=job.plan().total_calls) as bar:
            self.reports = (*self.reports, rewrite_all(job, bar.advance))
        return job.store, job.by, plan, written(job) - there

    def reviews(self) -> list[Any]:
        """Reviews of the example; made up in a smoke run."""
        from lightning_interp.rate import read_reviews
        from lightning_interp.rate.report.typo_study import made_up_reviews

        return made_up_reviews() if self.smoke else read_reviews()

    def triples(self, run: RunFolder) -> Any:
        """The texts."""
        from lightning_interp.rate import read_triples

        return read_triples(run.folder(self.phases[0]) / "triples.json")

    @property
    def in_file(self) -> bool:
        """Whether the file holds the rewards that are asked for."""
        from lightning_interp.rate.texts.readers import OWN_REWARDS

        return not (self.example or self.rewriter) and (self.reward == OWN_REWARDS or self.reward in self.given.rewards)

    def finished(self, triples: Any) -> dict[str, list[float]] | None:
        """Rewards that are in the file, if those are asked for."""
        from lightning_interp.errors import DataError
        from lightning_interp.rate.texts.readers import OWN_REWARDS

        if (self.example or self.rewriter) and self.reward == OWN_REWARDS:
            raise DataError(f"reward={self.reward!r}: a store holds no rewards. Name one that can score its texts.")
        return self.given.scores(self.reward, triples) if self.in_file else None

    def effects(self, run: RunFolder, scored: dict[str, Any]) -> Any:
        """The effects with all checks."""
        from lightning_interp.rate import TripleScores, read_rewards, study_effects

        from ._named import named_labeller

        triples = self.triples(run)
        if scored["rewards"] is None:
            scores = read_rewards(run.folder(self.phases[1]) / "rewards.jsonl").scores(triples, scored["scorer"])
        else:
            scores = TripleScores.from_dict({"scorer": scored["scorer"], "reward": scored["rewards"]})
        name = "contains:!" if self.example else self.check or self.label
        clustered = "paired" if triples.cluster is None else "cluster"
        options: dict[str, Any] = {"se": self.se or clustered, "ci": self.ci, "missing": self.missing}
        return study_effects(
            triples, scores, labeller=named_labeller(name, triples.original) if name else None, beta=self.beta,
            seed=self.seed, drop_truncated=self.drop_truncated, changes_length=name.startswith(("length", "words")),
            **options,
        )  # fmt: skip

    def result(self, run: RunFolder, texts: dict[str, Any], scored: dict[str, Any], study: Any) -> RecipeResult:
        """Tables, figures, and what speaks against the numbers."""
        from lightning_interp.rate.report.explained import TERMS
        from lightning_interp.rate.report.study_files import write_effects
        from lightning_interp.running.results import write_scalars

        from ._audit import running_estimates

        phase, prefix = self.phases[2], self.prefix
        run.phase(phase, lambda folder: {"file": write_effects(folder, study, seed=self.seed).name})
        settling = running_estimates(study.result, seed=self.seed)
        for name in ("naive", "single", "rate"):
            values = [float(row[name]) for row in settling if row[name] == row[name]]
            write_scalars(run.path / "tensorboard" / phase, f"rate/{self.attribute}/{name}", values)
        title = f"{self.named}, {scored['scorer']}"
        return RecipeResult(
            metrics={**study.metrics(), "truth": scored["truth"], "calls": texts["calls"], "plan": texts["plan"]},
            tables={
                **study.tables(prefix),
                f"{prefix}by_units": settling,
                **({f"{prefix}truth": self.truths(scored, study)} if scored["truth"] else {}),
                **({f"{prefix}reading": scored["reads"]} if scored.get("reads") else {}),
            },
            figures=study.figures(title, prefix),
            artifacts={f"{prefix}effects": run.folder(phase) / "effects.json"},
            question=f"How much does the reward {scored['scorer']!r} change because of {self.named}?",
            findings=[*study.findings(self.named), *self.known(scored)],
            captions=study.captions(prefix),
            terms=TERMS,
            caveats=[*self.about(), *study.caveats()],
            summary=f"{prefix}effects",
        )

    def known(self, scored: dict[str, Any]) -> list[str]:
        """The answer of the example, in words."""
        known = " and ".join(f"{value:.3f} ({name})" for name, value in (scored["truth"] or {}).items())
        return [f"The known answer, by exact edits of the texts, is {known}."] if known else []

    @property
    def used_model(self) -> str:
        """The language model that rewrites, if one does."""
        return self.source if self.rewriter in ("local", "endpoint") else ""

    @property
    def named(self) -> str:
        """The attribute, as it is shown."""
        return "three exclamation marks" if self.example else self.attribute

    def truths(self, scored: dict[str, Any], study: Any) -> list[dict[str, Any]]:
        """The known answer of the example beside what was estimated."""
        table = study.result.raw
        found = {"naive": table.naive, "single rewrite": table.single.ate, "double rewrite (RATE)": table.rate.ate}
        estimates = [(name, e.value, f"[{e.low:.4f}, {e.high:.4f}]") for name, e in found.items()]
        rows = [*((f"exact edits, {name}", value, "") for name, value in scored["truth"].items()), *estimates]
        return [{"of": name, "reward units": value, "interval": ends} for name, value, ends in rows]

    def about(self) -> list[str]:
        """What the texts are."""
        if not self.example:
            return (
                []
                if self.check or self.label
                else ["No labeller: nobody looked whether rewrites comply. Give --check."]
            )
        kind = "The reviews are made up: the numbers mean nothing." if self.smoke else "Real reviews of films."
        return [f"{kind} The marks and a kind opening were added by coins, so that the answer is known."]
