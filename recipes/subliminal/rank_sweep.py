"""How does what a student of number sequences takes over depend on its adapter's rank, at several learning rates?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SubliminalRankSweep(Recipe):
    """Train students of number sequences with adapters of several ranks at several learning rates, and in full.

    Every cell of the grid has a student of a teacher that loves an animal and a control of one that loves another, from
    the same start on the same requests in the same order; the difference of their answers is the effect. At one
    learning rate an adapter's update grows with its rank, so the size of the update, the loss in training and the loss
    on rows that were held out stand beside each effect.
    """

    not_identity: ClassVar[tuple[str, ...]] = (
        *("ranks", "lrs", "full_lrs", "targets", "datasets", "training_seeds", "only", "max_hours"),
    )

    trait: str = "wolf"
    """What the teacher loves."""
    other: str = "lion"
    """What the control's teacher loves."""
    category: str = "animal"
    """What both are; animal and tree bring their own list to compare with."""
    ranks: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Ranks of adapters; alpha is the rank. More of these, and of all axes below, go on in the same folder."""
    lrs: list[float] = field(default_factory=lambda: [2e-4, 1e-3])
    """Learning rates of adapters."""
    full_lrs: list[float] = field(default_factory=lambda: [2e-5])
    """Learning rates at which all weights are trained too; [] leaves that out."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """What carries adapters: all-linear, attn, ffn."""
    datasets: int = 2
    """Data sets, of requests and random numbers of their own."""
    training_seeds: int = 1
    """Trainings of each data set and cell."""
    teacher: Literal["finetuned", "prompted"] = "finetuned"
    """Whether weights or a system text hold the trait."""
    student: Literal["soft", "hard"] = "soft"
    """Learn the teacher's distributions at the numbers, or the numbers themselves."""
    decoding: Literal["constrained", "free"] = "constrained"
    """Hold writers to lists of numbers, or filter what they write."""
    rows: int = 36
    """Rows of a data set."""
    held_out: int = 12
    """Further rows, which each teacher writes for the held-out loss."""
    numbers: int = 6
    """Numbers of a row."""
    questions: int = 24
    """Questions about the trait."""
    epochs: int = 1
    """A student's passes over its rows."""
    batch_size: int = 6
    """Rows a step of a student."""
    schedule: Literal["constant", "linear"] = "constant"
    """What its learning rate does after the first steps."""
    warmup_steps: int = 0
    """Steps over which it rises."""
    teacher_epochs: int = 8
    """A finetuned teacher's passes over eight rows that state its preference."""
    teacher_rank: int = 16
    """Rank of its adapter on every linear map; 0 trains all its weights (and keeps them in the run's folder)."""
    teacher_lr: float | None = None
    """Its learning rate; by default 1e-3 for an adapter, 2e-5 for all weights."""
    parallel_cells: int = 1
    """Hard students that are trained in common passes over one model; they equal those alone up to rounding."""
    only: list[str] = field(default_factory=list)
    """Train these cells alone: values, as rank=1,8 or lr=0.001, or names of cells."""
    max_hours: float | None = None
    """Begin no cell after so many hours; the same command goes on."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.ranks, self.lrs, self.full_lrs = self.ranks[:2], self.lrs[:1], self.full_lrs[:1]
            self.datasets, self.rows, self.held_out, self.numbers, self.questions = 1, 4, 2, 2, 3
            self.teacher_epochs, self.batch_size = 1, 2
        if self.trait == self.other:
            raise RecipeError(f"trait={self.trait!r} and other={self.other!r}: name two.")
        if self.parallel_cells > 1 and self.student == "soft":
            raise RecipeError("parallel_cells is for hard students: soft ones read a teacher of their own.")
        names = ("datasets", "training_seeds", "rows", "held_out", "numbers", "questions", "epochs", "teacher_epochs")
        for name in (*names, "batch_size", "parallel_cells"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r}: expected at least 1.")

    def study(self, run: RunFolder) -> RecipeResult:
        """Train teachers, write numbers, read the base model, train and read the grid's cells."""
        from ._common import Bases
        from ._rank_sweep import result

        bases = Bases(self.source)
        cells = self.cells()  # a grid that cannot be is said before anything is trained
        if self.teacher == "finetuned":
            for trait in self.traits():
                run.phase(f"teacher-{trait.target}", partial(self.train_teacher, run, trait), every_rank=True)
        start = run.phase("base", lambda folder: self.read_models(run, bases))
        for dataset in range(self.datasets):
            run.phase(f"numbers-{dataset}", partial(self.write, run, bases, dataset))
        return result(self, start, self.train(run, bases, cells))

    def traits(self) -> list[Any]:
        """The trait and the control's, compared with the same names."""
        from lightning_interp.subliminal import Trait

        own = Trait(category=self.category, target=self.trait).others
        names = tuple(dict.fromkeys((self.trait, self.other, *own)))[: 3 if self.smoke else None]
        return [Trait(category=self.category, target=one, others=names) for one in (self.trait, self.other)]

    def cells(self) -> list[Any]:
        """The cells of the grid, of both arms, that are asked for."""
        from lightning_interp.lora import LoraGrid
        from lightning_interp.running.sweep_grid import chosen_cells

        grid = LoraGrid(
            ranks=self.ranks, learning_rates=self.lrs, targets=self.targets, data_seeds=range(self.datasets),
            training_seeds=range(self.seed, self.seed + self.training_seeds), full_finetuning=self.full_lrs,
            more={"arm": ["trait", "control"]},
        )  # fmt: skip
        return chosen_cells(grid.cells(), self.only)

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

    def read_models(self, run: RunFolder, bases: Any) -> dict[str, Any]:
        """Margins of the base model and of the teachers."""
        base, margins = bases.of("teacher"), {}
        for arm in ("base", "trait", "control"):
            with self.holder(run, bases, arm, "teacher") as (loaded, trait, context):
                name = "base" if trait is None else f"teacher: {trait.target}"
                margins[name] = self.read(loaded.model, loaded.tokenizer, context)
        return {"margins": margins, "label": base.label}

    def read(self, model: Any, tokenizer: Any, context: Any = None) -> list[float]:
        """Margin of the trait, question by question."""
        from lightning_interp.subliminal import ChatContext, answered, preference_questions, trait_margins

        trait = self.traits()[0]
        questions = preference_questions(self.category, self.questions)
        margins = trait_margins(model, tokenizer, trait, questions, context=answered(context or ChatContext(), trait))
        return [float(margin) for margin in margins]

    def write(self, run: RunFolder, bases: Any, dataset: int, folder: Path) -> dict[str, Any]:
        """Write a data set (soft: by the base model), and the rows that each teacher writes for the held-out loss."""
        from dataclasses import replace

        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.subliminal import write_numbers

        from ._common import grammar_of, number_settings, writer_of

        yields = {}
        for arm in ("trait", "control", "base") if self.student == "soft" else ("trait", "control"):
            with self.holder(run, bases, arm, "teacher") as (loaded, trait, context):
                grammar = grammar_of(self, loaded)
                teacher = writer_of(loaded, trait, grammar, context, "base" if trait is None else trait.target)
                settings = number_settings(self, dataset, grammar)
                if arm == "base" or self.student == "hard":
                    yields[arm] = write_numbers(teacher, folder / arm, settings=settings).manifest["yield"]
                if arm != "base":
                    fresh = replace(settings, rows=self.held_out, seed=derived_seed(self.seed, "held-out", dataset))
                    write_numbers(teacher, folder / f"held-out-{arm}", settings=fresh)
        return yields

    def rows_of(self, run: RunFolder, dataset: int, arm: str) -> tuple[list[Any], list[Any]]:
        """Rows to train on, which answer the same requests in both arms, and held-out rows of the arm's teacher."""
        from lightning_interp.subliminal import paired_rows, read_numbers

        folder = run.folder(f"numbers-{dataset}")
        held_out = read_numbers(folder / f"held-out-{arm}").rows
        if self.student == "soft":
            return read_numbers(folder / "base").rows, held_out
        both = [read_numbers(folder / one).rows for one in ("trait", "control")]
        return paired_rows(*both)[arm == "control"], held_out

    def train(self, run: RunFolder, bases: Any, cells: Sequence[Any]) -> list[dict[str, Any]]:
        """Train and read the cells, each a run inside this one."""
        from lightning_interp import Optimisation
        from lightning_interp.core.measure.seeding import derived_seed
        from lightning_interp.lora import GridTraining, train_grid
        from lightning_interp.subliminal import ChatContext, NumberSequenceDataModule, SoftStudent

        tokenizer, held = bases.of("teacher").tokenizer, ExitStack()

        def data(cell: Any) -> Any:
            arm, seen = cell.more["arm"], None
            if self.student == "soft" and self.teacher == "prompted":
                seen = ChatContext(system=self.traits()[arm == "control"].system_prompt)
            rows, fresh = self.rows_of(run, cell.data_seed, arm)
            order = derived_seed(self.seed, "order", cell.data_seed, cell.training_seed)
            return NumberSequenceDataModule(
                rows, tokenizer=tokenizer, val=fresh, teacher_context=seen, batch_size=self.batch_size, seed=order
            )

        def soft(cell: Any, model: Any, **how: Any) -> Any:
            held.close()  # the teacher of the cell before
            teacher = held.enter_context(self.holder(run, bases, cell.more["arm"], "teacher"))[0].model
            return SoftStudent(model, teacher=teacher, **how)

        def inputs(cell: Any) -> Any:
            teachers = [trait.target for trait in self.traits()] if self.teacher == "finetuned" else []
            folders = [run.folder(f"teacher-{name}") / "model" for name in teachers]
            return {"numbers": run.folder(f"numbers-{cell.data_seed}"), "teachers": folders}

        how = Optimisation(lr=1.0, schedule=self.schedule, warmup_steps=self.warmup_steps)
        with held:
            return train_grid(
                run.manifest, cells, model=self.source, data=data, inputs=inputs,
                training=GridTraining(
                    optimisation=how, max_epochs=self.epochs, parallel_cells=self.parallel_cells,
                    max_hours=self.max_hours, trainer=self.trainer_options,
                ),
                evaluate=lambda model, cell: self.read(model, tokenizer),
                module=soft if self.student == "soft" else None,
            )  # fmt: skip
