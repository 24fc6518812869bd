"""What the recipe of gates does: its gates, how it asks, its table and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_interp import StepContext
from lightning_interp.core.measure.statistics import Estimate, counted, mean_interval
from lightning_interp.errors import PositionError
from lightning_interp.figures import BLUE, GREY, ORANGE, bars, in_house_style, label, legend_below, panels
from lightning_interp.lora import AdapterGate, GateSpec
from lightning_interp.models.sources.adapters import ADAPTER
from lightning_interp.subliminal import ChatContext, Trait, trait_logits

from ._common import STATUS

NOT = "all but "
_GATES: dict[str, Any] = {
    "entity": None,
    "system": {"kind": "system"},
    "template": {"kind": "chat_template"},
    "question": {"kind": "user"},
    "answer": {"kind": "assistant"},
    "last": {"kind": "last"},
}
CAPTION = (
    "Margin of the trait with the adapter on at these tokens alone (blue) and everywhere but there (orange); the lines "
    "are the adapter everywhere (full) and nowhere (dashed). Intervals are over questions. See which blue bars reach "
    "the full line (enough) and which orange bars fall short of it (needed): a gate may be both, or neither."
)
TERMS = {
    "entity": "all tokens of the first mention of the name",
    "system": "what the system turn says, the template's own text included",
    "template": "what nobody wrote: marks of turns, and a system text that the template puts there by itself",
    "question": "what the user says",
    "answer": "how the answer begins",
    "last": "the last token of the prompt, at which the answer is read",
    "all but ...": "the adapter is on at all other tokens",
    "margin": "logit of the trait's name as the answer, minus the mean over the names that it is compared with",
    "P": "probability of the trait among these names",
    "on tokens": "tokens of the first question's prompt at which the adapter is on",
    "[a, b]": "95 % interval, by a bootstrap over questions",
}


def gates_of(recipe: Any) -> dict[str, GateSpec]:
    """Every gate and its inverse, in the modules and layers that were asked for; everywhere and nowhere first."""
    cells = {"modules": recipe.modules, "layers": recipe.layers}
    gates = {"all": GateSpec(**cells), "none": GateSpec(tokens=[])}
    for name, tokens in _GATES.items():
        tokens = recipe.entity if name == "entity" else tokens
        if tokens:
            gates[name] = GateSpec(tokens=tokens, **cells)
            gates[NOT + name] = GateSpec(tokens=tokens, invert=True, **cells)
    return gates


def located(
    gates: Mapping[str, GateSpec], tokenizer: Any, context: ChatContext, questions: Sequence[str]
) -> tuple[dict[str, tuple[GateSpec, int]], list[str]]:
    """Gates with the number of tokens at which they are on, and why others are left out."""
    kept: dict[str, tuple[GateSpec, int]] = {}
    left_out = []
    ids = torch.tensor([context.ids(tokenizer, questions[0])])
    step = StepContext(1, ids.shape[1], input_ids=ids, find_tokenizer=lambda: tokenizer)
    for name, spec in gates.items():
        try:
            chosen = int(spec.positions.mask(step).sum())
        except PositionError as error:
            left_out += [] if name.startswith(NOT) else [f"{name}: {error}"]
            continue
        if not chosen and spec.tokens != ():
            left_out += [] if name.startswith(NOT) else [f"{name}: no token of the prompt is one."]
            continue
        kept[name] = (spec, ids.shape[1] - chosen if spec.invert else chosen)
    return kept, left_out


def read_under(
    loaded: Any, spec: GateSpec, trait: Trait, questions: Sequence[str], context: ChatContext
) -> dict[str, list[float]]:
    """Margin and probability of the trait under one gate, question by question."""
    found = trait_logits(
        loaded.model, loaded.tokenizer, trait, questions, context=context, gate=AdapterGate(ADAPTER, spec)
    )
    return {"margin": found.margin.tolist(), "share": found.share.tolist()}


def beside(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a gate with its inverse beside it; ``all`` beside ``none``."""
    by = {row["gate"]: row for row in rows}
    table = []
    for name, row in by.items():
        if name == "none" or name.startswith(NOT):
            continue
        other = by["none" if name == "all" else NOT + name]
        line: dict[str, Any] = {"gate": name}
        for side, one in (("", row), ("inverse: ", other)):
            line[f"{side}on tokens"] = one["on tokens"]
            line[f"{side}margin"] = str(mean_interval(one["margin"]))
            line[f"{side}P"] = sum(one["share"]) / len(one["share"])
        table.append(line)
    return table


@in_house_style
def gates_figure(margins: Mapping[str, Estimate], *, title: str) -> Any:
    """Bars of every gate beside its inverse, between the adapter everywhere and nowhere."""
    names = [name for name in margins if NOT + name in margins]
    figure, (axis,) = panels(1, size=(1.6 + 1.1 * max(len(names), 2), 3.9), title=title)
    for shift, colour, prefix, said in ((-0.2, BLUE, "", "on there alone"), (0.2, ORANGE, NOT, "on everywhere else")):
        bars(
            axis, [i + shift for i in range(len(names))], [margins[prefix + n] for n in names], colour, said, width=0.38
        )
    for name, style in (("all", "-"), ("none", "--")):
        axis.axhline(margins[name].value, color=GREY, linestyle=style, linewidth=1.2, label=f"adapter {name}")
    axis.set_xticks(range(len(names)), names)
    label(axis, "tokens", "margin (logits)", zero=True)
    legend_below(figure, 4)
    return figure


def findings(recipe: Any, margins: Mapping[str, Estimate]) -> list[str]:
    """What was found, whatever it is."""
    names = [name for name in margins if NOT + name in margins]
    asked = f"Over {counted(recipe.questions, 'prompt')}"
    said = [
        f"{asked}, the margin of {recipe.trait} is {margins['all']} with the adapter at all tokens and "
        f"{margins['none']} with it at none."
    ]
    if names:
        enough = max(names, key=lambda name: margins[name].value)
        needed = min(names, key=lambda name: margins[NOT + name].value)
        said += [
            f"On at one kind of token alone, it is largest at {enough}: {margins[enough]}.",
            f"On everywhere but at one kind, it is least without {needed}: {margins[NOT + needed]}.",
        ]
    return said


def about(recipe: Any, asked: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, and what they are not."""
    where = [f"{name}={value}" for name in ("modules", "layers") if (value := getattr(recipe, name)) is not None]
    origin = (
        "The adapter was trained on rows that state the preference: nothing about it is subliminal. Compare with a "
        "student of number sequences (--adapter=...)."
        if not recipe.adapter
        else "How the adapter was trained is not known here; without a control student, what it does may have nothing "
        "to do with a trait."
    )
    return [
        "A smoke run: the numbers mean nothing."
        if recipe.smoke
        else f"One adapter of {asked['label']}: another may differ.",
        "Sufficiency and necessity are not complementary: a gate that is enough need not be needed, margins under a "
        "gate and its inverse do not add up, and no gate has a share of the effect.",
        "Later tokens read what the adapter wrote at earlier ones: a gate says where the adapter acts, not where a "
        "trait is stored.",
        origin,
        STATUS,
        *([f"Gated in {', '.join(where)} alone; elsewhere the adapter is off throughout."] if where else []),
        *(f"Left out, {reason}" for reason in asked["left_out"]),
    ]
