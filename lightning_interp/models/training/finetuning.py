"""What every LightningModule that finetunes a model shares: what is trained, saved, restored and exported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.hooks.checks import check_strategy, check_weights, quantized_modules
from lightning_interp.core.measure.seeding import derived_seed, seeded_rng
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import QuantizedModelError, UnsupportedStrategyError
from lightning_interp.models.sources.adapters import (
    adapter_base,
    has_adapter,
    is_adapter_folder,
    remove_adapter,
    save_adapter,
)
from lightning_interp.models.sources.bundled import ALIASES
from lightning_interp.models.sources.folders import atomic_folder
from lightning_interp.models.sources.loading import LoadedModel
from lightning_interp.models.sources.pretrained import checkpoint_blocks, quiet_bars
from lightning_interp.models.training.adapter_state import check_state, drop_base, is_sharded_tensor, saved_names
from lightning_interp.models.training.lora import LoraSettings, check_precision, prepare_adapter
from lightning_interp.models.training.optimisation import Optimisation, adamw, plain, schedule_of, settings_of

__all__ = ["FINETUNING", "SETTINGS", "Finetuned", "Optimised", "adapting", "base_source"]

FINETUNING = Optimisation(lr=1e-4)

SETTINGS = ["model", "teacher", "tokenizer", "text", "preference", "lora", "optimisation", "betas"]
"""Arguments that no checkpoint holds as they are given: it holds plain values, and settings under their own names."""

_MODEL = "model."

Made = TypeVar("Made", bound=Any)


class Optimised(L.LightningModule):
    """A module whose trained parameters AdamW moves."""

    optimisation: Optimisation

    @property
    def lr(self) -> float:
        """Learning rate after warm-up, under the name that Lightning's learning rate finder sets."""
        return self.optimisation.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimisation = replace(self.optimisation, lr=value)

    def configure_optimizers(self) -> Any:
        """Make AdamW over everything that is trained, and its schedule."""
        settings = self.optimisation
        optimizer = adamw(self.parameters(), settings)
        steps = self.trainer.estimated_stepping_batches if settings.needs_end else float("inf")
        scheduler = schedule_of(optimizer, settings, total_steps=steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Finetuned(Optimised):
    """Trains a Hugging Face model, with an adapter or in full; subclasses say on what.

    With an adapter only its weights (and parameters that ask for gradients themselves) are trained, saved in
    checkpoints and restored from them; the base is loaded anew. Without one all weights are trained, in float32.
    """

    _task = "CAUSAL_LM"  # PEFT's name for it

    model: Any  # its own class says what it returns
    source: str  # where its base came from: a name, or an absolute path
    tokenizer: PreTrainedTokenizerBase | None
    seed: int

    def _keep(
        self,
        lora: LoraSettings | Mapping[str, Any] | None,
        optimisation: Optimisation | Mapping[str, Any],
        flat: dict[str, Any],
    ) -> LoraSettings | None:
        """Keep how it is trained, in the hyperparameters as plain values; gives the adapter's settings."""
        adapter = LoraSettings(**lora) if isinstance(lora, Mapping) else lora
        self.optimisation = settings_of(FINETUNING, optimisation, flat)
        self.hparams.update(lora=adapter.to_dict() if adapter else None, **plain(self.optimisation))
        return adapter

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} on {self.source!r}"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return has_adapter(self.model)

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that cannot train this module: FSDP1, DeepSpeed, or one that quantises the model itself."""
        check_strategy(self.trainer.strategy, reads_weights=False, purpose=self._title)
        instead = f"pass {type(self).__name__}(..., quantization='4bit', lora=...)"
        check_precision(self.trainer.precision_plugin, purpose=self._title, instead=instead)

    def configure_model(self) -> None:
        """Shard the model under ``ModelParallelStrategy`` (FSDP2): block by block, then the rest."""
        mesh = self.device_mesh
        if mesh is None or any(map(is_sharded_tensor, self.model.parameters())):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise UnsupportedStrategyError(
                f"{self._title} cannot be split by tensor parallelism, and this ModelParallelStrategy has "
                f"tensor_parallel_size={mesh['tensor_parallel'].size()}. "
                f"Pass ModelParallelStrategy(data_parallel_size={mesh.size()}, tensor_parallel_size=1)."
            )
        from torch.distributed.fsdp import fully_shard

        for block in ModelMap.build(self.model).blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to what the validation measures."""
        self._measure("val", batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to what the test measures."""
        self._measure("test", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log what the validation measured."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test measured."""
        self._log_epoch("test")

    def _measure(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        raise NotImplementedError

    def _log_epoch(self, stage: str) -> None:
        raise NotImplementedError

    def _own_dropout(self, batch_idx: int) -> AbstractContextManager[None]:
        """Random numbers of this step and process alone."""
        key = derived_seed(self.seed, "dropout", self.global_step, batch_idx, self.global_rank)
        return seeded_rng(key, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen base out of a checkpoint; see :func:`drop_base`."""
        if self.has_adapter:
            drop_base(checkpoint, self.model, _MODEL)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what :meth:`on_save_checkpoint` keeps.

        With an adapter a checkpoint without the base is whole, and one that lacks a part of the adapter is refused,
        whatever ``strict`` says; torch's lists of missing and unexpected names are empty then.
        """
        if self.has_adapter or strict:
            own = self.state_dict()
            check_state(state_dict, own, self._saved_names(own), owner=f"this {self._title}")
        result: Any = super().load_state_dict(state_dict, strict=strict and not self.has_adapter, assign=assign)
        return type(result)([], []) if self.has_adapter else result

    def export(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write what was trained for others to load; in a distributed run on rank zero only.

        Args:
            folder: The folder to make; it appears whole or not at all. With an adapter it is a PEFT folder, without
                one a model folder in Hugging Face format; the tokenizer lies beside it.
            overwrite: Whether a folder that holds files may be replaced.

        Returns:
            ``folder``.

        Raises:
            ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
            UnsupportedStrategyError: If the model is sharded; load a checkpoint on one device and export that.
        """
        check_weights(self.model, purpose=f"{type(self).__name__}.export")
        with atomic_folder(folder, overwrite=overwrite) as temporary, quiet_bars():
            if self.has_adapter:
                save_adapter(self.model, temporary, base=self.source, tokenizer=self.tokenizer)
            else:
                self.model.save_pretrained(temporary)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(temporary)
            self._complete(temporary)
        return Path(folder)

    def _complete(self, folder: Path) -> None:
        """For subclasses that have more to write into an exported folder."""

    def _prepare(self, settings: LoraSettings | None) -> None:
        quantised = quantized_modules(self.model)
        if settings is None and not has_adapter(self.model):
            if quantised:
                raise QuantizedModelError(
                    f"{type(self).__name__} cannot train all weights of {self.source!r}: {next(iter(quantised))} and "
                    f"{len(quantised) - 1} other modules are quantised. "
                    "Pass lora=LoraSettings(...), or load it without quantization."
                )
            self.model.float()  # master weights; reduced precision is the Trainer's part
            self.model.config.dtype = torch.float32
        else:
            prepare_adapter(self.model, settings, seed=self.seed, task=self._task)
            self.strict_loading = False
        if self.optimisation.gradient_checkpointing:
            checkpoint_blocks(self.model)

    def _saved_names(self, state: Mapping[str, Any]) -> set[str]:
        """All names, or with an adapter those of what is trained, and of what lies beside the model."""
        return saved_names(state, self.model, _MODEL) if self.has_adapter else set(state)


@contextmanager
def adapting(loaded: LoadedModel, source: str, module: Callable[..., Made], **how: Any) -> Iterator[Made]:
    """A module that puts an adapter into a loaded base to train it, until the block is left: the base is as before."""
    try:
        made = module(loaded.model, tokenizer=loaded.tokenizer, **how)
        made.source = base_source(loaded.model, source)  # which the exported adapter names
        yield made
    finally:
        loaded.model.eval()
        remove_adapter(loaded.model)


def base_source(model: PreTrainedModel, source: str) -> str:
    """The base model's source: a name, or an absolute path."""
    source = source or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    path = Path(source).expanduser()
    if source in ALIASES or not path.exists():
        return source
    return adapter_base(path)[0] if is_adapter_folder(path) else str(path.resolve())
