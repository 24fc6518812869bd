"""Gradients through a dual step: one linear solve, whatever the forward solve took.

A point of the curve is defined by ``phi_a(lam) = phi_a(lam0) + shift``, so by the implicit function theorem ``d lam / d
shift = (H + alpha I)^-1`` and ``d lam / d lam0 = (H + alpha I)^-1 (H0 + alpha I)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.softmax.arithmetic import exact_arithmetic
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import dual_steer
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import Potential

__all__ = ["dual_step"]


def dual_step(
    geometry: SoftmaxGeometry,
    lam: Tensor,
    shift: Tensor,
    *,
    alpha: float,
    rtol: float | None = None,
    cg_max: int = 200,
    solved: Tensor | None = None,
) -> Tensor:
    """Move the dual coordinate by ``shift``, with gradients to the state and to the shift, none to the head's weight.

    Args:
        geometry: Of the head.
        lam: States ``[B, d]``.
        shift: ``t beta`` ``[B, d]`` or ``[d]``.
        alpha: Regularisation, > 0.
        rtol: Accepted relative error, of the step and of the backward solve.
        cg_max: Hessian-vector products of the backward solve at most.
        solved: The steered states ``[B, d]``, where they are known already; only gradients are made then.

    Returns:
        Steered states ``[B, d]`` in the dtype of ``lam``.

    Raises:
        IncompatibleModelError: If the step or its gradient did not converge.

    Example:
        >>> geometry = SoftmaxGeometry(torch.eye(3))
        >>> shift = torch.tensor([[0.1, -0.1, 0.0]], requires_grad=True)
        >>> dual_step(geometry, torch.zeros(1, 3), shift, alpha=0.1).sum().backward()
        >>> [round(value, 3) for value in shift.grad[0].tolist()]
        [10.0, 10.0, 10.0]
    """
    moved = shift.expand_as(lam) if shift.dim() < lam.dim() else shift
    step: Any = _DualStep.apply  # typed in some versions of torch only
    found: Tensor = step(lam, moved, geometry, float(alpha), rtol, cg_max, solved)
    return found


class _DualStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lam: Tensor,
        shift: Tensor,
        geometry: SoftmaxGeometry,
        alpha: float,
        rtol: float | None,
        cg_max: int,
        solved: Tensor | None,
    ) -> Tensor:
        still = (shift == 0).all(-1)
        end = _solved(geometry, lam, shift, still, alpha, rtol) if solved is None else solved
        ctx.save_for_backward(lam, end)
        ctx.geometry, ctx.alpha, ctx.rtol, ctx.cg_max = geometry, alpha, rtol, cg_max
        return torch.where(still[:, None], lam, end.to(lam.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        lam0, lam = ctx.saved_tensors
        geometry, alpha = ctx.geometry, ctx.alpha
        incoming = grad.to(lam.dtype)
        wanted = ctx.rtol if ctx.rtol is not None else (1e-10 if lam.dtype == torch.float64 else 1e-4)
        with exact_arithmetic(lam.device):
            size = incoming.norm(dim=-1)
            potential = Potential(geometry, torch.zeros_like(lam), torch.zeros_like(lam), alpha)
            solved, _ = potential.solve(
                geometry.probs(lam), incoming, tolerance=wanted * size, max_iterations=ctx.cg_max
            )
            left = (geometry.hvp(lam, solved) + alpha * solved - incoming).norm(dim=-1)
            if not bool((left <= 10 * wanted * size + 1e-30).all()):  # NaN too
                raise IncompatibleModelError(
                    f"The gradient of a dual step left a relative residual of {float((left / size).max()):.2g} after "
                    f"{ctx.cg_max} products. Pass a larger cg_max or alpha."
                )
            back = geometry.hvp(lam0.to(lam.dtype), solved) + alpha * solved
        return back.to(lam0.dtype), solved.to(grad.dtype), None, None, None, None, None


def _solved(
    geometry: SoftmaxGeometry, lam: Tensor, shift: Tensor, still: Tensor, alpha: float, rtol: float | None
) -> Tensor:
    direction = torch.where(still[:, None], torch.ones_like(shift), shift)
    found = dual_steer(geometry, lam, direction, t=(~still).to(lam), alpha=alpha, options=SolverOptions(rtol=rtol))
    if not bool(found.reached.all()):
        row = int((~found.reached).nonzero()[0])
        raise IncompatibleModelError(
            f"The dual step of row {row} did not converge ({found.reason[row]}, relative residual "
            f"{float(found.rel_resid[row]):.2g}). Take a shorter step, a larger alpha, or a larger rtol."
        )
    return found.lam
