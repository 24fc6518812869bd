"""Prompts of a user, read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_interp.core.storage.row_files import file_rows
from lightning_interp.errors import DataError
from lightning_interp.grafting import GraftPrompt


def read_prompts(path: Path) -> list[GraftPrompt]:
    """Read rows with ``text`` and ``target``, and if wished ``spans``, ``unit`` and ``form``."""
    expected = "one object a row with 'text' and 'target'"
    prompts = [_prompt(row, where) for where, row in file_rows(path, expected=expected)]
    if not prompts:
        raise DataError(f"{path} holds no prompts. Expected {expected}.")
    return prompts


def _prompt(row: dict[str, Any], where: str) -> GraftPrompt:
    known = {"text": str, "target": str, "spans": dict, "unit": str | int, "form": str}
    for key, value in row.items():
        if key not in known or not isinstance(value, known[key]):
            raise DataError(f"{where}: {key!r} is {value!r}; expected the keys {', '.join(known)} (spans: an object).")
    if lacking := [key for key in ("text", "target") if not row.get(key)]:
        raise DataError(f"{where}: {lacking[0]!r} is missing or empty.")
    spans = row.get("spans", {})
    if wrong := [key for key, part in spans.items() if not isinstance(part, str)]:
        raise DataError(f"{where}: the span {wrong[0]!r} is {spans[wrong[0]]!r}; expected a piece of the text.")
    return GraftPrompt(row["text"], row["target"], spans, str(row.get("unit", "")), row.get("form", ""))
