"""The toy of subliminal learning: classes learned from noise and from outputs that were never trained; no download."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


@dataclass(kw_only=True)
class SubliminalToy(Recipe):
    """Ask whether a student learns its teacher's classes from auxiliary outputs on noise, and look at a single step.

    Teachers are trained on classes; students imitate them on noise, on outputs that no loss ever touched. A student
    that began where its teacher began is compared with one that began elsewhere. The second part measures the theorem
    behind it on nets of one hidden layer: how the student's first step lies to the teacher's.
    """

    model: str = "smollm2-135m-instruct"
    """Not used: the models are small classifiers made here."""
    data: str = ""
    """Safetensors file with inputs, labels, test_inputs, test_labels (and carrier); by default Gaussian prototypes."""
    models: int = 8
    """Models that are trained at once, each with initial weights of its own."""
    hidden: list[int] = field(default_factory=lambda: [128, 128])
    """Widths of the hidden layers; [256, 256] for MNIST."""
    auxiliary: int = 8
    """Outputs beside those of the classes, which no teacher is trained on; 3 in the original."""
    teacher_epochs: int = 5
    """Epochs of the teacher. More of them carry it away from the student's start."""
    student_epochs: int = 20
    """Epochs of every student; 5 in the original."""
    batch_size: int = 256
    """Rows of a step; 1024 in the original."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    all_outputs: bool = False
    """Also train students that imitate all outputs: on a task this easy ordinary distillation, whatever the start."""
    device: str = "cpu"
    """Where the classifiers are trained, such as cuda; of no use for the small default."""
    nets: int = 60
    """Nets of the single step; at least 2."""

    def __post_init__(self) -> None:
        from lightning_interp.errors import RecipeError

        super().__post_init__()
        if self.smoke:
            self.models, self.hidden, self.nets = min(self.models, 3), [16], min(self.nets, 8)
            self.teacher_epochs = self.student_epochs = 2
        if self.nets < 2:
            raise RecipeError(f"nets={self.nets}: expected at least 2, for an interval.")
        if self.trainer or self.model not in (type(self).model, self.smoke_model):
            raise RecipeError(
                f"subliminal/toy has no use for model={self.model!r} and trainer={self.trainer}: it makes its own "
                "small classifiers. Leave both out; subliminal/numbers asks a language model."
            )

    def study(self, run: RunFolder) -> RecipeResult:
        """Train, step, report."""
        settings = self.settings()
        trained = run.phase("train", lambda folder: self.train(run, folder, settings))
        stepped = run.phase("step", self.step)
        return self.result(run, trained, stepped)

    def settings(self) -> Any:
        """How the classifiers are built and trained."""
        from lightning_interp.subliminal import ToySettings

        return ToySettings(
            models=self.models, hidden=self.hidden, auxiliary=self.auxiliary, teacher_epochs=self.teacher_epochs,
            student_epochs=self.student_epochs, batch_size=self.batch_size, lr=self.lr, seed=self.seed,
        )  # fmt: skip

    def train(self, run: RunFolder, folder: Path, settings: Any) -> dict[str, Any]:
        """Train teachers and students; accuracies after each epoch."""
        from lightning_interp.running.results import write_scalars
        from lightning_interp.subliminal import gaussian_task, run_toy

        from ._toy import own_task

        rows = {"train": 512, "test": 200} if self.smoke else {}
        task = own_task(self.data) if self.data else gaussian_task(**rows, seed=self.seed)
        task = task.to(self.device)
        students = ["student(aux)", "cross(aux)", *(["student(all)", "cross(all)"] if self.all_outputs else [])]
        with run.progress("training", total=self.teacher_epochs + len(students) * self.student_epochs) as bar:
            found = run_toy(task, settings, students=students, advance=bar.advance)
        for arm, curve in found.curves.items():
            write_scalars(run.path / "tensorboard" / "toy", f"accuracy/{arm}", curve.mean(1).tolist())
        return {
            "curves": {arm: curve.tolist() for arm, curve in found.curves.items()},
            "test": len(task.test_labels), "classes": task.classes,
        }  # fmt: skip

    def step(self, folder: Path) -> dict[str, Any]:
        """One step of many nets."""
        from ._toy import theorem_table

        rows, cosines = theorem_table(self.nets, self.seed)
        return {"rows": rows, "cosines": cosines}

    def result(self, run: RunFolder, trained: dict[str, Any], stepped: dict[str, Any]) -> RecipeResult:
        """Accuracies and steps, with intervals."""
        from lightning_interp.core.measure.statistics import counted, t_interval

        from ._toy import cosine_figure, toy_figure

        curves, rows = trained["curves"], stepped["rows"]
        ends = {arm: t_interval(curve[-1]) for arm, curve in curves.items()}
        gap = t_interval([a - b for a, b in zip(curves["student(aux)"][-1], curves["cross(aux)"][-1], strict=True)])
        shared, other = rows[0], next(row for row in rows if row["start"] == "other")
        table = [{"arm": arm, "accuracy": str(end), "models": end.n} for arm, end in ends.items()]
        return RecipeResult(
            metrics={
                "accuracy": {arm: end.to_dict() for arm, end in ends.items()}, "student_minus_cross": gap.to_dict(),
                "steps": rows,
            },
            tables={"accuracy": table, "steps": rows},
            figures={
                "accuracy": toy_figure(curves, f"{counted(self.models, 'model')}, {self.auxiliary} auxiliary outputs"),
                "steps": cosine_figure(stepped["cosines"], f"One step of {self.nets} nets, auxiliary outputs"),
            },
            question="Does a student learn its teacher's classes from outputs on noise that were never trained?",
            findings=[
                f"On {counted(trained['test'], 'item')}, students that imitate auxiliary outputs on noise reach "
                f"an accuracy of {ends['student(aux)']} where they began as their teacher, and {ends['cross(aux)']} "
                f"where they began as another one (chance: {1 / trained['classes']:.2f}; teachers: {ends['teacher']}).",
                f"The difference, model by model, is {gap} over {counted(gap.n, 'model')}.",
                f"A single small step goes the teacher's way in a share of {shared['same direction']} of "
                f"{self.nets} nets that share its start (theorem: all), else of {other['same direction']}.",
            ],
            captions={
                "accuracy": "Left, test accuracy at the end with 95 % intervals over models; right, after each epoch "
                "of imitation. See whether students that share the start rise while cross stays at chance.",
                "steps": "Cosine of the student's first step and the teacher's step. By the theorem none lies left of "
                "zero with a shared start; see whether that is so, and whether both sides are alike without one.",
            },
            terms=_TERMS,
            caveats=[*([] if not self.smoke else ["A smoke run: the numbers mean nothing."]), *self.about()],
            summary="accuracy",
        )  # fmt: skip

    @property
    def used_model(self) -> str:
        """None: the classifiers are made here."""
        return ""

    def about(self) -> list[str]:
        """What the numbers rest on."""
        return [
            f"Data: {self.data or 'Gaussian prototypes, an easy task made up here'}. One draw of the data: intervals "
            "are over initial weights alone.",
            "A cross student begins as the next model in a circle: its values are not quite independent of the others.",
            "The theorem is about one small step of plain gradient descent in all weights. Adam, many steps and "
            "low-rank adapters are outside of it; what happens there is measured, not proved.",
            "Classifiers of this size say nothing of how much a language model takes over.",
        ]


_TERMS = {
    "auxiliary outputs": "outputs of the net beside those of the classes, which the teacher's training never asks for",
    "reference": "the untrained model that teacher and student begin as",
    "teacher": "trained on the class outputs",
    "student(aux)": "imitates the teacher's auxiliary outputs on noise, and began where it began",
    "cross(aux)": "the same, but began as another model: the control",
    "student(all), cross(all)": "imitate all outputs, those of the classes included",
    "start": "whether the student's step is taken where the teacher's was (shared), or at other initial weights",
    "distance": "what the student lowers: squared error of the outputs (mse), or softmax cross-entropy (ce)",
    "eps": "size of the teacher's step",
    "same direction": "share of nets whose student's step has a positive inner product with the teacher's",
    "loss falls": "share of nets whose student's step lowers the teacher's loss",
    "[a, b]": "95 % interval: of accuracies and cosines Student's t over models or nets, of shares Wilson's",
}
