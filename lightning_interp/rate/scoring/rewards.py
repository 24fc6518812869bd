"""Rewards on disk: one line a text and scorer, found again by content."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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


class MissingRewardError(DataError, KeyError):
    """A scorer has no reward of a text; names both."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would quote the message


class ScoreRow(NamedTuple):
    """One text that is to be scored.

    Attributes:
        id: Its unit.
        attr: The attribute.
        stage: ``"original"``, ``"rewrite"``, ``"rewrite2"`` or ``"rewrite3"``.
        draw: Number of the draw.
        prompt: What it answers.
        text: The text.
    """

    id: str
    attr: str
    stage: str
    draw: int
    prompt: str
    text: str

    def key(self, scorer_sha: str) -> int:
        """The number by which its reward is known: a digest of everything that decides it, and of its unit.

        Args:
            scorer_sha: Digest of the scorer's identity.
        """
        parts = (scorer_sha, self.attr, self.stage, self.draw, self.id, text_sha(self.prompt), text_sha(self.text))
        return int(digest(parts)[:_DIGITS], 16)


def rows_of(triples: RewriteTriples) -> list[ScoreRow]:
    """All texts of complete units, one row each.

    Args:
        triples: The units.

    Returns:
        The rows: all originals, then all rewrites, and so on.

    Raises:
        DataError: If a unit and draw occur twice.

    Example:
        >>> triples = RewriteTriples(attr="loud", ids=["a"], w=[1], prompts=["say"], original=["oh!"], rewrite=["oh"],
        ...     rewrite2=["oh!"], draw=[0])
        >>> [row.text for row in rows_of(triples)]
        ['oh!', 'oh', 'oh!']
    """
    keys = list(zip(triples.ids, triples.draw, strict=True))
    if len(set(keys)) < len(keys):
        twice = [key[0] for key in dict.fromkeys(keys) if keys.count(key) > 1]
        raise DataError(f"{len(twice)} units of {triples.attr!r} occur twice with one draw: {shown_ids(twice)}.")
    return [
        ScoreRow(name, triples.attr, stage, draw, prompt, text)
        for stage in triples.stages
        for name, draw, prompt, text in zip(
            triples.ids, triples.draw, triples.prompts, triples.texts(stage), strict=True
        )
    ]


def scorer_sha(scorer: Scorer) -> str:
    """Digest of what makes a scorer the one that it is.

    Args:
        scorer: The scorer.
    """
    return digest(scorer.identity())


def reward_record(row: ScoreRow, reward: float, truncated: bool, *, scorer: str, sha: str) -> dict[str, Any]:
    """One line of a file of rewards.

    NaN and infinity are never written: the reward is null then, and ``status`` is ``"nonfinite"``.

    Args:
        row: The text.
        reward: Its reward.
        truncated: Whether it was cut.
        scorer: Name of the scorer.
        sha: Digest of its identity.

    Returns:
        Plain data with the integer ``index`` of :meth:`ScoreRow.key`.
    """
    finite = math.isfinite(reward)
    return {
        "index": row.key(sha),
        "id": row.id,
        "attr": row.attr,
        "stage": row.stage,
        "draw": row.draw,
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
        reward = torch.tensor(values, dtype=torch.float64).chunk(len(triples.stages))
        cut = torch.tensor([bool(record["truncated"]) for record in records]).chunk(len(triples.stages))
        return TripleScores(
            name, dict(zip(triples.stages, reward, strict=True)), dict(zip(triples.stages, cut, strict=True))
        )

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
    file = Path(path)
    return RewardTable({record["index"]: record for record in _lines(file)}, str(file))


_FIELDS: Sequence[tuple[str, Any]] = (
    ("index", int),
    ("id", str),
    ("scorer", str),
    ("scorer_sha", str),
    ("reward", float | int | None),
    ("truncated", bool),
)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for where, record in json_lines(file, expected="the file that RewardScorer wrote", own=True):
        for name, kind in _FIELDS:
            if name not in record or not isinstance(record[name], kind):
                raise DataError(f"{where}: {name!r} is {record.get(name)!r:.80}. Delete the line and score it again.")
        yield record
