"""The arguments of a decoder's ``forward``: made for a batch, and read for what a pass knows about its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_interp.core.tokens.kv_cache import cache_in, installed_versions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError

__all__ = ["argument_reader", "model_inputs", "positions_restart", "step_reader"]


def argument_reader(module: nn.Module) -> Callable[[str, tuple[Any, ...], dict[str, Any]], Any]:
    """Make ``argument(name, args, kwargs)``, which finds an argument of a module's ``forward`` by name or place."""
    order = {name: i for i, name in enumerate(inspect.signature(module.forward).parameters)}

    def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = order.get(name, len(args))
        return args[index] if index < len(args) else None

    return argument


def step_reader(backbone: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], StepContext]:
    """Make a function that reads a :class:`StepContext` off the arguments of a decoder's ``forward``."""
    argument = argument_reader(backbone)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepContext:
        ids = argument("input_ids", args, kwargs)
        tokens = ids if ids is not None else argument("inputs_embeds", args, kwargs)
        if tokens is None or tokens.dim() < 2:
            raise PositionError(
                f"{type(backbone).__name__} was called without input_ids or inputs_embeds of shape [B, T]."
            )
        cache = cache_in(args, kwargs)
        mask = argument("attention_mask", args, kwargs)
        sign = "cu_seq_lens_q" if kwargs.get("cu_seq_lens_q") is not None else None
        if cache is None and mask is None and positions_restart(argument("position_ids", args, kwargs)):
            sign = "position_ids that begin anew"
        if sign is not None:
            raise PositionError(
                f"{type(backbone).__name__} was given several texts in one row ({sign}: packed, or continuous "
                "batching), so which token is whose is not known. Use a padded batch."
            )
        past = int(cache.get_seq_length()) if cache is not None else 0
        if isinstance(mask, dict):
            raise PositionError(
                f"{type(backbone).__name__} was given a dict of attention masks; expected one of shape [B, T]. "
                "Use a dynamic cache (static caches prepare their own masks)."
            )
        if cache is None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > tokens.shape[1]:
            raise PositionError(
                f"{type(backbone).__name__} was called with {tokens.shape[1]} tokens and an attention_mask of "
                f"{mask.shape[1]}, but without a cache that tells how many tokens came before, so the positions of "
                f"these are not known (with {installed_versions()}). Generate with a cache of transformers' own "
                "(get_seq_length()), or with use_cache=False."
            )
        return StepContext(int(tokens.shape[0]), int(tokens.shape[1]), past, tokens.device, ids, mask)

    return read


def positions_restart(position_ids: Any) -> bool:
    """Whether positions ``[B, T]`` do not count on within a row, which tells transformers that a text begins there."""
    known = isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2
    return known and bool((position_ids.diff(dim=1) != 1).any())


def model_inputs(
    model: nn.Module, ids: torch.Tensor, valid: torch.Tensor, *, start: int = 0, keep: int = 1
) -> dict[str, Any]:
    """Arguments of a forward pass over the columns from ``start`` on, with logits of the last ``keep`` columns only."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids[:, start:].to(device), "attention_mask": valid.long().to(device)}
    if "position_ids" in accepted:
        inputs["position_ids"] = (valid.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:].to(device)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    return inputs
