"""Several holders of one module: each says which of its sources every row uses, and they are worked out as one map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from lightning_interp.core.hooks.intervention import Attachment, split_output
from lightning_interp.core.model.components import Part, own_map
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.counted_dropout import CountedDropout, dropouts_in
from lightning_interp.core.weights.fitting import takes_empty
from lightning_interp.core.weights.masked_linear import Execution, MaskedHooks, MaskedMap, RowMap, TokenMap
from lightning_interp.core.weights.row_masks import RowMask
from lightning_interp.core.weights.sources import AdapterSource, WeightSource
from lightning_interp.errors import RecipeError

__all__ = ["Claim", "Dose", "Masks", "RowSource", "dosed", "held_adapters", "hold"]

Dose = float | Callable[[int | None], torch.Tensor | float]
Masks = Sequence[tuple[torch.Tensor | None, RowMask]]
_Members = tuple[tuple[int, int], ...]

_EXECUTIONS: tuple[Execution, ...] = ("auto", "overwrite", "partition", "dense")


@dataclass(frozen=True)
class RowSource:
    """A weight source at a dose from 0 (recipient) to 1, or at a function of the layer (None outside of blocks)."""

    source: WeightSource
    dose: Dose = 1.0
    label: str = field(default="", compare=False)


@dataclass(eq=False)
class Claim:
    """What one holder does with one module: masks and maps of its sources (from 1), worked out in each pass.

    ``deltas`` are what sources that only add something add; with any ``adapters``, rows that nobody claims run without
    them; ``adds`` lets its deltas be added to those of other holders.
    """

    holder: str
    part: Part
    layer: int | None
    sources: Mapping[int, RowSource]
    changes: Mapping[int, RowMap]
    deltas: Mapping[int, RowMap]
    adapters: frozenset[str]
    masks: Callable[[], Masks]
    execution: Execution
    adds: bool
    dropout: CountedDropout
    step: Callable[[], StepContext]

    def map_of(self, k: int, plain: RowMap) -> RowMap:
        """The map of one source at its dose, from the map of rows that nobody claims."""
        return dosed(plain, self.changes[k], self.sources[k].dose, self.layer)

    def delta_of(self, k: int) -> RowMap | None:
        """The same for what the source adds."""
        return dosed(None, self.deltas[k], self.sources[k].dose, self.layer) if k in self.deltas else None


def hold(attachment: Attachment, claim: Claim) -> None:
    """Let a claim hold its module, alone or beside others, in whatever order they come.

    Two holders may claim one row for equal sources. Other sources on one row of one module contradict each other, and
    the first such pass is refused; only where both holders add does the row get the sum of both deltas.
    """
    hooks = MaskedHooks.on(claim.part.module)
    if hooks is not None and isinstance(hooks.masked, _SharedMap):
        hooks.masked = _SharedMap.of((*hooks.masked.claims, claim))
    else:
        hooks = MaskedHooks(_SharedMap.of((claim,)))
    attachment.add(_Release(hooks, claim))
    attachment.expect(hooks.hook, claim.part.path)


def held_adapters(module: nn.Module) -> frozenset[str]:
    """Adapters that holders of a module choose by row."""
    hooks = MaskedHooks.on(module)
    claims = hooks.masked.claims if hooks is not None and isinstance(hooks.masked, _SharedMap) else ()
    return frozenset[str]().union(*(claim.adapters for claim in claims))


def dosed(plain: RowMap | None, change: RowMap, dose: Dose, layer: int | None) -> RowMap:
    """A map at a dose: ``change`` itself at 1, else what lies between it and ``plain`` (None if it is added).

    Linear maps, embeddings and norms are linear in their parameters, so ``(1 - a) f(x; recipient) + a f(x; source)`` is
    ``f(x; (1 - a) recipient + a source)``, and the dose ``a`` may carry gradients.
    """
    if dose == 1:
        return change

    def between(*args: Any, **kwargs: Any) -> torch.Tensor:
        other = split_output(change(*args, **kwargs))[0]
        share = dose(layer) if callable(dose) else dose
        share = share.to(other) if isinstance(share, torch.Tensor) else share
        if plain is None:
            return share * other
        own = split_output(plain(*args, **kwargs))[0]
        return own + share * (other - own)

    return between


@dataclass(frozen=True, eq=False)
class _Release:
    """Takes one claim off its module, whatever others are there."""

    hooks: MaskedHooks
    claim: Claim

    def remove(self) -> None:
        shared = self.hooks.masked
        claims = shared.claims if isinstance(shared, _SharedMap) else ()
        rest = tuple(claim for claim in claims if claim is not self.claim)
        if rest:
            self.hooks.masked = _SharedMap.of(rest)
        else:
            self.hooks.remove()


@dataclass(eq=False)
class _SharedMap(MaskedMap):
    """The masked map of a module that holders claim."""

    claims: tuple[Claim, ...] = ()

    @classmethod
    def of(cls, claims: tuple[Claim, ...]) -> _SharedMap:
        part, adapters = claims[0].part, frozenset[str]().union(*(claim.adapters for claim in claims))
        own = own_map(part.module) if adapters else None
        codes, masks = _joint(claims)
        shared = cls(
            part.module,
            0,
            {},
            masks,
            max((claim.execution for claim in claims), key=_EXECUTIONS.index),
            part.per_call,
            takes_empty=takes_empty(part.module),
            claims=claims,
        )
        if own is not None:
            shared._fill(codes, own, dropouts_in(part.module, part.path))
            shared.adapted = part.module if _has_switch(part.module) else None
            shared.native = _native(part.module, adapters, codes, claims)
            shared.alternatives = {0: claims[0].dropout.wrap(own, dropouts_in(own, part.path), claims[0].step)} | dict(
                shared.alternatives
            )
        else:
            shared._fill(codes, part.module.forward, {})
        return shared

    def _fill(self, codes: Mapping[int, _Members], plain: RowMap, dropouts: dict[str, nn.Dropout]) -> None:
        """The map of every code, and its delta where it has one."""
        alternatives: dict[int, RowMap | TokenMap] = {}
        deltas: dict[int, RowMap | TokenMap] = {}
        for code, members in codes.items():
            claim, k = self.claims[members[0][0]], members[0][1]
            adding = [delta for c, j in members if (delta := self.claims[c].delta_of(j)) is not None]
            whole = claim.map_of(k, plain) if len(members) == 1 else _sum([plain, *adding])
            alternatives[code] = claim.dropout.wrap(whole, dropouts, claim.step)
            if len(adding) == len(members):
                deltas[code] = claim.dropout.wrap(_sum(adding), dropouts, claim.step)
        self.alternatives, self.deltas = alternatives, deltas
        if dropouts:
            self.bypass = lambda: any(module.training for module in dropouts.values())


def _has_switch(module: Any) -> bool:
    """Whether an adapted layer runs as its base, on every row, while PEFT's switch is off."""
    return hasattr(module, "lora_A") and hasattr(module, "_disable_adapters") and not hasattr(module, "parameter_name")


