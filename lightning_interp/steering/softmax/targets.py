"""Finding the dual step at which something else than the step is reached: a KL budget, or odds of a concept.

Both grow along the curve (the penalised cost provably, the odds in practice), so the step is found by Newton's method
on the step, kept inside a bracket. The curve's tangent, one linear solve, gives the slope and the first guess of the
next point at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_interp.steering.softmax.curve import DualCurve
from lightning_interp.steering.softmax.geometry import divergence
from lightning_interp.steering.softmax.newton import NewtonResult

_GROWTH, _EXPANSIONS = 8.0, 10
__all__ = ["KlMeasure", "Measure", "OddsMeasure", "SearchResult", "search_step"]


class Measure(Protocol):
    """A number of a state, and its gradient; rows are those of the curve."""

    def at(self, curve: DualCurve, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value ``[B]`` and gradient ``[B, d]`` where the family's logits are ``z`` ``[B, K]``."""


class KlMeasure:
    """Square root of ``KL(P_start || P_lam)``: nearly linear in the step where the step is short."""

    def at(self, curve: DualCurve, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Measure`. At the start the gradient is that of the Fisher length along the tangent."""
        first = curve.z0.log_softmax(-1)
        root = divergence(first, z.log_softmax(-1)).sqrt()
        slope = (curve.family.mean(z.softmax(-1)) - curve.phi0) / (2 * root[:, None]).clamp_min(1e-12)
        return root, slope


@dataclass(frozen=True)
class OddsMeasure:
    """Log odds of two sets of tokens, ``log p(target) - log p(base)``.

    Args:
        base: Columns of the family that hold base tokens, bool ``[K]`` or ``[B, K]``.
        target: The same for target tokens.
    """

    base: torch.Tensor
    target: torch.Tensor

    def rows(self, index: torch.Tensor) -> OddsMeasure:
        """The same for some of the rows."""
        return self if self.base.dim() == 1 else OddsMeasure(self.base[index], self.target[index])

    def at(self, curve: DualCurve, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Measure`."""
        base, target = z.masked_fill(~self.base, -torch.inf), z.masked_fill(~self.target, -torch.inf)
        slope = curve.family.mean(target.softmax(-1) - base.softmax(-1))
        return target.logsumexp(-1) - base.logsumexp(-1), slope


@dataclass
class SearchResult:
    """Points at which a measure meets its goal, one row each.

    Args:
        point: The points.
        t: Dual steps ``[B]``.
        value: The measure there ``[B]``.
        met: Whether it is the goal, within the accepted error, bool ``[B]``.
    """

    point: NewtonResult
    t: torch.Tensor
    value: torch.Tensor
    met: torch.Tensor


def search_step(
    curve: DualCurve,
    measure: Measure,
    goal: torch.Tensor,
    *,
    accepted: torch.Tensor,
    warm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SearchResult:
    """Find the points of curves where a measure has a value.

    Args:
        curve: One curve a row.
        measure: What is to be reached.
        goal: Values ``[B]``.
        accepted: Accepted absolute errors ``[B]``.
        warm: A point ``[B, d]`` near the curve and its step ``[B]``, where a coarser search ended.

    Returns:
        The points; a row that cannot reach its goal has the nearest point that was seen, and ``met`` False.
    """
    search = _Search(curve, measure, goal, accepted)
    if warm is not None:
        search.move(warm[1], warm[0])
    for _ in range(curve.options.max_search):
        if not len(search.rows):
            break
        search.advance()
    return search.finish()


class _Search:
    """Rows that look for their step; a row that has found it leaves."""

    def __init__(self, curve: DualCurve, measure: Measure, goal: torch.Tensor, accepted: torch.Tensor) -> None:
        self.curve, self.measure, self.goal, self.accepted = curve, measure, goal, accepted
        self.goals, self.allowed = goal, accepted
        lam0 = curve.lam0
        self.rows = torch.arange(len(lam0), device=lam0.device)
        self.best = NewtonResult.empty(lam0)
        self.best.reason[:] = 0
        self.t, self.lam, self.z = torch.zeros_like(goal), lam0.clone(), curve.z0
        self.value, self.slope = measure.at(curve, self.z)
        self.low, self.high = torch.full_like(goal, -torch.inf), torch.full_like(goal, torch.inf)
        self.best_t, self.best_value = torch.zeros_like(goal), self.value.clone()
        self.hvps, self.newton = self.best.hvps.clone(), self.best.newton.clone()
        self.moves = torch.zeros_like(self.hvps)
        self._bracket()
        self._leave((self.value - self.goal).abs() <= self.accepted)

    def advance(self) -> None:
        """Propose a step from slope and bracket, solve there, and look."""
        ahead, used = self.curve.tangent(self.z)
        self.hvps[self.rows] += used
        step = self._proposed(ahead)
        self.move(step, self.lam + (step - self.t)[:, None] * ahead)

    def move(self, step: torch.Tensor, guess: torch.Tensor) -> None:
        """Solve at a step, look, and let rows go that are there or cannot get there."""
        if len(self.rows) != len(step):  # a warm start names all rows, also those that have left
            step, guess = step[self.rows], guess[self.rows]
        found = self.curve.point(step, guess)
        self.t, self.lam, self.z = step, found.lam, found.z
        self.hvps[self.rows] += found.hvps
        self.newton[self.rows] += found.newton
        self.value, self.slope = self.measure.at(self.curve, self.z)
        self._bracket()
        self._remember(found)
        near = (self.value - self.goal).abs() <= self.accepted
        self.moves[self.rows] += 1
        bounded = self.low.isfinite() & self.high.isfinite()
        tight = bounded & (self.high - self.low <= 1e-7 * torch.maximum(self.high.abs(), self.low.abs()))
        lost = ~bounded & (self.moves[self.rows] >= _EXPANSIONS)
        if hasattr(self.curve.family, "curvature"):  # a support too small to solve on: a larger one comes next
            lost = lost | ~found.converged
        self._leave((near & found.converged) | tight | lost)

    def _proposed(self, ahead: torch.Tensor) -> torch.Tensor:
        rise = (self.slope * ahead).sum(-1)
        rise = torch.where(self.t == 0, self._first_rise(ahead, rise), rise)
        newton = self.t + (self.goal - self.value) / rise
        edge, away = torch.where(self.value < self.goal, self.low, self.high), torch.sign(self.goal - self.value)
        reach = torch.where(edge == 0, torch.full_like(edge, torch.inf), _GROWTH * edge.abs())
        newton = torch.minimum(torch.maximum(newton, self.t - reach), self.t + reach)
        bounded = self.low.isfinite() & self.high.isfinite()
        wider = edge + away * torch.where(edge == 0, torch.ones_like(edge), _GROWTH * edge.abs())
        elsewhere = torch.where(bounded, 0.5 * (self.low + self.high), wider)
        usable = newton.isfinite() & (rise > 0) & (newton > self.low) & (newton < self.high)
        return torch.where(usable, newton, elsewhere)

    def _first_rise(self, ahead: torch.Tensor, rise: torch.Tensor) -> torch.Tensor:
        """At the start the root of the KL grows by half the tangent's Fisher length squared, under the root."""
        if not isinstance(self.measure, KlMeasure):
            return rise
        p = self.z.softmax(-1)
        u = self.curve.family.logits_change(ahead)
        variance = (p * (u - (p * u).sum(-1, keepdim=True)).square()).sum(-1)
        return (0.5 * variance).sqrt()

    def _bracket(self) -> None:
        below = self.value < self.goal
        self.low = torch.where(below, torch.maximum(self.low, self.t), self.low)
        self.high = torch.where(below, self.high, torch.minimum(self.high, self.t))

    def _remember(self, found: NewtonResult) -> None:
        closer = (self.value - self.goal).abs() < (self.best_value[self.rows] - self.goal).abs()
        closer = (closer & found.lam.isfinite().all(-1)).nonzero().flatten()
        rows = self.rows[closer]
        self.best.put(rows, found, closer)
        self.best_t[rows], self.best_value[rows] = self.t[closer], self.value[closer]

    def _leave(self, done: torch.Tensor) -> None:
        if not bool(done.any()):
            return
        keep = (~done).nonzero().flatten()
        for name in ("rows", "t", "lam", "z", "value", "slope", "low", "high", "goal", "accepted"):
            setattr(self, name, getattr(self, name)[keep])
        if len(keep):
            self.curve = self.curve.rows(keep)
            take = getattr(self.measure, "rows", None)
            self.measure = self.measure if take is None else take(keep)

    def finish(self) -> SearchResult:
        met = ((self.best_value - self.goals).abs() <= self.allowed) & self.best.converged
        self.best.hvps, self.best.newton = self.hvps, self.newton
        return SearchResult(self.best, self.best_t, self.best_value, met)
