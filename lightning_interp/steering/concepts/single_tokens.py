"""Strings that are one token of a tokenizer, and what single tokens say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["single_token", "word_tokens"]

_MARKS = ("Ġ", "▁")


def single_token(tokenizer: Any, text: str) -> int | None:
    """The token that a string is, or None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and _says(tokenizer, ids[0], text):
        return int(ids[0])
    entry = tokenizer.convert_tokens_to_ids(text)
    if entry is None or (entry == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    return int(entry)


def word_tokens(tokenizer: Any) -> Iterator[tuple[int, str, bool]]:
    """Id, text and leading space of the tokens that are ASCII letters or digits, in the order of ids."""
    special = set(tokenizer.all_special_ids)
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        spaced = token.startswith(_MARKS)
        text = token[1:] if spaced else token
        if index not in special and text.isascii() and text.isalnum():
            yield index, text, spaced


def _says(tokenizer: Any, index: int, text: str) -> bool:
    """Whether a token reads as the text; encoders may add a leading space and decoders drop it, so ask the entry."""
    if str(tokenizer.convert_ids_to_tokens(index)).startswith(_MARKS) != text.startswith(" "):
        return False
    return str(tokenizer.decode([index], clean_up_tokenization_spaces=False)).strip() == text.strip()
