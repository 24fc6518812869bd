"""What a run of dual steering changed and cost."""

from __future__ import annotations

import torch

from lightning_interp.core.measure.reduced import Sums
from lightning_interp.steering.softmax.result import SteerResult

__all__ = ["DUAL_MEASURES", "DualMeter"]

DUAL_MEASURES = ("kl", "probe_change", "hvps_per_token", "reached", "certified")
"""Means over steered tokens: nats, units of the probe, products, shares."""


class DualMeter(Sums):
    """Means over the states that were steered; ``last`` is the latest solve."""

    def __init__(self) -> None:
        super().__init__("tokens", *DUAL_MEASURES)
        self.last: SteerResult | None = None

    def update(self, found: SteerResult) -> None:
        """Count one solve."""
        self.last = found
        columns = (found.kl, found.probe_after - found.probe_before, found.hvps, found.reached, found.certified)
        sums = [column.double().sum() for column in columns]
        self.add(torch.stack([sums[0].new_tensor(float(len(found.lam))), *sums]))

    def compute(self) -> dict[str, float]:
        """The means so far, and ``tokens``, how many states they are over, of all processes, which must all call it."""
        tokens, *rest = self.totals()
        means = [value / tokens if tokens else 0.0 for value in rest]
        return {"tokens": int(tokens), **dict(zip(DUAL_MEASURES, means, strict=True))}

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self.last = None
