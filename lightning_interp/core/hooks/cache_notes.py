"""What of a KV cache was filled by passes that an attachment saw, noted on the cache, so that its copies know too."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.kv_cache import cache_in, cache_of, installed_versions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError

__all__ = ["CacheNotes"]

_NAME = "_seen_by_attachments"
_KEYS = count()
_TEXTS = 8
"""Texts that were read whole, one of which may come again with one more token."""


class CacheNotes:
    """The notes of one attachment."""

    def __init__(self, model_map: ModelMap) -> None:
        self.model_map = model_map
        self._key, self._open = next(_KEYS), _Seen()
        self._texts: deque[torch.Tensor] = deque(maxlen=_TEXTS)

    def read(self, step: StepContext, cache: Any | None) -> None:
        """Tell a pass what came before it, and note that it came."""
        seen: _Seen | None = getattr(cache, _NAME, {}).get(self._key) if step.past else None
        virtual = _virtual_columns(self.model_map, step.past, step.input_ids is None)
        step.virtual = virtual if seen is None else seen.virtual
        before = max(step.past - step.virtual, 0)
        step.follows = seen is not None and before <= seen.columns
        step.unseen = 0 if step.follows else before
        step.rewound = seen is not None and before < seen.columns
        told = step.generation is not None or step.known_prompt_lengths is not None
        first = (None if told or before else step) if seen is None else seen.first
        if told and before and first is not None and first.past + first.length == step.past:
            step.before = first
        if seen is not None:
            step.carried, step.prompt = dict(seen.carried), None if step.is_prefill else seen.prompt
        self._open = _Seen(before + step.length, first, step.virtual, step.prompt or step, step.carried)
        self._note(cache)

    def read_text(self, step: StepContext) -> None:
        """Tell a pass over a whole text which others were its text but for the last token, by their shapes alone."""
        if step.input_ids is None or step.past > step.virtual:
            return
        shape = (step.batch_size, step.length - 1)
        step.shorter = tuple(ids for ids in self._texts if ids.shape == shape)
        self._texts.append(step.input_ids)

    def made(self, output: Any) -> None:
        """Note the cache that a pass made, where it was given none."""
        if self._open.columns >= 0:
            self._note(cache_in(output, {}) if isinstance(output, tuple) else cache_of(output))
            self._open = _Seen()

    def _note(self, cache: Any | None) -> None:
        if cache is not None:
            with suppress(AttributeError):  # a cache of somebody's own may take no attributes
                cache.__dict__.setdefault(_NAME, {})[self._key] = self._open
            self._open = _Seen()


def _virtual_columns(model_map: ModelMap, past: int, embedded: bool) -> int:
    """Virtual tokens of PEFT's prompt learning before a text, where they are cached or came as embeddings."""
    for outer in model_map.outer[:-1]:
        config: Any = getattr(outer, "active_peft_config", None)
        if not getattr(config, "is_prompt_learning", False) or getattr(outer, "_adapters_disabled", False):
            continue
        count, cached = int(config.num_virtual_tokens), config.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
        if past and embedded and not cached:
            raise PositionError(
                f"{type(outer).__name__} put its {count} virtual tokens into the text again, after {past} columns that "
                f"were cached, so positions are not known (with {installed_versions()}). Pass use_cache=False."
            )
        return count if (past >= count if cached else past or embedded) else 0
    return 0


@dataclass
class _Seen:
    """What is known of one cache."""

    columns: int = -1
    first: StepContext | None = None  # the pass that was taken for the whole prompt for lack of a better knowledge
    virtual: int = 0
    prompt: StepContext | None = None  # the pass that read the prompt's end
    carried: dict[Any, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seen:
        return self

    def __reduce__(self) -> tuple[type[_Seen], tuple[()]]:
        return _Seen, ()
