"""The LightningModule that trains a language model to prefer completions: direct preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.hooks.checks import check_strategy, quantized_modules
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.errors import DataError, IncompatibleModelError
from lightning_interp.models.data.dpo_pairs import DPODataModule
from lightning_interp.models.training.causal_lm import CausalLM
from lightning_interp.models.training.dpo_loss import PREFERENCE, DPOSettings, PairTerms, dpo_terms
from lightning_interp.models.training.dpo_reference import ReferenceIdentity, complete_reference
from lightning_interp.models.training.head_loss import ChunkedHead, row_sums, scored_positions
from lightning_interp.models.training.optimisation import plain, settings_of
from lightning_interp.models.training.reward_metric import log_scores

__all__ = ["DPO", "reference_logps"]

_GAP = 1e-4  # nats by which two log-ratios of the same model may differ in float32
_LOSS = 1e-5  # and the loss from its value at the start


class DPO(CausalLM):
    """Trains a language model to prefer chosen completions to rejected ones, held to a reference.

    Batches come from :class:`DPODataModule`. The reference is the policy as it is at the first step, with the adapter
    that it starts from: a fit computes its log-probabilities before that step, or reads them from the data's file, and
    batches carry them. Beginning at a checkpoint takes them from there and from the file, never from the policy, which
    has moved. In the batches of the first step the loss must be ln 2 and the margin 0, otherwise the reference was
    another model, and the training is refused. The head's logits are made in chunks (see :class:`ChunkedHead`); all
    else is as in :class:`CausalLM`.

    Logs ``train/loss``, ``train/accuracy``, ``train/margin``, ``train/chosen_reward`` and ``train/rejected_reward``
    (see :func:`dpo_terms`); ``val/...`` and ``test/...`` likewise, with ``val/pairs``, their number. Every pair weighs
    the same, across batches and processes.

    Args:
        model: As for :class:`CausalLM`.
        preference: What is minimised: settings, or some of them as a dict.
        **options: As for :class:`CausalLM`, and fields of :class:`DPOSettings` under their own names, as checkpoints
            hold them.

    Attributes:
        preference: What is minimised.

    Raises:
        RecipeError: If an argument has a wrong value.
        QuantizedModelError: If a quantised base is to be trained in full.
        IncompatibleModelError: If the adapter does not fit the model.

    Example:
        >>> from lightning_interp.models import LoraSettings
        >>> module = DPO("tiny:llama", lora=LoraSettings(r=2), beta=0.2, lr=3e-4)
        >>> module.preference.beta, module.has_adapter
        (0.2, True)
    """

    preference: DPOSettings
    _head: ChunkedHead

    def __init__(self, model: Any, *, preference: DPOSettings | Mapping[str, Any] = PREFERENCE, **options: Any) -> None:
        asked = settings_of(PREFERENCE, preference, options)
        super().__init__(model, **{**options, "chunked_head": True})
        self.preference = asked
        self.hparams.update(plain(asked))
        self._identity: ReferenceIdentity | None = None
        self.val_terms, self.test_terms = PairTerms(), PairTerms()

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that cannot train this module: one that shards weights, or quantises the model itself."""
        super().setup(stage)
        check_strategy(self.trainer.strategy, reads_weights=True, purpose=self._title)

    def on_fit_start(self) -> None:
        """Compute the reference's log-probabilities of the data, or read them; at a checkpoint only the latter."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DPODataModule):
            moved = self.trainer.ckpt_path is not None or self.trainer.global_step > 0
            self._know_reference(data, moved=moved, context=self.trainer.precision_plugin.forward_context())

    def on_train_start(self) -> None:
        """The same before steps that a callback takes earlier than that, such as LearningRateFinder."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DPODataModule) and data.missing(("train",)):
            self.on_fit_start()

    def on_validation_start(self) -> None:
        """Without a fit around it, read the reference's log-probabilities of the data."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DPODataModule) and self.trainer.state.fn != "fit":
            self._know_reference(data, moved=True, context=nullcontext(), splits=("val",))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which model the reference is, beside what :class:`CausalLM` keeps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["dpo_reference"] = None if self._identity is None else list(self._identity)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        found = checkpoint.get("dpo_reference")
        self._identity = None if found is None else ReferenceIdentity(*found)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch's pairs.

        Raises:
            DataError: If the batch lacks ``reference``, or has an odd number of rows.
            IncompatibleModelError: Before the first optimiser step, if the reference was another model.
        """
        with self._own_dropout(batch_idx):
            logps = self.sequence_logps(batch)
        terms = self._terms(logps, batch, batch_idx)
        if self.global_step == 0 and self.preference.check_start:
            self._check_start(batch, batch_idx, terms)
        loss = terms["loss"].mean()
        means = {f"train/{name}": value.detach().mean() for name, value in terms.items()}
        several: dict[str, Any] = {"batch_size": len(terms["loss"]), "sync_dist": True}
        self.log("train/loss", means.pop("train/loss"), prog_bar=True, **several)
        self.log_dict(means, **several)
        return loss

    def sequence_logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of each row's completion under the policy as it is, summed over the labelled tokens.

        Args:
            batch: With ``input_ids`` and ``labels`` ``[rows, time]``, on the model's device.

        Returns:
            In nats, ``[rows]``, float32; with gradients, and dropout if the module is in training mode.
        """
        labels = batch["labels"]
        positions = batch["scored"] if "scored" in batch else scored_positions(labels)
        found = self._head.logps(
            lambda: self(batch["input_ids"], batch.get("attention_mask")).logits, labels, positions
        )
        return row_sums(found, positions, labels.shape)

    def _terms(self, logps: Tensor, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if "reference" not in batch or len(batch["reference"]) != len(logps) or len(logps) % 2:
            held = "no 'reference'" if "reference" not in batch else f"{len(batch['reference'])} reference values"
            raise DataError(
                f"Batch {batch_idx} has {len(logps)} rows and {held}; expected the chosen rows, then as many rejected "
                "ones, and the reference's log-probability of each. Pass a DPODataModule to fit, or give its "
                "reference file."
            )
        if batch["reference"].dtype.itemsize < logps.dtype.itemsize:
            raise DataError(
                f"Batch {batch_idx} has its 'reference' in {batch['reference'].dtype}, which rounds it by more than is "
                "learned in a step: Trainer(precision='bf16-true') and the like do so to batches. Take 'bf16-mixed', "
                "and for a frozen base in bfloat16 DPO(..., dtype='bfloat16')."
            )
        return dpo_terms(logps, batch["reference"], self.preference)

    @torch.no_grad()
    def _check_start(self, batch: dict[str, Tensor], batch_idx: int, terms: Mapping[str, Tensor]) -> None:
        """Refuse a reference that is not the policy as it starts: asks the device, so before the first step only."""
        beta = self.preference.beta
        strict = min(_GAP, 2 * _LOSS / beta)  # the loss changes by at most beta / 2 a nat
        if float(terms["margin"].abs().max()) <= strict * beta:
            return
        with undisturbed(self.model):  # without dropout, and with the rounding that the precision has
            logps = self.sequence_logps(batch)
            allowed = (_roundoff(self.model) * logps.abs().view(2, -1).sum(dim=0)).clamp_min(strict)
            again = self._terms(logps, batch, batch_idx)
        gap = again["margin"].abs() / beta
        if not bool((gap <= allowed).all()):
            start = dpo_terms(logps * 0, logps * 0, self.preference)["loss"].mean()
            raise IncompatibleModelError(
                f"{self._title}: at the first step policy and reference must be the same model, but in batch "
                f"{batch_idx} the log-ratios of the two completions differ by up to {float(gap.max()):.4g} nats (loss "
                f"{float(again['loss'].mean()):.4g}, expected {float(start):.6g}). The reference's log-probabilities "
                "are of another model: of a policy that starts from a trained adapter the reference has that adapter, "
                "and is not the base with adapters switched off. Compute them with the model that training starts "
                "from, as fit does with a DPODataModule; for another reference on purpose pass check_start=False."
            )

    def _measure(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        terms = self._terms(self.sequence_logps(batch), batch, batch_idx)
        getattr(self, f"{stage}_terms").update(terms, batch.get("real"))

    def _log_epoch(self, stage: str) -> None:
        log_scores(self, stage, getattr(self, f"{stage}_terms"))

    def _know_reference(
        self,
        data: DPODataModule,
        *,
        moved: bool,
        context: AbstractContextManager[Any],
        splits: Sequence[str] = ("train", "val"),
    ) -> None:
        def logps_of(batch: dict[str, Tensor]) -> Tensor:
            return self.sequence_logps({name: tensor.to(self.device) for name, tensor in batch.items()})

        identity = self._identity if moved else None
        self._identity = complete_reference(
            self.model, data, logps_of, identity=identity, moved=moved, context=context, splits=splits
        )


def reference_logps(module: DPO, data: DPODataModule, *, autocast: torch.dtype | None = None) -> None:
    """Compute the reference's log-probabilities of all pairs before a training, where the data has none of them yet.

    A fit does so itself; this is for whoever wants them earlier, say as a stage of its own. They go to the data's
    ``logps``, and to its file if it has one. A computation that was killed goes on at the file.

    Args:
        module: The policy as training will start from it.
        data: The pairs.
        autocast: Type that the training will compute in under autocast, such as ``torch.bfloat16``.

    Raises:
        IncompatibleModelError: If the file is of another reference, or in another precision.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}]
        >>> data = DPODataModule(rows, tokenizer=byte_tokenizer())
        >>> reference_logps(DPO("tiny:llama"), data)
        >>> next(iter(data.train_dataloader()))["reference"].shape
        torch.Size([2])
    """
    context = nullcontext() if autocast is None else torch.autocast(module.device.type, dtype=autocast)
    module._know_reference(data, moved=False, context=context)


def _roundoff(model: torch.nn.Module) -> float:
    """Relative rounding of a log-probability: of the coarsest type that a model computes in."""
    kind = next(model.parameters()).device.type
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(kind):
        types.add(torch.get_autocast_dtype(kind))
    types.add(
        {"high": torch.float16, "medium": torch.bfloat16}.get(torch.get_float32_matmul_precision(), torch.float32)
    )
    if quantized_modules(model):
        types.add(torch.bfloat16)  # whose step is that of eight bits
    return max(torch.finfo(dtype).eps for dtype in types) / 2
