"""Training that goes on after a kill: one checkpoint, the newest, and an export at the end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["fit_and_export", "fit_or_go_on"]


def fit_and_export(
    module: Any, data: Any, folder: Path, trainer: Mapping[str, Any], *, minutes: float | None = None
) -> dict[str, float]:
    """Train in a phase's folder, or go on at its checkpoint; export to ``folder/model`` and give what was logged last.

    The numbers are the same after a kill at any moment: a training that was finished then logs nothing any more.
    ``minutes`` is for large states: a checkpoint each time that so many have passed, and none beside the export.
    """
    runner, logged = fit_or_go_on(module, data, folder, trainer, minutes=minutes)
    if runner.is_global_zero:
        module.export(folder / "model", overwrite=True)  # of an attempt that was killed after it
        if minutes is not None:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    runner.strategy.barrier()
    return logged


def fit_or_go_on(
    module: Any,
    data: Any,
    folder: Path,
    trainer: Mapping[str, Any],
    *,
    every: int | None = None,
    minutes: float | None = None,
) -> tuple[L.Trainer, dict[str, float]]:
    """Train with a checkpoint in ``folder/checkpoints``, or go on at it; gives the Trainer and what was logged last.

    The checkpoint is of the newest epoch, or of the newest step that ``every`` divides and of the end, or of a step
    once in so many ``minutes``. The optimizer's moments are given up then: the next training has its own.
    """
    keep = _Newest(
        folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False, every_n_train_steps=every,
        train_time_interval=None if minutes is None else timedelta(minutes=minutes),
    )  # fmt: skip
    runner = L.Trainer(**{**trainer, "callbacks": [*trainer.get("callbacks", ()), keep]})
    last = folder / "checkpoints" / "last.ckpt"
    runner.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    if every is not None:
        runner.save_checkpoint(last, weights_only=False)
    for optimizer in runner.optimizers:  # parts of a Trainer refer to each other, and Python keeps such for long
        optimizer.state.clear()
    return runner, keep.logged | _numbers(runner)


class _Newest(ModelCheckpoint):
    """Keeps one file, the newest, and in it what was logged; save_last alone writes nothing before the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logged: dict[str, float] = {}

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.logged = _numbers(trainer)
        super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "logged": dict(self.logged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.logged = dict(state_dict.get("logged", {}))


def _numbers(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
