"""Dual steering on the tokens that matter: a restricted vocabulary, chosen once a solve and certified afterwards."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import centred, exact_arithmetic
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

__all__ = ["PolishedFamily", "RestrictedFamily", "choose_support", "restrict"]

_REACH = 10.0
"""Logits by which the far end of a straight path is moved along the direction, where its length is not known."""


class RestrictedFamily:
    """The softmax over tokens ``index`` ``[B, K]`` with rows ``weight`` ``[B, K, d]`` and ``bias`` ``[B, K]``."""

    def __init__(self, index: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> None:
        self.index, self.weight, self.bias, self.scale = index, weight, bias, scale

    def logits(self, lam: Tensor) -> Tensor:
        """``[B, d] -> [B, K]``."""
        z = self.logits_change(lam)
        return z if self.bias is None else z + self.scale * self.bias

    def logits_change(self, v: Tensor) -> Tensor:
        """Linear part of :meth:`logits`."""
        with exact_arithmetic(v.device):
            return self.scale * torch.bmm(self.weight, v[:, :, None])[:, :, 0]

    def mean(self, weights: Tensor) -> Tensor:
        """Its transpose, ``[B, K] -> [B, d]``."""
        with exact_arithmetic(weights.device):
            return self.scale * torch.bmm(weights[:, None, :], self.weight)[:, 0]

    def gradients(self, index: Tensor) -> Tensor:
        """Gradients of the logits in columns ``index`` ``[B, k]``: ``[B, k, d]``."""
        return self.scale * self.weight.take_along_dim(index[..., None], dim=1)

    def rows(self, index: Tensor) -> Self:
        """The same for some of the rows."""
        bias = None if self.bias is None else self.bias[index]
        return type(self)(self.index[index], self.weight[index], bias, self.scale)


class PolishedFamily:
    """The ``whole`` vocabulary with the curvature of a ``part``: exact gradients, cheap Hessian-vector products.

    Newton's method on it ends where the whole family's gradient vanishes, so its result needs no other certificate.
    """

    def __init__(self, whole: SoftmaxGeometry, part: RestrictedFamily) -> None:
        self.whole, self.part = whole, part
        self.logits, self.logits_change = whole.logits, whole.logits_change
        self.mean, self.gradients = whole.mean, whole.gradients

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """Hessian-vector product with the support's share of the probabilities ``p`` ``[B, V]``; ``[B, d]``."""
        inside, u = p.gather(-1, self.part.index), self.part.logits_change(v)
        return self.part.mean(centred(inside, u))

    def rows(self, index: Tensor) -> PolishedFamily:
        """The same for some of the rows."""
        return PolishedFamily(self.whole, self.part.rows(index))


def restrict(geometry: SoftmaxGeometry, index: Tensor, dtype: torch.dtype) -> RestrictedFamily:
    """Gather the rows of a support ``[B, K]``, once a solve: gathering costs as much as several products with them."""
    index = index.to(geometry.weight.device)
    bias = None if geometry.bias is None else geometry.bias[index].to(dtype)
    return RestrictedFamily(index, geometry.weight[index].to(dtype), bias, geometry.scale)


def choose_support(
    z: Tensor, push: Tensor, size: int, *, end: Tensor | None = None, always: Tensor | None = None
) -> Tensor:
    """At least ``size`` tokens ``[B, K]``, all different, that a path from logits ``z`` along ``push`` can make likely.

    Half are the likeliest at the start, a quarter the likeliest at the straight path's ``end`` (a guess if None), and a
    quarter those that the direction favours most, as promoted tokens may be rare at the start; ``always`` are in.
    """
    rows, vocabulary = z.shape
    size = min(size, vocabulary)
    push = push.expand(rows, -1)
    if end is None:
        end = z + _REACH * push / (push.amax(-1, keepdim=True) - push.mean(-1, keepdim=True)).clamp_min(1e-12)
    chosen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=z.device)
    if always is not None:
        chosen[:, always.to(z.device)] = True
    for scores, share in ((z, 2), (end, 4), (push, 4)):
        chosen.scatter_(1, scores.topk(max(1, size // share), dim=-1).indices, True)
    count = min(vocabulary, max(size, int(chosen.sum(-1).max())))
    # Rows with fewer tokens are filled up with the next likeliest, so that all have the same number.
    score = z - z.amax(-1, keepdim=True) + chosen * (2 * (z.amax() - z.amin()) + 1)
    return score.topk(count, dim=-1).indices.sort(-1).values
