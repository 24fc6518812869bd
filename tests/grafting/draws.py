"""Random graft plans, each written twice: as a plan of the package and as a table for the oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from oracle import Cell, Rule, all_cells, assignment, cells_of, layer_components, shared_components

from lightning_interp.core.tokens.positions import All, FromBatch, Last, Positions, Span, Tokens
from lightning_interp.grafting.plan import GraftPlan, GraftRule

T = TypeVar("T")


class Dice:
    """Seeded choices."""

    def __init__(self, *key: object) -> None:
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def choice(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def some(self, values: Sequence[T], most: int) -> list[T]:
        """One to ``most`` different values."""
        order = torch.randperm(len(values), generator=self.generator)[: 1 + self.below(most)]
        return [values[i] for i in order.tolist()]

    def ids(self, n: int) -> list[int]:
        """Byte tokens without specials."""
        return torch.randint(5, 261, (n,), generator=self.generator).tolist()


@dataclass
class Draw:
    """One prompt with a plan, the masks that its selectors ask for, and what the oracle makes of it."""

    ids: list[int]
    plan: GraftPlan
    table: list[dict[Cell, int]]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


def draw(
    family: str,
    seed: object,
    *,
    length: int = 12,
    sources: Mapping[str, int] | None = None,
    switches: bool = True,
    n_layers: int = 4,
) -> Draw:
    """A random prompt and a random plan of one to four rules for it.

    Args:
        family: Tells which components there are.
        seed: Same seed, same draw.
        length: Tokens of the prompt.
        sources: Donor names and their index.
        switches: Also draw the head and final-norm policies.
        n_layers: Blocks of the model.
    """
    dice = Dice(family, seed)
    made = Draw(dice.ids(length), GraftPlan(), [])
    policies = ("recipient", "donor", "follow") if switches else ("recipient",)
    head, final_norm = dice.choice(policies), dice.choice(policies)
    names = [*layer_components(family), *shared_components(family), "ATTN", "O", "FFN", "NORMS", "BLOCK", "PAPER_ALL"]
    if head == final_norm == "follow":
        names.append("ALL")
    names = [n for n in names if (n != "unembed" or head == "follow") and (n != "final_norm" or final_norm == "follow")]
    rules, meant = [], []
    for i in range(1 + dice.below(4)):
        selector, chosen = _positions(dice, made, f"{seed}/{i}")
        components = dice.some(names, 3)
        layers, indices = _layers(dice, n_layers)
        others = dice.below(5) == 0
        source = dice.choice(list(sources or {"donor": 1}))
        cells = cells_of(family, components, indices, n_layers)
        if not cells and indices and not others:  # a group without members in these layers is an error, not a plan
            continue
        cells = all_cells(family, n_layers) - cells if others else cells
        rules.append(GraftRule(selector, tuple(components), layers, source, others))
        meant.append(Rule(frozenset(chosen), frozenset(cells), (sources or {"donor": 1})[source]))
    grafts = [meant[i].source for i, rule in enumerate(rules) if rule.layers != "none" or rule.others]
    made.plan = GraftPlan(tuple(rules), head, final_norm)
    # With several donors, a head or final norm that is "the donor's" is that of the first rule that grafts.
    made.table = assignment(length, meant, head=head, final_norm=final_norm, donor=(*grafts, 1)[0])
    return made


def _positions(dice: Dice, made: Draw, key: str) -> tuple[Positions, set[int]]:
    """A selector and the indices it means, sometimes combined with another or turned round."""
    selector, chosen = _simple(dice, made, f"{key}a")
    more = dice.below(6)
    if more <= 1:
        other, also = _simple(dice, made, f"{key}b")
        selector, chosen = (selector | other, chosen | also) if more else (selector & other, chosen & also)
    if dice.below(4) == 0:
        selector, chosen = ~selector, set(range(len(made.ids))) - chosen
    return selector, chosen


def _simple(dice: Dice, made: Draw, key: str) -> tuple[Positions, set[int]]:
    n, kind = len(made.ids), dice.below(6)
    if kind == 0:
        return All(), set(range(n))
    if kind == 1:
        last = 1 + dice.below(3)
        return Last(last), set(range(n - last, n))
    if kind == 2:
        token = dice.choice(made.ids)
        return Tokens((token,)), {t for t, i in enumerate(made.ids) if i == token}
    if kind == 3:
        start = dice.below(n)
        stop = start + 1 + dice.below(n - start)
        return Span(start, stop), set(range(start, stop))
    if kind == 4:
        back = 1 + dice.below(n)
        return Span(-back), {n - back}
    mask = torch.rand(n, generator=dice.generator) < 0.5
    made.masks[key] = mask
    return FromBatch(key), set(mask.nonzero().flatten().tolist())


def _layers(dice: Dice, n: int) -> tuple[Any, set[int]]:
    first = dice.below(n)
    last = first + dice.below(n - first)
    everything = list(range(n))
    return dice.choice(
        [
            ("all", set(everything)),
            ("all", set(everything)),
            ("all", set(everything)),
            ("none", set()),
            (first, {first}),
            (-1 - first, {n - 1 - first}),
            (f"{first}-{last}", set(range(first, last + 1))),
            ("upper_half", set(everything[2 * (n // 4) :])),
            ("Q2", set(everything[n // 4 : 2 * (n // 4)])),
            ((first, last), {first, last}),
        ]
    )


def batch_masks(draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
    """The masks of all rows as one batch: each row fills its own."""
    length = len(draws[0].ids)
    masks = {}
    for row, made in enumerate(draws):
        for key, mask in made.masks.items():
            masks[key] = torch.zeros(len(draws), length, dtype=torch.bool)
            masks[key][row] = mask
    return masks
