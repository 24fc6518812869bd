"""What every LightningModule that AdamW trains shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L

from lightning_interp.models.training.optimisation import Optimisation, adamw, schedule_of

__all__ = ["Optimised"]


class Optimised(L.LightningModule):
    """A module whose trained parameters AdamW moves."""

    optimisation: Optimisation

    @property
    def lr(self) -> float:
        """Learning rate after warm-up, under the name that Lightning's learning rate finder sets."""
        return self.optimisation.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimisation = replace(self.optimisation, lr=value)

    def configure_optimizers(self) -> Any:
        """Make AdamW over everything that is trained, and its schedule."""
        settings = self.optimisation
        optimizer = adamw(self.parameters(), settings)
        steps = float("inf") if settings.schedule == "constant" else self.trainer.estimated_stepping_batches
        scheduler = schedule_of(optimizer, settings, total_steps=steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
