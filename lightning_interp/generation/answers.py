"""Reading what a model answered: any answer of the protocol, of any shape, becomes a completion with a status."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.generation.requests import Completion

__all__ = ["parse_answer", "token_counts", "without_reasoning"]

_MOST_TOKENS = 10_000_000  # no answer read or wrote more, whatever it says
_THOUGHT = re.compile(r"\s*<(think|thinking|reasoning|thought)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"\s*<(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_THOUGHTS = re.compile("reason|think")  # kinds of parts
_END = re.compile(r"</(?:think|thinking|reasoning|thought)>\s*", re.IGNORECASE)  # where a template wrote the beginning


def parse_answer(body: Any) -> Completion:
    """Read an answer of the protocol.

    It is ``truncated`` at the limit of tokens, inside its reasoning or in the middle of a character, ``refused`` if the
    model or a filter refused, ``failed`` if it is none. Reasoning in front of the answer is left out.
    """
    read, written = token_counts(body)
    counts: dict[str, Any] = {"tokens_in": read, "tokens_out": written}
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
        return Completion(text=None, status="failed", error=f"an answer without choices: {_shown(body)}", **counts)
    message, reason = _object(choices[0], "message"), choices[0].get("finish_reason")
    content = message.get("content", choices[0].get("text"))
    text = _text(content)
    answer = None if text is None else without_reasoning(_characters(text))
    refusal = message.get("refusal")
    if refusal or reason == "content_filter":
        return Completion(text=answer, status="refused", error=str(refusal or reason)[:500], **counts)
    if reason == "length":
        return Completion(text=answer, status="truncated", error="ran into the limit of tokens", **counts)
    if text is None and content is not None:
        return Completion(text=None, status="failed", error=f"the content is no text: {_shown(content)}", **counts)
    if text is not None and answer is None:
        return Completion(text=None, status="truncated", error="ended inside its reasoning", **counts)
    return Completion(text=answer or "", **counts)


def without_reasoning(text: str) -> str | None:
    """A text without the reasoning that a model wrote in front of its answer; None if there is nothing else."""
    if thought := _THOUGHT.match(text):
        return without_reasoning(text[thought.end() :].lstrip())
    if _OPEN.match(text):
        return None
    ends = list(_END.finditer(text))
    return text[ends[-1].end() :] if ends and not _OPEN.search(text) else text


def token_counts(body: Any) -> tuple[int | None, int | None]:
    """Tokens read and written, as far as an answer tells them in numbers that can be."""
    usage = _object(body, "usage")
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and 0 <= number <= _MOST_TOKENS else None


def _text(content: Any) -> str | None:
    """A content that is a text, or a list of parts of which some are texts."""
    if isinstance(content, str):
        return content
    listed = content if isinstance(content, list) else []
    parts = [part for part in listed if not (isinstance(part, Mapping) and _THOUGHTS.search(str(part.get("type"))))]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    texts = [text.get("value") if isinstance(text, Mapping) else text for text in texts]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if found else None


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"


def _characters(text: str) -> str:
    """A text in which two halves of one character are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _object(row: Any, key: str) -> Mapping[str, Any]:
    value = row.get(key) if isinstance(row, Mapping) else None
    return value if isinstance(value, Mapping) else {}
