"""Texts of the user's own: labelled or not, rewritten or not, scored or not, one JSON object a line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError
from lightning_interp.rate.rewriting.records import Unit, check_units
from lightning_interp.rate.texts.readers import ForeignRewrites

__all__ = ["COLUMNS", "OWN_REWARDS", "read_own"]

OWN_REWARDS = "columns"
"""Name under which the rewards of the file are found."""

_REWARDS = {"original": "reward", "rewrite": "reward_rewrite", "rewrite2": "reward_rewrite2"}
COLUMNS = ("text", "original", "prompt", "w", "id", "cluster", "rewrite", "rewrite2", *_REWARDS.values())
"""Keys that are looked at: ``text`` (or ``original``) is needed, the others are not."""


def read_own(path: str | os.PathLike[str]) -> ForeignRewrites:
    r"""Read a file of the user's own.

    A line holds ``text`` (or ``original``), and may hold ``prompt``, ``w`` (0, 1 or null), ``id`` (the number of the
    line if there is none) and ``cluster``; ``rewrite`` and ``rewrite2``, if the texts are rewritten already; and
    ``reward``, ``reward_rewrite`` and ``reward_rewrite2``, if they are scored. Other keys are not looked at, unless one
    is nearly the name of a known one.

    Args:
        path: A JSONL file.

    Returns:
        Units, texts and rewards; the rewards as those of the model :data:`OWN_REWARDS`.

    Raises:
        DataError: If the file cannot be read or a line cannot be used; names file and line.

    Example:
        >>> import json, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "mine.jsonl")
        >>> with open(path, "w") as file:
        ...     _ = file.write(json.dumps({"text": "A fine film!", "w": 1, "prompt": "Review it."}))
        >>> read_own(path).units[0].prompt
        'Review it.'
    """
    units: list[Unit] = []
    texts: dict[str, tuple[str | None, str | None]] = {}
    rewards: dict[str, dict[str, float]] = {}
    for where, row in json_lines(path):
        _check_names(row, where)
        unit = _unit(row, where, where.rpartition(" ")[2])
        units.append(unit)
        texts[unit.id] = (_text(row, "rewrite", where), _text(row, "rewrite2", where))
        scores = {stage: _number(row, key, where) for stage, key in _REWARDS.items() if row.get(key) is not None}
        if scores:
            rewards[unit.id] = scores
    return ForeignRewrites(
        units=check_units(units, os.fspath(path)),
        texts=texts,
        rewards={OWN_REWARDS: rewards} if rewards else {},
        source=os.fspath(path),
    )


def _check_names(row: Mapping[str, Any], where: str) -> None:
    for name in row:
        near = difflib.get_close_matches(name, [one for one in COLUMNS if one not in row], n=1, cutoff=0.85)
        if name not in COLUMNS and near:
            raise DataError(f"{where}: there is a key {name!r}; is {near[0]!r} meant? Rename one or the other.")


def _unit(row: Mapping[str, Any], where: str, number: str) -> Unit:
    given = [name for name in ("text", "original") if name in row]
    if len(given) != 1:
        raise DataError(
            f"{where}: the keys are {', '.join(row) or 'none'}; expected 'text' or 'original', and not both."
        )
    text = _text(row, given[0], where)
    if text is None or not text.strip():
        raise DataError(f"{where}: {given[0]!r} is {text!r}; expected a text. Delete the line.")
    name = row.get("id", number)
    cluster = row.get("cluster")
    try:
        return Unit(
            id=str(name) if isinstance(name, int) and not isinstance(name, bool) else name,
            text=text,
            w=row.get("w"),
            prompt=row.get("prompt") or "",
            cluster=str(cluster) if isinstance(cluster, int) else cluster,
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {text!r:.80}; expected a string.")
    return text


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {key!r} is {value!r:.80}; expected a number.")
    return float(value)
