"""What looks wrong with a rewrite. A flag is shown and counted; it never removes a text."""

from __future__ import annotations

import re

from lightning_interp.rate.estimators.triples import same_text

__all__ = ["FLAGS", "rewrite_flags"]

FLAGS = ("empty", "identical", "length", "refusal", "preamble")
"""All flags that a rewrite can carry."""

_SHORTEST, _LONGEST = 0.2, 5.0  # of the source's length, in characters

_REFUSAL = re.compile(
    r"\W*(i'?m sorry|i am sorry|sorry|apologies|unfortunately)?\W*(but )?"
    r"(i (can ?not|can'?t|am unable|'?m unable|won'?t|will not|am not able|'?m not able)|as an ai\b|i'?m an ai\b)",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"\W*((sure|certainly|of course|absolutely|okay|ok)\b\W*)?"
    r"((here'?s|here is|here are|below is|the following is)\b[^\n.!?]{0,60}\b(re-?writ|revis|version|text|edit)"
    r"|i(?:'ve| have)? (re-?writ|re-?wrote|revised|edited|adjusted|changed)"
    r"|(re-?written|revised|edited) (text|version|response|review)\b)",
    re.IGNORECASE,
)


def rewrite_flags(source: str, text: str | None, *, changes_length: bool = False) -> tuple[str, ...]:
    """Check a rewrite against the text that it was made from.

    Refusals and remarks about the edit are looked for at the beginning of the rewrite, and not reported where the
    source begins like that too. They are found by English phrases, so they are hints.
    """
    if text is None or not text.strip():
        return ("empty",)
    found = []
    if same_text(source, text):
        found.append("identical")
    if not changes_length and not _SHORTEST <= len(text.strip()) / max(1, len(source.strip())) <= _LONGEST:
        found.append("length")
    for name, pattern in (("refusal", _REFUSAL), ("preamble", _PREAMBLE)):
        if _begins(pattern, text) and not _begins(pattern, source):
            found.append(name)
    return tuple(found)


def _begins(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.match(text.replace("\u2019", "'")) is not None
