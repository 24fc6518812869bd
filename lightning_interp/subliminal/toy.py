"""The toy of subliminal learning: what a student takes over from outputs that its teacher was never trained on.

Small classifiers have auxiliary outputs beside those of the classes. A teacher is trained on the classes alone; a
student imitates the teacher's auxiliary outputs on noise, and never sees a class. One that began where its teacher did
(``student``) learns the classes all the same; one that began elsewhere (``cross``) is the control.

After Cloud et al. 2025, "Subliminal Learning", arXiv 2507.14805, section on MNIST; any data will do here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate, t_interval
from lightning_interp.errors import DataError, RecipeError

__all__ = ["MNIST", "ToyResult", "ToySettings", "ToyTask", "gaussian_task", "run_toy"]

STUDENTS = ("student(aux)", "cross(aux)", "student(all)", "cross(all)")
_CHUNK = 4096  # inputs that are evaluated at once
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ToyTask:
    """Labelled inputs, which every model sees, and inputs that carry the teacher's outputs to the student.

    Args:
        inputs: ``[n, d]``, floating point; the original scales images to [-1, 1].
        labels: Classes from 0, ``[n]``.
        test_inputs, test_labels: Of the accuracy, ``[m, d]`` and ``[m]``.
        carrier: What students imitate on, ``[k, d]``; None draws ``n`` rows uniformly from [-1, 1].

    Raises:
        DataError: If shapes do not fit, a value is not finite, or a label is no class.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    carrier: Tensor | None = None

    def __post_init__(self) -> None:
        carrier = self.test_inputs if self.carrier is None else self.carrier
        for name, rows in (("inputs", self.inputs), ("test_inputs", self.test_inputs), ("carrier", carrier)):
            width = self.inputs.shape[-1]
            if rows.dim() != 2 or not len(rows) or rows.shape[1] != width or not bool(rows.isfinite().all()):
                raise DataError(
                    f"ToyTask({name}) of shape {list(rows.shape)}: expected finite [n, {width}]; flatten images."
                )
        for name, labels, rows in (
            ("labels", self.labels, self.inputs),
            ("test_labels", self.test_labels, self.test_inputs),
        ):
            if labels.shape != rows.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0:
                raise DataError(
                    f"ToyTask({name}) are {labels.dtype} {list(labels.shape)}: expected {len(rows)} classes from 0."
                )

    def to(self, device: str | torch.device) -> ToyTask:
        """The same on another device."""
        carrier = None if self.carrier is None else self.carrier.to(device)
        inputs, labels = self.inputs.to(device), self.labels.to(device)
        return ToyTask(inputs, labels, self.test_inputs.to(device), self.test_labels.to(device), carrier)

    @property
    def classes(self) -> int:
        """How many there are, by the largest label."""
        return 1 + int(torch.maximum(self.labels.max(), self.test_labels.max()))


def gaussian_task(*, train: int = 8192, test: int = 2000, width: int = 64, classes: int = 10, seed: int = 0) -> ToyTask:
    """A task without a download: one Gaussian prototype a class, unit noise round it, tanh.

    Args:
        train: Rows to learn from.
        test: Rows to be tested on.
        width: ``d``.
        classes: How many.
        seed: Of prototypes, classes and noise.

    Example:
        >>> task = gaussian_task(train=20, test=10)
        >>> task.inputs.shape, task.test_inputs.shape, task.classes <= 10
        (torch.Size([20, 64]), torch.Size([10, 64]), True)
    """
    random = _generator(seed, "gaussian_task")
    prototypes = torch.randn(classes, width, generator=random)
    labels = torch.randint(classes, (train + test,), generator=random)
    inputs = (prototypes[labels] + torch.randn(train + test, width, generator=random)).tanh()
    return ToyTask(inputs[:train], labels[:train], inputs[train:], labels[train:])


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """How models are built and trained.

    Args:
        models: Independent models that train at once, each with its own initial weights (``M``).
        hidden: Widths of the hidden layers.
        auxiliary: Outputs beside those of the classes.
        teacher_epochs: Of the teacher, on the class outputs.
        student_epochs: Of every student, on what it imitates.
        batch_size: Rows of a step; all models see the same rows.
        lr: Learning rate of Adam.
        seed: Of initial weights, carrier and order.

    Raises:
        RecipeError: If a number is too small; ``cross`` needs two models.
    """

    models: int = 8
    hidden: Sequence[int] = (128, 128)
    auxiliary: int = 8
    teacher_epochs: int = 5
    student_epochs: int = 20
    batch_size: int = 256
    lr: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (*self.hidden, self.auxiliary, self.teacher_epochs, self.student_epochs, self.batch_size)
        if self.models < 2 or min(whole) < 1 or not (self.lr > 0 and math.isfinite(self.lr)):
            raise RecipeError(
                f"{self}: expected at least 2 models (a cross student begins as another one), a learning rate above 0, "
                "and at least 1 of everything else."
            )


