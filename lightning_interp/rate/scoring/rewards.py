"""Rewards on disk: one line a text and scorer, found again by content."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError
from lightning_interp.models.scoring.text_scorer import Scorer
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import shown_ids, text_sha
from lightning_interp.rate.scoring.scores import TripleScores

__all__ = ["MissingRewardError", "RewardTable", "ScoreRow", "read_rewards", "reward_record", "rows_of", "scorer_sha"]

_DIGITS = 15  # of the digest: a key of 60 bits
_FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("id", "scorer", "scorer_sha"), str),
    "index": int,
    "reward": float | int | None,
    "truncated": bool,
}


class MissingRewardError(DataError, KeyError):
    """A scorer has no reward of a text; names both."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would quote the message


class ScoreRow(NamedTuple):
    """One text that is to be scored."""

    id: str
    attr: str
    stage: str
    draw: int
    prompt: str
    text: str

    def key(self, scorer_sha: str) -> int:
        """The number by which its reward is known: a digest of everything that decides it, and of its unit."""
        parts = (scorer_sha, self.attr, self.stage, self.draw, self.id, text_sha(self.prompt), text_sha(self.text))
        return int(digest(parts)[:_DIGITS], 16)


def rows_of(triples: RewriteTriples) -> list[ScoreRow]:
    """All texts of complete units, one row each."""
    keys = list(zip(triples.ids, triples.draw, strict=True))
    if len(set(keys)) < len(keys):
        twice = [key[0] for key in dict.fromkeys(keys) if keys.count(key) > 1]
        raise DataError(f"{len(twice)} units of {triples.attr!r} occur twice with one draw: {shown_ids(twice)}.")
    return [
        ScoreRow(name, triples.attr, stage, draw, prompt, text)
        for stage in triples.stages
        for (name, draw), prompt, text in zip(keys, triples.prompts, triples.texts(stage), strict=True)
    ]


def scorer_sha(scorer: Scorer) -> str:
    """Digest of what makes a scorer the one that it is."""
    return digest(scorer.identity())


def reward_record(row: ScoreRow, reward: float, truncated: bool, *, scorer: str, sha: str) -> dict[str, Any]:
    """One line of a file of rewards.

    NaN and infinity are never written: the reward is null then, and ``status`` is ``"nonfinite"``.
    """
    finite = math.isfinite(reward)
    return {
        "index": row.key(sha),
        **dict(zip(("id", "attr", "stage", "draw"), row, strict=False)),
        "scorer": scorer,
        "scorer_sha": sha,
        "reward": reward if finite else None,
        "status": "ok" if finite else "nonfinite",
        "truncated": truncated,
        "text_sha": text_sha(row.text),
    }


class RewardTable:
    """Rewards read from a file.

    Args:
        records: Lines of :func:`reward_record`, by index.
        source: The file, for messages.

    Attributes:
        scorers: Names of the scorers by digest of their identity.
    """

    def __init__(self, records: Mapping[int, Mapping[str, Any]], source: str = "rewards") -> None:
        self.records, self.source = records, source
        self.scorers = {str(record["scorer_sha"]): str(record["scorer"]) for record in records.values()}

    def __len__(self) -> int:
        return len(self.records)

    def scores(self, triples: RewriteTriples, scorer: Scorer | str) -> TripleScores:
        """Rewards of one scorer for complete units; a reward that was not finite is NaN.

        Args:
            triples: The units.
            scorer: The scorer, or its name if only one of that name wrote into the file.

        Returns:
            Rewards by stage.

        Raises:
            MissingRewardError: If a text has no reward of this scorer (its text may have changed since).
            DataError: If several scorers have the name.
        """
        name, sha = (scorer, self._sha(scorer)) if isinstance(scorer, str) else (scorer.name, scorer_sha(scorer))
        rows = rows_of(triples)
        found = [self.records.get(row.key(sha)) for row in rows]
        lacking = [row for row, record in zip(rows, found, strict=True) if record is None]
        if lacking:
            raise MissingRewardError(
                f"{self.source} has no reward of scorer {name!r} for the {lacking[0].stage!r} text of unit "
                f"{lacking[0].id!r} of {triples.attr!r} ({len(lacking)} of {len(rows)} texts lack one). Score these "
                "texts, or leave the units out."
            )
        records = [record for record in found if record is not None]
        values = [math.nan if record["reward"] is None else float(record["reward"]) for record in records]
        cut = torch.tensor([bool(record["truncated"]) for record in records])
        return TripleScores.stacked(name, triples.stages, torch.tensor(values, dtype=torch.float64), cut)

    def _sha(self, name: str) -> str:
        known = [sha for sha, other in self.scorers.items() if other == name]
        if len(known) > 1:
            raise DataError(
                f"{self.source} has rewards of {len(known)} scorers called {name!r}, which differ in their settings. "
                "Pass the scorer itself."
            )
        return known[0] if known else ""


def read_rewards(path: str | os.PathLike[str]) -> RewardTable:
    """Read a file of rewards.

    Args:
        path: What ``RewardScorer`` wrote.

    Returns:
        Its rewards.

    Raises:
        DataError: If the file cannot be read, with file and line of the first line that is no reward.
    """
    records = {}
    for where, record in json_lines(path, expected="the file that RewardScorer wrote", own=True):
        for name, kind in _FIELDS.items():
            if name not in record or not isinstance(record[name], kind):
                raise DataError(f"{where}: {name!r} is {record.get(name)!r:.80}. Delete the line and score it again.")
        records[record["index"]] = record
    return RewardTable(records, os.fspath(path))
