"""What a steering solve found, one row a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from lightning_interp.steering.softmax.geometry import divergence, entropy
from lightning_interp.steering.softmax.newton import NewtonResult
from lightning_interp.steering.softmax.request import SteerRequest

__all__ = ["SteerResult", "described"]

CERTIFIED = 1e-2
"""Relative error of the dual coordinate, over the whole vocabulary, up to which a row counts as certified."""


@dataclass
class SteerResult:
    """Steered states and their diagnostics, one row a state.

    Args:
        lam: Steered states ``[B, d]``, in the working dtype.
        t: Step along the direction as it was given, ``[B]``: of the dual coordinate for dual steering, of the state for
            Euclidean steering.
        reached: Whether the target was met and the solve converged, bool ``[B]``.
        reason: Why each row stopped: ``converged``, ``stalled``, ``max_iter``, ``budget`` or ``unreachable``.
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
        certified: Whether ``rel_resid`` is within the accepted error, bool ``[B]``.
        alpha: Regularisation that was used.
    """

    lam: torch.Tensor
    t: torch.Tensor
    reached: torch.Tensor
    reason: list[str]
    newton: torch.Tensor
    hvps: torch.Tensor
    probe_before: torch.Tensor
    probe_after: torch.Tensor
    kl: torch.Tensor
    entropy_before: torch.Tensor
    entropy_after: torch.Tensor
    rel_resid: torch.Tensor
    covered: torch.Tensor
    certified: torch.Tensor
    alpha: float

    def table(self) -> list[dict[str, Any]]:
        """One plain row a state, without the state itself."""
        names = [field.name for field in fields(self) if field.name not in ("lam", "alpha")]
        columns = {name: getattr(self, name) for name in names}
        plain = {k: v if isinstance(v, list) else v.tolist() for k, v in columns.items()}
        return [{name: plain[name][row] for name in names} | {"alpha": self.alpha} for row in range(len(self.lam))]

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
    request: SteerRequest,
    point: NewtonResult,
    z: torch.Tensor,
    t: torch.Tensor,
    met: torch.Tensor,
    resid: torch.Tensor,
    covered: torch.Tensor,
) -> SteerResult:
    """Diagnostics of steered states over the whole vocabulary.

    Args:
        request: What was asked for.
        point: The steered states and what they took.
        z: Logits of the steered states ``[B, V]``.
        t: Steps ``[B]``.
        met: Whether the target is met ``[B]``.
        resid: Relative error of the dual coordinate ``[B]``.
        covered: Probability that the support covers ``[B]``.
    """
    beta, lam = request.beta, point.lam
    first, second = (request.geometry.capped(logits).log_softmax(-1) for logits in (request.z, z))
    reason = [
        "unreachable" if name == "converged" and not ok else name
        for name, ok in zip(point.reasons(), met.tolist(), strict=True)
    ]
    return SteerResult(
        lam=lam,
        t=t,
        reached=met,
        reason=reason,
        newton=point.newton,
        hvps=point.hvps,
        probe_before=(beta * request.lam).sum(-1),
        probe_after=(beta * lam).sum(-1),
        kl=divergence(first, second),
        entropy_before=entropy(first),
        entropy_after=entropy(second),
        rel_resid=resid,
        covered=covered,
        certified=resid <= max(CERTIFIED, 10 * request.options.accepted(lam.dtype)),
        alpha=request.alpha,
    )
