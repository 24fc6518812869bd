"""Run the rows of a prefix tree through a grafted model: one pass an interval, caches handed from parent to child."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import suspended
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.pass_arguments import model_inputs
from lightning_interp.core.weights.sources import ModelSource, WeightSource
from lightning_interp.errors import IncompatibleModelError, UnsupportedStrategyError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.grafting.prefixes import PrefixTree

__all__ = ["Rows", "check_whole", "last_logits"]

_WHOLE: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
"""Donors that were compared with each recipient."""


@dataclass(frozen=True)
class Rows:
    """Left-padded token ids, which of them are real, and the graft's code of each, all ``[R, T]``."""

    ids: torch.Tensor
    valid: torch.Tensor
    codes: torch.Tensor


@torch.no_grad()
def last_logits(model_map: ModelMap, graft: Graft, rows: Rows, tree: PrefixTree, *, token_budget: int) -> torch.Tensor:
    """Last logits of every different row, depth first, so that only one path of caches lives; the graft is attached."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = model_map.model

    def descend(level: int, chosen: torch.Tensor, cache: Any, place: dict[int, int]) -> None:
        interval, last = tree.intervals[level], level + 1 == len(tree.intervals)
        for part in torch.split(chosen, max(1, token_budget // interval.stop)):
            mine, start, stop = interval.rows[part], interval.start, interval.stop
            inputs = model_inputs(model, rows.ids[mine, :stop], rows.valid[mine, :stop], start=start)
            inputs["use_cache"] = not last or level > 0
            if level:
                past = _picked(cache, [place[parent] for parent in interval.parents[part].tolist()])
                inputs |= cache_argument(model, past)
            graft.given = rows.codes[mine, start:stop]
            output = model(**inputs)
            if last:
                found.append((part, output.logits[:, -1].float()))
                continue
            children = torch.isin(tree.intervals[level + 1].parents, part).nonzero()[:, 0]
            _check_cache(model, output)
            descend(level + 1, children, cache_of(output), {row: i for i, row in enumerate(part.tolist())})

    try:
        descend(0, torch.arange(len(tree.intervals[0].rows)), None, {})
    finally:
        graft.given = None
    return _in_order(found)


def _in_order(found: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Logits of every pass by their rows; those of a single pass are in order, and are not copied."""
    if len(found) == 1:
        return found[0][1]
    together = found[0][1].new_empty(sum(len(rows) for rows, _ in found), found[0][1].shape[-1])
    for rows, logits in found:
        together[rows.to(together.device)] = logits
    return together


def _picked(cache: Any, rows: list[int]) -> Any:
    """Some rows of a cache, as a cache of their own; the caller's stays as it is."""
    picked = copy.copy(cache)
    picked.layers = [copy.copy(layer) for layer in cache.layers]
    if len(set(rows)) == 1 and len(rows) > 1:  # one parent for all: its keys are viewed, not copied
        picked.batch_select_indices(torch.tensor(rows[:1]))
        for layer in picked.layers:
            layer.keys, layer.values = (x.expand(len(rows), *x.shape[1:]) for x in (layer.keys, layer.values))
        return picked
    picked.batch_select_indices(torch.tensor(rows))
    return picked


def _check_cache(model: nn.Module, output: Any) -> None:
    cache = cache_of(output)
    if not (hasattr(cache, "layers") and hasattr(cache, "batch_select_indices")):
        raise UnsupportedStrategyError(
            f"{type(model).__name__} returned {type(cache).__name__} as its cache, whose rows cannot be shared. Pass "
            "GraftEvaluator(share_prefixes=False)."
        )


@torch.no_grad()
def check_whole(model_map: ModelMap, donors: Mapping[str, WeightSource], ids: torch.Tensor) -> None:
    """Refuse two models that differ in what no hook reaches: with everything grafted, the recipient is the donor.

    Each pair is asked once, with one row of tokens ``[T]``; a donor that is no model at hand (an adapter, a folder) is
    not.
    """
    asked = _WHOLE.setdefault(model_map.model, weakref.WeakSet())
    for name, source in donors.items():
        if type(source) is not ModelSource or source.map.model in asked:
            continue
        donor = source.map.model
        valid = torch.ones_like(ids[None], dtype=torch.bool)
        with suspended(model_map.model, donor), evaluating(model_map.model, donor):
            expected = donor(**model_inputs(donor, ids[None], valid), use_cache=False).logits.double().cpu()
            with Graft({name: source}, GraftPlan.whole(name)).attach(model_map):
                inputs = model_inputs(model_map.model, ids[None], valid)
                found = model_map.model(**inputs, use_cache=False).logits.double().cpu()
        off = float((found - expected).norm() / (expected - expected.mean()).norm().clamp_min(1e-12))
        if not off <= _tolerance(model_map.model, donor):
            raise IncompatibleModelError(
                f"GraftPlan.whole({name!r}) on {type(model_map.model).__name__} is not the donor: its logits are off "
                f"by {off:.2g} of their spread, so the models differ in what no graft reaches (a buffer, a setting, "
                "weights that are used past their module). Make these equal in both."
            )
        asked.add(donor)


def _tolerance(*models: nn.Module) -> float:
    exact = all(p.dtype in (torch.float32, torch.float64) for model in models for p in model.parameters())
    return 2e-4 if exact and not torch.is_autocast_enabled(next(models[0].parameters()).device.type) else 3e-2
