"""The regularised dual curve of one direction from each of several states, its points, and the search for one of them.

With ``phi_a(lam) = grad A(lam) + alpha lam`` the curve is ``phi_a(lam(t)) = phi_a(lam0) + t beta``. It is the
continuous limit of Algorithm 1 of arXiv 2602.15293, and each of its points minimises a strictly convex function, so
that none has to be reached by walking. ``alpha -> 0`` gives the dual steering of the paper's Theorem 3, a large
``alpha`` Euclidean steering.

A KL budget and odds of a concept are searched for. Both go one way along the curve (the penalised cost provably grows,
the odds do in practice, or fall where the direction points away from the concept), so the step is found by Newton's
method on the step, kept inside a bracket. The curve's tangent, one linear solve, gives the slope and the first guess of
the next point at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import ROUNDED, divergence, rounding
from lightning_interp.steering.softmax.newton import (
    REASONS,
    Family,
    NewtonResult,
    Potential,
    Tolerance,
    minimise,
    rows_of,
)

__all__ = ["DualCurve", "KlMeasure", "Measure", "OddsMeasure", "SearchResult", "SolverOptions", "search_step"]


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


_GROWTH, _EXPANSIONS = 8.0, 10
_NATS = 64.0
"""Logits by which the first step of a search moves a token at most, against the others."""
_FAR = 2.0
"""Logarithm of a factor by which the root of a KL is far off."""
_UNREACHABLE, _ROUNDING, _MAX_SEARCH = (REASONS.index(name) for name in ("unreachable", "rounding", "max_search"))


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
        root = divergence(curve.z0.log_softmax(-1), change).sqrt()
        tiny = torch.finfo(root.dtype).tiny
        slope = (curve.family.mean(z.softmax(-1)) - curve.phi0) / (2 * root[:, None]).clamp_min(tiny)
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

    def at(self, curve: DualCurve, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``[B]`` and gradient ``[B, d]``, as above."""
        base, target = z.masked_fill(~self.base, -torch.inf), z.masked_fill(~self.target, -torch.inf)
        slope = curve.family.mean(target.softmax(-1) - base.softmax(-1))
        return target.logsumexp(-1) - base.logsumexp(-1), slope


Measure = KlMeasure | OddsMeasure


@dataclass
class SearchResult:
    """Points at which a measure meets its goal (or why not), one row each, and their dual steps ``[B]``."""

    point: NewtonResult
    t: Tensor


def search_step(
    curve: DualCurve, measure: Measure, goal: Tensor, *, accepted: Tensor, warm: tuple[Tensor, Tensor] | None = None
) -> SearchResult:
    """Find the points of curves where a measure has its goal ``[B]``; a row out of reach has the nearest, and says why.

    ``accepted`` are absolute errors ``[B]``, ``warm`` a point ``[B, d]`` and its step where a coarser search ended.
    """
    search = _Search(curve, measure, goal, accepted)
    if warm is not None and len(search.rows):
        search.resume(warm[1][search.rows], warm[0][search.rows])
    for _ in range(curve.options.max_search):
        if not len(search.rows):
            break
        search.advance()
    return search.finish()


