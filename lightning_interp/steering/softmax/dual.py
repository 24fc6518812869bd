"""Dual steering: move one concept of a next-token distribution and leave the rest alone as far as the family allows.

Ordinary steering adds a probe's direction ``beta`` to the state. A probe is a linear functional of the state, though,
so it lives in the dual space, and dual steering adds it to the dual coordinate: ``phi(lam) = phi(lam0) + t beta``.
Among all states with the same probe value, that one has the smallest ``KL(P_start || P_end)`` (arXiv 2602.15293,
Theorem 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import exact_arithmetic
from lightning_interp.steering.softmax.curve import DualCurve, SolverOptions
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import Family, NewtonResult
from lightning_interp.steering.softmax.request import SteerRequest, Target, TokenPairs, check_alpha
from lightning_interp.steering.softmax.result import SteerResult, described
from lightning_interp.steering.softmax.support import PolishedFamily, RestrictedFamily, choose_support, restrict
from lightning_interp.steering.softmax.targets import KlMeasure, OddsMeasure, search_step

__all__ = ["combine", "dual_steer"]

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
    pairs: TokenPairs | None = None,
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
        Steered states with diagnostics. A target that cannot be reached gives the nearest point and ``reached`` False.

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
    part, index = _restricted(request, size)
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


def _restricted(request: SteerRequest, size: int) -> tuple[RestrictedFamily, Tensor]:
    push, end = request.geometry.logits_change(request.beta), None
    if request.kind == "probe_value":
        step = (request.goal - (request.beta * request.lam).sum(-1)) / request.beta.square().sum(-1)
        end = request.z + step[:, None] * push
    elif request.kind == "t":
        push = push * torch.sign(request.goal)[:, None]
    pairs = request.pairs
    always = None if pairs is None else torch.cat([pairs.base_ids, pairs.target_ids])
    index = choose_support(request.z, push, size, end=end, always=always)
    return restrict(request.geometry, index, request.lam.dtype), index


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
        found = search_step(curve, KlMeasure(), goal, accepted=0.5 * loose * goal, warm=request.warm)
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
    z = geometry.logits(lam)  # anew: the certificate takes nothing over from the descent
    p = z.softmax(-1)
    gap = geometry.mean(p - request.z.softmax(-1)) + request.alpha * (lam - request.lam) - t[:, None] * request.beta
    length = t.abs() * request.beta.norm(dim=-1)
    resid = torch.where(length > 0, gap.norm(dim=-1) / length.clamp_min(1e-30), torch.zeros_like(length))
    covered = torch.ones_like(t) if index is None else p.gather(-1, index).sum(-1).clamp_max(1.0)
    point.lam = lam
    return described(request, point, z, t, resid, covered)


def _patched(result: SteerResult, better: SteerResult, rows: Tensor) -> SteerResult:
    for name, value in vars(better).items():
        old = getattr(result, name)
        if isinstance(old, Tensor):
            old[rows] = value
        elif isinstance(old, list):
            for row, item in zip(rows.tolist(), value, strict=True):
                old[row] = item
    return result
