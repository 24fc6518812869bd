"""Prompts of a user, read from a file."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_interp.errors import DataError
from lightning_interp.grafting import GraftPrompt


def read_prompts(path: Path) -> list[GraftPrompt]:
    """Read a user's prompts.

    Args:
        path: JSONL: ``text`` and ``target``, and if wished ``spans``, ``unit`` and ``form``.

    Returns:
        The prompts.

    Raises:
        DataError: With file and line, if a line is no such object; if there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the prompts {str(path)!r}: {error}. Expected a JSONL file in UTF-8.") from error
    prompts = [_prompt(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompts. Expected one JSON object a line with 'text' and 'target'.")
    return prompts


def _prompt(line: str, where: str) -> GraftPrompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}). Expected one object a line.") from error
    known = {"text": str, "target": str, "spans": dict, "unit": str | int, "form": str}
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, expected an object with 'text' and 'target'.")
    for key, value in row.items():
        if key not in known or not isinstance(value, known[key]):
            raise DataError(f"{where}: {key!r} is {value!r}; expected the keys {', '.join(known)} (spans: an object).")
    if lacking := [key for key in ("text", "target") if not row.get(key)]:
        raise DataError(f"{where}: {lacking[0]!r} is missing or empty.")
    spans = row.get("spans", {})
    if wrong := [key for key, part in spans.items() if not isinstance(part, str)]:
        raise DataError(f"{where}: the span {wrong[0]!r} is {spans[wrong[0]]!r}; expected a piece of the text.")
    return GraftPrompt(row["text"], row["target"], spans, str(row.get("unit", "")), row.get("form", ""))
