"""What a grafted model predicts at the last prompt token, and a metric that reduces it over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_interp.core.measure.reduced import KeyedRows

__all__ = ["METRICS", "GraftScores", "score_logits", "target_rank"]

METRICS = (
    "top1",
    "top5",
    "target_prob",
    "target_logprob",
    "target_rank",
    "logit_diff",
    "kl_to_recipient",
    "kl_to_donor",
)
"""Columns of :func:`score_logits`, in order (``top5`` stands for the chosen k)."""


def target_rank(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rank of the target, 1 for the largest; ties favour it. A NaN counts as larger, so a broken model never hits."""
    own = logits.gather(-1, target[..., None])
    return 1 + (~(logits <= own)).sum(dim=-1)


def score_logits(
    logits: torch.Tensor, target: torch.Tensor, recipient: torch.Tensor, donor: torch.Tensor, *, top_k: int = 5
) -> torch.Tensor:
    """Score logits ``[n, V]``, or ``[plans, n, V]``, against targets ``[n]`` and the two plain models' logits.

    Returns ``[..., n, 8]``, columns as in ``METRICS``: top-1 and top-k hits, probability, log-probability (nats) and
    rank of the target, its logit minus that of the recipient's favourite token, and KL(recipient || graft) and KL(donor
    || graft) in nats.
    """
    logits, recipient, donor = logits.float(), recipient.float(), donor.float()
    log_p = logits.log_softmax(dim=-1)
    target = target.expand(logits.shape[:-1])
    at_target = log_p.gather(-1, target[..., None])[..., 0]
    rank = target_rank(logits, target)
    favourite = recipient.argmax(dim=-1).expand(logits.shape[:-1])
    gap = logits.gather(-1, target[..., None]) - logits.gather(-1, favourite[..., None])
    columns = [
        (rank <= 1).float(),
        (rank <= top_k).float(),
        at_target.exp(),
        at_target,
        rank.float(),
        gap[..., 0],
        _kl(recipient, log_p),
        _kl(donor, log_p),
    ]
    return torch.stack(columns, dim=-1)


def _kl(reference: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_p = reference.log_softmax(dim=-1)
    p = log_p.exp()
    # A token that the reference excludes (logit -inf) contributes nothing, whatever the graft says.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)


class GraftScores(KeyedRows):
    """Scores of every plan on every prompt, gathered over processes; a prompt counts once, whoever scored it."""

    def __init__(self, plans: Sequence[str]) -> None:
        super().__init__(len(plans) * len(METRICS))
        self.plans = tuple(plans)

    def update(self, index: torch.Tensor, scores: torch.Tensor) -> None:
        """Add scores ``[n, plans, 8]`` of the prompts ``[n]``."""
        self.add(index, scores)

    def compute(self) -> torch.Tensor:
        """Scores of all prompts in order of their index, ``[N, plans, 8]``."""
        return self.table()[1].reshape(-1, len(self.plans), len(METRICS))
