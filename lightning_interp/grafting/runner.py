"""Run the rows of a prefix tree through a grafted model: one pass an interval, caches handed from parent to child."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.errors import UnsupportedStrategyError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.prefixes import PrefixTree

__all__ = ["Rows", "last_logits", "model_inputs", "whole_head"]


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


def model_inputs(model: nn.Module, ids: torch.Tensor, valid: torch.Tensor, *, start: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass over the columns from ``start`` on, with logits of the last column only."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids[:, start:].to(device), "attention_mask": valid.long().to(device)}
    if "position_ids" in accepted:
        inputs["position_ids"] = (valid.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:].to(device)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return inputs


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


@contextmanager
def whole_head(model_map: ModelMap) -> Iterator[None]:
    """Hand the head its last column as one block: torch multiplies a strided slice by a frozen head row by row."""
    if model_map.head is None:
        yield
        return
    handle = model_map.head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
