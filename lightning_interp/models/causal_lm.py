"""The LightningModule that finetunes a causal language model, with an adapter or in full."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.checks import check_strategy, check_weights, quantized_modules
from lightning_interp.core.model_map import ModelMap
from lightning_interp.errors import DataError, QuantizedModelError, UnsupportedStrategyError
from lightning_interp.models.adapters import adapter_base, has_adapter, is_adapter_folder, save_adapter
from lightning_interp.models.bundled import ALIASES
from lightning_interp.models.folders import atomic_folder
from lightning_interp.models.lora import LoraSettings, inject_lora, train_adapter
from lightning_interp.models.metric import IGNORED, TokenLoss, completion_loss
from lightning_interp.models.optimisation import Schedule, adamw, check_optimisation, schedule_of
from lightning_interp.models.pretrained import Quantization, quiet_bars
from lightning_interp.models.seeding import derived_seed, seeded_rng
from lightning_interp.models.sources import load_causal_lm
from lightning_interp.models.state import check_state, saved_names

__all__ = ["CausalLM"]

_MODEL = "model."


class CausalLM(L.LightningModule):
    """Finetunes a causal language model on batches with ``input_ids``, ``attention_mask`` and ``labels``.

    The loss is the mean cross entropy of the batch's labelled tokens (-100 marks the others; see
    :class:`TextDataModule`). With an adapter only its weights are trained, saved in checkpoints and restored from
    them; the base is loaded anew. Without one all weights are trained, as float32 master weights: reduced precision
    comes from ``Trainer(precision="bf16-mixed")``. Dropout draws from a generator keyed by seed, step and rank, so a
    resumed run equals an uninterrupted one, and ranks draw different masks.

    Logs ``train/loss``, ``val/loss`` and ``val/perplexity`` (``test/...`` likewise). In validation every labelled
    token weighs the same, across batches and processes.

    Args:
        model: A source for :func:`load_causal_lm`, or a loaded model, which is changed in place. A model that carries
            an adapter goes on training that adapter.
        tokenizer: Exported beside the model; taken from the source if that is a name.
        lora: Put in an adapter and train it: settings, or the same as a dict.
        lr: Learning rate after warm-up.
        weight_decay: Decoupled decay of matrices (not of biases and norms).
        betas: Decay rates of AdamW's two moments.
        warmup_steps: Steps over which the learning rate rises from zero.
        schedule: What the learning rate does afterwards: stay, or fall to zero by the last step.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        quantization: Load a named source with a ``"4bit"`` or ``"8bit"`` base; needs an adapter.
        dtype: Type of a named source's frozen weights.
        seed: Root seed of the adapter's start and of dropout.

    Attributes:
        model: The model.
        source: Where its base came from: a name, or an absolute path.

    Raises:
        RecipeError: If an argument has a wrong value.
        QuantizedModelError: If a quantised base is to be trained in full.
        IncompatibleModelError: If the adapter does not fit the model.

    Example:
        >>> module = CausalLM("tiny:llama", lora=LoraSettings(r=2))
        >>> sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        4096
        >>> module.training, module.strict_loading
        (True, False)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: LoraSettings | Mapping[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        gradient_checkpointing: bool = False,
        quantization: Quantization | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_optimisation(lr=lr, weight_decay=weight_decay, betas=betas, warmup_steps=warmup_steps, schedule=schedule)
        settings = LoraSettings(**lora) if isinstance(lora, Mapping) else lora
        # Checkpoints are read with weights_only=True: plain values and nothing else.
        self.save_hyperparameters(ignore=["model", "tokenizer", "lora", "betas"], logger=False)
        self.hparams.update(lora=settings.to_dict() if settings else None, betas=[float(beta) for beta in betas])
        source = model if isinstance(model, str) else ""
        if isinstance(model, str):
            self.hparams.update(model=model)
            loaded = load_causal_lm(model, dtype=dtype, quantization=quantization)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        self.source = _base_source(model, source)
        self.lr, self.weight_decay, self.betas = lr, weight_decay, (betas[0], betas[1])
        self.warmup_steps, self.schedule, self.seed = warmup_steps, schedule, seed
        self.model: Any = model  # its own class says what it returns
        self.tokenizer = tokenizer
        self._prepare(settings, gradient_checkpointing)
        self._can_trim = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.val_loss, self.test_loss = TokenLoss(), TokenLoss()
        # transformers loads in evaluation mode, which Lightning would keep: dropout would stay off.
        self.train()

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return has_adapter(self.model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            input_ids: Token ids of shape ``[batch, time]``.
            attention_mask: 1 for tokens and 0 for padding, of the same shape.
            **kwargs: Further arguments of the model.

        Returns:
            The model's output, with ``logits`` of shape ``[batch, time, vocabulary]``.
        """
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that cannot train this module.

        Args:
            stage: Lightning's stage.

        Raises:
            QuantizedModelError: If the Trainer quantises the model itself, which would freeze what is trained.
            UnsupportedStrategyError: If its strategy is FSDP1 or DeepSpeed.
        """
        check_strategy(self.trainer.strategy, reads_weights=False, purpose=f"CausalLM on {self.source!r}")
        plugins = {cls.__name__ for cls in type(self.trainer.precision_plugin).__mro__}
        if "BitsandbytesPrecision" in plugins:
            raise QuantizedModelError(
                f"CausalLM on {self.source!r} cannot use BitsandbytesPrecision: it quantises and freezes "
                "every linear map, those of the adapter too, so nothing would be trained. Leave that plugin out, pass "
                "CausalLM(..., quantization='4bit', lora=...) and Trainer(precision='bf16-mixed') or '32-true'."
            )

    def configure_model(self) -> None:
        """Shard the model under ``ModelParallelStrategy`` (FSDP2): block by block, then the rest.

        Raises:
            UnsupportedStrategyError: If the strategy asks for tensor parallelism, its default.
        """
        mesh = self.device_mesh
        if mesh is None or any(map(_is_sharded, self.model.parameters())):
            return
        if mesh["tensor_parallel"].size() > 1:
            total = mesh.size()
            raise UnsupportedStrategyError(
                f"CausalLM on {self.source!r} cannot be split by tensor parallelism, and this "
                f"ModelParallelStrategy has tensor_parallel_size={mesh['tensor_parallel'].size()}. "
                f"Pass ModelParallelStrategy(data_parallel_size={total}, tensor_parallel_size=1)."
            )
        from torch.distributed.fsdp import fully_shard

        for block in ModelMap.build(self.model).blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch's labelled tokens.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, time]``.
            batch_idx: Its index in the epoch.

        Returns:
            The loss, a scalar.

        Raises:
            DataError: If the batch has no ``labels``, or no labelled token.
        """
        key = derived_seed(self.seed, "dropout", self.global_step, batch_idx, self.global_rank)
        with seeded_rng(key, self.device):
            total, tokens = self._loss(batch, batch_idx, trim=True)
        loss = total / tokens
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation loss.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, time]``.
            batch_idx: Its index.
        """
        self.val_loss.update(*self._loss(batch, batch_idx, trim=False))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the test loss.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, time]``.
            batch_idx: Its index.
        """
        self.test_loss.update(*self._loss(batch, batch_idx, trim=False))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        self._log_epoch("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._log_epoch("test", self.test_loss)

    def configure_optimizers(self) -> Any:
        """Make AdamW over everything that is trained, and its schedule.

        Raises:
            RecipeError: If the learning rate is to fall by the end of a run that has none.
        """
        optimizer = adamw(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)
        steps = float("inf") if self.schedule == "constant" else self.trainer.estimated_stepping_batches
        scheduler = schedule_of(optimizer, self.schedule, warmup_steps=self.warmup_steps, total_steps=steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen base out of a checkpoint, but for two kinds that are read back whole or not at all.

        These are sharded checkpoints, and those that Lightning's weight averaging has put its copy into.

        Args:
            checkpoint: Changed in place.
        """
        state = checkpoint["state_dict"]
        if "averaging_state" not in checkpoint and not any(_is_sharded(tensor) for tensor in state.values()):
            saved = self._saved_names(state)
            checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in saved}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what :meth:`on_save_checkpoint` keeps.

        With an adapter a checkpoint without the base is whole, and one that lacks a part of the adapter is refused,
        whatever ``strict`` says.

        Args:
            state_dict: Tensors by name.
            strict: In full finetuning, whether missing and unknown tensors are refused.
            assign: As in torch.

        Returns:
            torch's lists of missing and unexpected names; with an adapter both are empty.

        Raises:
            IncompatibleModelError: With the first tensor that is missing, unknown or of another shape.
        """
        if self.has_adapter or strict:
            own = self.state_dict()
            check_state(state_dict, own, self._saved_names(own), owner=f"this CausalLM on {self.source!r}")
        result: Any = super().load_state_dict(state_dict, strict=strict and not self.has_adapter, assign=assign)
        return type(result)([], []) if self.has_adapter else result

    def export(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write what was trained for others to load; in a distributed run on rank zero only.

        Args:
            folder: The folder to make; it appears whole or not at all. With an adapter it is a PEFT folder, without
                one a model folder in Hugging Face format; the tokenizer lies beside it. ``load_causal_lm`` reads both.
            overwrite: Whether a folder that holds files may be replaced.

        Returns:
            ``folder``.

        Raises:
            ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
            UnsupportedStrategyError: If the model is sharded; load a checkpoint on one device and export that.
        """
        check_weights(self.model, purpose="CausalLM.export")
        if self.has_adapter:
            return save_adapter(self.model, folder, base=self.source, tokenizer=self.tokenizer, overwrite=overwrite)
        with atomic_folder(folder, overwrite=overwrite) as temporary, quiet_bars():
            self.model.save_pretrained(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
        return Path(folder)

    def _prepare(self, settings: LoraSettings | None, gradient_checkpointing: bool) -> None:
        quantised = quantized_modules(self.model)
        if settings is None and not has_adapter(self.model):
            if quantised:
                raise QuantizedModelError(
                    f"CausalLM cannot train all weights of {self.source!r}: {quantised[0]} and "
                    f"{len(quantised) - 1} other modules are quantised. "
                    "Pass lora=LoraSettings(...), or load it without quantization."
                )
            self.model.float()  # master weights; reduced precision is the Trainer's part
            self.model.config.dtype = torch.float32
        else:
            if quantised:
                _prepare_quantised(self.model)
            if settings is not None:
                inject_lora(self.model, settings, seed=self.seed)
            else:
                train_adapter(self.model)
            self.strict_loading = False
        if gradient_checkpointing:
            _enable_checkpointing(self.model)

    def _loss(self, batch: dict[str, Tensor], batch_idx: int, *, trim: bool) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy of the labelled tokens, and their number."""
        if "labels" not in batch:
            raise DataError(
                f"Batch {batch_idx} has no 'labels', only {', '.join(batch)}. "
                "Give token ids, with -100 where nothing is scored; TextDataModule does so."
            )
        labels, more = batch["labels"], {}
        if trim:
            scored = (labels != IGNORED).any(dim=0)
            scored[0] = False  # nothing predicts the first token
            if not bool(scored.any()):
                raise DataError(
                    f"Batch {batch_idx} has no labelled token: its labels of shape {tuple(labels.shape)} are all "
                    "-100 after the first column. Check the completions, or raise max_length if they were cut off."
                )
            if self._can_trim:  # the head is dear: leave out the columns before the first prediction
                # As indices, not as a number: torch multiplies a slice by a frozen head row by row, many times slower.
                first = int(scored.int().argmax()) - 1
                more["logits_to_keep"] = torch.arange(first, labels.shape[1], device=labels.device)
        logits = self(batch["input_ids"], batch.get("attention_mask"), **more).logits
        return completion_loss(logits, labels)

    def _log_epoch(self, stage: str, metric: TokenLoss) -> None:
        loss = metric.compute()
        metric.reset()
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/perplexity", loss.exp(), sync_dist=True)

    def _saved_names(self, state: Mapping[str, Any]) -> set[str]:
        return saved_names(state, self.model, prefix=_MODEL) if self.has_adapter else set(state)


def _base_source(model: PreTrainedModel, source: str) -> str:
    """The base model's source: a name, or an absolute path."""
    source = source or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    path = Path(source).expanduser()
    if source in ALIASES or not path.exists():
        return source
    return adapter_base(path)[0] if is_adapter_folder(path) else str(path.resolve())


def _prepare_quantised(model: PreTrainedModel) -> None:
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def _enable_checkpointing(model: Any) -> None:
    # Reentrant checkpointing marks parameters ready twice under DDP, and needs inputs that require gradients.
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
