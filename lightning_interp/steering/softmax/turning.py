"""Where odds, which may rise and fall along the dual curve or a line, have a value or come closest to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import divergence
from lightning_interp.steering.softmax.curve import DualCurve, OddsMeasure

__all__ = ["FIRST", "MORE", "Sides", "bracket", "rise_far_out", "steps_outwards"]

_FACTOR, _POINTS, _ROUNDS = 2.0, 48, 16  # of the steps on either side, and of the closer looks
FIRST, MORE = 0.1, 50.0  # logits by which the first step moves the odds at most, and the last one more than asked
_FLAT = 1e-3  # share of a direction's reach below which two tokens are pushed alike
Look = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def steps_outwards(first: Tensor, last: Tensor) -> Tensor:
    """Steps ``[n, B]`` from ``-last`` over 0 to ``last``, on either side by equal factors from ``first`` on."""
    factor = (last / first).nan_to_num(1.0, posinf=1.0).clamp(1.0, _FACTOR**_POINTS)
    count = min(_POINTS, 2 + int(factor.amax().log() / torch.tensor(_FACTOR).log()))
    out = first * factor ** torch.linspace(0, 1, count).to(first)[:, None]
    return torch.cat([-out.flip(0), torch.zeros_like(out[:1]), out])


def rise_far_out(push: Tensor, odds: OddsMeasure) -> Tensor:
    """How fast odds change a step far out on either side at least, where logits change by ``push`` ``[B, K]``."""
    ends = [
        [(sign * push).masked_fill(~side, -torch.inf).amax(-1) for side in (odds.base, odds.target)] for sign in (1, -1)
    ]
    width = (push.amax(-1) - push.amin(-1)).clamp_min(torch.finfo(push.dtype).tiny)
    return torch.stack([(target - base).abs() for base, target in ends]).amin(0).maximum(_FLAT * width)


def bracket(look: Look, goal: Tensor, steps: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two steps ``[B]`` with the goal between them, or one twice where it comes closest; whether it falls, and is met.

    ``look`` gives the number, its slope and its cost at steps ``[B]``. Of several places the one that costs least is
    taken; what differs by less than ``accepted`` is equally close. ``steps`` ``[n, B]`` grow; where none has the goal
    beside it, it is looked for where the tangents at two neighbours meet deepest.
    """
    seen = torch.empty(3, *steps.shape, dtype=steps.dtype, device=steps.device)
    for row in steps.abs().amax(-1).argsort().tolist():  # outwards, so that a look may begin at the one before
        seen[:, row] = torch.stack(look(steps[row]))
    for _ in range(_ROUNDS):
        gap = (seen[0] - goal).nan_to_num(torch.inf)
        new, deep = _deepest(steps, gap, seen[1])
        if bool(((gap[:-1] * gap[1:] <= 0).any(0) | (deep > gap.abs().amin(0) - accepted)).all()):
            break
        order = torch.cat([steps, new[None]]).argsort(0)
        steps = torch.cat([steps, new[None]]).gather(0, order)
        seen = torch.cat([seen, torch.stack(look(new))[:, None]], 1).gather(1, order.expand(3, -1, -1))
    gap, cost = (seen[0] - goal).nan_to_num(torch.inf), seen[2]
    share = (gap[:-1] / (gap[:-1] - gap[1:])).nan_to_num(0.5)
    between = torch.where(gap[:-1] * gap[1:] <= 0, cost[:-1] + share * (cost[1:] - cost[:-1]), torch.inf)
    best = torch.where(gap.abs() <= gap.abs().amin(0) + accepted, cost, torch.inf).argmin(0)
    met, start = (between < torch.inf).any(0), between.argmin(0)
    low, high, left = (x.gather(0, index[None])[0] for x, index in ((steps, start), (steps, start + 1), (gap, start)))
    nearest = steps.gather(0, best[None])[0]
    return torch.where(met, low, nearest), torch.where(met, high, nearest), met & (left > 0), met


def _deepest(t: Tensor, gap: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Where tangents at neighbours meet closest to 0, well between the two ``[B]``, and how close; inf if none do."""
    away, slope, wide = gap.abs(), slope * gap.sign(), t[1:] - t[:-1]
    x = (away[1:] - away[:-1] - slope[1:] * wide) / (slope[:-1] - slope[1:])
    dips = (slope[:-1] < 0) & (slope[1:] > 0)
    depth, place = torch.where(dips, away[:-1] + slope[:-1] * x, torch.inf).nan_to_num(torch.inf).min(0)
    left, x, wide = (y.gather(0, place[None])[0] for y in (t[:-1], x, wide))
    inside = torch.minimum(torch.maximum(x, 0.1 * wide), 0.9 * wide)
    return left + torch.where(inside.isfinite(), inside, 0.5 * wide), depth


class Sides:
    """Odds and KL along both sides of dual curves, each point solved for from the last one of its side."""

    def __init__(self, curve: DualCurve, measure: OddsMeasure) -> None:
        self.curve, self.measure, self.first = curve, measure, curve.z0.log_softmax(-1)
        self.ends = [curve.lam0, curve.lam0]
        self.hvps = self.newton = torch.zeros(len(curve.lam0), dtype=torch.long, device=curve.lam0.device)

    def warm(self, t: Tensor) -> Tensor:
        """A state to begin at for steps ``[B]``."""
        return torch.where((t > 0)[:, None], self.ends[1], self.ends[0])

    def steps(self, wanted: Tensor) -> Tensor:
        """Steps ``[n, B]`` from hardly any move to where odds move like a line, and by ``wanted`` if they ever do."""
        curve, tiny = self.curve, torch.finfo(wanted.dtype).tiny
        ahead, used = curve.tangent(curve.z0)
        self.hvps = self.hvps + used
        push = curve.family.logits_change(curve.beta)
        hull = (push.amax(-1) - push.amin(-1)).square() / curve.beta.square().sum(-1)
        last = (hull + curve.alpha * (wanted.abs() + MORE)) / rise_far_out(push, self.measure)
        first = FIRST / curve.family.logits_change(ahead).abs().amax(-1).clamp_min(tiny)
        return steps_outwards(torch.minimum(first, last), last)

    def look(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log odds, their slope along the curve and the KL at steps ``[B]``."""
        curve, later = self.curve, (t > 0)[:, None]
        found = curve.point(t, self.warm(t))
        ahead, used = curve.tangent(found.z)
        self.ends = [torch.where(later, self.ends[0], found.lam), torch.where(later, found.lam, self.ends[1])]
        self.hvps, self.newton = self.hvps + found.hvps + used, self.newton + found.newton
        change = torch.where(self.first.isfinite(), found.z - curve.z0, 0.0)
        value, slope = self.measure.at(curve, found.z, found.lam)
        return value, (slope * ahead).sum(-1), divergence(self.first, change)
