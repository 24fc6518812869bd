"""Prompts for grafted models, and what the tokenizer makes of them: token ids, and the tokens of an entity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from lightning_interp.core.tokens.batches import padded
from lightning_interp.core.tokens.positions import FromBatch, Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.tokens.text import find_mention, is_whole
from lightning_interp.errors import PositionError

__all__ = [
    "EncodedPrompt",
    "GraftPrompt",
    "PromptBatch",
    "encode",
    "encode_prompt",
    "first_target_token",
    "locate_entity",
    "spans_of",
]


@dataclass(frozen=True)
class GraftPrompt:
    """One question to a grafted model.

    Args:
        text: The prompt.
        target: What should follow it; its first token is scored.
        spans: Named pieces of the prompt that plans may select with ``FromBatch(name)``, such as ``{"FE": "Ann Lee"}``.
        unit: Unit of sampling for intervals (the fact); prompts of one unit are averaged first.
        form: Which prompt form this is; results are also given by form.
    """

    text: str
    target: str
    spans: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    form: str = ""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids ``[T]``, the id of its target, and the token indices of its spans."""

    index: int
    ids: list[int]
    target: int
    spans: dict[str, list[int]]


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts: ids and real tokens ``[n, T]``, and a mask ``[n, T]`` a span."""

    ids: torch.Tensor
    valid: torch.Tensor
    masks: dict[str, torch.Tensor]
    target: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Pad prompts on the left."""
        ids, mask = padded([prompt.ids for prompt in prompts], side="left")
        names = dict.fromkeys(name for prompt in prompts for name in prompt.spans)
        masks = {name: torch.zeros_like(mask, dtype=torch.bool) for name in names}
        for row, prompt in enumerate(prompts):
            for name, tokens in prompt.spans.items():
                masks[name][row, torch.tensor(tokens) + ids.shape[1] - len(prompt.ids)] = True
        return cls(ids, mask.bool(), masks, torch.tensor([prompt.target for prompt in prompts]))

    def step(self, tokenizer: Any) -> StepContext:
        """What position selectors see of these prompts."""
        n, width = self.ids.shape
        return StepContext(
            n, width, input_ids=self.ids, attention_mask=self.valid, find_tokenizer=lambda: tokenizer, batch=self.masks
        )


def encode(prompt: GraftPrompt, index: int, tokenizer: Any, asked: Sequence[str]) -> EncodedPrompt:
    """Tokenise one prompt and find the spans that some plan selects."""
    if lacking := [name for name in asked if name not in prompt.spans]:
        raise PositionError(
            f"The prompt {prompt.text!r} has no span {lacking[0]!r}, which a plan selects; it has: "
            f"{', '.join(prompt.spans) or 'none'}. Pass GraftPrompt(spans={{{lacking[0]!r}: ...}})."
        )
    spans = {name: locate_entity(tokenizer, prompt.text, part) for name, part in prompt.spans.items()}
    ids, _ = encode_prompt(tokenizer, prompt.text)
    return EncodedPrompt(index, ids, first_target_token(tokenizer, prompt.text, prompt.target), spans)


def spans_of(positions: Any) -> Iterator[str]:
    """Keys of every ``FromBatch`` inside a selector."""
    if isinstance(positions, FromBatch):
        yield positions.key
    for part in fields(positions) if is_dataclass(positions) else ():
        value = getattr(positions, part.name)
        yield from spans_of(value) if isinstance(value, Positions) else ()


def encode_prompt(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the half-open span of characters of each."""
    if not getattr(tokenizer, "is_fast", False):
        raise PositionError(
            f"{type(tokenizer).__name__} gives no character offsets. Load the fast tokenizer of this model."
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def locate_entity(tokenizer: Any, text: str, entity: str, *, which: str = "first") -> list[int]:
    """Indices of the tokens that hold any character of an entity.

    Mentions that are words of their own count, or where there are none, those that tokens spell from end to end.

    Args:
        tokenizer: A fast tokenizer.
        text: The prompt.
        entity: The name, as it is written in the prompt.
        which: ``first``, ``last`` or ``all`` mentions.

    Returns:
        Token indices, special tokens counted.

    Raises:
        PositionError: If the entity does not occur, or only as a piece of a token, or ``which`` is unknown.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> locate_entity(byte_tokenizer(), "Anna saw Ann.", "Ann")
        [9, 10, 11]
    """
    if which not in ("first", "last", "all"):
        raise PositionError(f"locate_entity(which={which!r}) is unknown; expected 'first', 'last' or 'all'.")
    _, spans = encode_prompt(tokenizer, text)
    places = find_mention(text, entity, "all") if entity else []
    if not places:
        raise PositionError(
            f"Entity {entity!r} does not occur in the prompt {text!r}. Check the spelling and the case."
        )
    if not is_whole(text, *places[0]):
        places = [place for place in places if _spelled(text, spans, *place)]
    if not places:
        raise PositionError(
            f"Entity {entity!r} is only a piece of other words in the prompt {text!r}, and of their tokens. Name the "
            "whole word."
        )
    places = {"first": places[:1], "last": places[-1:], "all": places}[which]
    return [i for i, (a, b) in enumerate(spans) if b > a and any(a < end and b > begin for begin, end in places)]


def _spelled(text: str, spans: Sequence[tuple[int, int]], begin: int, end: int) -> bool:
    """Whether tokens hold the characters of a place and no others but spaces."""
    touched = [(a, b) for a, b in spans if b > a and a < end and b > begin]
    return not any(text[a:begin].strip() or text[end:b].strip() for a, b in touched)


def first_target_token(tokenizer: Any, text: str, target: str) -> int:
    """Id of the first token of ``" " + target`` after a prompt (Nief et al. 2025, released code)."""
    if not target.strip():
        raise PositionError(f"The target {target!r} of the prompt {text!r} is empty.")
    ids = list(tokenizer(text)["input_ids"])
    joined = list(tokenizer(f"{text} {target}")["input_ids"])
    if joined[: len(ids)] == ids and len(joined) > len(ids):
        return int(joined[len(ids)])
    return int(tokenizer(f" {target}", add_special_tokens=False)["input_ids"][0])
