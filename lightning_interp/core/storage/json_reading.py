"""Reading JSON that somebody else may have written: every fault is a ``ValueError`` that says what is wrong.

``json.loads`` alone lets other errors out (nesting too deep, numbers too long), keeps the last of two equal keys,
turns ``1e999`` into infinity, and gives half characters that no file can be written with.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_interp.errors import DataError, InterpError

__all__ = ["BOM", "check_characters", "half_character", "parse_json", "read_json"]

BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors begin a file in UTF-8 with."""
_DEEPEST = 200  # levels; Python's own functions that walk an object stop at some hundreds
_MOST_DIGITS = 308  # of a whole number: what a float can still hold


def parse_json(data: bytes | str, *, own: bool = False, twice: bool = False) -> Any:
    """Read a JSON text; what is ``own`` may hold numbers of any length and half characters.

    With ``twice``, as in files that other libraries read as well, the last of two equal keys counts.
    """
    text = data if isinstance(data, str) else data.removeprefix(BOM).decode("utf-8")
    pairs = None if twice else _object
    try:
        found = json.loads(
            text, object_pairs_hook=pairs, parse_int=int if own else _integer, parse_float=float if own else _float
        )
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from error
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(found)
    if not own and (isinstance(data, str) or "\\ud" in text.lower()):
        check_characters(found)
    return found


def read_json(
    path: str | os.PathLike[str],
    *,
    expected: str = "a JSON file",
    error: type[InterpError] = DataError,
    own: bool = False,
    twice: bool = False,
) -> Any:
    """Read a file that is JSON as a whole; what :func:`parse_json` refuses is raised as ``error``."""
    name = str(os.fspath(path))
    try:
        return parse_json(Path(path).read_bytes(), own=own, twice=twice)
    except OSError as fault:
        raise error(f"Cannot read {name!r}: {fault.strerror}. Expected {expected}.") from fault
    except ValueError as fault:
        raise error(f"{name!r} is no valid JSON ({fault}). Expected {expected}.") from fault


def half_character(text: str) -> bool:
    """Whether a text holds half of a character (a lone surrogate), which no model and no file in UTF-8 takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} is there twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text[:12]}... has {len(text)} digits, more than a float can hold")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.20} is larger than a float can hold")
    return value


def _check_depth(found: Any) -> None:
    level, depth = [found], 0
    while level := [value for one in level for value in _inside(one) if isinstance(value, dict | list)]:
        depth += 1
        if depth >= _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def check_characters(found: Any) -> None:
    """Refuse half of a character (a lone surrogate), which no file and no tokenizer takes, in texts at any depth."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if half_character(value):
                raise ValueError(f"{value!r:.60} holds half of a character (a lone surrogate)")
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def _inside(one: Any) -> Any:
    return one.values() if isinstance(one, dict) else one
