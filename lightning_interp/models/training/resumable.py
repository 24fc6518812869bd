"""Training that goes on after a kill: one checkpoint, the newest, and an export at the end."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_interp.errors import RecipeError

__all__ = ["fit_and_export", "fit_or_go_on", "trainer_arguments"]


def trainer_arguments(given: Any, *, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of a Trainer for one training of several, with copies of the callbacks, as a list.

    What a callback keeps, such as the best score of EarlyStopping, would otherwise go into the next training, but not
    into that of a run which goes on.

    Args:
        given: What somebody gave as arguments.
        elsewhere: Arguments that are no one's to give, with what to use instead.

    Returns:
        The arguments.

    Raises:
        RecipeError: If there is no such argument, it is set elsewhere, or a callback cannot be copied.

    Example:
        >>> trainer_arguments({"accelerator": "cpu", "callbacks": None}, elsewhere={})
        {'accelerator': 'cpu', 'callbacks': []}
    """
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"trainer is {given!r:.60}; expected arguments of Trainer by name: each training has its own."
        )
    known = set(inspect.signature(L.Trainer).parameters)
    if unknown := [name for name in given if name not in known]:
        raise RecipeError(f"trainer names {unknown[0]!r}, which is no argument of Lightning's Trainer.")
    if found := [name for name in given if name in elsewhere]:
        raise RecipeError(f"trainer sets {found[0]}={given[found[0]]!r}; use {elsewhere[found[0]]}.")
    if given.get("enable_checkpointing", True) is False:
        raise RecipeError(
            "trainer sets enable_checkpointing=False, but a training goes on at its checkpoint. Leave it out."
        )
    callbacks = given.get("callbacks") or []
    own = []
    for one in callbacks if isinstance(callbacks, Sequence) else [callbacks]:
        try:
            own.append(deepcopy(one))
        except Exception as error:
            raise RecipeError(
                f"trainer has a {type(one).__name__}, of which each training needs a copy, and it cannot be copied "
                f"({error}). Give trainer as a function that makes the arguments anew."
            ) from error
    return {**given, "callbacks": own}


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
        keep.logged |= _numbers(runner)  # which a run that finds the training finished cannot log again
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
