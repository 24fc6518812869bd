"""Interventions whose effect is measured while they act: one metric a stage, logged when an epoch of it ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, get_args

from torchmetrics import Metric

from lightning_interp.core.callbacks.intervention_callback import InterventionCallback, Stage
from lightning_interp.core.callbacks.monitor import log_reduced

__all__ = ["MeteredCallback"]


class MeteredCallback(InterventionCallback, ABC):
    """Carry an intervention through a run, and log what its meter counted as ``<name>/<stage>/<measure>``.

    In ``predict``, where Lightning logs nothing, it is in :attr:`measured` alone. Validation inside of ``fit`` does not
    interrupt the count of training; sanity checks count nothing.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.measured: dict[str, dict[str, float]] = {}
        self._meters: dict[str, Metric] = {stage: self.make_meter() for stage in get_args(Stage)}

    @abstractmethod
    def make_meter(self) -> Metric:
        """A new meter; ``compute`` gives one number a measure."""

    @abstractmethod
    def meter_on(self, meter: Metric) -> None:
        """Let the intervention, which is attached now, feed this meter."""

    def kept(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """Which measures are kept; none of them if it is empty."""
        return found

    def logged(self, kept: Mapping[str, float]) -> Mapping[str, float]:
        """Which of them are logged."""
        return kept

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"measured": {stage: dict(values) for stage, values in self.measured.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured."""
        self.measured = {stage: dict(values) for stage, values in state_dict["measured"].items()}

    def _enter(self, stage: str, trainer: Any, pl_module: Any) -> None:
        super()._enter(stage, trainer, pl_module)
        if not self.attached:
            return
        meter = self._meters[stage]
        if pl_module.device.type != "mps":  # which has no float64
            meter.to(pl_module.device)
        if stage != "train" or self._suspended is None:  # not when training goes on after its validation
            meter.reset()
        self.meter_on(meter)

    def _epoch_end(self, stage: str, trainer: Any, pl_module: Any) -> None:
        if self._stage != stage:
            return
        found = self._meters[stage].compute()
        self._meters[stage].reset()
        kept = dict(self.kept(found))
        if trainer.sanity_checking or not kept:
            return
        self.measured[stage] = kept
        if stage != "predict":
            logged = self.logged(kept).items()
            log_reduced(pl_module, {f"{self.name}/{stage}/{measure}": value for measure, value in logged})
