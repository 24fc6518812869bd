"""Does what a student takes over show in other contexts than the one that it was trained in?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SubliminalContext(Recipe):
    """Train students of number sequences in several contexts, and ask each about the trait in several.

    A context is the text that stands round a prompt: the model's own system text, another identity, an empty one, a
    text without any. Teachers, requests and numbers are the same for all. Every student has a control, trained in the
    same context from the same start on what another teacher says; the difference of the two is the effect. No student
    is trained for an evaluation.
    """

    trait: str = "wolf"
    """What the teacher loves."""
    other: str = "lion"
    """What the control's teacher loves."""
    category: str = "animal"
    """What both are; animal and tree bring their own list to compare with."""
    design: Literal["grid", "pairs"] = "grid"
    """Three contexts by three (the model's own, a foreign identity, empty), or chosen pairs, matched and not."""
    teacher: Literal["finetuned", "prompted"] = "finetuned"
    """Whether weights or a system text hold the trait."""
    student: Literal["soft", "hard"] = "soft"
    """Learn the teacher's distributions at the numbers, or the numbers themselves."""
    decoding: Literal["constrained", "free"] = "constrained"
    """Hold writers to lists of numbers, or filter what they write."""
    datasets: int = 3
    """Data sets, of requests and random numbers of their own."""
    rows: int = 48
    """Rows of a data set."""
    numbers: int = 6
    """Numbers of a row."""
    questions: int = 24
    """Questions about the trait."""
    numbers_first: bool = False
    """Put a list of numbers before every question, as students know them from training."""
    samples: int = 0
    """Sampled answers of each question, beside the logits; 100 is usual, for a GPU."""
    rank: int = 8
    """Rank of the student's adapter on every linear map; alpha is the rank."""
    lr: float = 5e-4
    """The student's learning rate."""
    epochs: int = 1
    """The student's passes over its rows."""
    batch_size: int = 6
    """Rows a step of the student."""
    teacher_epochs: int = 8
    """A finetuned teacher's passes over eight rows that state its preference."""
    teacher_rank: int = 16
    """Rank of its adapter on every linear map; 0 trains all its weights (and keeps them in the run's folder)."""
    teacher_lr: float | None = None
    """Its learning rate; by default 1e-3 for an adapter, 2e-5 for all weights."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.datasets, self.rows, self.numbers, self.questions = 1, 4, 2, 3
            self.teacher_epochs, self.batch_size, self.samples = 1, 2, min(self.samples, 2)
        if self.trait == self.other:
            raise RecipeError(f"trait={self.trait!r} and other={self.other!r}: name two.")
        for name in ("datasets", "rows", "numbers", "questions", "epochs", "teacher_epochs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least 1.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Show the contexts, train teachers, write numbers, train students, ask."""
        from ._common import Bases

        bases = Bases(self.source)
        shown = run.phase("contexts", lambda folder: self.show(bases))
        if self.teacher == "finetuned":
            for trait in self.traits():
                phase = f"teacher-{trait.target}"
                run.phase(phase, partial(self.train_teacher, run, trait), every_rank=True)
        run.phase("numbers", lambda folder: self.write(run, bases, folder))
        for dataset, train, arm in self.students():
            phase = f"student-{dataset}-{train}-{arm}"
            run.phase(phase, partial(self.train_student, run, bases, dataset, train, arm), every_rank=True)
        scored = run.phase("questions", lambda folder: self.ask(run, bases))
        return self.result(shown, scored)

    def traits(self) -> list[Any]:
        """The trait and the control's, compared with the same names."""
        from lightning_interp.subliminal import Trait

        own = Trait(category=self.category, target=self.trait).others
        names = tuple(dict.fromkeys((self.trait, self.other, *own)))[: 3 if self.smoke else None]
        return [Trait(category=self.category, target=one, others=names) for one in (self.trait, self.other)]

    def contexts(self) -> dict[str, Any]:
        """All contexts by name; one is the prompt that lends a model the trait."""
        from lightning_interp.subliminal import CONTEXTS, ChatContext

        return {**CONTEXTS, "trait_prompt": ChatContext(system=self.traits()[0].system_prompt)}

    def pairs(self) -> list[tuple[str, str]]:
        """Contexts of training and evaluation."""
        from ._context import DESIGNS

        pairs = [pair for pair, _ in DESIGNS[self.design]]
        return [pair for pair in pairs if set(pair) <= {"default", "empty"}] if self.smoke else pairs

    def students(self) -> list[tuple[int, str, str]]:
        """Data set, training context and arm of every student."""
        trained = dict.fromkeys(train for train, _ in self.pairs())
        runs = [(dataset, train) for dataset in range(self.datasets) for train in trained]
        return [(dataset, train, arm) for dataset, train in runs for arm in ("trait", "control")]

    def show(self, bases: Any) -> dict[str, Any]:
        """What training and evaluation really read, side by side; pairs that differ are warned of."""
        from lightning_interp.running.terminal import print_table

        from ._context import SIDES, rendered_pairs

        rows = rendered_pairs(bases.of("student").tokenizer, self.contexts(), self.pairs())
        read = {row[side]: row[f"{what} reads"] for row in rows for side, what in SIDES.items()}
        print_table("contexts, as the model reads them", [{"context": k, "text": repr(x)} for k, x in read.items()])
        return {"rows": rows}

    def train_teacher(self, run: RunFolder, trait: Any, folder: Path) -> dict[str, Any]:
        """Finetune on rows that state the preference."""
        from ._common import train_teacher

        return train_teacher(self, run, trait, folder)

    @contextmanager
    def holder(self, run: RunFolder, bases: Any, arm: str, part: str) -> Iterator[tuple[Any, Any, Any]]:
        """The model that teaches an arm, its trait, and the context in which it holds that; the base is arm base."""
        from lightning_interp.subliminal import ChatContext

        trait = None if arm == "base" else self.traits()[arm == "control"]
        if trait is None or self.teacher == "prompted":
            yield bases.of(part), trait, ChatContext(system=None if trait is None else trait.system_prompt)
            return
        with bases.adapted(part, run.folder(f"teacher-{trait.target}") / "model") as loaded:
            yield loaded, trait, ChatContext()

    def write(self, run: RunFolder, bases: Any, folder: Path) -> dict[str, Any]:
        """Write every data set: for hard students by teacher and control, for soft ones by the base model."""
        from lightning_interp.subliminal import write_numbers

        from ._common import grammar_of, number_settings, writer_of

        arms = ["trait", "control"] if self.student == "hard" else ["base"]
        done = []
        with run.progress("writing numbers", total=len(arms) * self.datasets * self.rows) as bar:
            for arm in arms:
                with self.holder(run, bases, arm, "student") as (loaded, trait, context):
                    grammar = grammar_of(self, loaded)
                    teacher = writer_of(loaded, trait, grammar, context, "base" if trait is None else trait.target)
                    for dataset in range(self.datasets):
                        settings, place = number_settings(self, dataset, grammar), folder / f"{arm}-{dataset}"
                        made = write_numbers(teacher, place, settings=settings, progress=bar.advance)
                        done.append({"arm": arm, "data set": dataset, "yield": made.manifest["yield"]})
        return {"written": done}

    def rows_of(self, run: RunFolder, dataset: int, arm: str) -> list[dict[str, Any]]:
        """The rows that a student is trained on; those of both arms answer the same requests."""
        from lightning_interp.subliminal import paired_rows, read_numbers

        folder = run.folder("numbers")
        if self.student == "soft":
            return read_numbers(folder / f"base-{dataset}").rows
        both = [read_numbers(folder / f"{one}-{dataset}").rows for one in ("trait", "control")]
        return paired_rows(*both)[arm == "control"]

    def train_student(
        self, run: RunFolder, bases: Any, dataset: int, train: str, arm: str, folder: Path
    ) -> dict[str, float]:
        """Train one student in one context; all of a data set begin alike and see its rows in the same order."""
        from lightning_interp import CausalLM, LoraSettings, Optimisation
        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.models.training.resumable import fit_and_export
        from lightning_interp.subliminal import NumberSequenceDataModule, SoftStudent

        root, context, seen = derived_seed(self.seed, "student", dataset), self.contexts()[train], None
        lora = LoraSettings(r=self.rank, alpha=self.rank, dropout=0.0)
        how: dict[str, Any] = {"lora": lora, "optimisation": Optimisation(lr=self.lr), "seed": root}
        kind: type[CausalLM] = CausalLM
        with ExitStack() as stack:
            if self.student == "soft":
                loaded, _, seen = stack.enter_context(self.holder(run, bases, arm, "teacher"))
                kind, how["teacher"] = SoftStudent, loaded.model
            module = stack.enter_context(bases.trained("student", kind, **how))
            data = NumberSequenceDataModule(
                self.rows_of(run, dataset, arm), tokenizer=module.tokenizer, context=context,
                teacher_context=None if seen == context else seen, batch_size=self.batch_size, seed=root,
            )  # fmt: skip
            settings = {"max_epochs": self.epochs, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
            return fit_and_export(module, data, folder, self.trainer_kwargs(run, **settings))

    def ask(self, run: RunFolder, bases: Any) -> dict[str, Any]:
        """Margins of the base model in all contexts, and of every student in those of its pairs."""
        from ._context import margins_in

        base = bases.of("student")
        evaluated = list(dict.fromkeys(context for _, context in self.pairs()))
        start = margins_in(self, base, evaluated)
        found, students = [], self.students()
        with run.progress("asking", total=len(students)) as bar:
            for dataset, train, arm in students:
                chosen = [context for one, context in self.pairs() if one == train]
                with bases.adapted("student", run.folder(f"student-{dataset}-{train}-{arm}") / "model") as loaded:
                    told = margins_in(self, loaded, chosen)
                found += [{"dataset": dataset, "train": train, "arm": arm, **one} for one in told]
                bar.advance()
        return {"base": start, "students": found, "label": base.label}

    def result(self, shown: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
        """The paired effect of every pair of contexts with its interval, and what it may not be used for."""
        from lightning_interp.core.measure.statistics import counted

        from ._common import TERMS
        from ._context import (
            CAPTION,
            DESIGNS,
            TERMS_OF_CONTEXT,
            about,
            answer_rows,
            arm_rows,
            contrast,
            effects_of,
            findings,
            map_figure,
        )

        same = {(row["train"], row["eval"]): row["same text"] for row in shown["rows"]}
        effects = effects_of(scored["students"], self.pairs())
        matched = contrast(scored["students"], same)
        asks = dict(DESIGNS[self.design])
        table = [
            {
                "train": pair[0], "eval": pair[1], "same text": same[pair], "paired effect": str(effect.estimate),
                "by clusters": str(effect.by_clusters), "detectable": effect.detectable, "asks": asks[pair],
            }
            for pair, effect in effects.items()
        ]  # fmt: skip
        title = f"{scored['label']}, {self.student} students, {counted(self.datasets, 'dataset')} of {self.rows} rows"
        answers, loved = answer_rows(scored["students"]), self.traits()[0].plural
        return RecipeResult(
            metrics={
                "effects": {f"{train}/{asked}": effect.to_dict() for (train, asked), effect in effects.items()},
                "matched_minus_mismatched": None if matched is None else matched.to_dict(),
            },
            tables={"effects": table, "contexts": shown["rows"], "arms": arm_rows(scored)}
            | ({"answers": answers} if answers else {}),
            figures={"effects": map_figure(effects, same, title=title)},
            question=f"In which contexts does a student of numbers show that its teacher loves {loved}?",
            findings=findings(self, effects, matched),
            captions={"effects": CAPTION},
            terms=TERMS | TERMS_OF_CONTEXT,
            caveats=about(self, scored["label"], next(iter(effects.values()))),
            summary="effects",
        )  # fmt: skip
