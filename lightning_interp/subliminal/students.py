"""Students of number sequences: on the numbers themselves (hard), or on a teacher's whole distribution there (soft).

A hard student is :class:`CausalLM` as it is. For both a control is trained beside: the same start, the same requests in
the same order, other completions (or another teacher); only the difference of the two says anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.training.causal_lm import CausalLM, scored_columns
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.metric import IGNORED
from lightning_interp.models.training.optimisation import Optimisation

__all__ = ["SoftStudent", "StudentSettings", "distillation_loss", "student_settings"]

Scale = Literal["paper", "small"]


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """How a student is finetuned: what goes to its module, to its data and to the Trainer.

    Args:
        lora: The adapter; None trains all weights.
        optimisation: How weights are trained.
        epochs: Times that every row is seen.
        batch_size: Rows of a step on one device.
        accumulate: Such steps a change of the weights.
        clip: Largest norm of the gradient.
        max_length: Tokens a row may have.
    """

    lora: LoraSettings | None
    optimisation: Optimisation
    epochs: int = 3
    batch_size: int = 22
    accumulate: int = 3
    clip: float = 1.0
    max_length: int = 500

    def trainer(self) -> dict[str, Any]:
        """Arguments for Lightning's Trainer."""
        steps = {"max_epochs": self.epochs, "accumulate_grad_batches": self.accumulate}
        return {**steps, "gradient_clip_val": self.clip, "log_every_n_steps": 1}


def student_settings(scale: Scale = "paper", *, rank: int = 8, full: bool = False) -> StudentSettings:
    """Settings for a student.

    ``"paper"`` are those of Cloud et al. 2025 and Nief et al. 2026 (three epochs of 10,000 rows in bf16: about 456
    steps); for full finetuning their learning rate is not certain, so try several, as one should for every rank.
    ``"small"`` is for a model of about 135 million parameters and some hundred rows on a CPU.

    Args:
        scale: Which.
        rank: Of the adapter on every linear map; its alpha is the rank, so that the update has the scale 1 at each.
        full: Train all weights instead.

    Returns:
        The settings.

    Raises:
        RecipeError: If the scale is unknown.

    Example:
        >>> settings = student_settings("paper", rank=64)
        >>> settings.lora.alpha, settings.optimisation.lr, settings.batch_size * settings.accumulate
        (64, 0.0002, 66)
    """
    if scale not in get_args(Scale):
        raise RecipeError(f"student_settings({scale!r}): expected one of {', '.join(get_args(Scale))}.")
    lora = None if full else LoraSettings(r=rank, alpha=rank, dropout=0.0, target_modules="all-linear")
    if scale == "paper":
        optimisation = Optimisation(lr=2e-5 if full else 2e-4, schedule="linear", warmup_steps=5)
        sizes = {"batch_size": 4, "accumulate": 16} if full else {}
        return StudentSettings(lora=lora, optimisation=optimisation, **sizes)
    small = Optimisation(lr=2e-5 if full else 5e-4)
    return StudentSettings(lora=lora, optimisation=small, epochs=1, batch_size=8, accumulate=1)


class SoftStudent(CausalLM):
    """A soft student: KL(teacher || student) at the tokens of the completions, which both read.

    This is not subliminal learning as it was published: more is learned from a token than which it is. Measures are
    logged as ``train/soft_loss`` and the like.

    Args:
        model: As for :class:`CausalLM`.
        teacher: Whose distributions are learned: a model with the same vocabulary, which is left as it is. It reads the
            batch's ``teacher_input_ids`` where there are some (see :class:`NumberSequenceDataModule`), for instance
            with its system text, else what the student reads. With the student's own base, nothing is to be learned:
            the gradient is zero and the weights stay as they are.
        **options: As for :class:`CausalLM`.

    Raises:
        DataError: In training, if teacher and student see other completions, or have other vocabularies.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> SoftStudent("tiny:llama", teacher=tiny_model(seed=1), lora=LoraSettings(r=2)).has_adapter
        True
    """

    _loss_name = "soft_loss"

    def __init__(self, model: Any, *, teacher: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._teacher = (teacher,)  # no submodule: neither trained nor saved

    def on_fit_start(self) -> None:
        """Bring the teacher where the student is."""
        self._teacher[0].to(self.device)

    def _compared(self, batch: dict[str, Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        (teacher,), labels = self._teacher, batch["labels"]
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        seen = labels
        if "teacher_input_ids" in batch:
            ids, mask, seen = (batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        more = {"logits_to_keep": scored_columns(seen, 0)} if logits.shape[1] < labels.shape[1] else {}
        with torch.no_grad(), evaluating(teacher):
            taught = teacher(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return distillation_loss(logits, labels, taught, seen)


def distillation_loss(logits: Tensor, labels: Tensor, taught: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over the labelled tokens, and their number.

    The gradient by the student's logits is the difference of the two distributions, worked out as such: it is exactly
    zero where the logits are equal.

    Args:
        logits: The student's ``[batch, kept, vocabulary]``, of the last columns or of all; each predicts the next.
        labels: ``[batch, time]``, -100 where nothing is scored.
        taught: The teacher's, ``[batch, kept, vocabulary]``.
        seen: Labels of what the teacher reads, ``[batch, time]``; the same completions, perhaps at other places.

    Returns:
        The sum in nats, and the number of tokens.

    Raises:
        DataError: If the completions or the vocabularies differ.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
        >>> total, tokens = distillation_loss(logits, labels, torch.tensor([[[2.0, 0, 0, 0]] * 3]), labels)
        >>> round(float(total), 3), int(tokens)
        (0.936, 2)
    """
    targets = [x[x != IGNORED] for x in (labels[:, 1:], seen[:, 1:])]
    if not torch.equal(*targets) or logits.shape[-1] != taught.shape[-1]:
        raise DataError(
            f"Teacher and student must read the same completions: {len(targets[1])} and {len(targets[0])} scored "
            f"tokens, of vocabularies of {taught.shape[-1]} and {logits.shape[-1]}. Use one tokenizer and one data set."
        )
    with torch.autocast(logits.device.type, enabled=False):
        own, other = _predicting(logits, labels).float(), _predicting(taught, seen).float()
        with torch.no_grad():
            student, teacher = own.log_softmax(-1), other.log_softmax(-1)
            value = (teacher.exp() * (teacher - student)).sum()
            slope = student.exp() - teacher.exp()
        carried = (slope * own).sum()  # its gradient is the slope; its value is taken out again
        return value + (carried - carried.detach()), torch.tensor(len(targets[0]), device=logits.device)


def _predicting(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict a labelled token, ``[tokens, vocabulary]``."""
    kept = logits.shape[1]
    return logits[:, :-1][labels[:, labels.shape[1] - kept :][:, 1:] != IGNORED]
