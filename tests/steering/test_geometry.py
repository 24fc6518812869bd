"""The softmax's geometry against automatic differentiation, dense matrices, closed forms and published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import conjugate_gradient, solve_dense

pytestmark = pytest.mark.kernels

GOLDEN = torch.tensor([[1, 0.5], [-1, 0.5], [0.5, -1], [0.25, 1.5], [-0.75, -0.5]], dtype=torch.float64)
LAM = torch.tensor([0.3, -0.2], dtype=torch.float64)
BETA = torch.tensor([1, 0.5], dtype=torch.float64)


def family(seed=0, v=40, d=6, bias=False, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64)
    shift = torch.randn(v, generator=rng, dtype=torch.float64) if bias else None
    states = torch.randn(5, d, generator=rng, dtype=torch.float64)
    return SoftmaxGeometry(weight, shift, scale=scale), states


def log_norm(geometry, lam):
    """``A`` as a plain formula that autograd can differentiate."""
    bias = 0 if geometry.bias is None else geometry.bias
    return torch.logsumexp(geometry.scale * (geometry.weight @ lam + bias), -1)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_golden_numbers():
    geometry = SoftmaxGeometry(GOLDEN)
    assert float(geometry.log_norm(LAM)) == pytest.approx(1.6077972621297278, abs=1e-14)
    probabilities = [0.244681659542, 0.134284141896, 0.284279530624, 0.159965475984, 0.176789191954]
    close(geometry.probs(LAM), probabilities, 1e-11)
    close(geometry.dual(LAM), [0.159936757989, 0.056756988094], 1e-11)
    hessian = torch.stack([geometry.hvp(LAM, unit) for unit in torch.eye(2, dtype=torch.float64)])
    close(hessian, [[0.533897680261, 0.030264465319], [0.030264465319, 0.779919244239]], 1e-11)
    close(geometry.hvp(LAM, BETA), [0.549029912920, 0.420224087439], 1e-11)
    close(geometry.dual(torch.tensor([-1, 2], dtype=torch.float64)), [-0.121379823735, 1.092172739647], 1e-11)


@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 1.0), (True, 0.25)])
def test_derivatives_are_those_of_autograd(bias, scale):
    geometry, states = family(bias=bias, scale=scale)
    v = torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for lam in states:
        close(geometry.log_norm(lam), log_norm(geometry, lam), 1e-12)
        close(geometry.dual(lam), torch.func.grad(lambda x: log_norm(geometry, x))(lam), 1e-12)
        hessian = torch.func.hessian(lambda x: log_norm(geometry, x))(lam)
        close(geometry.hvp(lam, v), hessian @ v, 1e-12)
        close(geometry.fisher_norm(lam, v), (v @ hessian @ v).sqrt(), 1e-12)
        assert torch.linalg.eigvalsh(hessian).min() > -1e-12
    batched = geometry.hvp(states, v.expand_as(states))
    close(batched, torch.stack([geometry.hvp(lam, v) for lam in states]), 1e-12)


@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.5)])
def test_kl_is_the_bregman_divergence(bias, scale):
    geometry, states = family(bias=bias, scale=scale)
    a, b = states[0], states[1]
    bregman = geometry.log_norm(b) - geometry.log_norm(a) - geometry.dual(a) @ (b - a)
    close(geometry.kl(a, b), bregman, 1e-12)
    p, q = geometry.probs(a), geometry.probs(b)
    close(geometry.kl(a, b), (p * (p.log() - q.log())).sum(), 1e-12)
    close(geometry.entropy(a), -(p * p.log()).sum(), 1e-12)


def test_a_shift_of_all_rows_moves_the_dual_coordinate_alone():
    geometry, states = family()
    k = torch.arange(6, dtype=torch.float64)
    shifted = SoftmaxGeometry(geometry.weight + k)
    close(shifted.probs(states), geometry.probs(states), 1e-12)
    close(shifted.dual(states), geometry.dual(states) + k, 1e-12)
    close(shifted.hvp(states, states), geometry.hvp(states, states), 1e-11)
    close(shifted.kl(states[0], states[1]), geometry.kl(states[0], states[1]), 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 5e-3, 0.5])
def test_round_trip(alpha):
    geometry, states = family()
    y = geometry.dual(states, alpha=alpha)
    back = geometry.inverse_dual(y, alpha=alpha)
    close(back, states, 1e-9)
    close(geometry.dual(back, alpha=alpha), y, 1e-10)


@given(st.integers(0, 200), st.sampled_from([1e-3, 0.1, 2.0]))
def test_every_point_has_a_regularised_inverse(seed, alpha):
    geometry, _ = family()
    y = 5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(geometry.dual(geometry.inverse_dual(y, alpha=alpha), alpha=alpha), y, 1e-9)


def test_a_point_outside_the_hull_has_none():
    geometry = SoftmaxGeometry(GOLDEN)
    with pytest.raises(IncompatibleModelError, match=r"inverse_dual\(alpha=0\).*row 0"):
        geometry.inverse_dual(torch.tensor([9.0, 9.0], dtype=torch.float64))


def test_moment_matching_is_no_mixture():
    geometry = SoftmaxGeometry(torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64))
    a, b = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    middle = geometry.probs(geometry.m_geodesic(a, b, 0.5))[0]
    mixture = 0.5 * (geometry.probs(a) + geometry.probs(b))[0]
    close(middle, [1 / 3, 1 / 3, 1 / 3], 1e-9)
    close(mixture, [0.37764, 0.24473, 0.37764], 1e-5)
    close(geometry.mean(middle), geometry.mean(mixture), 1e-9)
    close(geometry.e_geodesic(a, b, 0.25), [[0.5]], 1e-12)


def test_the_solvers_agree():
    geometry, states = family(v=30, d=8)
    v, alpha = torch.ones(1, 8, dtype=torch.float64), 0.03
    lam = states[0]
    p = geometry.probs(lam)
    dense = solve_dense(geometry.weight, p, v[0], alpha)
    iterated, used = conjugate_gradient(
        lambda x: geometry.hvp(lam, x) + alpha * x, v, tolerance=torch.tensor([1e-12]), max_iterations=50
    )
    hessian = torch.func.hessian(lambda x: log_norm(geometry, x))(lam)
    exact = torch.linalg.solve(hessian + alpha * torch.eye(8, dtype=torch.float64), v[0])
    for found in (dense, iterated[0]):
        close(found, exact, 1e-8)
    assert 1 <= int(used) <= 12


def test_the_kept_copy_follows_the_weight():
    weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    geometry, lam = SoftmaxGeometry(weight), torch.ones(4)
    first = geometry.logits(lam)
    assert torch.equal(geometry.logits(lam), first)
    weight.mul_(2)
    assert torch.allclose(geometry.logits(lam), 2 * first)
    assert first.dtype == torch.float32


def test_bfloat16_and_autocast_do_not_reach_the_arithmetic():
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    lam = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = SoftmaxGeometry(weight.double()).dual(lam.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SoftmaxGeometry(weight).dual(lam)
    assert found.dtype == torch.float32
    assert float((found - wide).norm() / wide.norm()) < 1e-6


class TestSoftcap:
    cap = 3.0

    def test_refused_by_default(self):
        with pytest.raises(IncompatibleModelError, match="caps its logits at 3"):
            SoftmaxGeometry(GOLDEN, softcap=self.cap, name="Gemma2")

    def test_ignored_it_is_the_uncapped_family_and_metrics_are_the_models_own(self):
        geometry = SoftmaxGeometry(GOLDEN, softcap=self.cap, on_softcap="ignore")
        close(geometry.dual(LAM), SoftmaxGeometry(GOLDEN).dual(LAM), 1e-14)
        capped = (self.cap * torch.tanh(GOLDEN @ LAM / self.cap)).log_softmax(-1)
        close(geometry.model_log_probs(LAM), capped, 1e-14)

    def test_pulled_back_it_is_the_hessian_of_the_kl(self):
        geometry = SoftmaxGeometry(GOLDEN, softcap=self.cap, on_softcap="pullback")

        def divergence(x):
            first = (self.cap * torch.tanh(GOLDEN @ LAM / self.cap)).log_softmax(-1)
            return (first.exp() * (first - (self.cap * torch.tanh(GOLDEN @ x / self.cap)).log_softmax(-1))).sum()

        hessian = torch.func.hessian(divergence)(LAM)
        close(geometry.hvp(LAM, BETA), hessian @ BETA, 1e-12)
        close(geometry.fisher_norm(LAM, BETA), (BETA @ hessian @ BETA).sqrt(), 1e-12)

    @pytest.mark.parametrize("ask", [lambda g: g.dual(LAM), lambda g: g.inverse_dual(LAM, alpha=1.0)])
    def test_pulled_back_it_has_no_dual_coordinate(self, ask):
        with pytest.raises(IncompatibleModelError, match="caps its logits at 3"):
            ask(SoftmaxGeometry(GOLDEN, softcap=self.cap, on_softcap="pullback"))


def test_alpha_scales_with_the_square_of_the_unembedding():
    geometry, _ = family()
    twice = SoftmaxGeometry(2 * geometry.weight)
    assert twice.resolve_alpha("auto") == pytest.approx(4 * geometry.resolve_alpha("auto"), rel=1e-5)
    variance = geometry.weight.var(dim=0, correction=0).mean().item()
    assert geometry.resolve_alpha("auto") == pytest.approx(5 * variance, rel=1e-5)
    assert geometry.resolve_alpha(0.25) == 0.25


@pytest.mark.parametrize(
    ("weight", "bias", "text"),
    [
        (torch.zeros(3), None, r"\[3\]; expected floating \[V, d\]"),
        (torch.zeros(3, 2, dtype=torch.long), None, "torch.int64"),
        (torch.zeros(3, 2), torch.zeros(2), r"bias \[2\] beside a weight \[3, 2\]"),
    ],
)
def test_a_head_that_is_none(weight, bias, text):
    with pytest.raises(IncompatibleModelError, match=text):
        SoftmaxGeometry(weight, bias)


def test_a_state_of_another_width():
    with pytest.raises(IncompatibleModelError, match=r"width 2, but got \[3\]"):
        SoftmaxGeometry(GOLDEN).logits(torch.zeros(3))


def test_rows_are_worked_on_in_pieces(monkeypatch):
    geometry, states = family()
    whole = geometry.dual(states)
    monkeypatch.setattr(type(geometry), "max_rows", property(lambda self: 2))
    close(geometry.dual(states), whole, 1e-13)
    assert math.isfinite(float(whole.sum()))
