"""The regularised dual curve of one direction from each of several states, and its points.

With ``phi_a(lam) = grad A(lam) + alpha lam`` the curve is ``phi_a(lam(t)) = phi_a(lam0) + t beta``. It is the
continuous limit of Algorithm 1 of arXiv 2602.15293, and each of its points minimises a strictly convex function, so
that none has to be reached by walking. ``alpha -> 0`` gives the dual steering of the paper's Theorem 3, a large
``alpha`` Euclidean steering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_interp.steering.softmax.newton import Family, NewtonResult, Potential, Tolerance, minimise, rows_of

__all__ = ["DualCurve", "SolverOptions"]


@dataclass(frozen=True)
class SolverOptions:
    """How exact a solve is.

    Args:
        rtol: Accepted error of the dual coordinate as a share of ``|t| |beta|``; by default 1e-3, in float64 1e-10.
        target_rtol: Accepted relative error of a target that is searched for (KL, odds of the concept).
        max_newton: Newton iterations at most.
        cg_max: Hessian-vector products of one iteration at most.
        hvp_budget: Products of one solve at most, or None.
        max_search: Solves of one search for a target at most.
    """

    rtol: float | None = None
    target_rtol: float = 1e-3
    max_newton: int = 100
    cg_max: int = 50
    hvp_budget: int | None = None
    max_search: int = 30

    def accepted(self, dtype: torch.dtype) -> float:
        """``rtol`` for a working dtype."""
        return self.rtol if self.rtol is not None else (1e-10 if dtype == torch.float64 else 1e-3)


@dataclass(frozen=True)
class DualCurve:
    """Curves ``phi_a(lam(t)) = phi_a(lam0) + t beta``, one a row.

    Args:
        family: Over the whole vocabulary or some of it.
        lam0: Starts ``[B, d]``.
        beta: Directions ``[B, d]``, as given (not normalised).
        z0: The family's logits at the starts ``[B, K]``.
        phi0: Dual coordinates of the starts in this family ``[B, d]``.
        alpha: Regularisation.
        options: How exact.
    """

    family: Family
    lam0: Tensor
    beta: Tensor
    z0: Tensor
    phi0: Tensor
    alpha: float
    options: SolverOptions

    @classmethod
    def of(
        cls, family: Family, lam0: Tensor, beta: Tensor, alpha: float, options: SolverOptions, z0: Tensor | None = None
    ) -> DualCurve:
        """The curves of a family; ``z0`` are its logits at the starts, where they are known."""
        z0 = family.logits(lam0) if z0 is None else z0
        return cls(family, lam0, beta, z0, family.mean(z0.softmax(-1)), alpha, options)

    def rows(self, index: Tensor) -> DualCurve:
        """The same for some of the rows."""
        taken = {name: getattr(self, name)[index] for name in ("lam0", "beta", "z0", "phi0")}
        return replace(self, family=rows_of(self.family, index), **taken)

    def point(self, t: Tensor, start: Tensor | None = None) -> NewtonResult:
        """The points at dual steps ``t`` ``[B]``: minima of ``A + alpha/2 |lam - lam0|^2 - (phi0 + t beta) . lam``."""
        potential = Potential(self.family, self.phi0 + t[:, None] * self.beta, self.lam0, self.alpha)
        accepted = self.options.accepted(self.lam0.dtype) * t.abs() * self.beta.norm(dim=-1)
        return self._minimise(potential, self.lam0 if start is None else start, accepted)

    def at_probe(self, c: Tensor, start: Tensor | None = None) -> tuple[NewtonResult, Tensor]:
        """The points at probe values ``beta . lam = c`` ``[B]``, and their dual steps: minima on a hyperplane."""
        length = self.beta.norm(dim=-1, keepdim=True)
        normal = self.beta / length
        base = self.lam0 if start is None else start
        onto = base + normal * ((c - (self.beta * base).sum(-1)) / length[:, 0])[:, None]
        potential = Potential(self.family, self.phi0, self.lam0, self.alpha, normal)
        accepted = self.options.accepted(base.dtype)  # at the minimum the gradient is t beta
        found = self._minimise(potential, onto, lambda gradient: accepted * gradient.norm(dim=-1))
        return found, (found.gradient * self.beta).sum(-1) / length[:, 0].square()

    def tangent(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``d lam / d t = (H + alpha I)^-1 beta`` at points of the curves by their logits, and the products it took."""
        p = z.softmax(-1)
        potential = Potential(self.family, self.phi0, self.lam0, self.alpha)
        accepted = 0.05 * self.beta.norm(dim=-1)
        return potential.solve(p, self.beta, tolerance=accepted, max_iterations=self.options.cg_max)

    def _minimise(self, potential: Potential, start: Tensor, tolerance: Tolerance) -> NewtonResult:
        options = self.options
        return minimise(potential, start, tolerance, options.max_newton, options.cg_max, options.hvp_budget)
