"""Carry steering through the stages of a Lightning run, and record what was done."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning_interp.core.callbacks.intervention_callback import Stage
from lightning_interp.core.callbacks.metered_callback import MeteredCallback
from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.errors import RecipeError
from lightning_interp.steering.activation.intervention import MEASURES, Steering, SteeringMeter

__all__ = ["SteeringCallback"]


class SteeringCallback(MeteredCallback):
    """Steer in the stages that you name; what was done stays with the run.

    What, where, how much and of which vector goes into checkpoints and, once a run, to every logger.

    Args:
        steering: One intervention of the steering family, or several, which act in this order.
        when: Any of ``train``, ``validate``, ``test``, ``predict``.
        log: Any of ``share`` (real tokens whose activation changed) and ``shift`` (how far these moved, relative to
            their length), logged as ``<name>/<stage>/<measure>``; in ``predict`` only in :attr:`measured`.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        tokenizer: For selectors that read text; default is the module's or data module's ``tokenizer``.
        name: Prefix of what is logged; tells several callbacks apart.

    Attributes:
        measured: By stage, the measures of its last epoch, where ``log`` asks for some.

    Raises:
        RecipeError: If there is nothing to steer with, or ``when`` or ``log`` holds an unknown name.

    Example:
        >>> from lightning_interp.steering import AddDirection
        >>> steer = AddDirection([1.0, 2.0], site="resid_post.1", strength=2.0)
        >>> SteeringCallback(steer, when=["validate"]).describe()[0]["sites"]
        ['resid_post.1']
    """

    def __init__(
        self,
        steering: Steering | Sequence[Steering],
        *,
        when: Sequence[Stage] = ("validate", "test", "predict"),
        log: Sequence[str] = (),
        target: str | None = None,
        tokenizer: Any = None,
        name: str = "steering",
    ) -> None:
        parts = [steering] if isinstance(steering, Steering) else list(steering)
        if wrong := [type(part).__name__ for part in parts if not isinstance(part, Steering)] or ["nothing"] * (
            not parts
        ):
            raise RecipeError(
                f"SteeringCallback got {[*wrong, 'nothing'][0]}; expected AddDirection or another of the steering "
                "family, or a list of them. Carry other interventions with InterventionCallback."
            )
        if unknown := [measure for measure in log if measure not in MEASURES]:
            raise RecipeError(
                f"SteeringCallback(log={list(log)!r}): {unknown[0]!r} is unknown; expected {', '.join(MEASURES)}."
            )
        whole = parts[0] if len(parts) == 1 else Compose(*parts)
        super().__init__(whole, when=when, target=target, tokenizer=tokenizer, name=name)
        self.parts, self.log_measures, self._recorded = parts, tuple(log), False

    def describe(self) -> list[dict[str, Any]]:
        """What each intervention does, in plain values."""
        return [part.describe() for part in self.parts]

    def state_dict(self) -> dict[str, Any]:
        """The description, and what was measured."""
        return {"describe": self.describe(), **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured; warn if the checkpoint was steered in another way."""
        now = self.describe()
        if [_settings(part) for part in state_dict["describe"]] != [_settings(part) for part in now]:
            warnings.warn(
                f"The checkpoint was made under another steering than SteeringCallback(name={self.name!r}) does now: "
                f"{json.dumps(state_dict['describe'])[:400]}.",
                stacklevel=2,
            )
        super().load_state_dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See :meth:`InterventionCallback.setup`."""
        super().setup(trainer, pl_module, stage)
        self._recorded = False

    def make_meter(self) -> SteeringMeter:
        """Share and shift."""
        return SteeringMeter()

    def meter_on(self, meter: Any) -> None:
        """Feed it, if something is to be logged."""
        for number, part in enumerate(self.parts if self.log_measures else ()):
            part.observe = partial(meter.update, part=number)

    def kept(self, found: Mapping[str, float]) -> dict[str, float]:
        """What was asked for."""
        return {measure: found[measure] for measure in self.log_measures}

    def _enter(self, stage: str, trainer: Any, pl_module: Any) -> None:
        super()._enter(stage, trainer, pl_module)
        if self.attached and not self._recorded:
            self._recorded = True
            for logger in trainer.loggers if is_rank_zero() else ():
                _record(logger, str(self.name), self.describe())

    def release(self) -> None:
        """Take every hook off. Safe to call at any time."""
        super().release()
        for part in self.parts:
            part.observe = None


def _settings(described: dict[str, Any]) -> dict[str, Any]:
    """What does not change while a direction is trained."""
    moves = ("sha256", "norms") if described["trained"] else ()
    return {key: value for key, value in described.items() if key not in moves}


def _record(logger: Any, name: str, described: list[dict[str, Any]]) -> None:
    """Tell a logger what is done: as text where it shows texts, among the hyperparameters elsewhere."""
    text = json.dumps(described, indent=2)
    if "TensorBoardLogger" in {cls.__name__ for cls in type(logger).__mro__}:
        # Its hyperparameters would bring a metric of their own.
        logger.experiment.add_text(name, f"```json\n{text}\n```")
    else:
        logger.log_hyperparams({name: described})
