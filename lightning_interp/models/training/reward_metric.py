"""How well a model orders pairs of texts, or predicts ratings, over many batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.errors import DataError

if TYPE_CHECKING:
    from lightning import LightningModule

__all__ = ["PairScores", "PointScores", "bradley_terry_loss", "log_scores", "pair_losses"]


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    r"""Negative log likelihood of each preference under the Bradley-Terry model.

    .. math:: -\log \sigma(r_{chosen} - r_{rejected} - m)

    The margin is that of Touvron et al. 2023 ("Llama 2", equation 2); without one it is the loss of Ouyang et al. 2022
    ("Training language models to follow instructions with human feedback", equation 1). Rewards and losses are
    ``[n]``; computed in float32.
    """
    return -F.logsigmoid(chosen.float() - rejected.float() - margin)


def pair_losses(rewards: Tensor, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
    """The loss of each pair ``[n]`` of a batch with the rewards ``[2 n]``; None for a batch of rated texts."""
    if "margin" in batch:
        chosen, rejected = rewards.chunk(2)
        return bradley_terry_loss(chosen, rejected, batch["margin"])
    if "reward" not in batch:
        raise DataError(
            f"Batch {batch_idx} has neither 'margin' (pairs) nor 'reward' (rated texts), only {', '.join(batch)}. "
            "PreferenceDataModule makes both kinds."
        )
    return None


def log_scores(module: LightningModule, stage: str, *metrics: PairScores | PointScores) -> None:
    """Log what the metrics of a stage found, and reset them; those without a batch are left out."""
    for metric in metrics:
        if metric.update_called:  # every process has batches of the same kind
            for name, value in metric.compute().items():
                module.log(f"{stage}/{name}", value.float(), prog_bar=name in ("loss", "accuracy"), sync_dist=True)
        metric.reset()


class PointScores(Metric):
    """Mean squared error of predicted rewards; every text weighs the same, whatever batch it was in."""

    full_state_update = False
    is_differentiable = False
    counted = "texts"
    means: tuple[str, ...] = ("loss",)
    count: Tensor

    def __init__(self, counted: str = "") -> None:
        super().__init__()
        self.counted = counted or self.counted
        for name in self.means:
            self.add_state(name, default=torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, real: Tensor | None = None) -> None:
        """Add a batch of losses ``[n]``; ``real`` is False for texts that do not count."""
        self._add(real, loss=loss)

    def _add(self, real: Tensor | None, **values: Tensor) -> None:
        # Not in place: a reset inside validate() leaves inference tensors, which the next fit() may not change.
        for name, value in values.items():
            weight = torch.ones_like(value) if real is None else real.to(value)
            setattr(self, name, getattr(self, name) + (value.detach() * weight).sum())
        self.count = self.count + weight.sum().long()

    def compute(self) -> dict[str, Tensor]:
        """Return the means and the number of texts or pairs; NaN for a mean of none."""
        return {name: getattr(self, name) / self.count for name in self.means} | {self.counted: self.count}


class PairScores(PointScores):
    """Mean loss and share of pairs in the right order; every pair weighs the same, whatever batch it was in.

    Two equal rewards are half right.
    """

    counted = "pairs"
    means = ("loss", "accuracy")

    def update(  # type: ignore[override]  # two rewards a pair
        self, chosen: Tensor, rejected: Tensor, loss: Tensor, real: Tensor | None = None
    ) -> None:
        """Add a batch of rewards and losses ``[n]``; ``real`` is False for pairs that do not count."""
        self._add(real, loss=loss, accuracy=(chosen > rejected).to(loss) + 0.5 * (chosen == rejected).to(loss))
