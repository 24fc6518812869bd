"""Carry dual steering through the stages of a Lightning run, and record what it did and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from lightning_interp.core.callbacks.intervention_callback import InterventionCallback, Stage
from lightning_interp.errors import RecipeError
from lightning_interp.steering.softmax.dual_intervention import DualSteering
from lightning_interp.steering.softmax.dual_meter import DUAL_MEASURES, DualMeter

__all__ = ["DualSteeringCallback"]


class DualSteeringCallback(InterventionCallback):
    """Steer the next-token distribution in the stages that you name, and log what it changed and cost.

    At the end of each epoch that steered something,
    ``<name>/<stage>/{kl,probe_change,hvps_per_token,reached,certified}`` are logged, means over the steered tokens of
    all processes; in ``predict``, where Lightning logs nothing, they are in :attr:`measured` alone. In training
    gradients flow through the steered states, at the step that was found.

    Args:
        steering: The intervention.
        when: Any of ``train``, ``validate``, ``test``, ``predict``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        tokenizer: For selectors that read text.
        name: Prefix of what is logged; tells several callbacks apart.

    Attributes:
        measured: By stage, the measures of its last epoch and how many ``tokens`` they are over.

    Raises:
        RecipeError: If ``steering`` is something else, or ``when`` names an unknown stage.

    Example:
        >>> import torch
        >>> DualSteeringCallback(DualSteering(torch.ones(32), kl_budget=0.5), when=["test"]).state_key
        "DualSteeringCallback{'name': 'dual_steering'}"
    """

    def __init__(
        self,
        steering: DualSteering,
        *,
        when: Sequence[Stage] = ("validate", "test", "predict"),
        target: str | None = None,
        tokenizer: Any = None,
        name: str = "dual_steering",
    ) -> None:
        if not isinstance(steering, DualSteering):
            raise RecipeError(
                f"DualSteeringCallback got {type(steering).__name__}; expected DualSteering. Carry other interventions "
                "with SteeringCallback or InterventionCallback."
            )
        super().__init__(steering, when=when, target=target, tokenizer=tokenizer, name=name)
        self.steering = steering
        self.measured: dict[str, dict[str, float]] = {}
        self._meters = {each: DualMeter() for each in get_args(Stage)}

    def state_dict(self) -> dict[str, Any]:
        """What is done, and what was measured."""
        return {
            "describe": self.steering.describe(),
            "measured": {stage: dict(values) for stage, values in self.measured.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured."""
        self.measured = {stage: dict(values) for stage, values in state_dict["measured"].items()}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        self._measure("train", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        self._measure("validate", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        self._measure("test", trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep."""
        self._measure("predict", trainer, pl_module)

    def _enter(self, stage: str, trainer: Any, pl_module: Any) -> None:
        super()._enter(stage, trainer, pl_module)
        if stage != "train" or self._suspended is None:  # not when training goes on after its validation
            self._meters[stage].reset()
        self.steering.meter = self._meters[stage]

    def _measure(self, stage: str, trainer: Any, pl_module: Any) -> None:
        if self._stage != stage:
            return
        found = self._meters[stage].compute(trainer)
        self._meters[stage].reset()
        if trainer.sanity_checking or not found["tokens"]:
            return
        self.measured[stage] = found
        if stage != "predict":
            logged = {f"{self.name}/{stage}/{measure}": found[measure] for measure in DUAL_MEASURES}
            # Every process holds the same means already.
            pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)
