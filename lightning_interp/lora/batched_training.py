"""Train several adapters at once over one frozen base, each as if it were trained alone."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import ManifestError, RecipeError, UnsupportedStrategyError
from lightning_interp.lora.adapter_cells import AdapterCell, CellResult, batches_from, check_cells, joined
from lightning_interp.lora.batched import AdapterBatch, Share, frozen_base
from lightning_interp.lora.svd import update_norms
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.models.sources.adapters import save_adapter
from lightning_interp.models.sources.loading import load_causal_lm
from lightning_interp.models.sources.tokenizers import check_same_tokenizer
from lightning_interp.models.training.finetuning import base_source
from lightning_interp.models.training.metric import IGNORED, row_losses
from lightning_interp.models.training.optimisation import Optimisation, schedule_of
from lightning_interp.models.training.resumable import fit_or_go_on

__all__ = ["AdapterCell", "BatchedAdapters", "CellResult", "train_adapters_together"]

_ADAPTERS = "adapters."


def train_adapters_together(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    cells: Sequence[AdapterCell],
    out: str | os.PathLike[str],
    *,
    trainer: Mapping[str, Any] | None = None,
    checkpoint_every: int = 100,
    on_end: Callable[[CellResult], None] | None = None,
) -> list[CellResult]:
    """Train adapters of any rank, target and rate in common passes over one frozen base.

    Each is what :class:`CausalLM` and a Trainer of its own would make of it with the same seed and batches, but for
    rounding, and for other dropout of the same rate on a GPU and on an adapted output head, which sees other columns in
    a common pass than in one of its own. A pass has one batch of each adapter that is still
    trained. An adapter whose loss or gradient is not finite leaves the others as they are. A killed run goes on at its
    checkpoint when it is started again with the same cells and ``out``.

    Args:
        model: A source for :func:`load_causal_lm`, or a loaded model without adapter; its weights stay as they are.
        tokenizer: Makes batches of cells that are given as rows, and is written beside the adapters; taken from the
            source if None.
        cells: The adapters, each with rows, optimiser, schedule and end of its own.
        out: Folder of the checkpoint and, below each cell's key, of the PEFT folders.
        trainer: Arguments of ``lightning.Trainer``: one process, ``precision`` of ``32-true`` or ``bf16-mixed``.
        checkpoint_every: Steps between checkpoints.
        on_end: Called with each result at the moment its cell ends, and once more if the run is killed before the
            next checkpoint.

    Returns:
        A result a cell, in their order.

    Raises:
        RecipeError: If no cell is given, a key comes twice, or the Trainer is told what is a cell's part.
        IncompatibleModelError: If an adapter or a tokenizer does not fit the base, or the base drops out by itself.
        UnsupportedStrategyError: If there is more than one process.
        ManifestError: If ``out`` holds the checkpoint of other cells.

    Example:
        >>> import tempfile
        >>> from lightning_interp.models import LoraSettings
        >>> optimisation, rows = Optimisation(lr=1e-2), [{"prompt": "1+1=", "completion": "2"}]
        >>> cells = [
        ...     AdapterCell(key=f"r{r}", data=rows, lora=LoraSettings(r=r), optimisation=optimisation, max_steps=2)
        ...     for r in (1, 4)
        ... ]
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     results = train_adapters_together("tiny:llama", None, cells, out, trainer=quiet)
        >>> [(result.key, result.status, result.steps) for result in results]
        [('r1', 'finished', 2), ('r4', 'finished', 2)]
    """
    options = dict(trainer or {})
    check_cells(cells, options)
    folder, source = Path(out), model if isinstance(model, str) else ""
    if isinstance(model, str):
        loaded = load_causal_lm(model)
        model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    data = {cell.key: _data_of(cell, tokenizer) for cell in cells}
    base = base_source(model, source)
    with frozen_base(model, checkpointing=cells[0].optimisation.gradient_checkpointing):
        module = BatchedAdapters(model, tokenizer, cells, data, folder, base=base, on_end=on_end)
        with module.adapters.attached(model):
            settings = {"default_root_dir": folder, **options, "max_epochs": 1}
            fit_or_go_on(module, None, folder, settings, every=checkpoint_every)
    return [module.results[cell.key] for cell in cells]


class BatchedAdapters(L.LightningModule):
    """Trains the adapters of several cells in common passes; see :func:`train_adapters_together`.

    Logs ``train/loss``, the mean over cells, and ``train/loss/KEY`` of each.

    Args:
        model: The frozen base, to which ``adapters`` are attached while a Trainer fits.
        tokenizer: Exported beside each adapter.
        cells: The adapters.
        data: The rows of each, by key.
        out: Where the adapters are written, each below its key.
        base: The base model that they name.
        on_end: Called with each result.

    Attributes:
        adapters: Those that are still trained.
        results: What became of the others, by key.
        passes: Number of common passes so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        cells: Sequence[AdapterCell],
        data: Mapping[str, TextDataModule],
        out: Path,
        *,
        base: str,
        on_end: Callable[[CellResult], None] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds the adapters alone
        self.model: Any = model
        self.tokenizer, self.out, self.base, self.on_end = tokenizer, out, base, on_end
        self.cells = {cell.key: cell for cell in cells}
        self.adapters = AdapterBatch(model, {cell.key: (cell.lora, cell.seed) for cell in cells})
        self.loaders = {key: module.train_dataloader() for key, module in data.items()}
        self.ends = {key: cell.steps(len(self.loaders[key])) for key, cell in self.cells.items()}
        self.results: dict[str, CellResult] = {}
        self.losses: dict[str, list[float]] = {key: [] for key in self.cells}
        self.passes = 0
        self._measured = torch.zeros(0)  # losses of this pass
        self._can_trim = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.train()

    @property
    def active(self) -> list[str]:
        """Keys of the cells that are still trained."""
        return [key for key in self.cells if key not in self.results]

    def setup(self, stage: str) -> None:
        """Refuse a Trainer of several processes, of half precision weights, or one that changes gradients itself."""
        check_strategy(self.trainer.strategy, reads_weights=False, purpose="Training adapters together")
        if self.trainer.world_size > 1:
            raise UnsupportedStrategyError(
                f"Adapters are trained together by one process, and this Trainer has {self.trainer.world_size}. Pass "
                "devices=1, and give each device cells of its own."
            )
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise RecipeError(
                f"Adapters cannot be trained together with precision={self.trainer.precision!r}: expected '32-true' or "
                "'bf16-mixed', which keep their weights in float32 and scale no common loss."
            )

    def train_dataloader(self) -> _Passes:
        """Return the common passes that are still to come."""
        return _Passes(self)

    def configure_optimizers(self) -> Any:
        """Make one AdamW with a group a cell, each with its own schedule."""
        groups = []
        for key, cell in self.cells.items():
            settings = cell.optimisation
            own = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
            groups.append({"params": [self.adapters.flat(key)] if key in self.active else [], **own})
        optimizer = AdamW(groups, fused=True)
        factors = [_factor(cell.optimisation, self.ends[key]) for key, cell in self.cells.items()]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the sum over cells of the mean cross entropy of their labelled tokens."""
        shares = [self._share(key, *shape) for key, shape in batch["shapes"].items()]
        labels = batch["labels"]
        self.adapters.shares = shares
        sums, tokens = self._row_losses(batch["input_ids"], batch["attention_mask"], labels)
        rows = [share.rows for share in shares]
        pairs = zip(torch.split(sums, rows), torch.split(tokens, rows), strict=True)
        losses = torch.stack([total.sum() / count.sum() for total, count in pairs])
        self._measured = losses.detach()
        self.log("train/loss", losses.detach().mean(), prog_bar=True, batch_size=len(labels))
        named = {f"train/loss/{share.key}": loss for share, loss in zip(shares, losses.detach(), strict=True)}
        self.log_dict(named, batch_size=len(labels))
        return losses.sum()

    def _row_losses(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy of each row's labelled tokens, and their number; the head runs for no others."""
        targets, more = labels[:, 1:], {}
        first = int((targets != IGNORED).any(dim=0).int().argmax())
        if self._can_trim:
            more["logits_to_keep"] = torch.arange(first, targets.shape[1], device=labels.device)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more).logits
        return row_losses(logits if self._can_trim else logits[:, first:-1], targets[:, first:])

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the gradient of each cell to its own norm, and keep those of failed cells from the optimiser."""
        norms = [self.adapters.gradient_norm(key) for key in self.active]
        losses, sizes = torch.stack([self._measured, torch.stack(norms)]).tolist()
        for key, loss, norm, size in zip(self.active, losses, norms, sizes, strict=True):
            if not (math.isfinite(loss) and math.isfinite(size)):
                self._end(key, why=f"the loss is {loss} and the norm of the gradient {size} at step {self.passes + 1}")
                continue
            self.losses[key].append(loss)
            clip = self.cells[key].clip
            if clip is not None and clip < size + 1e-6:  # a smaller one would be multiplied by 1
                nn.utils.clip_grads_with_norm_(self.adapters.flat(key), clip, norm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Empty the gradients where backward adds to them."""
        self.adapters.zero_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the adapters, and write those that are finished."""
        super().optimizer_step(*args, **kwargs)
        self.passes += 1
        for key in self.active:
            if self.passes == self.ends[key]:
                self._end(key)
        self.trainer.should_stop |= not self.active

    def _end(self, key: str, *, why: str = "") -> None:
        """Let a cell leave: write its adapter unless it failed, and forget its weights and their moments."""
        folder, norm = None, None
        if not why:
            with self.adapters.injected(key, self.model):
                norm = update_norms(self.model).total
                if math.isfinite(norm):  # a folder of a killed attempt is replaced
                    folder = self.out / key
                    save_adapter(self.model, folder, base=self.base, tokenizer=self.tokenizer, overwrite=True)
                else:
                    why, norm = f"the weights are not finite after step {self.passes}", None
        self.results[key] = CellResult(
            key=key,
            status="failed" if why else "finished",
            folder=folder,
            why=why,
            losses=tuple(self.losses[key]),
            steps=len(self.losses[key]),
            update_norm=norm,
        )
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.state.pop(self.adapters.flat(key), None)
        optimizer.param_groups[list(self.cells).index(key)]["params"] = []
        self.adapters.drop(key)
        if self.on_end is not None:
            self.on_end(self.results[key])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters that are still trained, and what became of the others; no base."""
        kept = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(_ADAPTERS)}
        checkpoint["state_dict"] = kept
        checkpoint["cells"] = {
            "settings": self._told(),
            "passes": self.passes,
            "losses": self.losses,
            "results": [result.to_dict() for result in self.results.values()],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the cells that a checkpoint has not ended."""
        state = checkpoint.get("cells", {})
        mine, theirs = self._told(), state.get("settings", [])
        if mine != theirs:
            differs = next((a["key"] for a, b in zip(mine, theirs, strict=False) if a != b), f"{len(theirs)} cells")
            raise ManifestError(
                f"{self.out} holds the checkpoint of other cells (the first that differs: {differs!r}). Choose another "
                "folder, or give the cells that it was begun with."
            )
        self.passes, self.losses = state["passes"], state["losses"]
        for values in state["results"]:
            self.results[values["key"]] = CellResult.from_dict(values, self.out)
            self.adapters.drop(values["key"])

    def _told(self) -> list[dict[str, Any]]:
        told = []
        for key, cell in self.cells.items():
            loader: Any = self.loaders[key]
            order = {"rows": len(loader.dataset), "batches": len(loader), "order": loader.sampler.key}
            told.append(cell.to_dict() | order | {"end": self.ends[key]})
        return told

    def _share(self, key: str, rows: int, length: int) -> Share:
        cell, generator = self.cells[key], None
        if cell.lora.dropout:  # the key of CausalLM in a Trainer of its own
            seed = derived_seed(cell.seed, "dropout", self.passes, self.passes % len(self.loaders[key]), 0)
            generator = torch.Generator(self.device).manual_seed(seed)
        return Share(key, rows, length, generator)


class _Passes:
    """One batch of every cell that is still trained, joined, until none is."""

    def __init__(self, module: BatchedAdapters) -> None:
        self.module = module

    def __len__(self) -> int:
        return max(self.module.ends.values())

    def state_dict(self) -> dict[str, int]:
        """The module's checkpoint says where to go on; Lightning warns of loaders without a state."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        module = self.module
        sources = {key: batches_from(module.loaders[key], module.passes) for key in module.active}
        while module.active:
            batches = {key: next(sources[key]) for key in module.active}
            shapes = {key: tuple(batch["input_ids"].shape) for key, batch in batches.items()}
            yield {**joined(list(batches.values())), "shapes": shapes}


def _factor(settings: Optimisation, steps: int) -> Callable[[int], float]:
    """The learning rate over time, relative to its own after warm-up."""
    schedule: Any = schedule_of(AdamW([nn.Parameter(torch.zeros(1))], lr=settings.lr), settings, total_steps=steps)
    if schedule is None:
        return lambda step: 1.0
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def _data_of(cell: AdapterCell, tokenizer: PreTrainedTokenizerBase | None) -> TextDataModule:
    if isinstance(cell.data, TextDataModule):
        if cell.data.packing:
            raise RecipeError(
                f"Cell {cell.key!r} has data with packing=True, and packed rows cannot share a pass with other cells' "
                "rows. Pass packing=False; length_window saves padding here too."
            )
        if tokenizer is not None:
            check_same_tokenizer(cell.data.tokenizer, tokenizer)
        return cell.data
    if tokenizer is None:
        raise RecipeError(
            f"Cell {cell.key!r} is given as rows, but there is no tokenizer. Pass one, or a TextDataModule as data."
        )
    return TextDataModule(cell.data, tokenizer=tokenizer, seed=cell.seed)
