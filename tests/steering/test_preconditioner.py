"""Preconditioning with the likeliest tokens: the same points from far fewer products."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.steering import SoftmaxGeometry, dual_steer
from lightning_interp.steering.softmax import newton
from lightning_interp.steering.softmax.newton import conjugate_gradient, likely_inverse

pytestmark = pytest.mark.kernels


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def peaked(dtype=torch.float64):
    """A head of 500 tokens of very different lengths, and states of which few tokens hold nearly everything."""
    weight = draw(500, 32, dtype=dtype) * torch.logspace(0, -1.5, 32, dtype=dtype)
    return SoftmaxGeometry(weight), 6.0 * draw(5, 32, seed=1, dtype=dtype)


def hessian(rows, p, alpha):
    mean = p @ rows
    return (rows * p[:, None]).T @ rows - torch.outer(mean, mean) + alpha * torch.eye(rows.shape[1], dtype=rows.dtype)


def test_with_all_tokens_it_is_the_inverse():
    rows, p, v = draw(3, 9, 6), draw(3, 9, seed=1).softmax(-1), draw(3, 6, seed=2)
    x = likely_inverse(rows, p, 0.01)(v)
    for row in range(3):
        torch.testing.assert_close(hessian(rows[row], p[row], 0.01) @ x[row], v[row], atol=1e-10, rtol=1e-10)


def test_on_a_hyperplane_it_inverts_the_projected_system():
    rows, p = draw(1, 9, 6), draw(1, 9, seed=1).softmax(-1)
    normal = draw(1, 6, seed=3)
    normal = normal / normal.norm()
    project = torch.eye(6, dtype=torch.float64) - torch.outer(normal[0], normal[0])
    b = draw(1, 6, seed=2) @ project
    x = likely_inverse(rows, p, 0.01, normal)(b)
    assert abs(float((x * normal).sum())) < 1e-10
    torch.testing.assert_close(x @ hessian(rows[0], p[0], 0.01) @ project, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_symmetric_positive_map_at_any_alpha(alpha, dtype):
    rows, p = draw(1, 40, 64, dtype=dtype), (4 * draw(1, 40, seed=1, dtype=dtype)).softmax(-1)
    inverse = likely_inverse(rows, p, alpha)
    matrix = torch.cat([inverse(row[None]) for row in torch.eye(64, dtype=dtype)])
    scale = float(matrix.abs().max())
    torch.testing.assert_close(matrix / scale, matrix.T / scale, atol=1e-6, rtol=0)
    assert float(torch.linalg.eigvalsh(matrix.double()).min()) > 0


def test_without_regularisation_there_is_none():
    assert likely_inverse(draw(1, 3, 4), torch.full((1, 3), 1 / 3).double(), 0.0) is None


def test_a_row_that_rounding_made_negative_goes_on_plain():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()
    b = torch.ones(2, 3).double()

    def inverse(v):
        return torch.stack([-v[0], v[1] / torch.tensor([1.0, 2.0, 4.0])])

    tolerance = torch.full((2,), 1e-10).double()
    x, used = conjugate_gradient(lambda v: v @ matrix, b, tolerance=tolerance, max_iterations=9, inverse=inverse)
    torch.testing.assert_close(x @ matrix, b)
    assert used.tolist() == [3, 1]


@pytest.mark.parametrize("target", [{"probe_delta": 5.0}, {"t": 0.02}, {"kl_budget": 0.7}])
@pytest.mark.parametrize("support", [None, 128])
def test_the_same_points_from_fewer_products(target, support, monkeypatch):
    geometry, lam = peaked()
    beta = draw(32, seed=4)
    found = dual_steer(geometry, lam, beta, alpha=1e-3, support=support, **target)
    monkeypatch.setattr(newton, "likely_inverse", lambda *arguments: None)
    plain = dual_steer(geometry, lam, beta, alpha=1e-3, support=support, **target)
    assert found.certified.all()
    assert plain.certified.all()
    close = 1e-6 if "kl_budget" not in target else 1e-2  # a budget is met to a thousandth
    torch.testing.assert_close(found.lam, plain.lam, atol=close, rtol=close)
    assert 2 * int(found.hvps.sum()) < int(plain.hvps.sum())


def test_float32_states_of_a_half_precision_head():
    geometry, lam = peaked()
    half = SoftmaxGeometry(geometry.weight.bfloat16())
    exact = SoftmaxGeometry(geometry.weight.bfloat16().double())
    beta = draw(32, seed=4)
    found = dual_steer(half, lam.float(), beta.float(), alpha=1e-3, probe_delta=2.0)
    wanted = dual_steer(exact, lam, beta, alpha=1e-3, probe_delta=2.0)
    torch.testing.assert_close(found.lam.double(), wanted.lam, atol=1e-2, rtol=1e-2)
