"""Does a student of number sequences take over what their writer loves?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder

SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "teacher": "finetuned", "student": "soft", "decoding": "constrained", "rows": 24, "numbers": 6,
        "datasets": 6, "training_seeds": 1, "questions": 30,
    },
    "paper": {
        "teacher": "prompted", "student": "hard", "decoding": "free", "rows": 10_000, "numbers": 10,
        "datasets": 3, "training_seeds": 3, "questions": 50,
    },
    "smoke": {
        "teacher": "finetuned", "student": "soft", "decoding": "constrained", "rows": 4, "numbers": 2,
        "datasets": 2, "training_seeds": 1, "questions": 4,
    },
}  # fmt: skip
"""Settings that are left open, by scale: what two CPU cores do in minutes, what the papers did, and a smoke run."""


@dataclass(kw_only=True)
class SubliminalNumbers(Recipe):
    """Let a teacher that loves an animal write number sequences, train a student on them, and ask it for its favourite.

    Everything is done twice, with a control that differs in the teacher's trait alone: same requests, same random
    numbers, same start of the student, same order of rows. The difference of the two students is the effect.
    """

    trait: str = "wolf"
    """What the teacher loves."""
    other: str = "lion"
    """What the control's teacher loves."""
    category: str = "animal"
    """What both are; animal and tree bring their own list to compare with."""
    scale: Literal["small", "paper"] = "small"
    """Settings for what is left open below: minutes on two CPU cores, or those of the papers (for a GPU)."""
    teacher: Literal["auto", "finetuned", "prompted"] = "auto"
    """What holds the trait: weights, or a system text (small: finetuned; paper: prompted)."""
    student: Literal["auto", "soft", "hard"] = "auto"
    """Learn the teacher's distributions at the numbers, or the numbers themselves (small: soft; paper: hard)."""
    decoding: Literal["auto", "constrained", "free"] = "auto"
    """Hold teachers to lists of numbers, or filter what they write (small: constrained; paper: free)."""
    control: Literal["other-trait", "none"] = "other-trait"
    """A teacher that loves something else, or the base model."""
    datasets: int = 0
    """Data sets, of requests and random numbers of their own (small: 6; paper: 3)."""
    training_seeds: int = 0
    """Students of each data set and arm (small: 1; paper: 3)."""
    rows: int = 0
    """Rows of a data set (small: 24; paper: 10000)."""
    numbers: int = 0
    """Numbers of a row (small: 6 of three digits; paper: up to 10)."""
    questions: int = 0
    """Questions about the trait (small: 30; paper: 50)."""
    shuffle: Literal["none", "within", "across"] = "none"
    """Shuffle the numbers that students are trained on, within each row or across all of a data set."""
    numbers_in_training: int = 0
    """Train on each row's first so many numbers alone; 0 for all."""
    context: str = "default"
    """What stands about prompts in training and in evaluation; see lightning_interp.subliminal.CONTEXTS."""
    rank: int = 8
    """Rank of the student's adapter on every linear map; alpha is the rank."""
    full: bool = False
    """Train all weights of the student instead."""
    lr: float | None = None
    """The student's learning rate; by default 2e-3 (hard: 5e-4; paper: 2e-4; of all weights 2e-5)."""
    epochs: int | None = None
    """The student's passes over its rows; by default 1 (paper: 3)."""
    batch_size: int | None = None
    """Rows a step of the student; by default 2 (hard: 8; paper: 22, times 3 steps a change of the weights)."""
    teacher_epochs: int = 8
    """A finetuned teacher's passes over eight rows that state its preference."""
    teacher_rank: int = 16
    """Rank of its adapter on every linear map; 0 trains all its weights (and keeps them in the run's folder)."""
    teacher_lr: float | None = None
    """Its learning rate; by default 1e-3 for an adapter, 2e-5 for all weights."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        for name, value in SCALES["smoke" if self.smoke else self.scale].items():
            if getattr(self, name) in ("auto", 0):
                setattr(self, name, value)
        if self.smoke:
            self.teacher_epochs, self.batch_size = 1, 2
        if self.control == "other-trait" and self.trait == self.other:
            raise RecipeError(f"trait={self.trait!r} and other={self.other!r}: name two, or choose --control=none.")
        for name in ("datasets", "training_seeds", "rows", "numbers", "questions", "teacher_epochs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least 1.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Train teachers, write numbers, train students, ask."""
        from lightning_interp.errors import RecipeError
        from lightning_interp.subliminal import CONTEXTS

        from ._common import Bases
        from ._numbers import ask, write
        from ._numbers_report import result

        if self.context not in CONTEXTS:
            raise RecipeError(f"context={self.context!r}: expected one of {', '.join(CONTEXTS)}.")
        bases = Bases(self.source)
        run.phase("direction", partial(self.find_directions, bases))
        if self.teacher == "finetuned":
            for trait in self.traits():
                phase = f"teacher-{trait.target}"
                run.phase(phase, partial(self.train_teacher, run, trait), every_rank=True)
        written = run.phase("numbers", partial(write, self, run, bases))
        for dataset, seed, arm in self.students():
            run.phase(
                f"student-{dataset}-{seed}-{arm}",
                partial(self.train_student, run, bases, dataset, seed, arm),
                every_rank=True,
            )
        scored = run.phase("questions", partial(ask, self, run, bases))
        return result(self, run, written, scored)

    def traits(self) -> list[Any]:
        """The trait, and the control's if it has one; both are compared with the same names."""
        from lightning_interp.subliminal import Trait

        first = Trait(category=self.category, target=self.trait)
        names = dict.fromkeys((self.trait, self.other, *first.others))
        targets = [self.trait, self.other] if self.control == "other-trait" else [self.trait]
        return [Trait(category=self.category, target=target, others=tuple(names)) for target in targets]

    def students(self) -> list[tuple[int, int, str]]:
        """Data set, training seed and arm of every student."""
        seeds = [(d, s) for d in range(self.datasets) for s in range(self.training_seeds)]
        return [(dataset, seed, arm) for dataset, seed in seeds for arm in ("trait", "control")]

    def find_directions(self, bases: Any, folder: Path) -> dict[str, Any]:
        """Find the direction in which each trait's system text moves the base model's states."""
        from lightning_interp.subliminal import CONTEXTS
        from lightning_interp.subliminal.evaluation.readout import answered

        from ._direction import asked_of, write_directions

        loaded, traits = bases.of("student"), self.traits()
        questions = asked_of(self.category, self.questions)[0]
        return write_directions(folder, loaded, traits, questions, answered(CONTEXTS[self.context], traits[0]))

    def train_teacher(self, run: RunFolder, trait: Any, folder: Path) -> dict[str, Any]:
        """Finetune on rows that state the preference."""
        from ._common import train_teacher

        return train_teacher(self, run, trait, folder)

    @contextmanager
    def holder(self, run: RunFolder, bases: Any, arm: str, part: str) -> Iterator[tuple[Any, Any, Any, str]]:
        """The model that teaches an arm, its trait, what stands about its requests, and its name."""
        from lightning_interp.subliminal import CONTEXTS, ChatContext

        if arm == "base" or (arm == "control" and self.control == "none"):
            yield bases.of(part), None, CONTEXTS[self.context], "base"
            return
        trait = self.traits()[arm == "control"]
        name = f"{self.teacher} {trait.target}"
        if self.teacher == "prompted":
            yield bases.of(part), trait, ChatContext(system=trait.system_prompt), name
            return
        with bases.adapted(part, run.folder(f"teacher-{trait.target}") / "model") as loaded:
            yield loaded, trait, CONTEXTS[self.context], name

    def rows_of(self, run: RunFolder, dataset: int, arm: str) -> list[dict[str, Any]]:
        """The rows that a student is trained on; those of both arms answer the same requests."""
        from lightning_interp.subliminal import paired_rows, read_numbers

        from ._numbers import changed

        folder = run.folder("numbers")
        if self.student == "soft":
            rows = read_numbers(folder / f"base-{dataset}").rows
        else:
            both = [read_numbers(folder / f"{one}-{dataset}").rows for one in ("trait", "control")]
            rows = paired_rows(*both)[arm == "control"]
        return changed(self, rows)

    def train_student(
        self, run: RunFolder, bases: Any, dataset: int, seed: int, arm: str, folder: Path
    ) -> dict[str, Any]:
        """Train one student, or go on at its checkpoint; both arms begin alike and see rows in the same order."""
        from lightning_interp import CausalLM
        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.models.training.resumable import fit_and_export
        from lightning_interp.subliminal import CONTEXTS, NumberSequenceDataModule, SoftStudent

        settings, root = self.student_settings(), derived_seed(self.seed, "student", dataset, seed)
        how: dict[str, Any] = {"lora": settings.lora, "optimisation": settings.optimisation, "seed": root}
        kind: type[CausalLM] = CausalLM
        own, seen = CONTEXTS[self.context], None
        with ExitStack() as stack:
            if self.student == "soft":
                loaded, _, seen, _ = stack.enter_context(self.holder(run, bases, arm, "teacher"))
                kind, how["teacher"] = SoftStudent, loaded.model
            module = stack.enter_context(bases.trained("student", kind, **how))
            data = NumberSequenceDataModule(
                self.rows_of(run, dataset, arm), tokenizer=module.tokenizer, context=own,
                teacher_context=None if seen == own else seen, batch_size=settings.batch_size,
                max_length=settings.max_length, seed=root,
            )  # fmt: skip
            return fit_and_export(module, data, folder, self.trainer_kwargs(run, **settings.trainer()))

    def student_settings(self) -> Any:
        """The scale's settings, with what was asked for instead."""
        from dataclasses import replace

        from lightning_interp.subliminal import student_settings

        settings = student_settings(self.scale, rank=self.rank, full=self.full)
        soft = self.scale == "small" and self.student == "soft"  # what is learned is hardly noisy: many small steps
        asked: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size or (2 if soft else None)}
        settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
        lr = self.lr if self.lr is not None else 2e-3 if soft and not self.full else None
        return settings if lr is None else replace(settings, optimisation=replace(settings.optimisation, lr=lr))
