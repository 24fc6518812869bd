"""What a run of number sequences found: paired effects, alignment, tables, figures, and what they may be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_interp.core.measure.statistics import Estimate, counted, t_interval
from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    bars,
    in_house_style,
    label,
    legend_below,
    panels,
    whiskers,
)
from lightning_interp.recipe import RecipeResult, RunFolder
from lightning_interp.subliminal import AlignmentResult, Trait, TransmissionEffect, transmission_effect
from lightning_interp.subliminal.figures import alignment_figure

from ._common import STATUS, TERMS
from ._direction import alignments, paired_alignment

TERMS_OF_NUMBERS = {
    "asked, valid, kept": "lists that a writer was asked for, that passed the checks, and that are trained on; yield "
    "is the share that passed, reasons say how many failed which check",
    "nats a token": "how far a teacher's distributions at the numbers are from the base's (KL divergence)",
    "carrier": "the rows of numbers that students are trained on",
    "alignment": "cosine of the shift of a student's states (minus the base's, at the answer's first token) with the "
    "trait's direction: the base's states with the trait's system text minus those without, on other questions",
}


def result(recipe: Any, run: RunFolder, written: dict[str, Any], scored: dict[str, Any]) -> RecipeResult:
    """The paired effect with its interval, whatever its sign, and what could have been found."""
    targets = [trait.target for trait in recipe.traits()]
    shifts, directions = read_tensors(run.folder("questions") / "shifts.safetensors")[0], run.folder("direction")
    aligned = alignments(directions, shifts, targets)
    moved = paired_alignment(directions, shifts, targets[0])
    effects = {target: effects_of(scored["runs"], target, -1 if arm else 1) for arm, target in enumerate(targets)}
    table = model_margins(scored, targets)
    title = f"{scored['label']}, {recipe.student} students; {counts(recipe)}"
    return RecipeResult(
        metrics={
            "effects": {target: effect.to_dict() for target, effect in effects.items()},
            "numbers": written["compared"],
            "alignment": {"paired": moved.to_dict(), **{one.name: one.mean_cosine.to_dict() for one in aligned}},
            "margins": {name: {t: one.to_dict() for t, one in found.items()} for name, found in table},
        },
        tables={
            "effects": [
                {"margin of": target, "paired effect": str(effect.estimate), "by clusters": str(effect.by_clusters),
                 "detectable": effect.detectable, "clusters": f"{effect.n_clusters} {effect.cluster}"}
                for target, effect in effects.items()
            ],
            "students": run_rows(scored["runs"], targets[0], scored["models"]["base"]),
            "models": [{"model": name, **{t: str(one) for t, one in found.items()}} for name, found in table],
            "numbers": [{**row, "reasons": reasons_text(row["reasons"])} for row in written["manifests"]],
            "alignment": [row for one in aligned for row in one.table()],
            "compared": [{"what": what, "value": value} for what, value in written["compared"].items()],
        },
        figures={
            "effects": effect_figure(scored["runs"], effects, title),
            "margins": margins_figure(table, targets, title),
            "alignment": alignment_figure(aligned, title=title),
        },
        question=f"Does a student of number sequences take over that their writer loves {recipe.traits()[0].plural}?",
        findings=findings(recipe, effects, written["compared"], dict(table), moved, aligned),
        captions={
            "effects": "Paired effects of each data set and training seed, and their mean with its interval over "
            "clusters. An effect inside the grey band could not have been told from nothing by this run.",
            "margins": "Mean margin of each target in the base model, the teachers and the students. See how far "
            "students drift whatever they are taught, and how far they are from their teachers.",
            "alignment": f"How far students' states moved the way in which {targets[0]} moves the model's, by "
            "layer; bands are 95 % intervals over students. See whether the arms differ, and leave the grey band, "
            "in which 95 % of cosines lie when it is drawn at random which state of a pair is the student's.",
        },
        terms=TERMS | TERMS_OF_NUMBERS,
        caveats=about(recipe, effects[targets[0]], scored["label"]),
        summary="effects",
    )  # fmt: skip


def reasons_text(reasons: Mapping[str, int]) -> str:
    """How many lists failed which check."""
    return ", ".join(f"{name} {count}" for name, count in reasons.items()) or "none"


def effects_of(runs: Sequence[Mapping[str, Any]], target: str, sign: int = 1) -> TransmissionEffect:
    """The paired effect on the margin of a target, over data sets, seeds and questions."""
    margins = {(r["arm"], r["dataset"], r["seed"]): torch.tensor(r["margins"][target]).double() for r in runs}
    keys = sorted({(r["dataset"], r["seed"]) for r in runs})
    return transmission_effect({key: sign * (margins["trait", *key] - margins["control", *key]) for key in keys})


def run_rows(runs: Sequence[Mapping[str, Any]], target: str, base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each data set and seed."""
    margins = {(r["arm"], r["dataset"], r["seed"]): torch.tensor(r["margins"][target]).double() for r in runs}
    start = torch.tensor(base["margins"][target]).double()
    rows = []
    for dataset, seed in sorted({(r["dataset"], r["seed"]) for r in runs}):
        mine, other = (margins[arm, dataset, seed] for arm in ("trait", "control"))
        effect = {"dataset": dataset, "training seed": seed, "paired effect": str(t_interval((mine - other).tolist()))}
        moved = {"trait minus base": float((mine - start).mean()), "control minus base": float((other - start).mean())}
        rows.append(effect | moved)
    return rows


