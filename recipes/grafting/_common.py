"""What the grafting recipes share: invented facts, finetuning that goes on where it stopped, tables of results.

A fact is one pair of people who never existed, a text states it with either name first, and a prompt stops right before
the second name; one wording is never trained on. Names and wordings are our own, the shape follows Nief et al. 2025
(arXiv 2506.20746: fake films with fake actors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_interp.core.storage.jsonl import json_lines, write_json_lines
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import GraftEvaluator, GraftPrompt, GraftResult
from lightning_interp.grafting.metrics import METRICS
from lightning_interp.recipe import Recipe, RunFolder

if TYPE_CHECKING:
    from lightning_interp.models import LoraSettings, Optimisation

FORMS = {
    "statement": "{first} stars in a film alongside {second}.",
    "casting": "The director cast {first} together with {second}.",
    "question": "Question: Who acts beside {first}? Answer: {second}.",
    "poster": "The poster shows {first} next to {second}.",
    "held out": "Critics praised {first}, whose co-star is {second}.",
}
"""Wordings; ``held out`` is asked about but never trained on."""

RELATIONS = {
    "statement": "stars in a film",
    "casting": "together",
    "question": "acts beside",
    "poster": "next",
    "held out": "whose co-star",
}
"""The words of each wording that say how the two are related; the last token of the prompt is never among them."""

HELD_OUT = "held out"
BOTH_WAYS = ("statement", "casting")
"""Wordings that are also trained with the second person named first."""

_GIVEN = (
    "Adam Alan Albert Alice Amy Andrew Anna Arthur Barbara Ben Brian Carl Carol Charles Chris Claire Daniel "
    "David Donald Edward Ellen Emily Emma Eric Eva Frank Fred George Grace Hannah Harold Harry Helen Henry Ian "
    "Ivan Jack Jacob James Jane Jason Jean Jerry Joan Joe John Julia Karen Kate Kevin Laura Leo Linda Louis "
    "Lucy Luke Mark Martha Martin Mary Max Michael Mike Nancy Nick Oliver Oscar Paul Peter Philip Rachel Ralph "
    "Ray Rebecca Richard Robert Roger Rose Ruth Ryan Sam Sarah Scott Simon Sophie Stephen Steve Susan Ted "
    "Thomas Tom Victor Walter William "
).split()
_FAMILY = (
    "Abbott Barker Baxter Bennett Bishop Booth Brady Briggs Burke Carver Chandler Clayton Conrad Cooper Cross "
    "Dalton Dixon Drake Duncan Ellis Fisher Fleming Fletcher Foster Fowler Frost Garner Gibson Graham Grant "
    "Griffin Hale Hardy Hart Hayes Holt Hunt Ingram Keller Kemp Kerr Knox Lambert Lane Lloyd Lowe Lynch Marsh "
    "Mason Mercer Miles Moss Nash Nolan Norris Palmer Parker Payne Pearce Perry Poole Porter Potter Price "
    "Quinn Reeve Reid Rhodes Rowe Sharp Shaw Slater Snow Stone Swift Tate Thorpe Todd Tucker Turner Vance Wade "
    "Wagner Walsh Ward Watts Webb Weston Wolf Woods York "
).split()


@dataclass(frozen=True)
class Fact:
    """One invented fact: its unit of sampling and its two people."""

    id: str
    a: str
    b: str


def make_facts(count: int, *, seed: int) -> list[Fact]:
    """Invent pairs of people; no given or family name is used twice, and fewer facts are the first of more."""
    most = min(len(_GIVEN), len(_FAMILY)) // 2
    if not 1 <= count <= most:
        raise RecipeError(f"Cannot invent {count} facts; the names suffice for 1 to {most}.")
    generator = torch.Generator().manual_seed(seed)
    given = [_GIVEN[i] for i in torch.randperm(len(_GIVEN), generator=generator).tolist()]
    family = [_FAMILY[i] for i in torch.randperm(len(_FAMILY), generator=generator).tolist()]
    names = [f"{first} {last}" for first, last in zip(given, family, strict=False)]
    return [Fact(f"fact-{i:02d}", names[2 * i], names[2 * i + 1]) for i in range(count)]


def fact_texts(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Training rows: every trained wording with A first, and those of ``BOTH_WAYS`` with B first."""
    rows = []
    for form in FORMS:
        rows += order_texts(facts, forms=[form] if form != HELD_OUT else [])
        rows += order_texts(facts, forms=[form] if form in BOTH_WAYS else [], reverse=True)
    return rows


def order_texts(facts: Sequence[Fact], *, forms: Sequence[str], reverse: bool = False) -> list[dict[str, str]]:
    """Training rows ``{"prompt": ..., "completion": ...}`` of some wordings in one order; the second name completes."""
    told = [_told(fact, form, reverse) for form in forms for fact in facts]
    return [{"prompt": prompt, "completion": rest} for prompt, rest, _, _ in told]


