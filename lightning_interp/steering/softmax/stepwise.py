"""The stepwise path of arXiv 2602.15293, Algorithm 1, as its authors run it: for parity and for figures of whole paths.

Each step solves ``(Cov[g] + alpha I) v = beta / |beta|`` at the current state and moves by ``eta v / |v|``. It is an
explicit Euler walk along the curve that ``dual_steer`` reaches directly, and the only mode that works with a softcapped
head (with the Fisher matrix pulled back to the state).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.errors import RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.arithmetic import centred, exact_arithmetic, working_dtype
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import conjugate_gradient, solve_dense
from lightning_interp.steering.softmax.support import restrict

__all__ = ["StepwisePath", "algorithm1"]


class _LocalFamily:
    """The likeliest tokens at some states, their probabilities, and the slope of the cap at their logits."""

    def __init__(self, geometry: SoftmaxGeometry, state: Tensor, top_k: int | None) -> None:
        z = geometry.logits(state)
        index = z.topk(min(top_k or z.shape[-1], z.shape[-1]), dim=-1).indices
        self.family, kept = restrict(geometry, index, state.dtype), z.gather(-1, index)
        self.p, self.slope = kept.softmax(-1), torch.ones_like(kept)
        if geometry.softcap is not None and geometry.on_softcap == "pullback":
            self.p = geometry.capped(kept).softmax(-1)
            self.slope = 1 - torch.tanh(kept / geometry.softcap).square()

    def dense(self, unit: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """``(Cov + alpha I)^-1 unit``, and that no product was taken."""
        rows = self.family.weight * self.family.scale * self.slope[:, :, None]
        found = [solve_dense(r, q, v, alpha) for r, q, v in zip(rows, self.p, unit, strict=True)]
        return torch.stack(found), torch.zeros(len(unit), dtype=torch.long, device=unit.device)

    def cg(self, unit: Tensor, alpha: float, cg_max: int, cg_atol: float) -> tuple[Tensor, Tensor]:
        """The same by the authors' loop: it takes a first step always, and stops where the curvature vanishes."""

        def product(v: Tensor) -> Tensor:
            family, slope = self.family, self.slope
            return family.mean(slope * centred(self.p, slope * family.logits_change(v))) + alpha * v

        tolerance = unit.new_full((len(unit),), min(cg_atol, 0.99))
        return conjugate_gradient(product, unit, tolerance=tolerance, max_iterations=cg_max, least=1e-10)


@dataclass
class StepwisePath:
    """A walked path.

    Args:
        points: States ``[S + 1, B, d]``, the start first; a row that stopped keeps its last point.
        steps: Steps that each row took ``[B]``.
        hvps: Hessian-vector products of each row ``[B]``; 0 with the dense solve.
    """

    points: Tensor
    steps: Tensor
    hvps: Tensor


def algorithm1(
    geometry: SoftmaxGeometry,
    lam: Tensor,
    direction: Any,
    *,
    alpha: float = 5e-3,
    eta: float = 2.0,
    steps: int = 200,
    top_k: int | None = 20000,
    cg_max: int = 20,
    cg_atol: float = 1e-5,
    solve: Literal["cg", "dense"] = "cg",
    pairs: CounterfactualPairs | None = None,
    stop_prob: float = 0.9999,
) -> StepwisePath:
    """Walk the regularised dual curve in steps of fixed length.

    Args:
        geometry: Of the head; capped ones with ``on_softcap='pullback'``.
        lam: States ``[B, d]`` or ``[d]``.
        direction: ``beta`` ``[d]``, or a probe; only its direction matters.
        alpha: Regularisation; the authors use 1e-3 by default and 5e-3 in their runs.
        eta: Length of a step.
        steps: Steps at most.
        top_k: Likeliest tokens that each step works on, renormalised; None for all.
        cg_max: Conjugate-gradient iterations of a step at most.
        cg_atol: Absolute residual at which they stop.
        solve: Conjugate gradients, or a dense factorisation as in the paper's runs.
        pairs: With them a row stops when the concept's probability exceeds ``stop_prob``.
        stop_prob: See ``pairs``.

    Returns:
        The path.

    Raises:
        RecipeError: If a setting is out of its range.
        IncompatibleModelError: If a state or direction has another width.

    Example:
        >>> geometry = SoftmaxGeometry(torch.eye(3))
        >>> path = algorithm1(geometry, torch.zeros(3), torch.tensor([1.0, -1.0, 0.0]), eta=0.5, steps=4)
        >>> path.points.shape, path.steps.tolist()
        (torch.Size([5, 1, 3]), [4])
    """
    for name, value in (("alpha", alpha), ("eta", eta), ("steps", steps), ("top_k", top_k)):
        if value is not None and not value > 0:
            raise RecipeError(f"algorithm1({name}={value!r}): expected a number > 0.")
    beta = direction if isinstance(direction, Tensor) else direction.direction
    state = lam.detach().reshape(-1, lam.shape[-1]).to(working_dtype(geometry.weight, lam))
    geometry.check_state(state, beta)
    unit = (beta / beta.norm()).to(state).expand(len(state), -1)
    walking = torch.ones(len(state), dtype=torch.bool, device=state.device)
    taken, hvps = walking.long() * 0, walking.long() * 0
    points = [state]
    with torch.no_grad(), exact_arithmetic(state.device):
        for _ in range(steps):
            if pairs is not None:
                walking = walking & (pairs.target_logit(geometry.model_log_probs(state)).sigmoid() <= stop_prob)
            if not bool(walking.any()):
                break
            family = _LocalFamily(geometry, state, top_k)
            move, used = family.dense(unit, alpha) if solve == "dense" else family.cg(unit, alpha, cg_max, cg_atol)
            hvps, taken = hvps + used * walking, taken + walking
            state = torch.where(walking[:, None], state + eta * move / move.norm(dim=-1, keepdim=True), state)
            points.append(state)
    return StepwisePath(torch.stack(points), taken, hvps)
