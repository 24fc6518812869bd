"""Plans worked out for one model: which source each cell has at each token, as small integer codes.

A token's *code* says which rules of its plan own it (and, under graft dropout, which draw). A *signature* says for one
cell, code by code, which source its weights come from: 0 the recipient, then the donors, then donors at a dose. So a
forward pass works out one code a token, and every module looks its own mask up in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.cells import Cell
from lightning_interp.core.weights.holders import Dose
from lightning_interp.core.weights.row_weights import without_padding
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.dropout import DRAWS
from lightning_interp.grafting.plan import GraftPlan, GraftRule

__all__ = ["EVERYWHERE", "NOWHERE", "CompiledPlans", "Doses", "check_doses", "dose_of"]

Doses = Mapping[str, torch.Tensor]

NOWHERE, EVERYWHERE = 0, 1
"""Local codes, at the start of each plan's block, of tokens that no rule owns and of those that are all donor's."""

_MOST_STATES = 4096
_SWITCHED = ("unembed", "final_norm")


@dataclass(frozen=True)
class Source:
    """A donor at a dose (1, a number between, or the name of a tensor)."""

    donor: str
    dose: float | str = 1.0


class CompiledPlans:
    """Plans worked out for one model; ``EVERYWHERE`` is a second ``NOWHERE`` unless ``everywhere``."""

    def __init__(
        self, plans: Sequence[GraftPlan], donors: Sequence[str], model_map: ModelMap, *, everywhere: bool = False
    ) -> None:
        self.plans = tuple(plans)
        self.sources = [Source(name) for name in donors]
        self._index = {source: i + 1 for i, source in enumerate(self.sources)}
        self._states = [_states(tuple((r.adds, r.dropout is not None) for r in plan.rules)) for plan in self.plans]
        ends = list(accumulate(states.size for states in self._states))
        self.offsets = [0, *ends[:-1]]
        self._tables: dict[Cell, list[int]] = {(n, layer): [0] * ends[-1] for n, layer, _ in model_map.cells()}
        for plan, states, start in zip(self.plans, self._states, self.offsets, strict=True):
            self._switches(plan, states, start, everywhere)
            self._rules(plan, states, start, model_map)

    def _switches(self, plan: GraftPlan, states: _States, start: int, everywhere: bool) -> None:
        """Codes that do not come from rules: a head or norm that is the donor's, and tokens that are all donor's."""
        first = self._source(Source(plan.sources[0])) if plan.sources else 1
        for switch, name in ((plan.head, "unembed"), (plan.final_norm, "final_norm")):
            if switch == "donor" and (name, None) in self._tables:
                self._tables[name, None][start : start + states.size] = [first] * states.size
        for (name, _), column in self._tables.items() if everywhere else ():
            if {"unembed": plan.head, "final_norm": plan.final_norm}.get(name, "follow") == "follow":
                column[start + EVERYWHERE] = first

    def _rules(self, plan: GraftPlan, states: _States, start: int, model_map: ModelMap) -> None:
        """Codes of every set of rules that can own a token."""
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

    def signature(self, component: str, layer: int | None) -> tuple[int, ...]:
        """Source of one cell for every code."""
        return tuple(self._tables[component, layer])

    @cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes that mean the same share a class ``[codes]``: inside of the model, and with norm and head."""
        inside = [column for (name, _), column in self._tables.items() if name not in _SWITCHED]
        return _alike(inside), _alike(list(self._tables.values()))

    def codes(self, step: StepContext, rows: Sequence[int]) -> torch.Tensor:
        """Codes ``[B, T]`` of rows whose plans are ``rows``; padding has the code of its row's first real token."""
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
            chosen = [masks[rule.positions][mine] for rule in self.plans[p].rules]
            codes[mine] = self._states[p].owners(chosen, step.positions[mine]) + self.offsets[p]
        return without_padding(codes, step)

    def all_codes(self, step: StepContext) -> torch.Tensor:
        """Codes of every plan on every row, ``[plans, B, T]``."""
        masks = {p: step.select(p) for p in dict.fromkeys(rule.positions for plan in self.plans for rule in plan.rules)}
        alike: dict[Any, list[int]] = {}  # plans that differ in what they graft, not in where
        for p, plan in enumerate(self.plans):
            alike.setdefault((self._states[p].kinds, *(rule.positions for rule in plan.rules)), []).append(p)
        codes = torch.empty(len(self.plans), step.batch_size, step.length, dtype=torch.long, device=step.device)
        for (_, *positions), mine in alike.items():
            local = self._states[mine[0]].owners([masks[p] for p in positions], step.positions)
            codes[mine] = without_padding(local, step) + torch.tensor([self.offsets[p] for p in mine])[:, None, None]
        return codes


