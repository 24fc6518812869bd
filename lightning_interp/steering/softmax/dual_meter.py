"""What a run of dual steering cost and changed: sums over tokens, the same on every process."""

from __future__ import annotations

from typing import Any

import torch

from lightning_interp.steering.softmax.result import SteerResult

__all__ = ["DUAL_MEASURES", "DualMeter"]

DUAL_MEASURES = ("kl", "probe_change", "hvps_per_token", "reached", "certified")
"""Means over steered tokens: nats, units of the probe, products, shares."""


class DualMeter:
    """Means over the states that were steered.

    Attributes:
        last: The latest solve.

    Example:
        >>> DualMeter().compute()["tokens"]
        0
    """

    def __init__(self) -> None:
        self.last: SteerResult | None = None
        self._sums = torch.zeros(len(DUAL_MEASURES) + 1, dtype=torch.float64)

    def update(self, found: SteerResult) -> None:
        """Count one solve."""
        self.last = found
        columns = (found.kl, found.probe_after - found.probe_before, found.hvps, found.reached, found.certified)
        sums = [column.double().sum() for column in columns]
        with torch.inference_mode(False):
            self._sums = self._sums + torch.stack([sums[0] * 0 + len(found.lam), *sums]).cpu()

    def compute(self, trainer: Any = None) -> dict[str, float]:
        """The means so far, and ``tokens``, how many states they are over.

        Args:
            trainer: Sum over its processes; None for this one alone. Every process must call it.
        """
        sums = self._sums
        if trainer is not None and trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        tokens, *rest = sums.tolist()
        means = [value / tokens if tokens else 0.0 for value in rest]
        return {"tokens": int(tokens), **dict(zip(DUAL_MEASURES, means, strict=True))}

    def reset(self) -> None:
        """Forget what was counted."""
        self.last = None
        self._sums = torch.zeros_like(self._sums)
