"""Bulk scoring by ``Trainer.predict``: on any devices, onto disk, and resumed where it stopped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.storage.distributed import JsonlWriter
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.scoring.rewards import ScoreRow, read_rewards, reward_record, rows_of, scorer_sha
from lightning_interp.rate.scoring.scores import CallableScorer, TripleScores, as_scorer

__all__ = ["RewardScorer"]

_CHUNK = 256
_SECONDS = 1.0  # after which rewards are written in the middle of a step

Step = Sequence[Sequence[ScoreRow]]


class Steps:
    """The steps of one process. No list, which Lightning takes for a list of loaders, nor a loader to be shared out."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)


class RewardScorer(L.LightningModule):
    """Scores all texts of complete units by ``Trainer.predict``, and writes the rewards to a file.

    Each process scores its share, longest texts first, and writes part files, merged at the end into one file with a
    line a text and unit. A text that occurs several times is scored once, and one that has a reward of this scorer
    there not again; a changed text or scorer is.

    Args:
        scorer: Anything that :func:`~lightning_interp.rate.scoring.scores.as_scorer` takes.
        triples: The units.
        path: The file; it may hold rewards of other scorers and attributes.
        chunk: Texts a step; after each, the rewards are on disk. By default 256 for a model; a function is called text
            by text, so that one that dies has lost none of its answers (it may say its own ``batch_size``).
        name: What to call a scorer that has no name.
        also: Units of further attributes, scored along: a text that they share is scored once. ``read_rewards`` of the
            file gives their rewards.
        **settings: Of :func:`~lightning_interp.rate.scoring.scores.as_scorer`, for a folder or id.

    Raises:
        RecipeError: If ``chunk`` is below 1, or the scorer is a lambda without a name.
        DataError: If the scorer cannot score texts, or a unit of an attribute occurs twice.

    Example:
        >>> import tempfile
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
        >>> def marks(prompts, texts):
        ...     return [float(text.count("!")) for text in texts]
        >>> file = Path(tempfile.mkdtemp()) / "rewards.jsonl"
        >>> RewardScorer(marks, RewriteTriples.from_rows([row]), file).run().reward["original"].tolist()
        [1.0]
    """

    def __init__(
        self,
        scorer: Any,
        triples: RewriteTriples,
        path: str | os.PathLike[str],
        *,
        chunk: int | None = None,
        name: str | None = None,
        also: Sequence[RewriteTriples] = (),
        **settings: Any,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise RecipeError(f"RewardScorer(chunk={chunk!r}): expected at least 1 text a step.")
        self.scorer, self.triples, self.path = as_scorer(scorer, name=name, **settings), triples, Path(path)
        self.chunk, at_once = chunk or _CHUNK, _CHUNK
        if isinstance(self.scorer, CallableScorer):
            at_once = getattr(self.scorer.function, "batch_size", 1)
        self._at_once: int = chunk or at_once
        if self.scorer.name == "<lambda>":
            raise RecipeError(
                "RewardScorer got a lambda, and stored rewards are known by their scorer's name. Pass name=, another "
                "one for each function."
            )
        self.rows = [row for units in (triples, *also) for row in rows_of(units)]
        if isinstance(model := getattr(self.scorer, "model", None), nn.Module):
            self.model = model  # as a part of this module it goes where the Trainer puts it
        self._sha = scorer_sha(self.scorer)
        self._writer: JsonlWriter | None = None

    def setup(self, stage: str) -> None:
        """Refuse a Trainer under which a model cannot score on its own, or gives other rewards.

        Args:
            stage: Lightning's stage.

        Raises:
            UnsupportedStrategyError: If the strategy is FSDP1 or DeepSpeed, or keeps weights in shards.
            RecipeError: If the Trainer changes the precision: rewards would not be those of the scorer.
        """
        if self.trainer.precision != "32-true":
            raise RecipeError(
                f"RewardScorer of {self.scorer.name!r} cannot use Trainer(precision={self.trainer.precision!r}): its "
                "rewards would be others than the scorer gives. Load the model in that type instead, as "
                "TextScorer.load(..., dtype='bfloat16') does."
            )
        check_strategy(self.trainer.strategy, reads_weights=True, purpose=f"RewardScorer of {self.scorer.name!r}")

    def predict_dataloader(self) -> Steps:
        """This process's share of the texts without a reward, in steps; every process has as many steps."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        done = JsonlWriter(self.path, rank, world).written()
        groups: dict[tuple[str, str], list[ScoreRow]] = {}
        for row in self.rows:
            if row.key(self._sha) not in done:
                groups.setdefault((row.prompt, row.text), []).append(row)
        pending = sorted(groups.values(), key=lambda rows: -len(rows[0].prompt) - len(rows[0].text))
        size = max(1, min(self.chunk, -(-len(pending) // world)))
        chunks = [pending[start : start + size] for start in range(0, len(pending), size)]
        steps = max(1, -(-len(chunks) // world))  # without a step Lightning calls no hook, and nothing is merged
        mine = chunks[rank::world]
        return Steps([*mine, *([] for _ in range(steps - len(mine)))])

    def on_predict_start(self) -> None:
        """Open the part file, once every process has looked what is there."""
        self.trainer.strategy.barrier()
        self._writer = JsonlWriter(self.path, self.trainer.global_rank, self.trainer.world_size)

    def predict_step(self, batch: Step, batch_idx: int) -> dict[str, Any]:
        """Score some texts and write their rewards.

        Args:
            batch: The rows of each text: several where units share it.
            batch_idx: Index of the step.

        Returns:
            ``id`` and ``stage`` of each row, and its ``reward`` (None if it is not finite).

        Raises:
            DataError: If called outside of ``Trainer.predict``.
        """
        if self._writer is None:
            raise DataError(f"RewardScorer of {self.scorer.name!r} writes rewards in Trainer.predict only. Use run().")
        records: list[dict[str, Any]] = []
        kept, since = 0, time.monotonic()
        try:
            for start in range(0, len(batch), self._at_once):
                records += self._scored(batch[start : start + self._at_once])
                if time.monotonic() - since > _SECONDS:
                    self._writer.write(records[kept:])
                    kept, since = len(records), time.monotonic()
        finally:  # what was answered before something broke
            self._writer.write(records[kept:])
        return {name: [record[name] for record in records] for name in ("id", "stage", "reward")}

    def _scored(self, batch: Step) -> list[dict[str, Any]]:
        reward, truncated = self.scorer.scores([rows[0].prompt for rows in batch], [rows[0].text for rows in batch])
        scored = zip(batch, reward.tolist(), truncated.tolist(), strict=True)
        by = {"scorer": self.scorer.name, "sha": self._sha}
        return [reward_record(row, value, flag, **by) for rows, value, flag in scored for row in rows]

    def on_predict_end(self) -> None:
        """Merge the part files of all processes."""
        if self._writer is not None:
            self._writer.merge(barrier=self.trainer.strategy.barrier)
            self._writer = None

    def teardown(self, stage: str) -> None:
        """Close the part file.

        Args:
            stage: Lightning's stage.
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def run(self, **settings: Any) -> TripleScores:
        """Score in a Trainer of its own, and read the rewards.

        Args:
            **settings: Of the Trainer, such as ``devices`` and ``strategy``.

        Returns:
            Rewards by stage.

        Raises:
            MissingRewardError: If the run was cut short (``limit_predict_batches``); running again goes on.
        """
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        quiet["enable_progress_bar"] = sys.stdout.isatty()
        L.Trainer(**{**quiet, **settings}).predict(self, return_predictions=False)
        return self.read()

    def read(self) -> TripleScores:
        """The rewards that are in the file.

        Returns:
            Rewards by stage.

        Raises:
            MissingRewardError: If a text has none yet.
        """
        return read_rewards(self.path).scores(self.triples, self.scorer)
