"""The search for a point of the dual curve by what is measured there.

A KL budget and odds of a concept are searched for. Both mostly go one way along the curve (the penalised cost provably
grows, the odds fall where the direction points away from the concept), so the step is found by Newton's method on the
step, kept inside a bracket. The curve's tangent, one linear solve, gives the slope and the first guess of the next
point at once. Odds may turn, so where that ends without them, the curve is looked at on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import ROUNDED, rounding
from lightning_interp.steering.softmax.curve import DualCurve, KlMeasure, Measure, OddsMeasure
from lightning_interp.steering.softmax.newton import REASONS, Family, NewtonResult, rows_of
from lightning_interp.steering.softmax.turning import Sides, bracket

__all__ = ["SearchResult", "search_step"]

_GROWTH, _EXPANSIONS = 8.0, 10
_NATS = 64.0
"""Logits by which the first step of a search moves a token at most, against the others."""
_FAR = 2.0
"""Logarithm of a factor by which the root of a KL is far off."""
_UNREACHABLE, _ROUNDING, _MAX_SEARCH = (REASONS.index(name) for name in ("unreachable", "rounding", "max_search"))


@dataclass
class SearchResult:
    """Points at which a measure meets its goal (or why not), one row each, and their dual steps ``[B]``."""

    point: NewtonResult
    t: Tensor


def search_step(
    curve: DualCurve, measure: Measure, goal: Tensor, *, accepted: Tensor, warm: tuple[Tensor, Tensor] | None = None
) -> SearchResult:
    """Find points of curves where a measure has its goal ``[B]``; a row out of reach has the nearest, and says why.

    Of several such points it is one. ``accepted`` are absolute errors ``[B]``, ``warm`` a point ``[B, d]`` and its step
    where a coarser search ended.
    """
    search = _Search(curve, measure, goal, accepted)
    if warm is not None and len(search.rows):
        search.resume(warm[1][search.rows], warm[0][search.rows])
    found = search.run()
    lost = (~search.met & (search.ended != _MAX_SEARCH) & search.best_error.isfinite()).nonzero().flatten()
    if isinstance(measure, OddsMeasure) and len(lost) and not _is_part(curve.family):
        again = _looked_for(curve.rows(lost), measure.rows(lost), goal[lost], accepted[lost])
        again.point.hvps += found.point.hvps[lost]
        again.point.newton += found.point.newton[lost]
        found.point.put(lost, again.point, torch.arange(len(lost), device=lost.device))
        found.t[lost] = again.t
    return found


def _is_part(family: Family) -> bool:
    """Whether the curvature is that of a support, which may be too small to solve on: a larger one comes next."""
    return hasattr(family, "curvature")


def _looked_for(curve: DualCurve, measure: OddsMeasure, goal: Tensor, accepted: Tensor) -> SearchResult:
    """Look for odds on both sides of the start; where they never come, the nearest that are."""
    search, sides = _Search(curve, measure, goal, accepted), Sides(curve, measure)
    low, high, falls, met = bracket(sides.look, goal, sides.steps(goal - search.value), 0.1 * accepted)
    search.between(low, high, falls, sides.warm(low))
    found = search.run()
    found.point.hvps += sides.hvps
    found.point.newton += sides.newton
    missed = ~met & (found.point.reason == _ROUNDING)
    found.point.reason = torch.where(missed, _UNREACHABLE, found.point.reason)
    return found


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
        self.sign = torch.ones_like(goal)
        self.low, self.high = torch.full_like(goal, -torch.inf), torch.full_like(goal, torch.inf)
        self.best_t, self.best_error, self.met = torch.zeros_like(goal), (self.value - goal).abs(), goal != goal
        self.hvps, self.newton = self.best.hvps.clone(), self.best.newton.clone()
        self.ended, self.moves = torch.full_like(self.hvps, _MAX_SEARCH), torch.zeros_like(self.hvps)
        self._bracket()
        self.met = self._near()
        self._leave(self.met)

    def run(self) -> SearchResult:
        """Go on until all rows are done, or the search is."""
        for _ in range(self.curve.options.max_search):
            if not len(self.rows):
                break
            self.advance()
        return self.finish()

    def advance(self) -> None:
        """Propose a step from slope and bracket, solve there, and look."""
        ahead, used = self.curve.tangent(self.z)
        self.hvps[self.rows] += used
        if self.measure.turns:
            self._turn((self.t == 0) & ((self.slope * ahead).sum(-1) < -self._noise(ahead)))
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

    def between(self, low: Tensor, high: Tensor, falls: Tensor, guess: Tensor) -> None:
        """Go on between two steps."""
        self._turn(falls)
        self.low, self.high = low, high
        self.move(_between(low, high), guess)

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
        if not self.measure.turns:
            lost = lost & (self.value == 0)  # a KL that grows at all goes on growing
        if _is_part(self.curve.family):
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
        for name in ("rows", "t", "lam", "z", "value", "slope", "low", "high", "goal", "accepted", "sign"):
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
