"""Each step's loss of a training, kept through checkpoints and written at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L

from lightning_interp.core.storage.faults import die_here
from lightning_interp.core.storage.jsonl import write_json_lines

__all__ = ["StepLosses"]


class StepLosses(L.Callback):
    """Keeps the loss of each batch, for a file that a killed training ends with the same lines.

    Args:
        path: A JSONL file: ``step`` (optimizer steps until then) and ``loss`` a line, of each batch; rank zero writes.
        bar: Shows a bar for a number of steps; what it gives moves it on.
    """

    def __init__(self, path: Path, bar: Callable[[float], AbstractContextManager[Callable[[float], object]]]) -> None:
        self.path, self._bar = path, bar
        self._losses: list[Any] = []  # tensors: reading one waits for the device
        self._shown: Any = None
        self._advance: Callable[[float], object] = lambda steps: None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show how far the training is."""
        self._shown = self._bar(float(trainer.estimated_stepping_batches))
        self._advance = self._shown.__enter__()
        self._advance(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep a batch's loss."""
        self._losses.append((trainer.global_step, outputs["loss"].detach()))
        self._advance(1)
        die_here("step")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            write_json_lines(self.path, ({"step": step, "loss": loss} for step, loss in self._numbers()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar away."""
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None

    def state_dict(self) -> dict[str, Any]:
        """The losses until now."""
        return {"losses": [list(one) for one in self._numbers()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind those of a checkpoint."""
        self._losses = [(step, loss) for step, loss in state_dict["losses"]]

    def _numbers(self) -> list[tuple[int, float]]:
        self._losses = [(step, float(loss)) for step, loss in self._losses]
        return list(self._losses)