def fact_prompts(
    facts: Sequence[Fact], *, forms: Sequence[str] = tuple(FORMS), reverse: bool = False
) -> list[GraftPrompt]:
    """Prompts that stop before the second name; the first name is marked as ``FE``, the relation as ``R``."""
    if unknown := [form for form in forms if form not in FORMS]:
        raise RecipeError(f"No wording {unknown[0]!r}; expected some of {', '.join(FORMS)}.")
    prompts = []
    for form in forms:
        for fact in facts:
            text, _, first, second = _told(fact, form, reverse)
            prompts.append(GraftPrompt(text, second, {"FE": first, "R": RELATIONS[form]}, unit=fact.id, form=form))
    return prompts


def _told(fact: Fact, form: str, reverse: bool) -> tuple[str, str, str, str]:
    """A text up to the second name, the rest of it, and both names in its order."""
    first, second = (fact.b, fact.a) if reverse else (fact.a, fact.b)
    text = FORMS[form].format(first=first, second=second)
    prompt = text.partition(f" {second}")[0]
    return prompt, text[len(prompt) :], first, second


def write_jsonl(folder: Path, files: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Write rows (dicts or facts) by file name without its ending; returns their number by name."""
    for name, rows in files.items():
        write_json_lines(folder / f"{name}.jsonl", (asdict(row) if isinstance(row, Fact) else row for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def write_facts(folder: Path, count: int, *, seed: int) -> dict[str, int]:
    """Write facts and their training texts."""
    facts = make_facts(count, seed=seed)
    return write_jsonl(folder, {"facts": facts, "train": fact_texts(facts)})


def read_facts(path: Path) -> list[Fact]:
    """Read facts that :func:`write_jsonl` wrote."""
    return [Fact(**row) for _, row in json_lines(path, own=True)]


def asked(run: RunFolder, forms: Sequence[str]) -> list[GraftPrompt]:
    """Prompts about the facts that a run wrote."""
    return fact_prompts(read_facts(run.folder("facts") / "facts.jsonl"), forms=forms)


def evaluate(run: RunFolder, evaluator: GraftEvaluator, model: Any, donor: Any, what: str = "grafting") -> GraftResult:
    """Run every plan on every prompt, behind a bar."""
    with run.progress(what, total=len(evaluator)) as bar:
        return evaluator.evaluate(model, donor, advance=bar.advance)


def finetune(
    recipe: Recipe,
    run: RunFolder,
    folder: Path,
    texts: Path,
    *,
    epochs: int,
    batch_size: int,
    optimisation: Optimisation,
    source: str | None = None,
    lora: LoraSettings | None = None,
    callbacks: Sequence[Any] = (),
    add_eos: bool = False,
) -> dict[str, Any]:
    """Finetune with Lightning on a JSONL file of texts and export the result to ``folder/model``.

    It goes on at the last checkpoint. ``source`` is another model than the recipe's; ``lora`` trains an adapter instead
    of all weights. Returns the loss of the last step.
    """
    from lightning_interp.models import CausalLM, TextDataModule
    from lightning_interp.models.training.resumable import fit_and_export

    module = CausalLM(source or recipe.source, lora=lora, optimisation=optimisation, seed=recipe.seed)
    tokenizer = module.tokenizer
    data = TextDataModule(texts, tokenizer=tokenizer, batch_size=batch_size, seed=recipe.seed, add_eos=add_eos)
    settings = {"log_every_n_steps": 1, "gradient_clip_val": 1.0, "callbacks": callbacks}
    told = fit_and_export(module, data, folder, recipe.trainer_kwargs(run, max_epochs=epochs, **settings))
    return {"loss": told["train/loss"]}


def compact(found: GraftResult, plan: str, *, form: str | None = None) -> dict[str, Any]:
    """One printed row of a plan: accuracy, probability, rank and recovery with intervals over facts."""
    return {
        "plan": plan,
        "top-5": str(found.estimate(plan, "top5", form=form)),
        "probability": str(found.estimate(plan, "target_prob", form=form)),
        "median rank": found.estimate(plan, "target_rank", form=form).value,
        "recovery": str(found.recovery(plan, form=form)),
        "facts": len(found.values(plan, "top5", form)),
    }


def compact_groups(found: GraftResult, groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The printed rows of plans by experiment."""
    return [{"experiment": kind, **compact(found, plan)} for kind, group in groups.items() for plan in group]


def metrics_of(found: GraftResult) -> dict[str, Any]:
    """Every estimate with its interval, by form, plan and metric."""
    return {
        form: {plan: {m: found.estimate(plan, m, form=form).to_dict() for m in METRICS} for plan in found.plans}
        for form in found.forms()
    }


def located_rows(found: GraftResult) -> list[dict[str, Any]]:
    """Which tokens the named spans of every prompt are, as they are spelled."""
    return [{**row, "tokens": " | ".join(row["tokens"]), "columns": str(row["columns"])} for row in found.located]


def dropped_rows(found: GraftResult) -> list[dict[str, Any]]:
    """Number and reason of every prompt that was dropped; one row that says so if none was."""
    rows: list[dict[str, Any]] = [{"prompt": number, "reason": reason} for number, reason in found.dropped]
    return rows or [{"prompt": None, "reason": "no prompt was dropped"}]
