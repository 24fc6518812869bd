"""Trains a grid of adapters over one base, one by one or several at once, each cell a run of its own that goes on."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import message_of
from lightning_interp.core.storage.sweep_cells import NOT_RUN
from lightning_interp.errors import ManifestError, RecipeError
from lightning_interp.lora.adapter_cells import AdapterCell, CellResult
from lightning_interp.lora.batched_training import train_adapters_together
from lightning_interp.lora.rank_grid import GridCell, check_ranks
from lightning_interp.lora.svd import update_norms
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.models.sources.adapters import adapted
from lightning_interp.models.sources.loading import LoadedModel, load_causal_lm
from lightning_interp.models.training.causal_lm import CausalLM
from lightning_interp.models.training.finetuning import FINETUNING, adapting
from lightning_interp.models.training.metric import completion_loss
from lightning_interp.models.training.optimisation import Optimisation, check_settings, plain
from lightning_interp.models.training.resumable import fit_and_export, fit_or_go_on

__all__ = ["GridTraining", "change_norm", "held_out", "train_grid"]

log = logging.getLogger(__name__)

_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


@dataclass(frozen=True, kw_only=True)
class GridTraining:
    """How the cells of a grid are trained.

    Args:
        optimisation: For all cells, but for the learning rate, which is each cell's own.
        max_epochs: Passes over a cell's rows.
        max_steps: Steps, if that is fewer.
        clip: Norm to which gradients are clipped; None for no bound.
        parallel_cells: Adapters that are trained in common passes over one base; full finetuning is always alone.
        max_hours: No cell begins after so many hours; None for no limit.
        trainer: Gives further arguments of ``lightning.Trainer``, anew for each cell.

    Raises:
        RecipeError: If a value is out of range.
    """

    optimisation: Optimisation = FINETUNING
    max_epochs: int | None = 1
    max_steps: int | None = None
    clip: float | None = 1.0
    parallel_cells: int = 1
    max_hours: float | None = None
    trainer: Callable[[], Mapping[str, Any]] = dict

    def __post_init__(self) -> None:
        wanted = {
            "max_epochs": (bool(self.max_epochs or self.max_steps), "max_epochs or max_steps, as it would never end"),
            "parallel_cells": (self.parallel_cells >= 1, "at least 1"),
            "max_hours": (self.max_hours is None or self.max_hours > 0, "a number above 0, or None"),
        }
        check_settings(self, "A grid's training", wanted)

    def for_trainer(self) -> dict[str, Any]:
        """Arguments of a cell's own Trainer."""
        limits = {"max_epochs": self.max_epochs or -1, "max_steps": self.max_steps or -1}
        return {**_QUIET, **limits, "gradient_clip_val": self.clip, **self.trainer()}

    def to_dict(self) -> dict[str, Any]:
        """What of it decides a cell's numbers."""
        names = ("max_epochs", "max_steps", "clip")
        return plain(replace(self.optimisation, lr=1.0)) | {name: getattr(self, name) for name in names}


