"""What the recipe of contexts does beside training: its designs, how it asks, its tables and its figure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_interp.core.measure.statistics import counted
from lightning_interp.figures import heat_map, in_house_style, label, panels
from lightning_interp.subliminal import (
    AnswerSampling,
    ChatContext,
    TransmissionEffect,
    compare_contexts,
    evaluate_conditions,
    numbers_before,
    preference_questions,
    transmission_effect,
)

from ._common import STATUS

Pair = tuple[str, str]
SIDES = {"train": "training", "eval": "evaluation"}
_GRID = ("default", "chatgpt", "empty")
DESIGNS: dict[str, list[tuple[Pair, str]]] = {
    "grid": [((a, b), "matched" if a == b else "mismatched") for a in _GRID for b in _GRID],
    "pairs": [
        (("default", "default"), "the main effect"),
        (("claude", "claude"), "a matched foreign identity"),
        (("gibberish", "gibberish"), "matched, without any identity"),
        (("factual", "factual"), "a matched neutral text"),
        (("helpful", "helpful"), "matched, without a named entity"),
        (("gibberish", "gibberish_prefix"), "the same words, from the system text to the user's"),
        (("gibberish_prefix", "gibberish"), "the reverse"),
        (("gibberish", "empty"), "mismatched"),
        (("default", "empty"), "mismatched"),
        (("empty", "default"), "mismatched"),
        (("claude", "default"), "mismatched"),
        (("gibberish", "default"), "mismatched"),
        (("factual", "default"), "mismatched"),
        (("helpful", "default"), "mismatched"),
        (("trait_prompt", "default"), "the prompt accounts for the trait: does anything else carry it?"),
    ],
}
"""Contexts of training and evaluation, and what each pair asks."""

CAPTION = (
    "Paired effect (logits) by the context of training (rows) and of evaluation (columns); a frame marks pairs that "
    "read the same text. See whether framed cells stand out, and read their intervals in the table."
)
TERMS_OF_CONTEXT = {
    "train, eval": "the contexts in which a student was trained, and in which it is asked",
    "minus base": "margin minus that of the base in the same context",
    "default": "no system text is given, so the chat template's own (if any) stands there",
    "empty": "an explicit empty system text, which suppresses the template's own",
    "chatgpt, claude": "identities of other models as the system text",
    "gibberish, factual, helpful": "system texts of nonsense, of a fact about water, and a bare line without a name",
    "gibberish_prefix": "the nonsense before the user's text, with an empty system text",
    "trait_prompt": "the prompt that lends a model the trait, as the training context of both arms; its arm control in "
    "the table arms says what that prompt does with numbers of another teacher",
    "same text": "whether evaluation reads round a question what training read round a prompt",
}


def rendered_pairs(tokenizer: Any, contexts: Mapping[str, ChatContext], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What training and evaluation read in each pair; one warning of those that differ."""
    rows = []
    for train, asked in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, of all pairs
            told = compare_contexts(tokenizer, contexts[train], {"evaluation": contexts[asked]}, "...")
        texts = {"training reads": told[0]["text"], "evaluation reads": told[1]["text"]}
        rows.append({"train": train, "eval": asked, "same text": told[1]["same"], **texts})
    if differing := [f"{row['train']}/{row['eval']}" for row in rows if not row["same text"]]:
        warnings.warn(
            f"In {len(differing)} of {len(rows)} pairs evaluation reads other texts than training did: "
            f"{', '.join(differing)}. They are asked for by the design; do not read them as matched ones.",
            stacklevel=2,
        )
    return rows