def _native(module: nn.Module, adapters: frozenset[str], codes: Mapping[int, _Members], claims: Sequence[Claim]) -> int:
    """The code of what an adapted layer computes when it is called; -1 if it may be none of them."""
    active = list(getattr(module, "active_adapters", ()))
    if active != list(adapters):
        return -1
    only = RowSource(AdapterSource(active[0]))
    return next((code for code, each in codes.items() if [claims[c].sources[k] for c, k in each] == [only]), -1)


def _sum(maps: Sequence[RowMap]) -> RowMap:
    if len(maps) == 1:
        return maps[0]

    def total(x: torch.Tensor) -> torch.Tensor:
        first, *others = (split_output(each(x))[0] for each in maps)
        for other in others:
            first = first + other.to(first.dtype)
        return first

    return total


def _joint(claims: Sequence[Claim]) -> tuple[dict[int, _Members], Callable[[], Masks]]:
    """Several claims' sources as one row of codes, (claim, source) pairs that add up, and the masks in these codes."""
    codes: dict[int, _Members] = {k: ((0, k),) for k in claims[0].sources}
    if len(claims) == 1:
        return codes, claims[0].masks
    masks, conflict = claims[0].masks, 0
    device = next((p.device for p in claims[0].part.module.parameters()), torch.device("cpu"))
    for c in range(1, len(claims)):
        codes, conflict, rows = _pairs(claims, codes, conflict, c)
        masks = partial(_joined, masks, claims[c].masks, _table(rows, device))
    return codes, partial(_agreed, claims, masks, conflict) if conflict else masks