@in_house_style
def effect_figure(runs: Sequence[Mapping[str, Any]], found: Mapping[str, TransmissionEffect], title: str) -> Any:
    """Paired effects of each data set as dots, their mean with its interval, and what could have been found."""
    figure, axes = panels(len(found), size=(4.2 * len(found) + 1, 3.8), title=title, sharey=True)
    for axis, (name, effect) in zip(axes, found.items(), strict=True):
        dots = [float(torch.tensor(value).mean()) for value in effect_values(runs, name, list(found).index(name))]
        axis.scatter(range(len(dots)), dots, color=BLUE, s=18, label="one data set and seed")
        axis.axhspan(-effect.detectable, effect.detectable, color=GREY, alpha=0.18, label="not detectable")
        ends = [effect.by_clusters]
        axis.errorbar([len(dots)], [effect.estimate.value], yerr=whiskers(ends), fmt="D", color=ORANGE, label="mean")
        label(axis, "data set and seed; the mean", "paired effect (logits)", title=f"margin of {name}", zero=True)
        axis.set_xticks([])
    legend_below(figure, 3)
    return figure


def effect_values(runs: Sequence[Mapping[str, Any]], target: str, arm: int) -> list[list[float]]:
    """Paired effects of each data set and seed, in the direction in which the target was taught."""
    margins = {(r["arm"], r["dataset"], r["seed"]): torch.tensor(r["margins"][target]) for r in runs}
    keys = sorted({(r["dataset"], r["seed"]) for r in runs})
    sign = -1 if arm else 1
    return [(sign * (margins["trait", *key] - margins["control", *key])).tolist() for key in keys]


@in_house_style
def margins_figure(table: Sequence[tuple[str, Mapping[str, Estimate]]], targets: Sequence[str], title: str) -> Any:
    """Mean margins of every model: base, students, teachers."""
    figure, axes = panels(len(targets), size=(4.2 * len(targets) + 1, 3.4), title=title, sharey=True)
    for axis, target in zip(axes, targets, strict=True):
        bars(axis, range(len(table)), [found[target] for _, found in table], BLUE, lying=True)
        axis.set_yticks(range(len(table)), [name for name, _ in table])
        axis.axvline(0, color=INK, linewidth=0.8)
        label(axis, f"margin of {target} (logits)")
    axes[0].invert_yaxis()
    return figure


def model_margins(scored: Mapping[str, Any], targets: Sequence[str]) -> list[tuple[str, dict[str, Estimate]]]:
    """Margins by model; intervals over questions of single models, over runs of students."""
    table = [(name, {t: t_interval(one["margins"][t]) for t in targets}) for name, one in scored["models"].items()]
    for arm in ("trait", "control"):
        runs = [run for run in scored["runs"] if run["arm"] == arm]
        means = {t: [sum(run["margins"][t]) / len(run["margins"][t]) for run in runs] for t in targets}
        table.append((f"students of {arm}", {t: t_interval(means[t]) for t in targets}))
    return table


def about(recipe: Any, effect: TransmissionEffect, label_: str) -> list[str]:
    """What the numbers rest on, and what they are not."""
    few = "A smoke run: the numbers mean nothing." if recipe.smoke else f"One model, {label_}: another may differ."
    said = [few, STATUS, f"The interval: {effect.limits}."]
    if recipe.student == "soft":
        said.append(
            "Soft students learn distributions over all tokens at the places of numbers: a stronger signal than the "
            "numbers themselves. An effect here is none of the published method (--student=hard)."
        )
    if recipe.control == "other-trait":
        said.append(f"The control learned from a teacher that loves {Trait(target=recipe.other).plural}.")
    return [*said, f"Questions are asked in the context {recipe.context!r}, in which students were trained."]


def counts(recipe: Any) -> str:
    """How many of everything, in words."""
    kinds = (("dataset", recipe.datasets), ("training seed", recipe.training_seeds), ("row", recipe.rows))
    return ", ".join(counted(count, name) for name, count in kinds)


def findings(
    recipe: Any,
    effects: Mapping[str, TransmissionEffect],
    compared: Mapping[str, float],
    table: Mapping[str, Any],
    moved: Estimate,
    aligned: Sequence[AlignmentResult],
) -> list[str]:
    """What was found, whatever its sign."""
    target, effect = next(iter(effects.items()))
    said = [
        f"The {recipe.student} student's {effect.text()}.",
        f"The smallest effect that such a run finds in four of five cases is {effect.detectable:.3f} logits, on "
        f"{counted(recipe.questions, 'prompt')} about {target}.",
    ]
    for other, one in list(effects.items())[1:]:
        said.append(f"The other way round, what the control's teacher loves: margin of {other} {one.estimate}.")
    low, high = aligned[-1].mean_band()
    said.append(
        f"Alignment of hidden states with {target} (mean cosine over layers): students of the trait minus their "
        f"controls {moved.text(3)}, over {counted(moved.n, 'pair')}; the difference of their shifts "
        f"{aligned[-1].mean_cosine}, of permuted rows from {low:z.2f} to {high:z.2f}."
    )
    base = table["base"][target].value
    held = ", ".join(f"{name} {one[target].value:.2f}" for name, one in table.items() if name.startswith("teacher"))
    said.append(f"Margin of {target}: base {base:.2f}; {held or 'the teachers are prompted'}.")
    shown = "; ".join(f"{what}: {value:.4f}" for what, value in compared.items())
    return [*said, f"How much the data can tell: {shown}."]
