"""Odds that rise and fall along a direction: where they have a value, or come closest to it, against a dense search."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.steering import dual_steer
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.euclidean import euclidean_steer
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

pytestmark = pytest.mark.kernels


class Pairs:
    base_ids, target_ids = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])


def crowd(rows, seed=0, width=8, tokens=40):
    """States, directions that know nothing of the concept, and goals; odds turn along every third of these."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    states = normal(rows, width) * (0.3 + 2 * torch.rand(rows, 1, generator=draw, dtype=torch.float64))
    return SoftmaxGeometry(normal(tokens, width)), states, normal(rows, width), torch.sigmoid(4 * normal(rows))


def odds(geometry, lam):
    z = geometry.logits(lam)
    return z[..., 3:6].logsumexp(-1) - z[..., :3].logsumexp(-1)


def densely(geometry, states, beta, alpha, points):
    """Odds ``[n, B]`` along both sides."""
    out = torch.logspace(-3.5, 3.5, points, dtype=torch.float64)
    steps = torch.cat([-out.flip(0), torch.zeros(1), out])
    if alpha is None:
        lam = states + steps[:, None, None] * beta
        return odds(geometry, lam)
    t, options = steps.repeat_interleave(len(states)), SolverOptions(rtol=1e-5)
    many = (x.repeat(len(steps), 1) for x in (states, beta))
    lam = dual_steer(geometry, *many, t=t, alpha=alpha, options=options).lam
    return odds(geometry, lam).reshape(len(steps), -1)


def check(steer, rows, seed, points, **settings):
    """Whether all goals that a dense search finds are met, and no point of it is closer than where the others ended."""
    geometry, states, beta, goal = crowd(rows, seed)
    found = steer(geometry, states, beta, pairs=Pairs(), target_prob=goal, **settings)
    path = densely(geometry, states, beta, found.alpha if steer is dual_steer else None, points) - goal.logit()
    there = (path[1:] * path[:-1] <= 0).any(0)
    assert found.reached[there].all(), [found.reason[row] for row in (there & ~found.reached).nonzero().flatten()]
    away = (odds(geometry, found.lam) - goal.logit()).abs()
    assert (away <= path.abs().amin(0) + 1e-3 * goal.logit().abs().clamp_min(1.0)).all()
    assert {reason for reason, met in zip(found.reason, found.reached.tolist(), strict=True) if not met} <= {
        "unreachable"
    }
    return there


@pytest.mark.parametrize("steer", [dual_steer, euclidean_steer])
def test_odds_are_met_or_come_as_close_as_they_can(steer):
    there = check(steer, 7, 8, 30)
    assert 0 < int(there.sum()) < 7, "some goals are met, some cannot be"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"support": 8}, {"alpha": 0.05}, {"alpha": 50.0}], ids=str)
def test_many_random_odds(settings):
    for seed in range(10):
        check(dual_steer, 50, seed, 250, **settings)


@pytest.mark.slow
def test_many_random_odds_on_lines():
    for seed in range(10):
        check(euclidean_steer, 50, seed, 2000)
