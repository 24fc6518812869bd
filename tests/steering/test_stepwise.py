"""The stepwise path against an independent float64 implementation of the published loop, and against its limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import dual_steer
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.stepwise import algorithm1

pytestmark = pytest.mark.kernels


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published_loop(weight, start, beta, *, alpha, eta, steps, top_k, cg_max=20):
    """The loop in numpy: top-k, renormalise, conjugate gradients from zero with an absolute stop, normalised step."""
    lam, points, beta = start.copy(), [start.copy()], beta / np.linalg.norm(beta)
    for _ in range(steps):
        z = weight @ lam
        kept = np.argsort(-z)[:top_k]
        p = np.exp(z[kept] - z[kept].max())
        p /= p.sum()
        rows = weight[kept]
        mean = p @ rows

        def product(v, rows=rows, p=p, mean=mean):
            return rows.T @ (p * (rows @ v)) - mean * (mean @ v) + alpha * v

        x, r = np.zeros_like(beta), beta.copy()
        d, rr = r.copy(), r @ r
        for _ in range(cg_max):
            image = product(d)
            curvature = d @ image
            if abs(curvature) < 1e-10:
                break
            x, r = x + rr / curvature * d, r - rr / curvature * image
            new = r @ r
            if np.sqrt(new) < 1e-5:
                break
            d, rr = r + new / rr * d, new
        lam = lam + eta * x / np.linalg.norm(x)
        points.append(lam.copy())
    return np.stack(points)


@pytest.mark.parametrize("top_k", [50, 300])
def test_parity_with_the_published_loop(top_k):
    weight, lam, beta = draw(300, 12, seed=1), draw(2, 12, seed=2), draw(12, seed=3)
    found = algorithm1(SoftmaxGeometry(weight), lam, beta, alpha=5e-3, eta=0.7, steps=15, top_k=top_k)
    for row in range(2):
        expected = published_loop(
            weight.numpy(), lam[row].numpy(), beta.numpy(), alpha=5e-3, eta=0.7, steps=15, top_k=top_k
        )
        # Two ways to centre the covariance round differently, which conjugate gradients amplify.
        np.testing.assert_allclose(found.points[:, row].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert found.steps.tolist() == [15, 15]
    dense = algorithm1(SoftmaxGeometry(weight), lam, beta, alpha=5e-3, eta=0.7, steps=15, top_k=top_k, solve="dense")
    torch.testing.assert_close(dense.points, found.points, atol=1e-4, rtol=1e-4)
    assert dense.hvps.tolist() == [0, 0]
    assert (found.hvps > 15).all()


def test_it_converges_to_the_curve_at_first_order():
    geometry, lam, beta, alpha = SoftmaxGeometry(draw(100, 8, seed=4)), draw(8, seed=5), draw(8, seed=6), 0.05
    gaps = []
    for eta in (0.2, 0.1, 0.05):
        path = algorithm1(geometry, lam, beta, alpha=alpha, eta=eta, steps=round(4 / eta), cg_max=100, cg_atol=1e-12)
        end = path.points[-1]
        exact = dual_steer(
            geometry, lam, beta, probe_value=float(end[0] @ beta), alpha=alpha, options=SolverOptions(rtol=1e-12)
        )
        gaps.append(float((exact.lam - end).norm()))
    assert 1.7 < gaps[0] / gaps[1] < 2.3
    assert 1.7 < gaps[1] / gaps[2] < 2.3


def test_a_row_stops_when_its_concept_is_certain():
    weight = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    pairs = CounterfactualPairs([(4, 0)])
    lam = torch.stack([torch.zeros(4), torch.tensor([20.0, 0, 0, 0])]).double()
    path = algorithm1(SoftmaxGeometry(weight), lam, torch.eye(4).double()[0], eta=0.5, steps=100, pairs=pairs)
    assert path.steps[1] == 0
    assert 0 < int(path.steps[0]) < 100
    last = SoftmaxGeometry(weight).probs(path.points[-1, 0])
    assert float(pairs.target_prob(last)) > 0.9999
    assert torch.equal(path.points[-1, 1], lam[1])


def test_a_softcapped_head_is_walked_with_the_pulled_back_fisher_matrix():
    weight, lam, beta, cap = draw(40, 6, seed=7), draw(6, seed=8), draw(6, seed=9), 4.0
    geometry = SoftmaxGeometry(weight, softcap=cap, on_softcap="pullback")
    path = algorithm1(geometry, lam, beta, alpha=0.01, eta=0.1, steps=1, cg_max=50, cg_atol=1e-12)
    fisher = torch.stack([geometry.hvp(lam, unit) for unit in torch.eye(6).double()])
    expected = torch.linalg.solve(fisher + 0.01 * torch.eye(6).double(), beta)
    moved = path.points[1, 0] - lam
    torch.testing.assert_close(moved, 0.1 * expected / expected.norm(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["alpha", "eta", "steps", "top_k"])
def test_settings_out_of_range(name):
    with pytest.raises(RecipeError, match=rf"algorithm1\({name}=0\): expected a number > 0"):
        algorithm1(SoftmaxGeometry(draw(5, 3)), draw(3), draw(3), **{name: 0})


def test_another_width():
    with pytest.raises(IncompatibleModelError, match=r"width 3, but got \[4\]"):
        algorithm1(SoftmaxGeometry(draw(5, 3)), draw(3), draw(4))
