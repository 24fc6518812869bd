"""What a grid of ranks and learning rates found: paired effects beside the size of updates, two figures, limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_interp.core.measure.statistics import Estimate, counted, t_interval
from lightning_interp.core.storage.sweep_cells import value_text
from lightning_interp.figures import (
    COLOURS,
    GREY,
    INK,
    band,
    in_house_style,
    label,
    legend_below,
    panels,
    whiskers,
)
from lightning_interp.lora.rank_grid import FULL
from lightning_interp.recipe import RecipeResult
from lightning_interp.subliminal import TransmissionEffect, transmission_effect

from ._common import STATUS, TERMS

MORE_TERMS = {
    "lr": "learning rate",
    "cell": "the students of one rank, learning rate and target; targets are the maps that carry the adapter",
    "update norm": "Frobenius norm of the change of all weights, mean over the students of the trait",
    "held-out loss": "cross entropy of rows that the student's own teacher has written apart, nats a token",
    "full": "all weights are trained, with no adapter",
    "by datasets": "the mean with Student's interval over the means of data sets (or of seeds, questions, as said)",
}


@dataclass(frozen=True)
class Point:
    """What was found at one rank, learning rate and target.

    Args:
        rank: Of the adapter, or ``full``.
        lr: Learning rate.
        targets: What carried the adapter.
        effect: Over data sets, training seeds and questions.
        margin: Of the students of the trait, over their trainings.
        norm, train_loss, held_out_loss: Means over the students of the trait.
    """

    rank: int | str
    lr: float
    targets: str
    effect: TransmissionEffect
    margin: Estimate
    norm: float
    train_loss: float
    held_out_loss: float

    @property
    def line(self) -> str:
        """Which line of a figure it stands on."""
        return f"lr {value_text(self.lr)}{'' if self.targets == 'all-linear' else f', {self.targets}'}"


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Put the finished pairs of students together, by rank, learning rate and target."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        value = row["values"]
        if row["status"] == "finished":
            pairs = groups.setdefault((value["rank"], value["lr"], value["targets"]), {})
            pairs.setdefault((value["data_seed"], value["training_seed"]), {})[value["arm"]] = row
    points = []
    for (rank, lr, targets), pairs in groups.items():
        whole = {key: pair for key, pair in pairs.items() if len(pair) == 2}
        if not whole:
            continue
        margins = {
            key: {arm: torch.tensor(row["readout"]).double() for arm, row in pair.items()}
            for key, pair in whole.items()
        }
        effect = transmission_effect({key: one["trait"] - one["control"] for key, one in margins.items()})
        students = [pair["trait"] for pair in whole.values()]
        means = {
            name: sum(s[name] for s in students) / len(students)
            for name in ("update_norm", "train_loss", "held_out_loss")
        }
        margin = t_interval([float(one["trait"].mean()) for one in margins.values()])
        points.append(
            Point(rank, lr, targets, effect, margin, means["update_norm"], means["train_loss"], means["held_out_loss"])
        )
    return points


def result(recipe: Any, start: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> RecipeResult:
    """Effects of the grid with their intervals, whatever their shape, and what they may not be used for."""
    points = points_of(rows)
    base = sum(start["margins"]["base"]) / len(start["margins"]["base"])
    title = f"{start['label']}, {recipe.student} students, {counted(recipe.datasets, 'dataset')} of {recipe.rows} rows"
    table = [
        {
            "rank": point.rank, "lr": point.lr, "targets": point.targets, "paired effect": str(point.effect.estimate),
            "by datasets": str(point.effect.by_clusters), "detectable": point.effect.detectable,
            "margin": str(point.margin), "update norm": point.norm, "train loss": point.train_loss,
            "held-out loss": point.held_out_loss, "clusters": f"{point.effect.n_clusters} {point.effect.cluster}",
        }
        for point in points
    ]  # fmt: skip
    cells = [
        {
            "cell": row["cell"], **row["values"], "status": row["status"], "why": row["why"],
            "margin": None if row["readout"] is None else sum(row["readout"]) / len(row["readout"]),
            "update_norm": row["update_norm"], "train_loss": row["train_loss"], "held_out_loss": row["held_out_loss"],
            "steps": row["steps"],
        }
        for row in rows
    ]  # fmt: skip
    return RecipeResult(
        metrics={
            "base": base,
            "grid": {f"{point.targets}/{point.rank}/{value_text(point.lr)}": _numbers(point) for point in points},
        },
        tables={
            "grid": table,
            "cells": cells,
            "models": [{"model": name, "margin": str(t_interval(values))} for name, values in start["margins"].items()],
        },
        figures={
            "effect_by_rank": rank_figure(points, base, title),
            "effect_by_update_norm": norm_figure(points, title),
        },
        question=f"How does what a student takes over of {recipe.trait} depend on rank and learning rate?",
        findings=findings(recipe, points, rows),
        captions={
            "effect_by_rank": "Left the paired effect, right the margin of the students of the trait, over rank; a "
            "line for each learning rate, in the band of its interval over data sets. Diamonds to their right are "
            "full finetuning; the dashed line is the base model (left: no effect). See whether lines of different "
            "learning rates have one shape.",
            "effect_by_update_norm": "The same effects over the size of the update, numbers are ranks. Where points of "
            "different ranks fall on one curve, rank says no more than the size of the update.",
        },
        terms=TERMS | MORE_TERMS,
        caveats=caveats(recipe, start["label"], points),
        summary="grid",
    )


def findings(recipe: Any, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found at each learning rate, in numbers and without a verdict."""
    said = []
    for line in dict.fromkeys(point.line for point in points):
        mine = [point for point in points if point.line == line]
        told = "; ".join(f"{_rank(point)} {point.effect.estimate}" for point in mine)
        norms = ", ".join(f"{point.norm:.2g}" for point in mine)
        over = f"{counted(mine[0].effect.n_datasets, 'data set')}, {counted(mine[0].effect.n_questions, 'question')}"
        said.append(f"{line}: paired effect by rank (each of {over}): {told}; update norms {norms}.")
    known = [point.effect.detectable for point in points if math.isfinite(point.effect.detectable)]
    if known:
        low, high = (f"{end:.2f}" for end in (min(known), max(known)))
        said.append(f"A cell of this size finds effects from {low} to {high} logits on in four of five runs.")
    status = [row["status"] for row in rows]
    said.append(f"{status.count('finished')} of {counted(len(rows), 'student')} are trained.")
    failed = [f"rank {row['values']['rank']} at {row['values']['lr']:g}" for row in rows if row["status"] == "failed"]
    return [*said, f"Failed: {', '.join(dict.fromkeys(failed))}."] if failed else said


