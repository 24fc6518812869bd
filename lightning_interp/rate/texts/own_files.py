"""Texts of the user's own: labelled or not, rewritten or not, scored or not, one JSON object a line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError
from lightning_interp.rate.texts.readers import ForeignRewrites, Given, collected, number_of, text_of, unit_of

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
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = file.write_text('{"text": "A fine film!", "w": 1, "prompt": "Review it."}')
        >>> read_own(file).units[0].prompt
        'Review it.'
    """
    return collected(path, (_given(row, where) for where, row in json_lines(path)))


def _given(row: Mapping[str, Any], where: str) -> Given:
    for name in row:
        near = difflib.get_close_matches(name, [one for one in COLUMNS if one not in row], n=1, cutoff=0.85)
        if name not in COLUMNS and near:
            raise DataError(f"{where}: there is a key {name!r}; is {near[0]!r} meant? Rename one or the other.")
    given = [name for name in ("text", "original") if name in row]
    if len(given) != 1:
        raise DataError(
            f"{where}: the keys are {', '.join(row) or 'none'}; expected 'text' or 'original', and not both."
        )
    text, first, second = (text_of(where, repr(key), row.get(key)) for key in (*given, "rewrite", "rewrite2"))
    if text is None or not text.strip():
        raise DataError(f"{where}: {given[0]!r} is {text!r}; expected a text. Delete the line.")
    name, cluster = row.get("id", where.rpartition(" ")[2]), row.get("cluster")
    unit = unit_of(
        where,
        id=str(name) if isinstance(name, int) and not isinstance(name, bool) else name,
        text=text,
        w=row.get("w"),
        prompt=row.get("prompt") or "",
        cluster=str(cluster) if isinstance(cluster, int) else cluster,
    )
    scored = {stage: key for stage, key in _REWARDS.items() if row.get(key) is not None}
    scores = {stage: number_of(where, repr(key), row[key]) for stage, key in scored.items()}
    return unit, (first, second), {OWN_REWARDS: scores} if scores else {}
