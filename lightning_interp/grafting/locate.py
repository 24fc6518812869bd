"""Find the tokens of an entity in a text, by character offsets."""

from __future__ import annotations

from typing import Any

from lightning_interp.core.tokens.text import find_occurrence
from lightning_interp.errors import PositionError

__all__ = ["encode_prompt", "first_target_token", "locate_entity"]


def encode_prompt(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the characters of each.

    Args:
        tokenizer: A fast tokenizer.
        text: The prompt.

    Returns:
        Ids ``[T]`` and half-open character spans ``[T]``.

    Raises:
        PositionError: If the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PositionError(
            f"{type(tokenizer).__name__} gives no character offsets. Load the fast tokenizer of this model."
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def locate_entity(tokenizer: Any, text: str, entity: str, *, which: str = "first") -> list[int]:
    """Indices of the tokens that hold any character of an entity.

    Args:
        tokenizer: A fast tokenizer.
        text: The prompt.
        entity: The name, as it is written in the prompt.
        which: ``first``, ``last`` or ``all`` mentions.

    Returns:
        Token indices, special tokens counted.

    Raises:
        PositionError: If the entity does not occur, or ``which`` is unknown.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> locate_entity(byte_tokenizer(), "I saw Ann.", "Ann")
        [6, 7, 8]
    """
    if which not in ("first", "last", "all"):
        raise PositionError(f"locate_entity(which={which!r}) is unknown; expected 'first', 'last' or 'all'.")
    _, spans = encode_prompt(tokenizer, text)
    places = find_occurrence(text, entity, which) if entity else []
    if not places:
        raise PositionError(
            f"Entity {entity!r} does not occur in the prompt {text!r}. Check the spelling and the case."
        )
    return [i for i, (a, b) in enumerate(spans) if b > a and any(a < end and b > begin for begin, end in places)]


def first_target_token(tokenizer: Any, text: str, target: str) -> int:
    """Id of the first token of ``" " + target`` after a prompt (Nief et al. 2025, released code).

    Args:
        tokenizer: Any tokenizer.
        text: The prompt.
        target: The expected continuation.

    Returns:
        A token id.

    Raises:
        PositionError: If the target is empty.
    """
    if not target.strip():
        raise PositionError(f"The target {target!r} of the prompt {text!r} is empty.")
    ids = list(tokenizer(text)["input_ids"])
    joined = list(tokenizer(f"{text} {target}")["input_ids"])
    if joined[: len(ids)] == ids and len(joined) > len(ids):
        return int(joined[len(ids)])
    return int(tokenizer(f" {target}", add_special_tokens=False)["input_ids"][0])
