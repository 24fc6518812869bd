"""Dual steering: move one concept of a next-token distribution and leave the rest alone as far as the family allows.

Ordinary steering adds a probe's direction ``beta`` to the state. A probe is a linear functional of the state, though,
so it lives in the dual space, and dual steering adds it to the dual coordinate: ``phi(lam) = phi(lam0) + t beta``.
Among all states with the same probe value, that one has the smallest ``KL(P_start || P_end)`` (arXiv 2602.15293,
Theorem 3). By the implicit function theorem one linear solve gives the gradients through a step, whatever it took:
``d lam / d shift = (H + alpha I)^-1`` and ``d lam / d lam0 = (H + alpha I)^-1 (H0 + alpha I)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.arithmetic import exact_arithmetic
from lightning_interp.steering.softmax.curve import DualCurve, KlMeasure, OddsMeasure, SolverOptions
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import Family, NewtonResult, Potential
from lightning_interp.steering.softmax.request import SteerRequest, SteerResult, Target, check_alpha, described
from lightning_interp.steering.softmax.search import search_step
from lightning_interp.steering.softmax.support import PolishedFamily, RestrictedFamily, choose_support, restrict

__all__ = ["combine", "dual_steer", "dual_step"]

_COARSE = 2e-2  # of the first pass, on the support alone
_SUPPORT_BYTES = 2**28


def combine(directions: Sequence[Tensor], steps: Sequence[float]) -> Tensor:
    """One direction for several concepts: dual steps add up, in any order, and are undone by their negatives.

    Args:
        directions: ``beta_k`` ``[d]``.
        steps: ``t_k``.

    Returns:
        ``sum_k t_k beta_k``, to be used with ``t=1``.
    """
    return torch.stack([step * direction for step, direction in zip(steps, directions, strict=True)]).sum(0)


def dual_steer(
    geometry: SoftmaxGeometry,
    lam: Tensor,
    direction: Any,
    *,
    pairs: CounterfactualPairs | None = None,
    bias: float | None = None,
    alpha: float | Literal["auto"] = "auto",
    support: int | None = None,
    options: SolverOptions | None = None,
    **target: float | Tensor | None,
) -> SteerResult:
    """Steer states in the dual coordinate, directly to a target.

    Args:
        geometry: Of the model's head.
        lam: States ``[B, d]`` or ``[d]``: what the head reads.
        direction: ``beta`` ``[d]`` or ``[B, d]``, or a probe (``direction`` and ``bias`` attributes).
        pairs: Tokens of the concept, for ``target_prob``; they are always part of a restricted support.
        bias: Offset ``b`` of the probe, for ``probe_prob``; that of the probe by default.
        alpha: Regularisation, > 0 (or 0 with a probe target); it decides the direction where the distribution is
            peaked, and is not scale free. ``auto`` takes the probe's, or else one from the unembedding's spread.
        support: Work on so many tokens, certify on all, and take four times as many where that fails. None: on all.
        options: How exact.
        **target: Exactly one of ``t``, ``probe_value``, ``probe_delta``, ``probe_prob``, ``target_prob``,
            ``kl_budget``; see :class:`Target`.

    Returns:
        Steered states with diagnostics. A target that is not reached gives the point of the curve that came closest and
        ``reached`` False. Odds may turn along a curve, so that several points have a ``target_prob``: one is given.

    Raises:
        IncompatibleModelError: If a state or direction has another width, or is not finite.
        RecipeError: If the target or ``alpha`` cannot be used.

    Example:
        >>> rows = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.5, -1.0], [0.25, 1.5], [-0.75, -0.5]])
        >>> lam, beta = torch.tensor([0.3, -0.2]), torch.tensor([1.0, 0.5])
        >>> found = dual_steer(SoftmaxGeometry(rows), lam, beta, probe_delta=1.0, alpha=0.0)
        >>> round(float(found.kl), 4), found.reason
        (0.211, ['converged'])
    """
    request = SteerRequest.made(geometry, lam, direction, Target(**target), pairs, bias, alpha, support, options)
    check_alpha(request.kind, request.alpha)
    with torch.no_grad(), exact_arithmetic(request.lam.device):
        limit = geometry.max_rows if support is None else max(1, _SUPPORT_BYTES // (4 * support * geometry.width))
        chunks = torch.split(torch.arange(len(request.lam), device=request.lam.device), limit)
        return SteerResult.joined([_solve(request.rows(index)) for index in chunks])


def _solve(request: SteerRequest) -> SteerResult:
    """Solve on the support, then go on with whole gradients from there; enlarge the support where that fails."""
    geometry, size = request.geometry, request.support
    if size is None or size >= geometry.vocabulary:
        return _examined(request, *_reach(request, geometry, None), None)
    part = _restricted(request, size)
    index = part.index
    coarse = replace(request.options, rtol=_COARSE, target_rtol=max(_COARSE, request.options.target_rtol))
    point, t = _reach(replace(request, options=coarse), part, index)
    request.warm = (point.lam, t)
    polished, t = _reach(request, PolishedFamily(geometry, part), None)
    polished.newton, polished.hvps = polished.newton + point.newton, polished.hvps + point.hvps
    result = _examined(request, polished, t, index)
    again = (~(result.certified & result.reached)).nonzero().flatten()
    if not len(again):
        return result
    wider = request.rows(again)
    wider.support = 4 * size
    better = _solve(wider)
    better.hvps, better.newton = better.hvps + result.hvps[again], better.newton + result.newton[again]
    return _patched(result, better, again)


def _restricted(request: SteerRequest, size: int) -> RestrictedFamily:
    push, end = request.geometry.logits_change(request.beta), None
    if request.kind == "probe_value":
        step = (request.goal - (request.beta * request.lam).sum(-1)) / request.beta.square().sum(-1)
        end = request.z + step[:, None] * push
    elif request.kind == "t":
        push = push * torch.sign(request.goal)[:, None]
    always = None if request.pairs is None else torch.cat([request.pairs.base_ids, request.pairs.target_ids])
    return restrict(request.geometry, choose_support(request.z, push, size, end=end, always=always), request.lam.dtype)


def _reach(request: SteerRequest, family: Family, index: Tensor | None) -> tuple[NewtonResult, Tensor]:
    z0 = request.z if index is None else request.z.gather(-1, index)
    curve = DualCurve.of(family, request.lam, request.beta, request.alpha, request.options, z0)
    start = None if request.warm is None else request.warm[0]
    if request.kind == "t":
        return curve.point(request.goal, start), request.goal
    if request.kind == "probe_value":
        return curve.at_probe(request.goal, start)
    loose = request.options.target_rtol
    if request.kind == "kl_budget":
        goal = request.goal.sqrt()  # the measure is the root, so half the relative error
        accepted = 0.5 * loose * goal
        found = search_step(curve, KlMeasure.within(z0, accepted), goal, accepted=accepted, warm=request.warm)
    else:
        goal = request.goal.logit()
        accepted = loose * goal.abs().clamp_min(1.0)
        found = search_step(curve, _odds(request, index), goal, accepted=accepted, warm=request.warm)
    return found.point, found.t


def _odds(request: SteerRequest, index: Tensor | None) -> OddsMeasure:
    masks = []
    for ids in request.concept():
        mask = torch.zeros(request.geometry.vocabulary, dtype=torch.bool, device=request.lam.device)
        mask[ids.to(mask.device)] = True
        masks.append(mask if index is None else mask[index])
    return OddsMeasure(*masks)


def _examined(request: SteerRequest, point: NewtonResult, t: Tensor, index: Tensor | None) -> SteerResult:
    """Diagnostics over the whole vocabulary: three products with the unembedding."""
    geometry, lam = request.geometry, point.lam
    still = t == 0  # nothing moves: the very same values
    lam = torch.where(still[:, None], request.lam, lam)
    change = geometry.logits_change(lam - request.lam)  # anew: the certificate takes nothing over from the descent
    p = (request.z + change).softmax(-1)
    slope = geometry.mean(p - request.z.softmax(-1))
    gap = slope + request.alpha * (lam - request.lam) - t[:, None] * request.beta
    length = t.abs() * request.beta.norm(dim=-1)
    resid = torch.where(length > 0, gap.norm(dim=-1) / length.clamp_min(1e-30), torch.zeros_like(length))
    covered = torch.ones_like(t) if index is None else p.gather(-1, index).sum(-1).clamp_max(1.0)
    point.lam = lam
    return described(request, point, change, t, resid, covered, slope)


def _patched(result: SteerResult, better: SteerResult, rows: Tensor) -> SteerResult:
    for name, value in vars(better).items():
        old = getattr(result, name)
        if isinstance(old, Tensor):
            old[rows] = value
        elif isinstance(old, list):
            for row, item in zip(rows.tolist(), value, strict=True):
                old[row] = item
    return result


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
