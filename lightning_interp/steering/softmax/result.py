"""What a steering solve found, one row a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import ROUNDED, divergence, entropy, rounding
from lightning_interp.steering.softmax.newton import NewtonResult
from lightning_interp.steering.softmax.request import SteerRequest

__all__ = ["SteerResult", "described", "ends_there"]

CERTIFIED = 1e-2
"""Relative error of the dual coordinate, over the whole vocabulary, up to which a row counts as certified."""


@dataclass
class SteerResult:
    """Steered states and their diagnostics, one row a state.

    Args:
        lam: Steered states ``[B, d]``, in the working dtype.
        t: Step along the direction as it was given ``[B]``: of the dual coordinate, or of the state in Euclidean
            steering.
        reached: Whether the solve converged and these states meet the target (:func:`ends_there`), bool ``[B]``.
        reason: Why each row stopped, ``converged`` exactly where it reached the target. A solve of a point: ``stalled``
            (rounding), ``max_iter``, ``budget`` (of products). A search for a step: ``unreachable`` (no step brings the
            goal within its two ends), ``rounding`` (none lies between the last two), ``max_search``.
        newton: Newton iterations ``[B]``.
        hvps: Hessian-vector products ``[B]``.
        probe_before: ``beta . lam`` at the start ``[B]``.
        probe_after: The same at the end ``[B]``.
        kl: ``KL(P_start || P_end)`` in nats, over the whole vocabulary ``[B]``.
        entropy_before: In nats ``[B]``.
        entropy_after: In nats ``[B]``.
        rel_resid: ``|phi_a(lam) - phi_a(lam0) - t beta| / (|t| |beta|)`` over the whole vocabulary ``[B]``; 0 where
            nothing moved, NaN for Euclidean steering.
        covered: Probability at the end that the support of the solve covers ``[B]``; 1 for the whole vocabulary.
        certified: Whether ``rel_resid`` is within the accepted error and the KL is a number, bool ``[B]``.
        alpha: Regularisation that was used.
    """

    lam: Tensor
    t: Tensor
    reached: Tensor
    reason: list[str]
    newton: Tensor
    hvps: Tensor
    probe_before: Tensor
    probe_after: Tensor
    kl: Tensor
    entropy_before: Tensor
    entropy_after: Tensor
    rel_resid: Tensor
    covered: Tensor
    certified: Tensor
    alpha: float

    def table(self) -> list[dict[str, Any]]:
        """One plain row a state, without the state itself."""
        columns = {name: value for name, value in vars(self).items() if name not in ("lam", "alpha")}
        plain = {k: v if isinstance(v, list) else v.tolist() for k, v in columns.items()}
        return [{name: plain[name][row] for name in plain} | {"alpha": self.alpha} for row in range(len(self.lam))]

    @classmethod
    def joined(cls, parts: Sequence[SteerResult]) -> Self:
        """One result of several, in order."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            pieces = [getattr(part, field.name) for part in parts]
            if field.name == "alpha":
                values["alpha"] = pieces[0]
            elif field.name == "reason":
                values["reason"] = [reason for piece in pieces for reason in piece]
            else:
                values[field.name] = torch.cat(pieces)
        return cls(**values)


def described(
    request: SteerRequest, point: NewtonResult, z: Tensor, t: Tensor, resid: Tensor, covered: Tensor
) -> SteerResult:
    """Diagnostics of steered states with the logits ``z`` ``[B, V]``; see :class:`SteerResult`."""
    beta, lam, geometry = request.beta, point.lam, request.geometry
    first, second = (geometry.capped(logits).log_softmax(-1) for logits in (request.z, z))
    change = geometry.logits_change(lam - request.lam)
    kl = geometry.kl_of_move(request.z, z, change)
    there = ends_there(request, lam, t, z, change, resid)
    said = zip(point.reasons(), there.tolist(), strict=True)
    return SteerResult(
        lam=lam,
        t=t,
        reached=point.converged & there,
        reason=["stalled" if name == "converged" and not ends else name for name, ends in said],
        newton=point.newton,
        hvps=point.hvps,
        probe_before=(beta * request.lam).sum(-1),
        probe_after=(beta * lam).sum(-1),
        kl=kl,
        entropy_before=entropy(first),
        entropy_after=entropy(second),
        rel_resid=resid,
        covered=covered,
        certified=(resid <= max(CERTIFIED, 10 * request.options.accepted(lam.dtype))) & kl.isfinite(),
        alpha=request.alpha,
    )


def ends_there(request: SteerRequest, lam: Tensor, t: Tensor, z: Tensor, change: Tensor, resid: Tensor) -> Tensor:
    """Whether states meet what was asked for ``[B]``, from the states alone and nothing that a solver says.

    A dual step may be off by ten times the accepted share, a probe value by that share of the move, a KL or odds by
    twice ``target_rtol`` (ten times for a walk in the state, as its line search does), and all by what the rounding of
    the states makes of it. NaN is False. ``z`` are the family's logits ``[B, V]``: a target is one without the cap.
    """
    options, goal = request.options, request.goal
    eps, beta = 64 * torch.finfo(lam.dtype).eps, request.beta
    ok: Tensor = lam.isfinite().all(-1) & t.isfinite()
    if request.kind == "t":
        walked = (lam - request.lam - t[:, None] * beta).norm(dim=-1)
        straight = walked <= eps * (lam.norm(dim=-1) + t.abs() * beta.norm(dim=-1))
        dual = 10 * options.accepted(lam.dtype) + eps * (1 + request.alpha * lam.norm(dim=-1) / beta.norm(dim=-1))
        ok &= (t == goal) & torch.where(resid.isnan(), straight, (t == 0) | (resid <= dual))
        return ok
    if request.kind == "probe_value":
        move = (goal - (beta * request.lam).sum(-1)).abs()
        rounded = eps * beta.norm(dim=-1) * (lam.norm(dim=-1) + request.lam.norm(dim=-1))
        accepted = options.accepted(lam.dtype) * move
        ok &= ((beta * lam).sum(-1) - goal).abs() <= accepted + rounded
        return ok
    slack = torch.where(resid.isnan(), 10.0, 2.0) * options.target_rtol
    if request.kind == "kl_budget":
        error = (divergence(request.z.log_softmax(-1), change) - goal).abs()
        slope = request.geometry.mean(z.softmax(-1) - request.z.softmax(-1))
        ok &= error <= slack * goal + torch.minimum(rounding(lam, slope), ROUNDED * goal)
        return ok
    base, target = request.concept()
    log_probs, wanted = z.log_softmax(-1), goal.logit()
    sides = [log_probs[:, ids].logsumexp(-1) for ids in (target, base)]
    size, error = wanted.abs().clamp_min(1.0), (sides[0] - sides[1] - wanted).abs()
    rounded = torch.minimum(eps * (1 + sides[0].abs() + sides[1].abs()), ROUNDED * size)
    ok &= error <= slack * size + rounded
    return ok
