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
    """Rank of the target, 1 for the largest; ties favour the target.

    Args:
        logits: ``[..., V]``.
        target: Token ids ``[...]``.

    Returns:
        ``1 +`` the number of strictly larger logits, ``[...]``; a NaN counts as larger, so a broken model never hits.

    Example:
        >>> target_rank(torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([2])).item()
        2
    """
    own = logits.gather(-1, target[..., None])
    return 1 + (~(logits <= own)).sum(dim=-1)


def score_logits(
    logits: torch.Tensor, target: torch.Tensor, recipient: torch.Tensor, donor: torch.Tensor, *, top_k: int = 5
) -> torch.Tensor:
    """Score predictions against the target and against the two plain models.

    Args:
        logits: ``[n, V]`` of some graft at the last prompt token, or ``[plans, n, V]`` of several.
        target: First token of the expected answer, ``[n]``.
        recipient: Logits of the recipient for the same prompts, ``[n, V]``.
        donor: Logits of the donor, ``[n, V]``.
        top_k: For the second column.

    Returns:
        ``[n, 8]`` or ``[plans, n, 8]``, columns as in ``METRICS``: top-1 and top-k hits, probability and
        log-probability (nats) and rank of the target, its logit minus that of the recipient's favourite token, and
        KL(recipient || graft) and KL(donor || graft) in nats.

    Example:
        >>> plain = torch.tensor([[2.0, 1.0]])
        >>> score_logits(plain, torch.tensor([0]), plain, plain)[0, -2:].tolist()
        [0.0, 0.0]
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
    """Scores of every plan on every prompt, gathered over processes; a prompt counts once, whoever scored it.

    Args:
        plans: Names of the plans.

    Example:
        >>> scores = GraftScores(["PRE", "SFT"])
        >>> scores.update(torch.tensor([0]), torch.ones(1, 2, len(METRICS)))
        >>> scores.compute().shape
        torch.Size([1, 2, 8])
    """

    def __init__(self, plans: Sequence[str]) -> None:
        super().__init__(len(plans) * len(METRICS))
        self.plans = tuple(plans)

    def update(self, index: torch.Tensor, scores: torch.Tensor) -> None:
        """Add scores.

        Args:
            index: Which prompts, ``[n]``.
            scores: ``[n, plans, 8]``.
        """
        self.add(index, scores)

    def compute(self) -> torch.Tensor:
        """Scores of all prompts in order of their index, ``[N, plans, 8]``."""
        return self.table()[1].reshape(-1, len(self.plans), len(METRICS))