MNIST = ToySettings(models=100, hidden=(256, 256), auxiliary=3, student_epochs=5, batch_size=1024)
"""The shape of the original, for 784 pixels of yours: 100 models of 784-256-256-(10+3). A GPU's work."""


@dataclass(frozen=True)
class ToyResult:
    """Test accuracies of every model.

    Args:
        curves: After each epoch ``[epochs, M]`` by arm: ``reference`` (untrained, one row), ``teacher``, and the
            students that were asked for.
    """

    curves: Mapping[str, Tensor]

    @property
    def accuracy(self) -> dict[str, Tensor]:
        """At the end, ``[M]`` by arm."""
        return {arm: curve[-1] for arm, curve in self.curves.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Mean over models with its 95 % interval (Student's t) by arm."""
        return {arm: t_interval(values.tolist()) for arm, values in self.accuracy.items()}

    def table(self) -> list[dict[str, Any]]:
        """A row an arm."""
        return [{"arm": arm, "accuracy": str(found), "models": found.n} for arm, found in self.estimates().items()]


def run_toy(
    task: ToyTask,
    settings: ToySettings | None = None,
    *,
    students: Sequence[str] = STUDENTS,
    advance: Callable[[int], object] | None = None,
) -> ToyResult:
    """Train teachers and students, and test all of them.

    Student ``i`` imitates teacher ``i``, by the mean over the batch of ``KL(teacher || student)`` of the softmax over
    the auxiliary outputs (``aux``) or all of them (``all``). It begins as teacher ``i`` began; a ``cross`` student as
    teacher ``i + 1`` did, in a circle. On a task as easy as the Gaussian one, ``all`` teaches any student the classes,
    so ``aux`` is what to look at.

    Losses are summed over models, whose gradients do not meet: each learns as if it were alone. The teacher's outputs
    on the carrier are held in memory, ``M * k * (classes + auxiliary)`` numbers.

    Args:
        task: The data; models train on its device.
        settings: See :class:`ToySettings`.
        students: Which to train.
        advance: Called with 1 after each epoch; there are ``teacher_epochs + len(students) * student_epochs``.

    Returns:
        The accuracies. The same seed gives the same ones on the same machine.

    Raises:
        RecipeError: If there is no such student.

    Example:
        >>> few = ToySettings(models=2, hidden=[8], teacher_epochs=1, student_epochs=1)
        >>> found = run_toy(gaussian_task(train=64, test=10), few, students=["student(aux)"])
        >>> list(found.accuracy), found.accuracy["teacher"].shape
        (['reference', 'teacher', 'student(aux)'], torch.Size([2]))
    """
    settings = settings or ToySettings()
    if wrong := [name for name in students if name not in STUDENTS]:
        raise RecipeError(f"run_toy(students=[{wrong[0]!r}]): expected some of {', '.join(STUDENTS)}.")
    report = advance or (lambda _: None)
    seed, classes, width = settings.seed, task.classes, task.inputs.shape[1]
    reference = [x.to(task.inputs) for x in _initial([width, *settings.hidden, classes + settings.auxiliary], settings)]
    carrier = task.carrier
    if carrier is None:
        carrier = 2 * torch.rand(task.inputs.shape, generator=_generator(seed, "carrier")).to(task.inputs) - 1

    def class_loss(outputs: Tensor, rows: Tensor) -> Tensor:
        wanted = task.labels[rows].expand(len(outputs), -1)
        return F.cross_entropy(outputs[..., :classes].flatten(0, 1), wanted.flatten()) * len(outputs)

    def trained(name: str, start: Sequence[Tensor], inputs: Tensor, loss: Loss) -> Sequence[Tensor]:
        student, curve, weights = name in STUDENTS, [], start
        for weights in _epochs(start, inputs, loss, "student" if student else "teacher", settings):
            curve.append(_accuracy(weights, task))
            report(1)
        curves[name] = torch.stack(curve)
        return weights

    curves = {"reference": _accuracy(reference, task)[None]}
    told = _outputs(trained("teacher", reference, task.inputs, class_loss), carrier)
    for name in students:
        first = classes if "aux" in name else 0
        wanted = told[..., first:].log_softmax(-1)

        def imitation(outputs: Tensor, rows: Tensor, first: int = first, wanted: Tensor = wanted) -> Tensor:
            said = outputs[..., first:].log_softmax(-1)
            return F.kl_div(said, wanted[:, rows], log_target=True, reduction="sum") / len(rows)

        start = [x.roll(-1, 0) for x in reference] if name.startswith("cross") else reference
        trained(name, start, carrier, imitation)
    return ToyResult(curves)


def _initial(widths: Sequence[int], settings: ToySettings) -> list[Tensor]:
    """Weights ``[M, in, out]`` of variance 1 / in and biases ``[M, 1, out]`` of 0, in turn; a model's are its own."""
    models = []
    for index in range(settings.models):
        random = _generator(settings.seed, "weights", index)
        models.append([torch.randn(a, b, generator=random) / math.sqrt(a) for a, b in pairwise(widths)])
    weights = [torch.stack(layer) for layer in zip(*models, strict=True)]
    return [x for weight in weights for x in (weight, torch.zeros(len(weight), 1, weight.shape[-1]))]


def _forward(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Outputs ``[M, n, out]`` of inputs ``[n, in]``."""
    hidden = inputs.expand(len(weights[0]), -1, -1)
    for layer in range(0, len(weights), 2):
        hidden = torch.baddbmm(weights[layer + 1], hidden.relu() if layer else hidden, weights[layer])
    return hidden


@torch.no_grad()
def _outputs(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([_forward(weights, part) for part in torch.split(inputs, _CHUNK)], dim=1)


def _epochs(
    start: Sequence[Tensor], inputs: Tensor, loss: Loss, purpose: str, settings: ToySettings
) -> Iterator[list[Tensor]]:
    """Weights after each epoch; the loss, of outputs and the rows' numbers, is a sum over models."""
    weights = [x.clone().requires_grad_() for x in start]
    optimizer = torch.optim.Adam(weights, lr=settings.lr, foreach=True)
    for epoch in range(settings.teacher_epochs if purpose == "teacher" else settings.student_epochs):
        order = torch.randperm(len(inputs), generator=_generator(settings.seed, purpose, epoch))
        for rows in torch.split(order.to(inputs.device), settings.batch_size):
            gradients = torch.autograd.grad(loss(_forward(weights, inputs[rows]), rows), weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        yield [x.detach() for x in weights]


def _accuracy(weights: Sequence[Tensor], task: ToyTask) -> Tensor:
    """Share of the test inputs whose class has the highest class output, ``[M]`` on the CPU."""
    said = _outputs(weights, task.test_inputs)[..., : task.classes].argmax(-1)
    return (said == task.test_labels).double().mean(1).cpu()


def _generator(*key: object) -> torch.Generator:
    seed, *purpose = key
    return torch.Generator().manual_seed(derived_seed(int(str(seed)), "toy", *purpose))
