"""Write activations of a Lightning run to disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.callbacks.intervention_callback import InterventionCallback, Stage
from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.errors import DataError

__all__ = ["CaptureCallback", "load_captures"]

_NAME = re.compile(r"rank(?P<rank>\d+)(-loader(?P<loader>\d+))?-batch(?P<batch>\d+)\.safetensors")


class CaptureCallback(InterventionCallback):
    """Write activations of a run to safetensors, one file a batch and rank.

    A stage that runs again (the next epoch, the next Trainer) writes over the files of the same batches: the last pass
    stays. Give each run a folder of its own.

    Args:
        sites: Where to read.
        folder: Where files go: ``<folder>/<stage>/rank0-batch000000.safetensors``, with tensors ``<site>/<forward>``.
        when: Stages to read in.
        positions: Which tokens; None for all columns.
        limit_batches: Stop writing after this many batches of a stage.
        target: See :class:`InterventionCallback`.
        tokenizer: See :class:`InterventionCallback`.
        name: See :class:`InterventionCallback`.

    Example:
        >>> CaptureCallback([Site("resid_post", 0)], "activations", when=["predict"]).when
        ('predict',)
    """

    def __init__(
        self,
        sites: Sequence[Site],
        folder: str | Path,
        *,
        when: Sequence[Stage] = ("validate", "test", "predict"),
        positions: Positions | None = None,
        limit_batches: int | None = None,
        target: str | None = None,
        tokenizer: Any = None,
        name: str | None = None,
    ) -> None:
        self.capture = ActivationCapture(sites, positions=positions, keep="all", device="cpu")
        super().__init__(self.capture, when=when, target=target, tokenizer=tokenizer, name=name)
        self.folder = str(folder)
        self.limit_batches = limit_batches

    def _batch(self, batch: Any) -> None:
        self.capture.clear()
        super()._batch(batch)

    def _write(self, trainer: Any, batch_idx: int, dataloader_idx: int) -> None:
        stage = "sanity" if getattr(trainer, "sanity_checking", False) else self._stage
        if stage is None or stage == "sanity" or (self.limit_batches is not None and batch_idx >= self.limit_batches):
            return
        tensors = {
            f"{site}/{i}": x.contiguous() for site, passes in self.capture.history.items() for i, x in enumerate(passes)
        }
        step = str(getattr(trainer, "global_step", 0))
        facts = {"batch": str(batch_idx), "dataloader": str(dataloader_idx), "global_step": step}
        loader = f"-loader{dataloader_idx}" if dataloader_idx else ""
        name = f"rank{trainer.global_rank}{loader}-batch{batch_idx:06d}.safetensors"
        save_tensors(Path(self.folder) / stage / name, tensors, facts)
        self.capture.clear()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write what this batch gave."""
        self._write(trainer, batch_idx, 0)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write what this batch gave."""
        self._write(trainer, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end


def load_captures(folder: str | Path) -> dict[str, list[torch.Tensor]]:
    """What :class:`CaptureCallback` wrote for one stage, by site (text), in order of batch, loader, rank and pass."""
    places = {file: _NAME.fullmatch(file.name) for file in Path(folder).glob("rank*-batch*.safetensors")}
    ordered = sorted((int(m["batch"]), int(m["loader"] or 0), int(m["rank"]), f) for f, m in places.items() if m)
    files = [file for *_, file in ordered]
    if not files:
        raise DataError(
            f"{folder} holds no captured activations; expected files such as rank0-batch000000.safetensors."
        )
    found: dict[str, list[torch.Tensor]] = {}
    for file in files:
        for key, tensor in sorted(read_tensors(file)[0].items(), key=lambda item: int(item[0].rpartition("/")[2])):
            found.setdefault(key.rpartition("/")[0], []).append(tensor)
    return found