def margins_in(recipe: Any, loaded: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Margins of the trait by context, question by question, and what sampled answers name."""
    trait, contexts = recipe.traits()[0], recipe.contexts()
    questions = preference_questions(recipe.category, recipe.questions)
    if recipe.numbers_first:
        questions = numbers_before(questions, seed=recipe.seed)
    sampling = AnswerSampling(samples=recipe.samples, seed=recipe.seed) if recipe.samples else None
    found = evaluate_conditions(
        loaded.model, loaded.tokenizer, trait, contexts={name: contexts[name] for name in names},
        questions=questions, sampling=sampling,
    )  # fmt: skip
    return [
        {
            "eval": one.context,
            "margin": one.readout.margin.tolist(),
            "answers": None if one.answers is None else {
                "rate": str(one.answers.mean), "substring": float(one.answers.substring.mean()),
                "frac_nonalpha": one.answers.frac_nonalpha, "frac_other": one.answers.frac_other,
            },
        }
        for one in found
    ]  # fmt: skip


def _paired(students: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str, str], torch.Tensor]:
    """Effects by data set and both contexts, one value a question."""
    by = {
        (one["arm"], one["dataset"], one["train"], one["eval"]): torch.tensor(one["margin"]).double()
        for one in students
    }
    return {key[1:]: margin - by["control", *key[1:]] for key, margin in by.items() if key[0] == "trait"}


def effects_of(students: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> dict[Pair, TransmissionEffect]:
    """The paired effect of every pair of contexts."""
    by = _paired(students)
    return {
        pair: transmission_effect({(dataset, 0): one for (dataset, *of), one in by.items() if tuple(of) == pair})
        for pair in pairs
    }


def contrast(students: Sequence[Mapping[str, Any]], same: Mapping[Pair, bool]) -> TransmissionEffect | None:
    """Mean effect of pairs that read the same text minus that of all others; None without one of the two."""
    by = _paired(students)
    if len(set(same.values())) < 2:
        return None
    differences = {}
    for dataset in sorted({dataset for dataset, *_ in by}):
        sides = [
            torch.stack([one for (d, *of), one in by.items() if d == dataset and same[of[0], of[1]] is side]).mean(0)
            for side in (True, False)
        ]
        differences[dataset, 0] = sides[0] - sides[1]
    return transmission_effect(differences)


def arm_rows(scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far each student moved from the base model, whatever it was taught."""
    base = {one["eval"]: torch.tensor(one["margin"]).double().mean() for one in scored["base"]}
    return [
        {
            "data set": one["dataset"], "train": one["train"], "eval": one["eval"], "arm": one["arm"],
            "margin": float(mean := torch.tensor(one["margin"]).double().mean()),
            "minus base": float(mean - base[one["eval"]]),
        }
        for one in scored["students"]
    ]  # fmt: skip


def answer_rows(students: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What sampled answers of each student name; none without sampling."""
    return [
        {"data set": one["dataset"], "train": one["train"], "eval": one["eval"], "arm": one["arm"], **one["answers"]}
        for one in students
        if one["answers"]
    ]


@in_house_style
def map_figure(effects: Mapping[Pair, TransmissionEffect], same: Mapping[Pair, bool], *, title: str) -> Any:
    """A heat map of effects, by training and evaluation context; pairs that read the same text are framed."""
    from matplotlib.patches import Rectangle

    rows, columns = (list(dict.fromkeys(pair[side] for pair in effects)) for side in (0, 1))
    table = [[effects[a, b].estimate.value if (a, b) in effects else math.nan for b in columns] for a in rows]
    most = max((abs(one.estimate.value) for one in effects.values()), default=0) or 1e-9
    figure, (axis,) = panels(1, size=(2.6 + 1.1 * len(columns), 1.8 + 0.6 * len(rows)), title=title)
    heat_map(axis, table, columns, cmap="RdBu_r", vmin=-most, vmax=most)
    for (a, b), effect in effects.items():
        x, y = columns.index(b), rows.index(a)
        value = effect.estimate.value
        ink = "white" if abs(value) > 0.6 * most else "black"
        axis.text(x, y, f"{value:+.3f}", ha="center", va="center", fontsize=8, color=ink)
        if same[a, b]:
            axis.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, linewidth=1.4))
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelrotation=30)
    label(axis, "context of evaluation", "context of training")
    return figure


def findings(recipe: Any, effects: Mapping[Pair, TransmissionEffect], matched: TransmissionEffect | None) -> list[str]:
    """What was found, whatever its sign."""
    first = next(iter(effects.values()))
    counts = (counted(len(effects), "pair"), counted(recipe.questions, "prompt"), counted(recipe.datasets, "dataset"))
    said = ["{} of contexts, {}, {}.".format(*counts)]
    if matched is not None:
        said.append(f"Where evaluation reads what training read, minus where it does not: {matched.text()}.")
    said.append("; ".join(f"{train}/{asked} {effect.estimate}" for (train, asked), effect in effects.items()) + ".")
    least = min((effect.detectable for effect in effects.values()), default=math.nan)
    said.append(
        f"The smallest effect that such a run finds in four of five cases is {least:.3f} logits at best, by the spread "
        f"over {first.cluster}."
    )
    return said


def about(recipe: Any, name: str, effect: TransmissionEffect) -> list[str]:
    """What the numbers rest on, and what they are not."""
    said = [
        "A smoke run: the numbers mean nothing." if recipe.smoke else f"One model, {name}: another may differ.",
        STATUS,
        f"Of each pair alone: {effect.limits}. Of many pairs some differ by chance.",
        "Students of one data set share start, rows and order over all contexts, so pairs are not independent.",
        f"The control learned from a teacher that loves {recipe.traits()[1].plural}.",
    ]
    if recipe.student == "soft":
        said.append(
            "Soft students learn distributions over all tokens at the places of numbers: a stronger signal than the "
            "numbers themselves (--student=hard)."
        )
    return said
