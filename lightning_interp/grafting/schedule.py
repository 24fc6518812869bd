"""Plans worked out for one model: which source each cell has at each token, as small integer codes.

A token's *code* says which rules of its plan own it (and, under graft dropout, which draw). A *signature* says for one
cell, code by code, which source its weights come from: 0 the recipient, then the donors, then donors at a dose. So a
forward pass works out one code a token, and every module looks its own mask up in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_interp.core.model_map import ModelMap
from lightning_interp.core.positions import Positions
from lightning_interp.core.step import StepContext
from lightning_interp.grafting.dropout import DRAWS, Cell
from lightning_interp.grafting.plan import GraftPlan, GraftRule

__all__ = ["EVERYWHERE", "NOWHERE", "Schedule", "Signature", "Source"]

Signature = tuple[int, ...]

NOWHERE, EVERYWHERE = 0, 1
"""Local codes, at the start of each plan's block, of tokens that no rule owns and of those that are all donor's."""

_SWITCHED = ("unembed", "final_norm")


@dataclass(frozen=True)
class Source:
    """A donor at a dose (1, a number between, or the name of a tensor)."""

    donor: str
    dose: float | str = 1.0


class Schedule:
    """Plans worked out for one model.

    Args:
        plans: Different plans.
        donors: Names of the donors.
        model_map: The recipient.

    Attributes:
        sources: What the source indices 1, 2, ... mean.
        offsets: First code of each plan.
    """

    def __init__(self, plans: Sequence[GraftPlan], donors: Sequence[str], model_map: ModelMap) -> None:
        self.plans = tuple(plans)
        self.sources = [Source(name) for name in donors]
        self._index = {source: i + 1 for i, source in enumerate(self.sources)}
        self._tables: dict[Cell, list[int]] = {(name, layer): [] for name, layer, _ in model_map.cells()}
        self._states: list[_States] = []
        self.offsets: list[int] = []
        size = 0
        for plan in self.plans:
            self.offsets.append(size)
            states = _States(plan)
            self._states.append(states)
            size += states.size
            self._fill(plan, states, model_map, size)

    def _fill(self, plan: GraftPlan, states: _States, model_map: ModelMap, size: int) -> None:
        """Append the plan's codes to the table of every cell."""
        start = size - states.size
        first = self._source(Source(plan.sources[0])) if plan.sources else 1
        for (name, _), column in self._tables.items():
            column.extend([0] * states.size)
            switch = {"unembed": plan.head, "final_norm": plan.final_norm}.get(name, "follow")
            if switch == "follow":
                column[start + EVERYWHERE] = first
            elif switch == "donor":
                column[start:] = [first] * states.size
        cells = [rule.cells(model_map) for rule in plan.rules]
        follows = {"unembed": plan.head == "follow", "final_norm": plan.final_norm == "follow"}
        for state, code in zip(states.states, states.codes, strict=True):
            for draw in range(states.spread(state)):
                for r in state:
                    rule = plan.rules[r]
                    kept = rule.dropout.keep(cells[r], draw) if rule.dropout else cells[r]
                    source = self._of_rule(rule)
                    for cell in kept:
                        if follows.get(cell[0], True):
                            self._tables[cell][start + code + draw] = source

    def _of_rule(self, rule: GraftRule) -> int:
        known = any(source.donor == rule.source for source in self.sources)
        return self._source(Source(rule.source, rule.dose)) if known and rule.dose != 0 else 0

    def _source(self, source: Source) -> int:
        if source not in self._index:
            self.sources.append(source)
            self._index[source] = len(self.sources)
        return self._index[source]

    def signature(self, component: str, layer: int | None) -> Signature:
        """Source of one cell for every code."""
        return tuple(self._tables[component, layer])

    @cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes that mean the same share a class ``[codes]``: inside of the model, and with norm and head."""
        table = torch.tensor(list(self._tables.values()))
        inside = [i for i, (name, _) in enumerate(self._tables) if name not in _SWITCHED]
        inner = torch.unique(table[inside], dim=1, return_inverse=True)[1]
        return inner, torch.unique(table, dim=1, return_inverse=True)[1]

    def start(self, rows: Sequence[int], device: torch.device) -> torch.Tensor:
        """First code of each row's plan, ``[B, 1]``."""
        return torch.tensor([self.offsets[p] for p in rows], device=device)[:, None]

    def codes(self, step: StepContext, rows: Sequence[int]) -> torch.Tensor:
        """Which rules own each token.

        Args:
            step: The tokens ``[B, T]``.
            rows: The plan of each row.

        Returns:
            Codes ``[B, T]``; padding has the code of its row's first real token.
        """
        of_plan: dict[int, list[int]] = {}
        for row, p in enumerate(rows):
            of_plan.setdefault(p, []).append(row)
        asked: dict[Positions, list[int]] = {}
        for p, mine in of_plan.items():
            for positions in dict.fromkeys(rule.positions for rule in self.plans[p].rules):
                asked.setdefault(positions, []).extend(mine)
        masks = {positions: _mask_of(positions, step, sorted(mine)) for positions, mine in asked.items()}
        codes = torch.zeros(step.batch_size, step.length, dtype=torch.long, device=step.device)
        for p, mine in of_plan.items():
            codes[mine] = self._owned(p, {key: mask[mine] for key, mask in masks.items()}, step.positions[mine])
        return without_padding(codes, step.valid)

    def all_codes(self, step: StepContext) -> torch.Tensor:
        """Codes of every plan on every row, ``[plans, B, T]``."""
        asked = dict.fromkeys(rule.positions for plan in self.plans for rule in plan.rules)
        masks = {positions: positions.mask(step) for positions in asked}
        codes = [self._owned(p, masks, step.positions) for p in range(len(self.plans))]
        return torch.stack([without_padding(each, step.valid) for each in codes])

    def _owned(self, p: int, masks: dict[Positions, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        states = self._states[p]
        state = torch.zeros_like(positions)
        for rule, step_to in zip(self.plans[p].rules, states.transitions, strict=True):
            state = torch.where(masks[rule.positions], torch.tensor(step_to, device=state.device)[state], state)
        code = torch.tensor(states.codes, device=state.device)[state] + self.offsets[p]
        if any(states.spread(each) > 1 for each in states.states):
            drawn = torch.tensor([states.spread(each) > 1 for each in states.states], device=state.device)[state]
            code = code + drawn * (positions.clamp(min=0) % DRAWS)
        return code


class _States:
    """Which sets of rules can own a token of one plan, as a machine that reads the rules in order."""

    def __init__(self, plan: GraftPlan) -> None:
        self.plan = plan
        self.states: list[tuple[int, ...]] = [()]
        self.transitions: list[list[int]] = []
        for r, rule in enumerate(plan.rules):
            after = [(*state, r) if rule.adds else (r,) for state in self.states]
            self.states += [state for state in dict.fromkeys(after) if state not in self.states]
            self.transitions.append([self.states.index(state) for state in after])
        for row in self.transitions:
            row += [0] * (len(self.states) - len(row))  # states that only later rules reach
        self.codes, self.size = [NOWHERE], 2
        for state in self.states[1:]:
            self.codes.append(self.size)
            self.size += self.spread(state)

    def spread(self, state: tuple[int, ...]) -> int:
        """Codes of a state: one, or one a draw of its graft dropout."""
        return DRAWS if any(self.plan.rules[r].dropout for r in state) else 1


def without_padding(codes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Give padding the code of its row's first real token: it reaches none, and uniform masks stay uniform."""
    first = valid.long().argmax(dim=1, keepdim=True)
    return torch.where(valid, codes, codes.gather(1, first))


def _mask_of(positions: Positions, step: StepContext, rows: list[int]) -> torch.Tensor:
    """A selector asks only the rows whose plan names it: elsewhere its text or span need not exist."""
    if len(rows) == step.batch_size:
        return positions.mask(step)
    mask = torch.zeros(step.batch_size, step.length, dtype=torch.bool, device=step.device)
    mask[rows] = positions.mask(step.rows(rows))
    return mask
