"""The regularised dual curve of one direction from each of several states, its points, and what is measured there.

With ``phi_a(lam) = grad A(lam) + alpha lam`` the curve is ``phi_a(lam(t)) = phi_a(lam0) + t beta``. It is the
continuous limit of Algorithm 1 of arXiv 2602.15293, and each of its points minimises a strictly convex function, so
that none has to be reached by walking. ``alpha -> 0`` gives the dual steering of the paper's Theorem 3, a large
``alpha`` Euclidean steering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import divergence, moved_probs
from lightning_interp.steering.softmax.newton import Family, NewtonResult, Potential, Tolerance, minimise, rows_of

__all__ = ["DualCurve", "KlMeasure", "Measure", "OddsMeasure", "SolverOptions"]


@dataclass(frozen=True)
class SolverOptions:
    """How exact a solve is.

    Args:
        rtol: Accepted error of the dual coordinate as a share of ``|t| |beta|``; by default 1e-3, in float64 1e-10.
        target_rtol: Accepted relative error of a target that is searched for (KL, odds of the concept).
        max_newton: Newton iterations at most.
        cg_max: Hessian-vector products of one iteration at most.
        hvp_budget: Products of one solve at most, or None.
        max_search: Solves of one search for a target at most; odds that are not met on the way of their slope are
            looked for on both sides of the start after that, with a hundred more.
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


@dataclass(frozen=True)
class KlMeasure:
    """Square root of ``KL(P_start || P_lam)``: nearly linear in a short step, and never falling along a curve.

    Of ``fine`` rows, bool ``[B]``, the logits' change is made anew: what logits are rounded by is too much for them.
    """

    fine: Tensor | None
    turns: ClassVar[bool] = False

    @classmethod
    def within(cls, z0: Tensor, accepted: Tensor) -> KlMeasure:
        """Exact to a quarter of ``accepted`` ``[B]`` from starts with the logits ``z0``."""
        noise = 8 * torch.finfo(z0.dtype).eps * z0.nan_to_num(neginf=0.0).abs().amax(dim=-1)
        fine = noise > 0.25 * accepted
        return cls(fine if bool(fine.any()) else None)

    def rows(self, index: Tensor) -> KlMeasure:
        """The same for some of the rows."""
        return self if self.fine is None else KlMeasure(self.fine[index])

    def start(self, curve: DualCurve) -> tuple[Tensor, Tensor]:
        """Value and gradient at the start."""
        return curve.lam0.new_zeros(len(curve.lam0)), torch.zeros_like(curve.lam0)

    def at(self, curve: DualCurve, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``[B]`` and gradient ``[B, d]`` at ``lam`` with the family's logits ``z``."""
        change = torch.where(curve.z0.isfinite(), z - curve.z0, 0.0)
        if self.fine is not None:
            change = torch.where(self.fine[:, None], curve.family.logits_change(lam - curve.lam0), change)
        first = curve.z0.log_softmax(-1)
        kl, tiny = divergence(first, change), torch.finfo(change.dtype).tiny
        root = kl.sqrt()
        slope = curve.family.mean(moved_probs(first, change, kl)) / (2 * root[:, None]).clamp_min(tiny)
        return root, slope * (root > 0)[:, None]


@dataclass(frozen=True)
class OddsMeasure:
    """Log odds of two sets of columns, bool ``[K]`` or ``[B, K]``; as they may fall, steps against count too."""

    base: Tensor
    target: Tensor
    turns: ClassVar[bool] = True

    def rows(self, index: Tensor) -> OddsMeasure:
        """The same for some of the rows."""
        return self if self.base.dim() == 1 else OddsMeasure(self.base[index], self.target[index])

    def start(self, curve: DualCurve) -> tuple[Tensor, Tensor]:
        """Value and gradient at the start."""
        return self.at(curve, curve.z0, curve.lam0)

    def value(self, z: Tensor) -> Tensor:
        """Value ``[B]`` at logits ``[B, K]``."""
        base, target = z.masked_fill(~self.base, -torch.inf), z.masked_fill(~self.target, -torch.inf)
        return target.logsumexp(-1) - base.logsumexp(-1)

    def moved(self, z: Tensor) -> Tensor:
        """Their derivatives by the logits, ``[B, K]``."""
        base, target = z.masked_fill(~self.base, -torch.inf), z.masked_fill(~self.target, -torch.inf)
        return target.softmax(-1) - base.softmax(-1)

    def at(self, curve: DualCurve, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``[B]`` and gradient ``[B, d]``, as above."""
        return self.value(z), curve.family.mean(self.moved(z))


Measure = KlMeasure | OddsMeasure
