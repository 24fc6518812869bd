"""The table of complete units: an original, its rewrite, the rewrite of the rewrite, and their rewards."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from lightning_interp.errors import DataError

__all__ = ["STAGES", "RewriteTriples", "as_reward", "same_text"]

STAGES = ("original", "rewrite", "rewrite2", "rewrite3")
"""Texts of a unit, in the order in which they are made."""

_COLUMNS = ("ids", "w", "prompts", "original", "rewrite", "rewrite2", "rewrite3", "draw", "cluster")

_REWARDS = {stage: "reward" if stage == "original" else f"reward_{stage}" for stage in STAGES}


@dataclass(frozen=True, kw_only=True)
class RewriteTriples:
    """Units of which every text is there, one row a unit and draw, in the order of the store.

    Args:
        attr: Name of the attribute.
        ids, draw: Unit and number of the draw of each row; several draws of a unit are several rows with one id.
        w, prompts: Value of the attribute in the original, and what the texts answer.
        original, rewrite, rewrite2: Texts as they were found, with the attribute flipped, and flipped back.
        cluster: What units that are not independent share; None if the store knows of none.
        rewrite3: Flipped once more; None if that was not asked for.
        reward: Rewards of the texts by stage, see :meth:`with_scores`; None if they are not scored.
        dropped, dropped_ids: What is left out: counts by reason and arm (``"none"`` without a label), ids by reason.

    Raises:
        DataError: If a column is shorter or longer than ``ids``, or holds something else; names column and row.

    Example:
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
        >>> RewriteTriples.from_rows([row]).texts("rewrite2")
        ['oh!']
    """

    attr: str
    ids: list[str]
    w: list[int]
    prompts: list[str]
    original: list[str]
    rewrite: list[str]
    rewrite2: list[str]
    draw: list[int]
    cluster: list[str] | None = None
    rewrite3: list[str] | None = None
    reward: dict[str, list[float]] | None = None
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped_ids: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in _COLUMNS}
        columns |= {_REWARDS.get(stage, stage): values for stage, values in (self.reward or {}).items()}
        for name, column in columns.items():
            if column is not None and len(column) != len(self.ids):
                raise DataError(
                    f"{name!r} of {self.attr!r} has {len(column)} values, but ids has {len(self.ids)}; expected one a "
                    "row in each."
                )
        for name in ("w", *self.stages):
            for unit, value in zip(self.ids, columns[name], strict=True):
                fits = value is not None and value in (0, 1) if name == "w" else isinstance(value, str)
                if not fits:
                    raise DataError(
                        f"{name!r} of unit {unit!r} of {self.attr!r} is {value!r:.80}; expected "
                        f"{'0 or 1' if name == 'w' else 'a text'}. Leave the unit out."
                    )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are there."""
        return STAGES if self.rewrite3 is not None else STAGES[:3]

    def texts(self, stage: str) -> list[str]:
        """The texts of one stage.

        Args:
            stage: One of :data:`STAGES`.

        Returns:
            One text a row.

        Raises:
            DataError: If the stage is unknown or was not asked for.
        """
        if stage not in self.stages:
            raise DataError(f"There is no stage {stage!r} of {self.attr!r}; these are: {', '.join(self.stages)}.")
        texts: list[str] = getattr(self, stage)
        return texts

    def select(self, rows: Iterable[int]) -> RewriteTriples:
        """Some of the rows, such as those of the units on which a rewriter complied.

        Args:
            rows: Their numbers, from 0, in the order that is wanted.

        Returns:
            The same attribute, and what was dropped, with these rows alone.

        Example:
            >>> row = {"w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
            >>> RewriteTriples.from_rows([row | {"id": "a"}, row | {"id": "b"}]).select([1]).ids
            ['b']
        """
        chosen = list(rows)
        columns = {name: getattr(self, name) for name in _COLUMNS}
        fewer: dict[str, Any] = {name: [c[row] for row in chosen] for name, c in columns.items() if c is not None}
        if self.reward is not None:
            fewer["reward"] = {stage: [values[row] for row in chosen] for stage, values in self.reward.items()}
        return replace(self, **fewer)

    def first(self, count: int) -> RewriteTriples:
        """The first rows.

        Args:
            count: How many; all if 0.

        Returns:
            The rows.
        """
        return self.select(range(count)) if 0 < count < len(self) else self

    def with_scores(self, reward: Mapping[str, Iterable[Any]]) -> RewriteTriples:
        """The same units with rewards of their texts.

        Args:
            reward: For each stage one number a row, such as ``TripleScores.reward``.

        Returns:
            The units; ``TripleScores.of`` takes the rewards out again.

        Raises:
            DataError: If a stage is unknown, or there are not as many rewards as rows.
        """
        for stage in reward:
            self.texts(stage)  # refuses an unknown one
        return replace(self, reward={stage: [float(value) for value in values] for stage, values in reward.items()})

    def rows(self) -> list[dict[str, Any]]:
        """One dict a row: ``id, attr, draw, w, cluster, prompt``, each stage's text and reward (``reward_rewrite``)."""
        columns: dict[str, Sequence[Any]] = {
            "id": self.ids, "attr": [self.attr] * len(self), "draw": self.draw, "w": self.w,
            "cluster": self.cluster or [None] * len(self), "prompt": self.prompts,
        }  # fmt: skip
        columns |= {stage: self.texts(stage) for stage in self.stages}
        columns |= {_REWARDS[stage]: values for stage, values in (self.reward or {}).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, source: str = "rows") -> RewriteTriples:
        """Complete units from what :meth:`rows` gave.

        Args:
            rows: The rows, all with the same keys; ``attr``, ``draw``, ``cluster`` and ``prompt`` may be missing.
            source: What they are, for messages.

        Returns:
            The units.

        Raises:
            DataError: If there is no row, a key is missing, or a value cannot be used.
        """
        found = [dict(row) for row in rows]
        keys = set[str]().union(*found)
        lacking = [name for name in ("id", "w", *STAGES[:3]) if any(name not in row for row in found)]
        if not found or lacking:
            what = ", ".join(lacking) or "rows"
            raise DataError(f"{source} has no {what}; expected rows with id, w and {', '.join(STAGES[:3])}.")
        attributes = {row.get("attr", "attribute") for row in found}
        if len(attributes) > 1:
            raise DataError(f"{source} has units of {len(attributes)} attributes; expected one. Divide the rows.")
        columns: dict[str, Any] = {n: [row.get(n) for row in found] for n in ("w", *STAGES) if n in keys}
        clusters = [row.get("cluster") or None for row in found]
        scored = [stage for stage in STAGES if _REWARDS[stage] in keys]
        reward = {stage: [as_reward(row.get(_REWARDS[stage])) for row in found] for stage in scored}
        return cls(
            attr=attributes.pop(),
            ids=[str(row["id"]) for row in found],
            draw=[int(row.get("draw", 0)) for row in found],
            prompts=[row.get("prompt") or "" for row in found],
            cluster=None if None in clusters else [str(name) for name in clusters],
            reward=reward or None,
            **columns,
        )

    def to_frame(self) -> Any:
        """:meth:`rows` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def targets(self, stage: str) -> list[int]:
        """The value of the attribute that the texts of one stage should have.

        Args:
            stage: One of :data:`STAGES`.

        Returns:
            One value a row.
        """
        return [w ^ STAGES.index(stage) % 2 for w in self.w]

    def identical(self) -> dict[str, dict[str, int]]:
        """Count rewrites that say the same as what they were made from.

        Returns:
            For each stage after the original, counts by arm: ``{"rewrite": {"w1": ..., "w0": ...}, ...}``.
        """
        counts = {stage: {"w1": 0, "w0": 0} for stage in self.stages[1:]}
        for before, stage in pairwise(self.stages):
            for w, source, text in zip(self.w, self.texts(before), self.texts(stage), strict=True):
                counts[stage][f"w{w}"] += same_text(source, text)
        return counts


def same_text(a: str, b: str) -> bool:
    """Whether two texts are equal but for white space and the composition of Unicode characters."""
    return a == b or _plain(a) == _plain(b)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def as_reward(value: Any) -> float:
    """A reward from a file: a number, NaN where there is none."""
    return float("nan") if value is None or value == "" else float(value)
