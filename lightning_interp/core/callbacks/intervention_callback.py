"""The one adapter between interventions and a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from lightning_interp.core.hooks.checks import check_hookable, check_strategy
from lightning_interp.core.hooks.intervention import Attachment, Intervention
from lightning_interp.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["InterventionCallback", "Stage", "tokenizer_of"]

Stage = Literal["train", "validate", "test", "predict"]
_STAGES = ("train", "validate", "test", "predict")


class InterventionCallback(L.Callback):
    """Carry an intervention through the stages of a Lightning run that you name, and no others.

    The hooks are on the model only while such a stage runs, and come off when it ends, fails or is interrupted.
    Validation inside ``fit`` follows its own entry in ``when``, whatever training does.

    Args:
        intervention: What to do.
        when: Any of ``train``, ``validate``, ``test``, ``predict``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        tokenizer: For selectors that read text; default is the module's or data module's ``tokenizer``.
        name: Tells several of these apart (enters the state key).

    Raises:
        RecipeError: If ``when`` is empty or names an unknown stage.

    Example:
        >>> from lightning_interp import ActivationCapture, Site
        >>> InterventionCallback(ActivationCapture([Site("logits")]), when=["test"]).when
        ('test',)
    """

    def __init__(
        self,
        intervention: Intervention,
        *,
        when: Sequence[Stage] = ("validate", "test", "predict"),
        target: str | None = None,
        tokenizer: Any = None,
        name: str | None = None,
    ) -> None:
        stages = (when,) if isinstance(when, str) else tuple(when)
        if not stages or any(stage not in _STAGES for stage in stages):
            raise RecipeError(f"{type(self).__name__}(when={stages!r}): expected some of {', '.join(_STAGES)}.")
        self.intervention = intervention
        self.when = stages
        self.target = target
        self.tokenizer = tokenizer
        self.name = name
        self._attachment: Attachment | None = None
        self._stage: str | None = None
        self._suspended: str | None = None

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks of one class by their ``name``."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    @property
    def attached(self) -> bool:
        """Whether hooks are on the model right now."""
        return self._attachment is not None

    def release(self) -> None:
        """Take every hook off. Safe to call at any time."""
        attachment, self._attachment, self._stage = self._attachment, None, None
        if attachment is not None:
            attachment.remove()

    def _enter(self, stage: str, trainer: Any, pl_module: nn.Module) -> None:
        self.release()
        if stage in self.when:
            check_hookable(pl_module)
            tokenizer = tokenizer_of(self, pl_module, getattr(trainer, "datamodule", None))
            self._attachment = self.intervention.attach(pl_module, tokenizer=tokenizer, target=self.target)
            self._stage = stage

    def _batch(self, batch: Any) -> None:
        if self._attachment is not None:
            self._attachment.batch = batch if isinstance(batch, Mapping) else None

    def _epoch_end(self, stage: str, trainer: Any, pl_module: Any) -> None:
        """For subclasses that measure: an epoch of a stage ends, with the hooks still on the model."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies that cannot do this, before anything runs."""
        check_strategy(
            trainer.strategy,
            reads_weights=self.intervention.reads_weights,
            purpose=f"{type(self).__name__}({type(self.intervention).__name__})",
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach if ``train`` was asked for."""
        self._enter("train", trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Hand the batch to selectors."""
        self._batch(batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Release."""
        self.release()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put training's hooks aside; attach if ``validate`` was asked for."""
        self._suspended = self._stage if self._stage == "train" else None
        self._enter("validate", trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand the batch to selectors."""
        self._batch(batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Release, and go back to what training had."""
        self.release()
        if self._suspended is not None:
            self._enter(self._suspended, trainer, pl_module)
            self._suspended = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach if ``test`` was asked for."""
        self._enter("test", trainer, pl_module)

    on_test_batch_start = on_validation_batch_start

    on_test_end = on_train_end

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach if ``predict`` was asked for."""
        self._enter("predict", trainer, pl_module)

    on_predict_batch_start = on_validation_batch_start

    on_predict_end = on_train_end

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what was measured in this stage."""
        self._epoch_end("train", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what was measured in this stage."""
        self._epoch_end("validate", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what was measured in this stage."""
        self._epoch_end("test", trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what was measured in this stage."""
        self._epoch_end("predict", trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Release: after an exception Lightning calls nothing else."""
        self._suspended = None
        self.release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Release whatever is left."""
        self._suspended = None
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attachment": None, "_stage": None, "_suspended": None}


def tokenizer_of(*owners: Any) -> Any:
    """The first tokenizer that one of these has, such as a callback, a module and a data module."""
    return next((owner.tokenizer for owner in owners if getattr(owner, "tokenizer", None)), None)
