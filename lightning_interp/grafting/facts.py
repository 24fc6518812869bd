"""Invented facts to finetune on: two people who never existed, one relation, several wordings, both orders.

The wordings and names are our own; the shape follows Nief et al. 2025 (arXiv 2506.20746, fake films with fake actors):
a fact is one pair, a text states it with either name first, and a prompt stops right before the second name. One
wording is never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_interp.errors import RecipeError
from lightning_interp.grafting.prompts import GraftPrompt

__all__ = ["FORMS", "Fact", "fact_prompts", "fact_texts", "make_facts", "order_texts"]

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
    """One invented fact.

    Args:
        id: Unit of sampling.
        a: First person.
        b: Second person.
    """

    id: str
    a: str
    b: str


def make_facts(count: int, *, seed: int) -> list[Fact]:
    """Invent pairs of people; no given name and no family name is used twice.

    Args:
        count: Number of facts.
        seed: The same seed gives the same facts.

    Returns:
        The facts.

    Raises:
        RecipeError: If there are not enough names.

    Example:
        >>> make_facts(2, seed=0) == make_facts(3, seed=0)[:2]
        True
    """
    most = min(len(_GIVEN), len(_FAMILY)) // 2
    if not 1 <= count <= most:
        raise RecipeError(f"Cannot invent {count} facts; the names suffice for 1 to {most}.")
    generator = torch.Generator().manual_seed(seed)
    given = [_GIVEN[i] for i in torch.randperm(len(_GIVEN), generator=generator).tolist()]
    family = [_FAMILY[i] for i in torch.randperm(len(_FAMILY), generator=generator).tolist()]
    names = [f"{first} {last}" for first, last in zip(given, family, strict=False)]
    return [Fact(f"fact-{i:02d}", names[2 * i], names[2 * i + 1]) for i in range(count)]


def fact_texts(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Training rows ``{"prompt": ..., "completion": ...}``; the completion is the second name.

    Returns:
        Every trained wording with A first, and those of ``BOTH_WAYS`` with B first.

    Example:
        >>> rows = fact_texts(make_facts(2, seed=0))
        >>> rows[0]["prompt"].endswith(" alongside"), len(rows)
        (True, 12)
    """
    rows = []
    for name in FORMS:
        rows += order_texts(facts, forms=[name] if name != HELD_OUT else [])
        rows += order_texts(facts, forms=[name] if name in BOTH_WAYS else [], reverse=True)
    return rows


def order_texts(facts: Sequence[Fact], *, forms: Sequence[str], reverse: bool = False) -> list[dict[str, str]]:
    """Training rows of some wordings in one order.

    Args:
        facts: What to tell.
        forms: Keys of ``FORMS``.
        reverse: B first, A second.

    Returns:
        Rows ``{"prompt": ..., "completion": ...}``; the completion is the name that comes second.

    Example:
        >>> fact = make_facts(1, seed=0)[0]
        >>> order_texts([fact], forms=["poster"], reverse=True)[0]["completion"] == f" {fact.a}."
        True
    """
    rows = []
    for form in forms:
        for fact in facts:
            first, second = (fact.b, fact.a) if reverse else (fact.a, fact.b)
            text = FORMS[form].format(first=first, second=second)
            prompt = text.partition(f" {second}")[0]
            rows.append({"prompt": prompt, "completion": text[len(prompt) :]})
    return rows


def fact_prompts(
    facts: Sequence[Fact], *, forms: Sequence[str] = tuple(FORMS), reverse: bool = False
) -> list[GraftPrompt]:
    """Prompts that stop before the second name; the first name is marked as ``FE``, the relation as ``R``.

    Args:
        facts: What to ask about.
        forms: Keys of ``FORMS``.
        reverse: Ask in the other order (B first).

    Returns:
        One prompt a fact and form.

    Raises:
        RecipeError: If a form is unknown.

    Example:
        >>> prompt = fact_prompts(make_facts(1, seed=0), forms=["statement"])[0]
        >>> prompt.text.endswith("alongside"), prompt.spans["FE"] in prompt.text
        (True, True)
    """
    prompts = []
    for form in forms:
        if form not in FORMS:
            raise RecipeError(f"No wording {form!r}; expected some of {', '.join(FORMS)}.")
        for fact in facts:
            first, second = (fact.b, fact.a) if reverse else (fact.a, fact.b)
            text = FORMS[form].format(first=first, second=second).partition(f" {second}")[0]
            prompts.append(GraftPrompt(text, second, {"FE": first, "R": RELATIONS[form]}, unit=fact.id, form=form))
    return prompts