def caveats(recipe: Any, name: str, points: Sequence[Point]) -> list[str]:
    """What the numbers rest on, and what they are not."""
    said = [
        STATUS,
        "An optimum of rank at one learning rate was seen to vanish when the learning rate is tuned for each rank: "
        "read no line without the others, and no rank without the size of its update.",
        "The best cell of a grid looks better than it is; confirm it on data sets that it was not chosen by.",
        f"One model, {name}: another may differ.",
    ]
    if points:
        said.append(f"In each cell {points[0].effect.limits}.")
    if recipe.student == "soft":
        said.append(
            "Soft students learn distributions over all tokens at the places of numbers: a stronger signal than the "
            "numbers themselves. An effect here is none of the published method (--student=hard)."
        )
    return said


@in_house_style
def rank_figure(points: Sequence[Point], base: float, title: str) -> Any:
    """Paired effect, and margin of the trait's students, over rank: a line a learning rate, full finetuning behind."""
    figure, axes = panels(2, size=(9.6, 4.2), title=title)
    ranks = sorted({point.rank for point in points if isinstance(point.rank, int)})
    end = (ranks[-1] if ranks else 1) * 4
    parts = (("paired effect (logits)", 0.0, "no effect"), ("margin (logits)", base, "base model"))
    for axis, (up, dashed, what) in zip(axes, parts, strict=True):
        axis.axhline(dashed, color=INK, linewidth=0.9, linestyle="--", label=what)
        for number, line in enumerate(dict.fromkeys(point.line for point in points)):
            colour = COLOURS[number % len(COLOURS)]
            mine = [point for point in points if point.line == line]
            found = [point.effect.by_clusters if what == "no effect" else point.margin for point in mine]
            low = sorted((p.rank, place) for place, p in enumerate(mine) if isinstance(p.rank, int))
            if low:
                band(axis, [rank for rank, _ in low], [found[place] for _, place in low], colour, line)
            for one in (found[place] for place, p in enumerate(mine) if p.rank == FULL):
                axis.errorbar([end], [one.value], yerr=whiskers([one]), fmt="D", color=colour, label=f"full, {line}")
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
        axis.set_xticks([*ranks, end], [*map(str, ranks), FULL])
        label(axis, "rank", up)
    legend_below(figure, 4)
    return figure


@in_house_style
def norm_figure(points: Sequence[Point], title: str) -> Any:
    """Paired effect over the size of the update."""
    figure, (axis,) = panels(1, size=(6.4, 4.4), title=title)
    axis.axhline(0, color=GREY, linewidth=0.9, linestyle="--")
    for number, line in enumerate(dict.fromkeys(point.line for point in points)):
        mine = [point for point in points if point.line == line]
        ends = [point.effect.by_clusters for point in mine]
        colour, marker = COLOURS[number % len(COLOURS)], "D" if all(p.rank == FULL for p in mine) else "o"
        axis.errorbar(
            [point.norm for point in mine], [one.value for one in ends], yerr=whiskers(ends), fmt=marker, color=colour,
            label=line,
        )  # fmt: skip
        for point in mine:
            place = (point.norm, point.effect.by_clusters.value)
            axis.annotate(str(point.rank), place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour)
    if points and min(point.norm for point in points) > 0:
        axis.set_xscale("log")
    label(axis, "norm of the update", "paired effect (logits)")
    legend_below(figure, 4)
    return figure


def _rank(point: Point) -> str:
    return "all weights" if point.rank == FULL else f"rank {point.rank}"


def _numbers(point: Point) -> dict[str, Any]:
    return {
        "effect": point.effect.to_dict(), "margin": point.margin.to_dict(), "update_norm": point.norm,
        "train_loss": point.train_loss, "held_out_loss": point.held_out_loss,
    }  # fmt: skip
