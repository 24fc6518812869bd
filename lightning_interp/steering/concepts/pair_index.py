"""Where the tokens of pairs sit in a vocabulary, and sums over their groups in O(V)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PairIndex"]


@dataclass(frozen=True, eq=False)
class PairIndex:
    """Pairs of one vocabulary of ``V`` tokens, of which ``n0`` are base and ``n1`` target tokens."""

    base: Tensor  # in order [n0]
    target: Tensor  # in order [n1]
    partner: Tensor  # place of each base token's partner among the targets [n0]
    tokens: Tensor  # that each entry of P^Z stands for, all but the base tokens [Z]
    slots: Tensor  # place of each target among `tokens` [n1]
    group: Tensor  # place among `tokens` that each token's mass goes to [V]
    side: Tensor  # 0 for base, 1 for target, -1 for neutral tokens [V]

    @classmethod
    def build(cls, pairs: Sequence[tuple[int, int]], size: int, device: torch.device) -> PairIndex:
        """Work the places out from ``(base, target)`` token ids, each base once and no token on both sides."""
        target_of = dict(pairs)
        base = torch.tensor(sorted(target_of))
        target = torch.tensor(sorted(set(target_of.values())))
        partner = torch.searchsorted(target, torch.tensor([target_of[token] for token in base.tolist()]))
        side = torch.full((size,), -1)
        side[base], side[target] = 0, 1
        tokens = (side != 0).nonzero().flatten()
        group = (side != 0).long().cumsum(0) - 1
        slots = group[target]
        group[base] = slots[partner]
        return cls(*(x.to(device) for x in (base, target, partner, tokens, slots, group, side)))

    def log_groups(self, log_p: Tensor) -> Tensor:
        """Log of the mass of each target token with its base tokens, ``[..., V] -> [..., n1]``."""
        own, base = log_p[..., self.target], log_p[..., self.base]
        partner = self.partner.expand(base.shape)
        top = own.detach().scatter_reduce(-1, partner, base.detach(), "amax")
        top = torch.where(top.isfinite(), top, 0.0)  # a group without any mass
        rest = (base - top.gather(-1, partner)).exp()
        return top + (own - top).exp().scatter_add(-1, partner, rest).log()

    def log_shares(self, log_p: Tensor) -> Tensor:
        """Log share of each base token in the mass of those with its target (even if 0), ``[..., V] -> [..., n0]``."""
        base = log_p[..., self.base]
        partner = self.partner.expand(base.shape)
        lowest = torch.full_like(log_p[..., self.target], -torch.inf)
        top = lowest.scatter_reduce(-1, partner, base, "amax").gather(-1, partner)
        weight = torch.where(top.isfinite(), base - top, 0.0).exp()
        total = torch.zeros_like(lowest).scatter_add(-1, partner, weight)
        return (weight / total.gather(-1, partner)).log()