def _pairs(
    claims: Sequence[Claim], codes: dict[int, _Members], conflict: int, c: int
) -> tuple[dict[int, _Members], int, tuple[tuple[int, ...], ...]]:
    """What each pair of a code and a source of claim ``c`` is: the new codes, the one of conflicts, and a table."""
    sources, known = claims[c].sources, {_what(claims, m): code for code, m in codes.items()}
    after, size = dict(codes), max([*codes, conflict], default=0) + 1
    rows = [[0] * (max(sources, default=0) + 1) for _ in range(size)]
    free = iter(range(size, size + len(sources) * (1 + len(codes)) + 1))
    conflict_after = conflict or next(free)
    for k, source in sources.items():
        mine = rows[0][k] = known.get((source,)) or next(free)
        after.setdefault(mine, ((c, k),))
        for code, members in codes.items():
            rows[code][0] = code
            if source in _what(claims, members):
                rows[code][k] = code
            elif all(claims[i].adds and j in claims[i].deltas for i, j in (*members, (c, k))):
                rows[code][k] = next(free)
                after[rows[code][k]] = (*members, (c, k))
            else:
                rows[code][k] = conflict_after
        if conflict:
            rows[conflict][k] = conflict
    for code in (*codes, *([conflict] if conflict else [])):
        rows[code][0] = code
    return after, conflict_after, tuple(map(tuple, rows))


def _what(claims: Sequence[Claim], members: _Members) -> tuple[RowSource, ...]:
    return tuple(claims[c].sources[k] for c, k in members)


@lru_cache(maxsize=1024)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """One tensor for equal tables, so that modules share their joint masks."""
    return torch.tensor(rows, device=device)


def _joined(left: Callable[[], Masks], right: Callable[[], Masks], table: torch.Tensor) -> Masks:
    mine, theirs = left(), right()
    if len(mine) < len(theirs):  # all features of one are groups of features of the other
        mine = [(columns, mine[0][1]) for columns, _ in theirs]
    elif len(theirs) < len(mine):
        theirs = [(columns, theirs[0][1]) for columns, _ in mine]
    return [(columns, mask.join(other, table)) for (columns, mask), (_, other) in zip(mine, theirs, strict=True)]


def _agreed(claims: Sequence[Claim], masks: Callable[[], Masks], conflict: int) -> Masks:
    found = masks()
    for _, mask in found:
        if conflict in mask.used:
            raise _contradiction(claims, mask.rows(conflict)[0], mask.shape[1])
    return found


def _contradiction(claims: Sequence[Claim], place: torch.Tensor, columns: int) -> RecipeError:
    row, column = divmod(int(place), columns)
    told = []
    for claim in claims:
        chosen = {int(mask.source[row, column]) for _, mask in claim.masks()} - {0}
        told += [f"{claim.holder} claims it for {claim.sources[k].label!r}" for k in sorted(chosen)]
    return RecipeError(
        f"Row {row}, token {column} of {claims[0].part.path} belongs to two holders with different weights: "
        f"{' and '.join(told)}. Choose other tokens or modules in one of them, or name both sources in one plan."
    )