def _alike(columns: list[list[int]]) -> torch.Tensor:
    """One number for each code, the same where all columns have the same source."""
    known: dict[tuple[int, ...], int] = {}
    return torch.tensor([known.setdefault(sources, len(known)) for sources in zip(*columns, strict=True)])


class _States:
    """Which sets of rules can own a token of a plan: a machine that reads rules (adds, has dropout) in order."""

    def __init__(self, kinds: tuple[tuple[bool, bool], ...]) -> None:
        self.kinds = kinds
        self.states: list[tuple[int, ...]] = [()]
        self.transitions: list[list[int]] = []
        for r, (adds, _) in enumerate(kinds):
            after = [(*state, r) if adds else (r,) for state in self.states]
            known = {state: i for i, state in enumerate(self.states)}
            for state in after:
                known.setdefault(state, len(known))
            self.states = list(known)
            if len(self.states) > _MOST_STATES:
                raise RecipeError(
                    f"A plan can own tokens by more than {_MOST_STATES} sets of its {len(kinds)} rules, because each "
                    "rule that adds doubles them. Put cells of one source and position into one rule."
                )
            self.transitions.append([known[state] for state in after])
        for row in self.transitions:
            row += [0] * (len(self.states) - len(row))  # states that only later rules reach
        self.codes, self.size = [NOWHERE], 2
        for state in self.states[1:]:
            self.codes.append(self.size)
            self.size += self.spread(state)

    def spread(self, state: tuple[int, ...]) -> int:
        """Codes of a state: one, or one a draw of its graft dropout."""
        return DRAWS if any(self.kinds[r][1] for r in state) else 1

    def owners(self, masks: Sequence[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """Local code of each token ``[B, T]``, from the mask of each rule and the token's position."""
        state = torch.zeros_like(positions)
        for mask, step_to in zip(masks, self.transitions, strict=True):
            state = torch.where(mask, torch.tensor(step_to, device=state.device)[state], state)
        code = torch.tensor(self.codes, device=state.device)[state]
        drawn = torch.tensor([self.spread(each) > 1 for each in self.states], device=state.device)
        return (
            code + drawn[state] * (positions.clamp(min=0) % DRAWS)
            if any(dropout for _, dropout in self.kinds)
            else code
        )


_states = lru_cache(maxsize=256)(_States)


def _mask_of(positions: Positions, step: StepContext, rows: list[int]) -> torch.Tensor:
    """A selector asks only the rows whose plan names it: elsewhere its text or span need not exist."""
    if len(rows) == step.batch_size:
        return step.select(positions)
    mask = torch.zeros(step.batch_size, step.length, dtype=torch.bool, device=step.device)
    mask[rows] = step.rows(rows).select(positions)
    return mask


def dose_of(dose: float | str, doses: Doses) -> Dose:
    """The dose of a rule for each layer: a number, or ``doses[dose]`` (scalar or ``[L]``) read anew at every call."""
    if not isinstance(dose, str):
        return dose
    return lambda layer: doses[dose] if layer is None or doses[dose].dim() == 0 else doses[dose][layer]


def check_doses(rule: GraftRule, cells: set[Cell], doses: Doses, n_layers: int) -> None:
    """Refuse a named dose that is missing or has a wrong shape, and doses of cells not linear in their parameters."""
    if rule.dose in (0, 1):
        return
    if any(name == "moe" for name, _ in cells):
        raise RecipeError(
            f"dose={rule.dose!r} on 'moe' is no mixture of weights: a router is not linear in its parameters. Use 0 or "
            "1 there, or name other components."
        )
    if not isinstance(rule.dose, str):
        return
    if rule.dose not in doses:
        raise RecipeError(
            f"A rule has dose={rule.dose!r}, but the doses are {', '.join(doses) or 'none'}. Pass "
            f"Graft(..., doses={{{rule.dose!r}: tensor}})."
        )
    shape = tuple(doses[rule.dose].shape)
    if shape not in ((), (n_layers,)):
        raise RecipeError(f"The dose {rule.dose!r} has shape {shape}; expected a scalar or [{n_layers}] (one a layer).")
    outside = sorted(name for name, layer in cells if layer is None)
    if shape and outside:
        raise RecipeError(
            f"The dose {rule.dose!r} has one value a layer, but the rule grafts {', '.join(outside)} too, which is in "
            "no layer. Name components inside of blocks ('BLOCK'), or pass a scalar."
        )