def train_grid(
    run: RunManifest,
    cells: Sequence[GridCell],
    *,
    model: str,
    data: Callable[[GridCell], TextDataModule],
    training: GridTraining,
    evaluate: Callable[[Any, GridCell], Any] | None = None,
    module: Callable[..., CausalLM] | None = None,
    inputs: Callable[[GridCell], Any] | None = None,
) -> list[dict[str, Any]]:
    """Train the cells of a grid, or go on where that stopped, and read each finished one.

    Each cell is a child run: finished ones are not trained again, an unfinished one goes on at its last checkpoint, a
    failed one is written down and the others go on. More cells, or fewer, go on in the same run. Cells that are trained
    together equal those trained alone up to rounding, so a grid keeps its ``parallel_cells``.

    Args:
        run: The open run of which the cells are children.
        cells: What to train; see :class:`LoraGrid`.
        model: A source for :func:`load_causal_lm`; each cell begins with it. It is loaded once for all adapters that
            are trained one by one.
        data: A cell's rows, in its order; ``val`` is what the held-out loss is measured on.
        training: How.
        evaluate: Called with the trained model and its cell; what it returns, plain values, becomes ``readout``.
        module: Makes what is trained of a cell and what :class:`CausalLM` takes: the model (loaded for an adapter, its
            name for all weights), ``tokenizer``, ``lora``, ``optimisation`` and ``seed``; that itself if None, which
            alone trains several at once.
        inputs: What a cell depends on besides its values, such as its rows; paths stand for what they hold.

    Returns:
        A row for each cell: ``cell`` (its key), ``values``, ``status`` (``finished``, ``failed`` or ``not run``),
        ``why``, and of finished ones ``train_loss`` of the last step and ``held_out_loss`` in nats a token, ``steps``,
        ``update_norm`` (Frobenius norm of the change of all weights) and ``readout``.

    Raises:
        IncompatibleModelError: If a rank is above the size of every map, or the model has no such maps.
        RecipeError: If a cell is there twice, or other modules than :class:`CausalLM` are to be trained at once.
    """
    keys = [cell.key for cell in cells]
    if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
        raise RecipeError(f"The cell {twice[0]!r} is there twice. Give each cell once.")
    if training.parallel_cells > 1 and module is not None:
        raise RecipeError("Only CausalLM is trained in common passes. Leave parallel_cells at 1 for another module.")
    base = load_causal_lm(model)
    check_ranks(base.model, cells)
    work = _Work(run, model, base, data, training, evaluate, module, inputs)
    loras = {cell.key: cell.lora(base.model) for cell in cells}
    began, rows, done = time.monotonic(), list[dict[str, Any]](), 0
    for group in _groups(cells, training.parallel_cells):
        spent = time.monotonic() - began
        up = training.max_hours is not None and spent >= training.max_hours * 3600
        left = f", about {spent / done * (len(cells) - done) / 60:.1f} min left" if done and not up else ""
        together = _Together(work, group, loras) if len(group) > 1 else None
        for cell in group:
            done += 1
            if up:
                rows.append(_row(cell, NOT_RUN))
                continue
            log.info("cell %d of %d: %s%s", done, len(cells), cell.label, left)
            rows.append(work.row(cell, loras[cell.key], together))
        if together is not None:
            together.clean()
    if missing := [row for row in rows if row["status"] == NOT_RUN]:
        log.info("the time is up with %d of %d cells left; the same command goes on", len(missing), len(cells))
    return rows


@dataclass(frozen=True)
class _Work:
    """What is done with each cell."""

    run: RunManifest
    model: str
    base: LoadedModel
    data: Callable[[GridCell], TextDataModule]
    training: GridTraining
    evaluate: Callable[[Any, GridCell], Any] | None
    module: Callable[..., CausalLM] | None
    inputs: Callable[[GridCell], Any] | None

    def row(self, cell: GridCell, lora: Any, together: _Together | None) -> dict[str, Any]:
        """Train and read a cell in its own run."""
        config = {**cell.values, "training": self.training.to_dict(), "model": self.model}
        given = None if self.inputs is None else self.inputs(cell)
        try:
            with self.run.child(cell.key, config=config, inputs={"given": given}) as child:
                train = (lambda folder: self.train(cell, lora, folder)) if together is None else together.train(cell)
                told = child.phase("train", train, every_rank=together is None)
                if told["status"] == "finished" and "held_out_loss" not in told:
                    told |= child.phase("read", lambda _: self.read(cell, child.folder("train") / "model"))
        except ManifestError:  # of the whole folder: it belongs to another grid, or its disk is full
            raise
        except Exception as error:  # whatever it was, the other cells are trained
            log.warning("cell %s: failed: %s", cell.label, message_of(error))
            return _row(cell, "failed", why=message_of(error))
        return _row(cell, **told)

    def optimisation(self, cell: GridCell) -> Optimisation:
        """How a cell is trained."""
        return replace(self.training.optimisation, lr=cell.lr)

    def train(self, cell: GridCell, lora: Any, folder: Path) -> dict[str, Any]:
        """Train one cell, or go on at its checkpoint; without an adapter it is read at once, and its weights go."""
        how: dict[str, Any] = {"lora": lora, "optimisation": self.optimisation(cell), "seed": cell.training_seed}
        made = CausalLM if self.module is None else partial(self.module, cell)
        rows, options = self.data(cell), {"default_root_dir": folder, **self.training.for_trainer()}
        if lora is not None:
            with adapting(self.base, self.model, made, **how) as adapter:
                told = fit_and_export(adapter, rows, folder, options)
                return self._trained(told, adapter, lambda: update_norms(adapter.model).total)
        student = made(self.model, **how)
        _, told = fit_or_go_on(student, rows, folder, options)
        found = self._trained(told, student, lambda: change_norm(student.model, self.base.model))
        if found["status"] == "finished":
            found |= self._read(cell, student.model)
        shutil.rmtree(folder / "checkpoints")  # all weights and the optimiser's state: nothing goes on from them
        return found

    def read(self, cell: GridCell, folder: Path) -> dict[str, Any]:
        """Read a cell from its exported adapter."""
        with adapted(self.base.model, folder):
            return self._read(cell, self.base.model)

    def _trained(self, told: Mapping[str, float], student: Any, norm: Callable[[], float]) -> dict[str, Any]:
        loss, size = told[f"train/{student._loss_name}"], norm()
        steps = int(student.trainer.global_step)
        if not math.isfinite(loss) or not math.isfinite(size):
            return {
                "status": "failed",
                "why": f"its training diverged: loss {loss}, update norm {size}",
                "steps": steps,
            }
        return {"status": "finished", "train_loss": loss, "steps": steps, "update_norm": size}

    def _read(self, cell: GridCell, trained: Any) -> dict[str, Any]:
        with evaluating(trained):
            loss = held_out(trained, self.data(cell))
            readout = None if self.evaluate is None else self.evaluate(trained, cell)
        return {"held_out_loss": loss, "readout": readout}


