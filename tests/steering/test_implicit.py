"""Gradients through a dual step against finite differences and the implicit function theorem."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.softmax.dual import dual_step
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

pytestmark = pytest.mark.kernels


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradcheck():
    geometry = SoftmaxGeometry(draw(30, 5))
    lam, shift = draw(2, 5, seed=1).requires_grad_(), (0.3 * draw(2, 5, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: dual_step(geometry, a, b, alpha=0.05, rtol=1e-13), (lam, shift), eps=1e-5, atol=1e-7, rtol=1e-6
    )


def test_jacobians_are_those_of_the_theorem():
    geometry, alpha, eye = SoftmaxGeometry(draw(30, 5)), 0.05, torch.eye(5, dtype=torch.float64)
    lam, shift = draw(1, 5, seed=1), 0.3 * draw(1, 5, seed=2)
    end = dual_step(geometry, lam, shift, alpha=alpha, rtol=1e-13)
    hessian0, hessian = (torch.stack([geometry.hvp(x[0], e) for e in eye]) + alpha * eye for x in (lam, end))
    by_shift = torch.autograd.functional.jacobian(
        lambda s: dual_step(geometry, lam, s, alpha=alpha, rtol=1e-13)[0], shift
    )[:, 0]
    by_lam = torch.autograd.functional.jacobian(
        lambda x: dual_step(geometry, x, shift, alpha=alpha, rtol=1e-13)[0], lam
    )[:, 0]
    torch.testing.assert_close(by_shift, torch.linalg.inv(hessian), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(by_lam, torch.linalg.solve(hessian, hessian0), rtol=1e-8, atol=1e-8)


def test_no_shift_is_the_identity():
    geometry, lam = SoftmaxGeometry(draw(30, 5)), draw(2, 5, seed=1).requires_grad_()
    end = dual_step(geometry, lam, torch.zeros(5).double(), alpha=0.1)
    assert torch.equal(end, lam)
    end.sum().backward()
    torch.testing.assert_close(lam.grad, torch.ones_like(lam), rtol=1e-8, atol=1e-8)


def test_one_shift_for_all_rows():
    geometry, lam, shift = SoftmaxGeometry(draw(30, 5)), draw(3, 5, seed=1), (0.2 * draw(5, seed=2)).requires_grad_()
    dual_step(geometry, lam, shift, alpha=0.1).square().sum().backward()
    assert shift.grad.shape == (5,)
    assert shift.grad.isfinite().all()


def test_a_gradient_that_does_not_converge_is_an_error():
    geometry, lam = SoftmaxGeometry(draw(600, 20)), 0.1 * draw(1, 20, seed=1).requires_grad_()
    end = dual_step(geometry, lam, 0.1 * draw(20, seed=2), alpha=1e-6, cg_max=1)
    with pytest.raises(IncompatibleModelError, match=r"relative residual of .* after 1 products"):
        end.sum().backward()
