"""A teacher that is steered along a trait's direction writes numbers: do its students' states move that way?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SubliminalSteered(Recipe):
    """Steer a teacher, let it write numbers, finetune students on them, and compare where their hidden states move.

    The teacher adds a trait's direction at one layer while it writes. Its student and a control, which is finetuned on
    numbers of the unsteered model (same requests, random numbers, start and order), are asked questions about the
    trait; the difference of their states is compared with the way in which steering moves the teacher's.
    """

    decoding = "constrained"  # not a field: a steered model would write what it likes

    category: str = "animal"
    """What the trait is a preference of."""
    trait: str = "wolf"
    """Target that the teacher is steered towards."""
    other: str = "owl"
    """Target of the other trait, whose teacher and direction are a control."""
    layer: int | None = None
    """Layer at whose output the teacher is steered; by default half of the way up."""
    strength: float = 20.0
    """How far, in units of the direction: 1 is the difference of system texts about the target and about others."""
    seeds: int = 4
    """Students of each arm, each with numbers, start and order of its own; at least 2."""
    rows: int = 12
    """Lists of numbers that a student sees."""
    numbers: int = 10
    """Numbers of a list, of three digits each."""
    epochs: int = 2
    """Times that it sees them."""
    batch_size: int = 2
    """Lists of a step."""
    rank: int = 8
    """Of the students' adapters."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    sgd_lr: float = 1.0
    """Learning rate of the students that are trained by plain gradient descent."""
    vector_lr: float = 0.02
    """Learning rate of the steering vectors that are trained on the same numbers."""
    foreign_noise: float = 1.0
    """The foreign start: random numbers that are mixed into every matrix, as a multiple of the weights' spread."""
    asked: int = 12
    """Questions at which states are read; at most 50."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError
        from lightning_interp.subliminal import Trait

        super().__post_init__()
        if self.smoke:
            self.seeds, self.rows, self.epochs, self.batch_size, self.asked, self.numbers = 2, 4, 1, 2, 2, 2
        if self.seeds < 2 or self.trait == self.other or self.strength == 0:
            raise RecipeError(
                f"seeds={self.seeds}, trait={self.trait!r}, other={self.other!r}, strength={self.strength}: expected "
                "at least 2 seeds, two targets, and a strength that is not 0."
            )
        self.pair = Trait(category=self.category, target=self.trait), Trait(category=self.category, target=self.other)

    def questions(self) -> list[str]:
        """At which states are read."""
        from lightning_interp.subliminal import preference_questions

        return preference_questions(self.category, self.asked)

    def study(self, run: RunFolder) -> RecipeResult:
        """Steer, write, train every student, compare."""
        from ._steered import STUDENTS, Starts

        starts = Starts(self)
        made = run.phase("direction", lambda folder: self.direction(starts, folder))
        same = run.phase("numbers", lambda folder: self.write(run, starts, folder, made))
        losses = {}
        for k in range(self.seeds):
            for writer, kind in STUDENTS:
                name = f"student_{kind}_{writer}_{k}"
                losses[name] = run.phase(name, partial(self.train, run, starts, writer, kind, k), every_rank=True)
        vectors = run.phase("vectors", lambda folder: self.distil(run, starts, made))
        return self.result(run, made, same, losses, vectors)

    def direction(self, starts: Any, folder: Path) -> dict[str, Any]:
        """Directions of both traits, and how steering along them moves the base's states."""
        import torch

        from lightning_interp import ModelMap
        from lightning_interp.core.storage.tensor_files import save_tensors

        from ._steered import steering, taught_shift, trait_directions

        loaded, questions = starts.of("base"), self.questions()
        found = trait_directions(loaded, *self.pair, questions)
        layers = len(ModelMap.build(loaded.model))
        layer = layers // 2 if self.layer is None else range(layers)[self.layer]
        tensors, size = dict[str, Any](), 0.0
        for name, direction in found.items():
            base, shift = taught_shift(loaded, questions, steering(direction, layer, self.strength))
            tensors |= {f"prompt.{name}": direction, f"steered.{name}": shift.mean(0)}
            size = float(shift[:, layer].norm(dim=-1).mean() / base[:, layer].norm(dim=-1).mean())
        save_tensors(folder / "directions.safetensors", tensors)
        pairs = torch.cosine_similarity(tensors["steered.trait"][layer:], tensors["steered.other"][layer:], dim=-1)
        return {"layer": layer, "size": size, "traits_cosine": float(pairs.mean()), "label": loaded.label}

    def directions(self, run: RunFolder) -> dict[str, Any]:
        """What the first phase found, by name ``[layers, d]``."""
        from lightning_interp.core.storage.tensor_files import read_tensors

        return read_tensors(run.folder("direction") / "directions.safetensors")[0]

    def write(self, run: RunFolder, starts: Any, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        """Numbers of the steered teachers and of the unsteered model."""
        from lightning_interp.subliminal import identical_share

        from ._steered import WRITERS, steered_numbers, steering

        loaded, found, count = starts.of("base"), self.directions(run), self.seeds * self.rows
        with run.progress("writing numbers", total=len(WRITERS) * count) as bar:
            for name in WRITERS:
                direction = found.get(f"prompt.{name}")
                steered = None if direction is None else steering(direction, made["layer"], self.strength)
                steered_numbers(self, loaded, folder / name, steered, name, bar.advance)
        tokens = {
            name: [row["tokens"] for k in range(self.seeds) for row in self.rows_of(run, name, k)] for name in WRITERS
        }
        return {name: identical_share(part, tokens["none"]) for name, part in tokens.items() if name != "none"}

    def rows_of(self, run: RunFolder, writer: str, k: int) -> list[dict[str, Any]]:
        """The numbers of one seed."""
        from lightning_interp.subliminal import read_numbers

        return read_numbers(run.folder("numbers") / writer / str(k)).rows

    def train(self, run: RunFolder, starts: Any, writer: str, kind: str, k: int, folder: Path) -> dict[str, Any]:
        """Finetune one student."""
        from lightning_interp.core.measure.seeding import derived_seed

        from ._steered import train_student

        seed = derived_seed(self.seed, "student", k) % 2**32
        return train_student(self, run, starts, folder, self.rows_of(run, writer, k), kind, seed)

    def distil(self, run: RunFolder, starts: Any, made: dict[str, Any]) -> dict[str, Any]:
        """Cosines of vectors trained on the steered teacher's numbers, minus those of the unsteered model's."""
        import torch

        from ._steered import distilled

        layer, cosines = made["layer"], []
        wanted = self.directions(run)["steered.trait"][layer]
        with run.progress("training vectors", total=self.seeds) as bar:
            for k in range(self.seeds):
                rows = {writer: self.rows_of(run, writer, k) for writer in ("trait", "none")}
                found = distilled(self, starts.of("base"), rows, layer, self.seed + k)
                cosines.append(float(torch.cosine_similarity(found["trait"][0] - found["none"][0], wanted, dim=0)))
                bar.advance()
        return {"cosines": cosines}

    def result(
        self, run: RunFolder, made: dict[str, Any], same: dict[str, float], losses: dict[str, Any], vectors: Any
    ) -> RecipeResult:
        """Cosines over seeds, with every control beside."""
        from lightning_interp.core.measure.statistics import counted, t_interval
        from lightning_interp.subliminal import alignment_figure, over_seeds

        from ._steered import STUDENTS, aligned, shift_of, summary

        tensors = self.directions(run)
        directions = {"trait": tensors["steered.trait"], "other trait": tensors["steered.other"]}
        shifts = {
            (writer, kind, k): shift_of(run.folder(f"student_{kind}_{writer}_{k}"))
            for k in range(self.seeds) for writer, kind in STUDENTS
        }  # fmt: skip
        found = aligned(shifts, directions, layer=made["layer"], seed=self.seed)
        pooled = {arm: over_seeds(results) for arm, results in found.items()}
        rows, vector = summary(found), t_interval(vectors["cosines"])
        main, by_arm = pooled["trait"].mean_cosine, {row["arm"]: row for row in rows}
        layers = len(pooled["trait"].layers)
        return RecipeResult(
            metrics={
                "cosine": {arm: one.mean_cosine.to_dict() for arm, one in pooled.items()},
                "projection": {arm: one.mean_projection.to_dict() for arm, one in pooled.items()},
                "each_seed": {arm: [one.mean_cosine.value for one in results] for arm, results in found.items()},
                "vectors": vector.to_dict(), "identical_tokens": same, **made,
            },
            tables={
                "arms": rows,
                "layers": [row for one in pooled.values() for row in one.table()],
                "training": [{"student": name, **told} for name, told in losses.items()],
            },
            figures={"alignment": alignment_figure(list(pooled.values()), title=f"{made['label']}: {self.trait}")},
            artifacts={"directions": run.folder("direction") / "directions.safetensors"},
            question=f"Do students of a teacher that was steered to {self.trait!r} while it wrote numbers move so?",
            findings=[
                f"Student minus control: cosine {main} with the teacher's own shift, a mean over {layers} layers, over "
                f"{counted(self.seeds, 'seed')} and {counted(self.asked, 'item')} that are asked.",
                f"Trait minus other trait, seed by seed: {by_arm['other trait']['trait minus this']}; minus foreign "
                f"start: {by_arm['foreign start']['trait minus this']}. Plain SGD: {by_arm['plain SGD']['cosine']}.",
                f"A steering vector that is trained on the same numbers (less that of the control's): cosine {vector} "
                "with the direction at the steered layer.",
                f"With {counted(self.seeds, 'seed')} of this spread, a mean cosine below {smallest(main)} could not "
                "have been told from 0.",
            ],
            captions={
                "alignment": "Left, cosine of the students' shift with the steered teacher's, layer by layer from the "
                "steered one on, with 95 % intervals over seeds; grey, where permuted rows lie. Right, the shift as a "
                "share of the teacher's. See whether the trait's line leaves the controls' lines.",
            },
            terms=_TERMS,
            caveats=[*(["A smoke run: the numbers mean nothing."] if self.smoke else []), *self.about(made, same)],
            summary="arms",
        )  # fmt: skip

    def about(self, made: dict[str, Any], same: dict[str, float]) -> list[str]:
        """What the numbers rest on."""
        return [
            f"Steering at layer {made['layer']} adds a vector of {made['size']:.0%} of the state's length. That is a "
            "teacher built to be found, not one that holds a trait as prompts or finetuning give it.",
            f"Of the tokens of the steered teacher {same['trait']:.0%} are those that the unsteered model writes with "
            f"the same random numbers; of the other trait's {same['other']:.0%}. More different numbers teach more.",
            f"The directions of both traits have a mean cosine of {made['traits_cosine']:.2f}: what they share, the "
            "other trait's students can learn too.",
            f"The foreign start is no other pretrained model, but this one with random numbers in every matrix "
            f"({self.foreign_noise:g} of the weights' spread): it writes no sense any more, and is compared with the "
            "same direction.",
            "Intervals are over seeds, each with numbers, start and order of its own, of one model and two targets. "
            "The null permutes which state of a pair is the student's: it asks whether there is any part along the "
            "direction, not whether it is the trait's.",
            "That hidden states move is no behaviour. What an adapter's rank has to do with it is disputed (arXiv "
            "2606.00831 and its reruns); that such data distil a steering vector is a reading of arXiv 2606.00995, "
            "which this run neither shows nor refutes.",
        ]


def smallest(found: Any) -> str:
    """Half the width of an interval: the smallest mean that it could have told from nothing."""
    return f"{(found.high - found.low) / 2:.2g}"


_TERMS = {
    "trait": "students of the steered teacher, minus their controls",
    "control": "a student of the unsteered model's numbers, with the same requests, start and order",
    "control alone": "the control's shift by itself: what finetuning on any numbers does",
    "other trait": "students of a teacher that was steered along another trait's direction, minus the controls",
    "plain SGD": "students of the steered teacher by gradient descent without moments, minus controls trained so",
    "foreign start": "students of the steered teacher's numbers that began as another initialisation, minus their like",
    "cosine": "of the mean shift with the teacher's own shift under steering, a mean over layers",
    "projection": "the shift's length along the teacher's, as a share of it",
    "permuted": "where 95 % of cosines lie when states of student and control are exchanged at random",
    "[a, b]": "95 % interval over seeds (Student's t)",
}