class _Together:
    """A group of cells that are trained in common passes, when the first of them is asked for."""

    def __init__(self, work: _Work, group: Sequence[GridCell], loras: Mapping[str, Any]) -> None:
        self.work, self.group, self.loras = work, group, loras
        self.folder = work.run.path / "together" / digest([cell.key for cell in group])[:16]
        self.results: dict[str, CellResult] = {}
        self.error: Exception | None = None

    def train(self, cell: GridCell) -> Callable[[Path], dict[str, Any]]:
        """What a cell's own run does: it takes its part of what the group has trained."""

        def taken(folder: Path) -> dict[str, Any]:
            self._train_all()
            result = self.results[cell.key]
            if result.folder is None:
                return {"status": "failed", "why": result.why, "steps": result.steps}
            shutil.copytree(result.folder, folder / "model", dirs_exist_ok=True)
            known = {"train_loss": result.losses[-1], "steps": result.steps, "update_norm": result.update_norm}
            return {"status": "finished", **known}

        return taken

    def clean(self) -> None:
        """Delete what the group has left, once every cell has its part."""
        if self.results and self.error is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _train_all(self) -> None:
        if self.error is not None:
            raise self.error
        if self.results:
            return
        settings, work = self.work.training, self.work
        cells = [
            AdapterCell(
                key=cell.key, data=work.data(cell), optimisation=work.optimisation(cell), lora=self.loras[cell.key],
                seed=cell.training_seed, max_epochs=settings.max_epochs, max_steps=settings.max_steps,
                clip=settings.clip,
            )
            for cell in self.group
        ]  # fmt: skip
        try:
            found = train_adapters_together(
                work.model, None, cells, self.folder, trainer={**_QUIET, **settings.trainer()}
            )
        except Exception as error:
            self.error = error
            raise
        self.results = {result.key: result for result in found}


@torch.no_grad()
def held_out(model: Any, data: TextDataModule) -> float | None:
    """Mean cross entropy of the labelled tokens of ``data``'s validation rows, in nats; None without such rows."""
    total, tokens = 0.0, 0
    for batch in data.val_dataloader():
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        read = {name: moved[name] for name in ("input_ids", "attention_mask", "position_ids") if name in moved}
        lost, count = completion_loss(model(**read, use_cache=False).logits, moved["labels"])
        total, tokens = total + float(lost), tokens + int(count)
    return total / tokens if tokens else None


@torch.no_grad()
def change_norm(model: nn.Module, base: nn.Module) -> float:
    """Frobenius norm of the difference of two models' parameters, all of them together.

    Example:
        >>> one, other = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        >>> _ = other.load_state_dict({"weight": one.weight + 1})
        >>> round(change_norm(one, other), 6)
        2.0
    """
    before = dict(base.named_parameters())
    squares = [
        float((parameter.detach().double() - before[name].detach().double().to(parameter.device)).square().sum())
        for name, parameter in model.named_parameters()
    ]
    return math.sqrt(math.fsum(squares))


def _groups(cells: Sequence[GridCell], size: int) -> Iterator[Sequence[GridCell]]:
    """Adapters by ``size``, in their order; each full finetuning alone."""
    adapters = [cell for cell in cells if cell.rank is not None]
    for start in range(0, len(adapters), size):
        yield adapters[start : start + size]
    for cell in cells:
        if cell.rank is None:
            yield [cell]


def _row(cell: GridCell, status: str, **found: Any) -> dict[str, Any]:
    known = dict.fromkeys(("why", "train_loss", "held_out_loss", "steps", "update_norm", "readout"))
    return {"cell": cell.key, "values": cell.values, "status": status, **known, **found}
