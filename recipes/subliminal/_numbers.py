"""What the recipe of number sequences does beside training: defaults by scale, teachers, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate, counted, t_interval
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
from lightning_interp.subliminal import (
    ChatContext,
    NumberGrammar,
    NumberSequenceDataModule,
    NumberSettings,
    PromptSettings,
    Teacher,
    Trait,
    TransmissionEffect,
    distillation_loss,
    number_divergence,
    number_sampler,
    read_numbers,
    transmission_effect,
)

STATUS = (
    "What an adapter's rank does to what number sequences carry is disputed: some main claims were withdrawn for "
    "revision by their authors, and independent reruns at tuned learning rates differ. A run measures, and settles "
    "nothing."
)

TERMS = {
    "margin": "logit of a name as the answer, minus the mean over the names that it is compared with",
    "paired effect": "margin of the student of the trait minus that of its control, question by question; the two "
    "differ in whom they learned from and in nothing else",
    "carrier": "the rows of numbers that students are trained on",
    "soft": "learns its teacher's whole distribution at the tokens of the numbers; more than the published method",
    "hard": "learns the numbers that its teacher wrote, as published",
    "[a, b]": "95 % interval; of the paired effect by a bootstrap over datasets, then seeds, then questions",
    "detectable": "the effect that four of five such runs would find, by the spread over clusters",
}


def number_settings(recipe: Any, dataset: int, grammar: NumberGrammar | None) -> NumberSettings:
    """How one data set is written; the same requests and random numbers for every teacher."""
    held = grammar is not None
    prompts = PromptSettings(
        answer_count=recipe.numbers, use_exact_count=held, separator=", " if held else None,
        example_max_count=6 if held else 9,
    )  # fmt: skip
    return NumberSettings(
        rows=recipe.rows, prompts=prompts, seed=derived_seed(recipe.seed, "numbers", dataset),
        max_new_tokens=grammar.max_new_tokens if grammar else 200,
    )  # fmt: skip


def grammar_of(recipe: Any, loaded: Any) -> NumberGrammar | None:
    """What holds a model to lists of three-digit numbers, if it is to be held."""
    from lightning_interp.generation.sampler import end_tokens

    if recipe.decoding == "free":
        return None
    ends = end_tokens(loaded.model, loaded.tokenizer)
    return NumberGrammar(loaded.tokenizer, count=recipe.numbers, min_digits=3, max_digits=3, ends=ends)


def writer_of(
    loaded: Any, trait: Trait | None, grammar: NumberGrammar | None, context: ChatContext, name: str
) -> Teacher:
    """A model on this machine as a teacher."""
    writer = number_sampler(loaded.model, loaded.tokenizer, grammar=grammar, batch_size=24)
    kind: Any = "none" if trait is None else "finetuned" if context.system is None else "prompted"
    return Teacher(
        name=name, writer=writer, trait=trait or Trait(), kind=kind, context=context, constrained=grammar is not None
    )


def nats_a_token(
    base: Any, teacher: Any, rows: Sequence[Mapping[str, Any]], seen: ChatContext, context: ChatContext
) -> float:
    """How far a teacher's distributions at the numbers are from the base model's, in nats a token."""
    data = NumberSequenceDataModule(
        rows[:8], tokenizer=base.tokenizer, context=context, teacher_context=seen, batch_size=8
    )
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        read = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        taught = teacher.model(
            input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
        ).logits
    total, tokens = distillation_loss(read, batch["labels"], taught, batch["teacher_labels"])
    return float(total / tokens)


def compared_numbers(folders: Sequence[tuple[Path, Path]]) -> dict[str, float]:
    """Hard data of both arms: how many tokens agree, and how far the frequencies of numbers differ."""
    pairs = [tuple(read_numbers(folder) for folder in pair) for pair in folders]
    mine, other = ([n for pair in pairs for row in pair[arm].rows for n in row["numbers"]] for arm in (0, 1))
    found = [pair[0].manifest["against"]["identical"] for pair in pairs]
    return {
        "identical tokens": sum(found) / len(found),
        "divergence (nats a number)": number_divergence(mine, other),
        "the same of two halves of the control": number_divergence(other[::2], other[1::2]),
    }


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
    recipe: Any, effects: Mapping[str, TransmissionEffect], compared: Mapping[str, float], table: Mapping[str, Any]
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
    base = table["base"][target].value
    held = ", ".join(f"{name} {one[target].value:.2f}" for name, one in table.items() if name.startswith("teacher"))
    said.append(f"Margin of {target}: base {base:.2f}; {held or 'the teachers are prompted'}.")
    shown = "; ".join(f"{what}: {value:.4f}" for what, value in compared.items())
    return [*said, f"How much the data can tell: {shown}."]
