"""What direct preference optimisation minimises, and what it reports of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_interp.models.training.optimisation import check_settings
from lightning_interp.models.training.reward_metric import PointScores

__all__ = ["PREFERENCE", "DPOSettings", "PairTerms", "dpo_terms"]

DPOLoss = Literal["sigmoid", "ipo"]


@dataclass(frozen=True, kw_only=True)
class DPOSettings:
    """What DPO minimises.

    Attributes:
        beta: How strongly the policy is held to the reference, 1 / nat.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round ("conservative DPO").
        loss: ``"sigmoid"`` (Rafailov et al. 2023) or ``"ipo"`` (Azar et al. 2023), the square
            of the difference of the summed log-ratios from ``1 / (2 beta)``.
        check_start: Raise if policy and reference are not the same model at the first step.

    Raises:
        RecipeError: With the name and value of a setting that cannot work.

    Example:
        >>> DPOSettings(beta=0.05).loss
        'sigmoid'
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: DPOLoss = "sigmoid"
    check_start: bool = True

    def __post_init__(self) -> None:
        smooth = 0 <= self.label_smoothing < 0.5 and (self.loss == "sigmoid" or self.label_smoothing == 0)
        wanted = {
            "beta": (self.beta > 0 and math.isfinite(self.beta), "a number above 0"),
            "loss": (self.loss in get_args(DPOLoss), f"one of {', '.join(get_args(DPOLoss))}"),
            "label_smoothing": (smooth, "a number from 0 to below 0.5, and 0 with loss='ipo'"),
        }
        check_settings(self, "DPO", wanted)


PREFERENCE = DPOSettings()


def dpo_terms(logps: Tensor, reference: Tensor, settings: DPOSettings = PREFERENCE) -> dict[str, Tensor]:
    r"""Loss, and what is reported, of each pair.

    .. math:: -\log \sigma(\beta (\Delta_w - \Delta_l)), \quad \Delta = \log \pi_\theta(y|x) - \log \pi_{ref}(y|x)

    Args:
        logps: Log-probabilities of completions under the policy, summed over their tokens, ``[2 pairs]`` in nats: the
            chosen ones, then the rejected ones.
        reference: The same under the reference; no gradient goes there.
        settings: What is minimised.

    Returns:
        ``loss``, ``accuracy`` (whether the chosen one gained more), ``margin`` (beta times the difference of gains),
        ``chosen_reward`` and ``rejected_reward`` (beta times the gain), each ``[pairs]``.

    Example:
        >>> import torch
        >>> terms = dpo_terms(torch.tensor([-10.0, -11.0]), torch.tensor([-12.0, -10.0]))
        >>> round(float(terms["loss"]), 6), round(float(terms["margin"]), 6)
        (0.554355, 0.3)
    """
    chosen, rejected = (logps - reference.detach()).chunk(2)
    gap = chosen - rejected
    if settings.loss == "ipo":
        loss = (gap - 1 / (2 * settings.beta)) ** 2
    else:
        wrong = settings.label_smoothing
        loss = -(1 - wrong) * F.logsigmoid(settings.beta * gap)
        if wrong:
            loss = loss - wrong * F.logsigmoid(-settings.beta * gap)
    chosen, rejected, gap = chosen.detach(), rejected.detach(), gap.detach()
    return {
        "loss": loss,
        "accuracy": (gap > 0).to(gap),
        "margin": settings.beta * gap,
        "chosen_reward": settings.beta * chosen,
        "rejected_reward": settings.beta * rejected,
    }


class PairTerms(PointScores):
    """Means over pairs; every pair weighs the same, whatever batch it was in."""

    counted = "pairs"
    means = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")

    def update(  # type: ignore[override]  # several numbers a pair
        self, terms: Mapping[str, Tensor], real: Tensor | None = None
    ) -> None:
        """Add what :func:`dpo_terms` gave; ``real`` is False for pairs that do not count."""
        self._add(real, **terms)