class _Search:
    """Rows that look for their step; a row that has found it leaves."""

    def __init__(self, curve: DualCurve, measure: Measure, goal: Tensor, accepted: Tensor) -> None:
        self.curve, self.measure, self.goal, self.accepted = curve, measure, goal, accepted
        lam0 = curve.lam0
        self.rows = torch.arange(len(lam0), device=lam0.device)
        self.best = NewtonResult.empty(lam0)
        self.best.reason[:] = 0
        self.t, self.lam, self.z = torch.zeros_like(goal), lam0.clone(), curve.z0
        self.value, self.slope = measure.start(curve)
        self.sign, self.back = torch.ones_like(goal), torch.zeros_like(goal, dtype=torch.bool)
        self.low, self.high = torch.full_like(goal, -torch.inf), torch.full_like(goal, torch.inf)
        self.best_t, self.best_error, self.met = torch.zeros_like(goal), (self.value - goal).abs(), goal != goal
        self.hvps, self.newton = self.best.hvps.clone(), self.best.newton.clone()
        self.ended, self.moves = torch.full_like(self.hvps, _MAX_SEARCH), torch.zeros_like(self.hvps)
        self._bracket()
        self.met = self._near()
        self._leave(self.met)

    def advance(self) -> None:
        """Propose a step from slope and bracket, solve there, and look."""
        ahead, used = self.curve.tangent(self.z)
        self.hvps[self.rows] += used
        if self.measure.turns:
            self._turn((self.t == 0) & ~self.back & ((self.slope * ahead).sum(-1) < -self._noise(ahead)))
        step = self._proposed(ahead)
        self.move(step, self.lam + (step - self.t)[:, None] * ahead)

    def resume(self, step: Tensor, guess: Tensor) -> None:
        """Go on from where a coarser search ended."""
        if self.measure.turns:
            self._turn((self.goal - self.value) * step < 0)
        self.move(step, guess)

    def _turn(self, falling: Tensor) -> None:
        """Where the measure falls along the curve, look for its negative, which grows."""
        flip = torch.where(falling, -1.0, 1.0).to(self.goal)
        self.sign, self.goal, self.value = self.sign * flip, self.goal * flip, self.value * flip
        self.slope = self.slope * flip[:, None]
        self.low = torch.where(falling, -torch.inf, self.low)
        self.high = torch.where(falling, torch.inf, self.high)
        self._bracket()

    def _turn_back(self, rows: Tensor) -> None:
        """Begin again on the other side: at the start a measure may go another way than farther out."""
        self.back, self.moves[self.rows[rows]] = self.back | rows, 0
        self.t = torch.where(rows, 0, self.t)
        self.lam = torch.where(rows[:, None], self.curve.lam0, self.lam)
        self.z = torch.where(rows[:, None], self.curve.z0, self.z)
        self._look()
        self._turn(rows)

    def move(self, step: Tensor, guess: Tensor) -> None:
        """Solve at a step, look, and let rows go that are there or cannot get there."""
        found = self.curve.point(step, guess)
        self.t, self.lam, self.z = step, found.lam, found.z
        self.hvps[self.rows] += found.hvps
        self.newton[self.rows] += found.newton
        self._look()
        self._bracket()
        near = self._near()
        self._remember(found, near)
        self.moves[self.rows] += 1
        bounded = self.low.isfinite() & self.high.isfinite()
        narrow = 4 * torch.finfo(step.dtype).eps * torch.maximum(self.high.abs(), self.low.abs())
        tight = bounded & (self.high - self.low <= narrow)
        lost = ~bounded & (self.moves[self.rows] >= _EXPANSIONS)
        if self.measure.turns and bool((again := lost & ~self.back).any()):
            self._turn_back(again)
            lost = lost & ~again
        if hasattr(self.curve.family, "curvature"):  # a support too small to solve on: a larger one comes next
            lost = lost | ~found.converged
        self.ended[self.rows[tight]], self.ended[self.rows[lost]] = _ROUNDING, _UNREACHABLE
        self._leave((near & found.converged) | tight | lost)

    def _proposed(self, ahead: Tensor) -> Tensor:
        rise = (self.slope * ahead).sum(-1)
        first, most = self._first(ahead, rise)
        rise = torch.where(self.t == 0, first, rise)
        newton = self.t + (self.goal - self.value) / rise
        if isinstance(self.measure, KlMeasure):
            newton = torch.where(self.t == 0, newton.minimum(most), self._by_factors(newton, rise))
        edge, away = torch.where(self.value < self.goal, self.low, self.high), torch.sign(self.goal - self.value)
        reach = torch.where(edge == 0, torch.full_like(edge, torch.inf), _GROWTH * edge.abs())
        newton = torch.minimum(torch.maximum(newton, self.t - reach), self.t + reach)
        bounded = self.low.isfinite() & self.high.isfinite()
        wider = edge + away * torch.where(edge == 0, torch.ones_like(edge), _GROWTH * edge.abs())
        elsewhere = torch.where(bounded, _between(self.low, self.high), wider)
        usable = newton.isfinite() & (rise > self._noise(ahead)) & (newton > self.low) & (newton < self.high)
        return torch.where(usable, newton, elsewhere)

    def _noise(self, ahead: Tensor) -> Tensor:
        """Rounding of the slope along the curve."""
        size: Tensor = 8 * torch.finfo(ahead.dtype).eps * self.slope.norm(dim=-1) * ahead.norm(dim=-1)
        return size

    def _by_factors(self, newton: Tensor, rise: Tensor) -> Tensor:
        """Newton's step on the logarithm, where the root of the KL is far off and so may grow like an exponential."""
        factor = (self.goal / self.value).log()
        step = self.t + self.value * factor / rise
        far = (factor.abs() > _FAR) & (step > self.low) & (step < self.high)
        return torch.where(far & factor.isfinite(), step, newton)

    def _first(self, ahead: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
        """How the measure rises at the start, and the longest step there.

        The root of the KL grows by half the tangent's Fisher length squared, under the root; where one token is nearly
        certain that is nearly nothing, and the step that it asks for endless.
        """
        if not isinstance(self.measure, KlMeasure):
            return rise, torch.full_like(rise, torch.inf)
        p = self.z.softmax(-1)
        u = self.curve.family.logits_change(ahead)
        u = u - (p * u).sum(-1, keepdim=True)
        return (0.5 * (p * u.square()).sum(-1)).sqrt(), _NATS / u.abs().amax(-1)

    def _look(self) -> None:
        value, slope = self.measure.at(self.curve, self.z, self.lam)
        self.value, self.slope = self.sign * value, self.sign[:, None] * slope

    def _bracket(self) -> None:
        below = self.value < self.goal
        self.low = torch.where(below, torch.maximum(self.low, self.t), self.low)
        self.high = torch.where(below, self.high, torch.minimum(self.high, self.t))

    def _near(self) -> Tensor:
        """Whether rows are at their goal, as closely as a state of this dtype can be."""
        most = ROUNDED / self.curve.options.target_rtol * self.accepted
        near: Tensor = (self.value - self.goal).abs() <= self.accepted + rounding(self.lam, self.slope).minimum(most)
        return near

    def _remember(self, found: NewtonResult, near: Tensor) -> None:
        error = (self.value - self.goal).abs()
        closer = ((error < self.best_error[self.rows]) & found.lam.isfinite().all(-1)).nonzero().flatten()
        rows = self.rows[closer]
        self.best.put(rows, found, closer)
        self.best_t[rows], self.best_error[rows], self.met[rows] = self.t[closer], error[closer], near[closer]

    def _leave(self, done: Tensor) -> None:
        if not bool(done.any()):
            return
        keep = (~done).nonzero().flatten()
        for name in ("rows", "t", "lam", "z", "value", "slope", "low", "high", "goal", "accepted", "sign", "back"):
            setattr(self, name, getattr(self, name)[keep])
        if len(keep):
            self.curve, self.measure = self.curve.rows(keep), rows_of(self.measure, keep)

    def finish(self) -> SearchResult:
        missed = self.best.converged & ~self.met
        self.best.reason = torch.where(missed, self.ended, self.best.reason)
        self.best.hvps, self.best.newton = self.hvps, self.newton
        return SearchResult(self.best, self.best_t)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Halve a bracket: by ratio where its ends are far apart, so that steps of any size are found soon."""
    small, large = torch.minimum(low.abs(), high.abs()), torch.maximum(low.abs(), high.abs())
    ratio = torch.where(high <= 0, -1.0, 1.0).to(low) * (small.clamp_min(large / _GROWTH**2) * large).sqrt()
    return torch.where((low * high >= 0) & (large > 2 * small), ratio, 0.5 * (low + high))
