"""The toy's data of one's own, the theorem's step on many small nets, and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.core.measure.statistics import Estimate, proportion_interval, t_interval
from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.errors import DataError
from lightning_interp.figures import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    band,
    bars,
    in_house_style,
    label,
    legend_below,
    panels,
)
from lightning_interp.subliminal import OneStep, ToyTask, one_step

_KEYS = ("inputs", "labels", "test_inputs", "test_labels")
_WIDTHS, _CLASSES = (20, 32, 13), 10  # of the theorem's nets; three outputs are auxiliary
ARM_COLOURS = {"reference": GREY, "teacher": COLOURS[2], "student(aux)": BLUE, "cross(aux)": ORANGE}


def own_task(path: str) -> ToyTask:
    """Read data of the user's own.

    Args:
        path: A safetensors file with the tensors of a ``ToyTask``; ``carrier`` may be missing.

    Returns:
        The task.

    Raises:
        DataError: If a tensor is missing, or does not fit.
    """
    tensors, _ = read_tensors(path)
    if lost := [key for key in _KEYS if key not in tensors]:
        raise DataError(f"{path} has no tensor {lost[0]!r}. Expected {', '.join(_KEYS)} and, if wished, carrier.")
    return ToyTask(**{key: tensors[key] for key in _KEYS}, carrier=tensors.get("carrier"))


def theorem_steps(nets: int, *, shared: bool, distance: Any, eps: float, seed: int) -> OneStep:
    """One step of many nets of one hidden layer, whose trait is a classification and whose carrier is noise.

    Args:
        nets: How many.
        shared: Whether students begin where their teachers do, else as nets of their own.
        distance: See ``one_step``.
        eps: The teacher's step.
        seed: Of weights and data, which are the same for any of the settings above.

    Returns:
        What the steps do, ``[nets]``; students imitate the auxiliary outputs.
    """

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(*_WIDTHS[:2]), nn.Tanh(), nn.Linear(*_WIDTHS[1:])).double()

    with seeded_rng(seed):
        parts = [dict(made().named_parameters()) for _ in range(2 * nets)]
        weights = {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}
        x, noise = torch.randn(nets, 64, _WIDTHS[0]).double(), 2 * torch.rand(nets, 64, _WIDTHS[0]).double() - 1
        y, net = torch.randint(_CLASSES, (nets, 64)), made()

    def step(teacher: Any, student: Any, x: Tensor, y: Tensor, noise: Tensor) -> OneStep:
        return one_step(
            net,
            lambda f: F.cross_entropy(f(x)[:, :_CLASSES], y),
            noise,
            distance=distance,
            read=lambda outputs: outputs[:, _CLASSES:],
            teacher=teacher,
            student=student,
            eps=eps,
        )

    first = {name: w[:nets] for name, w in weights.items()}
    second = {name: w[nets:] for name, w in weights.items()}
    found: OneStep = vmap(step)(first, first if shared else second, x, y, noise)
    return found


def theorem_table(nets: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows for both starts, distances and sizes of the teacher's step; cosines at the small step."""
    rows, cosines = [], {}
    for start in ("shared", "other"):
        for distance in ("mse", "ce"):
            for eps in (1e-3, 1e-1):
                found = theorem_steps(nets, shared=start == "shared", distance=distance, eps=eps, seed=seed)
                rows.append(
                    {
                        "start": start, "distance": distance, "eps": eps, "nets": nets,
                        "same direction": str(share(found.inner > 0)), "loss falls": str(share(found.change < 0)),
                        "cosine": str(t_interval(found.cosine.tolist())),
                    }
                )  # fmt: skip
                if eps == 1e-3:
                    cosines[f"{start} start, {distance}"] = found.cosine.tolist()
    return rows, cosines


def share(true: Tensor) -> Estimate:
    """How often, with Wilson's interval."""
    return proportion_interval(true.double().tolist())


@in_house_style
def toy_figure(curves: Mapping[str, Sequence[Sequence[float]]], title: str) -> Any:
    """Accuracies at the end as bars, and those of the students by epoch."""
    figure, (left, right) = panels(2, size=(9.0, 3.9), title=title)
    ends = {arm: t_interval(curve[-1]) for arm, curve in curves.items()}
    colours = [ARM_COLOURS.get(arm, COLOURS[3 + i % 3]) for i, arm in enumerate(ends)]
    bars(left, range(len(ends)), list(ends.values()), colours)
    left.set_xticks(range(len(ends)), [arm.replace("(", "\n(") for arm in ends])
    label(left, "", "test accuracy", title="at the end")
    for (arm, curve), colour in zip(curves.items(), colours, strict=True):
        if "(" in arm:
            band(right, range(1, len(curve) + 1), [t_interval(row) for row in curve], colour, arm, markersize=2)
    label(right, "epoch of imitation", "test accuracy", title="on the way")
    for axis in (left, right):
        axis.set_ylim(0, 1.05)
    legend_below(figure, 4)
    return figure


@in_house_style
def cosine_figure(cosines: Mapping[str, Sequence[float]], title: str) -> Any:
    """Histograms of the cosine of both steps."""
    figure, axes = panels(2, size=(9.0, 3.4), title=title, sharey=True)
    reach = max(abs(value) for values in cosines.values() for value in values) * 1.1
    for axis, distance in zip(axes, ("mse", "ce"), strict=True):
        for start, colour in (("other", ORANGE), ("shared", BLUE)):
            values = cosines[f"{start} start, {distance}"]
            axis.hist(values, bins=24, range=(-reach, reach), color=colour, alpha=0.65, label=f"{start} start")
        axis.axvline(0, color="#333333", linewidth=0.8)
        label(axis, "cosine of student's and teacher's step", "nets", title=distance)
    legend_below(figure, 2)
    return figure
