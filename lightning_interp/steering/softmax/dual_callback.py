"""Carry dual steering through the stages of a Lightning run, and record what it did and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.core.callbacks.intervention_callback import Stage
from lightning_interp.core.callbacks.metered_callback import MeteredCallback
from lightning_interp.errors import RecipeError
from lightning_interp.steering.softmax.dual_intervention import DUAL_MEASURES, DualMeter, DualSteering

__all__ = ["DualSteeringCallback"]


class DualSteeringCallback(MeteredCallback):
    """Steer the next-token distribution in the stages that you name, and log what it changed and cost.

    At the end of each epoch that steered something,
    ``<name>/<stage>/{kl,probe_change,hvps_per_token,reached,certified}`` are logged, means over the steered tokens of
    all processes; in ``predict`` they are in :attr:`measured` alone. In training gradients flow through.

    Args:
        steering: The intervention.
        when: Any of ``train``, ``validate``, ``test``, ``predict``.
        target, tokenizer: See ``InterventionCallback``.
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

    def make_meter(self) -> DualMeter:
        """What was changed, and its cost."""
        return DualMeter()

    def meter_on(self, meter: Any) -> None:
        """Feed it."""
        self.steering.meter = meter

    def kept(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """All, if something was steered."""
        return found if found["tokens"] else {}

    def logged(self, kept: Mapping[str, float]) -> Mapping[str, float]:
        """The means."""
        return {measure: kept[measure] for measure in DUAL_MEASURES}

    def state_dict(self) -> dict[str, Any]:
        """What is done, and what was measured."""
        return {"describe": self.steering.describe(), **super().state_dict()}
