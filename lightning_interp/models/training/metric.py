"""Cross entropy over the labelled tokens, and its mean over many batches and processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.errors import DataError

__all__ = ["TokenLoss", "completion_loss", "row_losses"]

IGNORED = -100
"""The label of a token that is not scored."""


def completion_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy of the labelled tokens, and their number.

    The logits ``[batch, kept, vocabulary]`` of the last ``kept`` positions (or of all) predict the token at the next;
    labels are ``[batch, time]``, -100 where nothing is scored. Summed in float32, inside autocast too.
    """
    kept = logits.shape[1]
    targets = labels[:, labels.shape[1] - kept :][:, 1:]
    with torch.autocast(logits.device.type, enabled=False):
        total = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return total, (targets != IGNORED).sum()


def row_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each row's cross entropy, ``[batch, time, vocabulary]`` and targets ``[batch, time]``; their number.

    Targets are the tokens that the logits of the same column predict, -100 where nothing is scored. In float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view(targets.shape).sum(dim=1), (targets != IGNORED).sum(dim=1)


class TokenLoss(Metric):
    """Mean cross entropy a token over batches and processes: every scored token weighs the same."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a batch."""
        # Not in place: a reset inside validate() leaves inference tensors, which the next fit() may not change.
        self.total = self.total + total.detach()
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Return the mean cross entropy a token."""
        if int(self.tokens) == 0:
            raise DataError(
                "No batch had a labelled token, so there is no mean loss: all labels are -100 after the first column. "
                "Check the completions, or raise max_length if they were cut off."
            )
        return self.total / self.tokens
