"""What a call of ``generate`` says of its prompt, so that no pass has to guess which of its tokens are new."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_interp.core.tokens.kv_cache import cache_in
from lightning_interp.errors import PositionError

__all__ = ["Generation", "read_generation", "repeat_rows"]

_DOUBTS = {
    "guidance_scale": ((None, 1), "guidance_scale={} runs a second text through the model, whose prompt is another"),
    "token_healing": ((None, False), "token_healing={} writes the end of the prompt anew"),
}


@dataclass(eq=False)
class Generation:
    """The prompt of one call of ``generate``.

    Args:
        columns: Columns of the prompt, padding and what is cached already counted.
        past: How many of them the cache held when the call began.
        ids: Their token ids ``[B, columns]``, where all are known.
        mask: Which of them are real ``[B, columns]``, where the caller says so.
        doubt: Why the columns cannot be relied on; empty if they can.
        beams: Beams of each prompt, between which rows go over from step to step.
        notes: What was worked out once for the whole call.
    """

    columns: int
    past: int = 0
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    doubt: str = ""
    beams: int = 1
    notes: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def prompts(self) -> int | None:
        """How many prompts there are, where it is known."""
        return next((len(x) for x in (self.ids, self.mask) if x is not None), None)

    def rows(self, index: list[int], batch_size: int) -> Generation:
        """The same call as some rows of a pass see it."""
        ids, mask = (None if x is None else repeat_rows(x, batch_size)[index] for x in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask, notes={})


def repeat_rows(x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """One row a prompt for each of its beams or samples, which lie next to each other."""
    if len(x) == batch_size:
        return x
    if batch_size % len(x):
        raise PositionError(f"The pass has {batch_size} rows, but generate was called with {len(x)} prompts.")
    return x.repeat_interleave(batch_size // len(x), dim=0)


def read_generation(generate: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """Read the prompt off the arguments of a ``generate``, as transformers reads them."""
    names = list(inspect.signature(generate).parameters)
    own = "inputs" not in names  # somebody's own method, which may hand everything on
    given = {**dict(zip(["inputs"] if own else names, args, strict=False)), **kwargs}
    doubt = _doubt(given, given.get("generation_config"), config)
    ids, embeds = _tensor(given, 2, "inputs", "input_ids"), _tensor(given, 3, "inputs_embeds")
    mask = _tensor(given, 2, "attention_mask")
    named = [given.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    if ids is None and embeds is None and (own or any(x is not None for x in named)):
        doubt = doubt or "it was given no prompt of token ids [B, T] or embeddings [B, T, d]"
    cache = cache_in((), given)
    past = int(cache.get_seq_length()) if cache is not None else 0
    if embeds is not None or ids is None:
        columns, ids = (1 if embeds is None else embeds.shape[1]), None
    else:  # after a cached prefix the ids are the whole text, or the new part of a longer mask
        whole = past == 0 or mask is None or mask.shape[1] == ids.shape[1]
        columns, ids = ids.shape[1] + (0 if whole else past), (ids if whole else None)
    if columns <= past and not doubt:
        doubt = f"it was given {columns} columns, but the cache holds {past} already (pass attention_mask of all)"
    fits = mask is not None and mask.shape[1] == columns
    beams = _setting("num_beams", given, given.get("generation_config"), config) or 1
    return Generation(columns, past, ids, mask if fits else None, doubt, int(beams))


def _tensor(given: Mapping[str, Any], dim: int, *names: str) -> torch.Tensor | None:
    found = (given.get(name) for name in names)
    return next((x for x in found if isinstance(x, torch.Tensor) and x.dim() == dim), None)


def _doubt(given: Mapping[str, Any], *configs: Any) -> str:
    for name, (harmless, why) in _DOUBTS.items():
        value = _setting(name, given, *configs)
        if value not in harmless:
            return why.format(value)
    return ""


def _setting(name: str, given: Mapping[str, Any], *configs: Any) -> Any:
    values = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)
