"""The LightningModule that finetunes a causal language model, with an adapter or in full."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.tokens.pass_arguments import positions_restart
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.packing import check_packing
from lightning_interp.models.sources.loading import load_causal_lm
from lightning_interp.models.sources.pretrained import Quantization
from lightning_interp.models.training.finetuning import FINETUNING, SETTINGS, Finetuned, base_source
from lightning_interp.models.training.head_loss import ChunkedHead, scored_positions
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.metric import IGNORED, TokenLoss, completion_loss
from lightning_interp.models.training.optimisation import Optimisation, no_more

__all__ = ["CausalLM", "scored_columns"]


class CausalLM(Finetuned):
    """Finetunes a causal language model on batches with ``input_ids``, ``attention_mask`` and ``labels``.

    The loss is the mean cross entropy of the batch's labelled tokens (-100 marks the others; see
    :class:`TextDataModule`). ``position_ids`` of a batch are passed on; where they come without a mask, as in packed
    rows, the model is asked once whether it keeps the texts of a row apart. With an adapter only its weights are
    trained, saved and restored; the base is loaded anew. Without one all weights are trained, as float32 master
    weights: reduced precision comes from ``Trainer(precision="bf16-mixed")``. Dropout is keyed by seed, step and rank,
    so a resumed run equals another.

    Logs ``train/loss``, ``val/loss`` and ``val/perplexity`` (``test/...`` likewise); every token weighs the same.

    Args:
        model: A source for :func:`load_causal_lm`, or a loaded model, which is changed in place; trains its adapter.
        tokenizer: Exported beside the model; taken from the source if that is a name.
        lora: Put in an adapter and train it: settings, or the same as a dict.
        optimisation: How its weights are trained: settings, or some of them as a dict.
        quantization: Load a named source with a ``"4bit"`` or ``"8bit"`` base; needs an adapter.
        dtype: Type of a named source's frozen weights.
        seed: Root seed of the adapter's start and of dropout.
        chunked_head: Make the logits of labelled tokens alone, some at a time (see :class:`ChunkedHead`): with 2,048
            tokens and 49,152 words in under a sixth of the memory. Under a frozen head, as with an adapter, it takes no
            longer; the head's own part up to half as long again if it is trained. Numbers differ by rounding.
        **flat: Fields of :class:`Optimisation` under their own names, as checkpoints hold them.

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

    _loss_name = "loss"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: LoraSettings | Mapping[str, Any] | None = None,
        optimisation: Optimisation | Mapping[str, Any] = FINETUNING,
        quantization: Quantization | None = None,
        dtype: str = "float32",
        seed: int = 0,
        chunked_head: bool = False,
        **flat: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=SETTINGS, logger=False)
        adapter = self._keep(lora, optimisation, flat)
        no_more(self, flat)
        source = model if isinstance(model, str) else ""
        if isinstance(model, str):
            self.hparams.update(model=model)
            loaded = load_causal_lm(model, dtype=dtype, quantization=quantization)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        self.source, self.seed = base_source(model, source), seed
        self.model, self.tokenizer = model, tokenizer
        self._prepare(adapter)
        self._can_trim = "logits_to_keep" in inspect.signature(model.forward).parameters
        if chunked_head and type(self)._compared is not CausalLM._compared:
            raise RecipeError(
                f"{type(self).__name__} compares whole distributions, which chunked_head=True never makes. Leave it "
                "out."
            )
        self._head = ChunkedHead(model) if chunked_head else None
        self._packs = False  # whether it is known to keep the texts of a packed row apart
        self.val_loss, self.test_loss = TokenLoss(), TokenLoss()
        # transformers loads in evaluation mode, which Lightning would keep: dropout would stay off.
        self.train()

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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch's labelled tokens.

        Raises:
            DataError: If the batch has no ``labels``, or no labelled token.
            IncompatibleModelError: If the batch holds packed rows, and the model cannot keep their texts apart.
        """
        with self._own_dropout(batch_idx):
            total, tokens = self._loss(batch, batch_idx, trim=True)
        loss = total / tokens
        self.log(f"train/{self._loss_name}", loss, prog_bar=True, batch_size=len(batch["labels"]), sync_dist=True)
        return loss

    def _measure(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        getattr(self, f"{stage}_loss").update(*self._loss(batch, batch_idx, trim=False))

    def _loss(self, batch: dict[str, Tensor], batch_idx: int, *, trim: bool) -> tuple[Tensor, Tensor]:
        """What is lost at the labelled tokens together, and their number."""
        if "labels" not in batch:
            raise DataError(
                f"Batch {batch_idx} has no 'labels', only {', '.join(batch)}. "
                "Give token ids, with -100 where nothing is scored; TextDataModule does so."
            )
        labels = batch["labels"]
        kept = scored_columns(labels, batch_idx) if trim else None
        more = {"logits_to_keep": kept} if trim and self._can_trim and self._head is None else {}
        if "position_ids" in batch:
            more["position_ids"] = batch["position_ids"]
            self._check_packing(batch)

        def run() -> Tensor:
            logits: Tensor = self(batch["input_ids"], batch.get("attention_mask"), **more).logits
            return logits

        if self._head is None:
            return self._compared(batch, run())
        found = self._head.logps(run, labels, scored_positions(labels))
        return -found.sum(), torch.tensor(len(found), device=found.device)

    def _check_packing(self, batch: Mapping[str, Tensor]) -> None:
        """Ask the model once whether it keeps the texts of a packed row apart."""
        if not self._packs and batch.get("attention_mask") is None and positions_restart(batch["position_ids"]):
            check_packing(self.model)
            self._packs = True

    def _compared(self, batch: dict[str, Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is lost at the labelled tokens together, and their number; logits of the last columns, or of all."""
        return completion_loss(logits, batch["labels"])

    def _log_epoch(self, stage: str) -> None:
        metric: TokenLoss = getattr(self, f"{stage}_loss")
        loss = metric.compute()
        metric.reset()
        self.log(f"{stage}/{self._loss_name}", loss, prog_bar=True, sync_dist=True)
        if self._loss_name == "loss":  # a cross entropy
            self.log(f"{stage}/perplexity", loss.exp(), sync_dist=True)


def scored_columns(labels: Tensor, batch_idx: int) -> Tensor:
    """Columns from the first that predicts a labelled token to the last: the head is dear, and no other is needed.

    As indices, not as a number: torch multiplies a slice by a frozen head row by row, many times slower.
    """
    scored = (labels != IGNORED).any(dim=0)
    scored[0] = False  # nothing predicts the first token
    if not bool(scored.any()):
        raise DataError(
            f"Batch {batch_idx} has no labelled token: its labels of shape {tuple(labels.shape)} are all "
            "-100 after the first column. Check the completions, or raise max_length if they were cut off."
        )
    return torch.arange(int(scored.int().argmax()) - 1, labels.shape[1], device=labels.device)
