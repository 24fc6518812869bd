"""Ordinary steering at the same targets: ``lam0 + t beta``, the baseline that dual steering is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.arithmetic import divergence, exact_arithmetic
from lightning_interp.steering.softmax.curve import OddsMeasure
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import NewtonResult
from lightning_interp.steering.softmax.request import SteerRequest, SteerResult, Target, described
from lightning_interp.steering.softmax.turning import FIRST, MORE, bracket, rise_far_out, steps_outwards

__all__ = ["euclidean_steer", "line_step"]

_DOUBLINGS, _HALVINGS = 110, 60


def euclidean_steer(
    geometry: SoftmaxGeometry,
    lam: Tensor,
    direction: Any,
    *,
    pairs: CounterfactualPairs | None = None,
    bias: float | None = None,
    **target: float | Tensor | None,
) -> SteerResult:
    """Ordinary steering ``lam + t beta`` at the same targets as :func:`dual_steer`, for comparison.

    Args:
        geometry: Of the model's head.
        lam: States ``[B, d]`` or ``[d]``.
        direction: ``beta`` ``[d]`` or ``[B, d]``, or a probe.
        pairs: Tokens of the concept, for ``target_prob``.
        bias: Offset of the probe, for ``probe_prob``.
        **target: As for :func:`dual_steer`.

    Returns:
        Steered states with the same diagnostics; no products are counted, as none are made.

    Raises:
        IncompatibleModelError: If a state or direction has another width, or is not finite.
        RecipeError: If the target cannot be used.

    Example:
        >>> geometry = SoftmaxGeometry(torch.eye(2))
        >>> euclidean_steer(geometry, torch.zeros(2), torch.tensor([1.0, -1.0]), probe_value=2.0).lam.tolist()
        [[1.0, -1.0]]
    """
    request = SteerRequest.made(geometry, lam, direction, Target(**target), pairs, bias)
    with torch.no_grad(), exact_arithmetic(request.lam.device):
        chunks = torch.split(torch.arange(len(request.lam), device=request.lam.device), geometry.max_rows)
        return SteerResult.joined([_walk_straight(request.rows(index)) for index in chunks])


def line_step(measure: Callable[[Tensor], Tensor], goal: Tensor) -> Tensor:
    """The steps ``[B]`` at which a growing measure has its goal, or comes nearest to it, by doubling and halving."""
    start = measure(torch.zeros_like(goal))
    sign = torch.where(start < goal, 1.0, -1.0).to(goal)
    near, far = torch.zeros_like(goal), sign
    best, best_error = near.clone(), (start - goal).abs()
    for _ in range(_DOUBLINGS):
        value = measure(far)
        error = (value - goal).abs()
        better = error < best_error
        best, best_error = torch.where(better, far, best), torch.where(better, error, best_error)
        short = sign * (goal - value) > 0
        if not bool(short.any()) or not bool(value.isfinite().all()):
            break
        near, far = torch.where(short, far, near), torch.where(short, 2 * far, far)
    for _ in range(_HALVINGS):
        middle = 0.5 * (near + far)
        value = measure(middle)
        error = (value - goal).abs()
        better = error <= best_error
        best, best_error = torch.where(better, middle, best), torch.where(better, error, best_error)
        short = sign * (goal - value) > 0
        near, far = torch.where(short, middle, near), torch.where(short, far, middle)
    return best


def _walk_straight(request: SteerRequest) -> SteerResult:
    beta, push = request.beta, request.geometry.logits_change(request.beta)
    if request.kind == "t":
        t = request.goal
    elif request.kind == "probe_value":
        t = (request.goal - (beta * request.lam).sum(-1)) / beta.square().sum(-1)
    else:
        t = _step_on_line(request, push)
    point = NewtonResult.empty(request.lam + t[:, None] * beta)
    point.reason[:] = 0
    nan, one = torch.full_like(t, torch.nan), torch.ones_like(t)
    change = request.geometry.logits_change(point.lam - request.lam)
    result = described(request, point, change, t, nan, one)
    if request.kind in ("kl_budget", "target_prob"):  # the bisection ended as near to it as this line comes
        rows = zip(result.reason, result.reached.tolist(), strict=True)
        result.reason = [reason if reached else "unreachable" for reason, reached in rows]
    return result


def _step_on_line(request: SteerRequest, push: Tensor) -> Tensor:
    first, goal = request.z.log_softmax(-1), request.goal
    if request.kind == "kl_budget":
        return line_step(lambda t: torch.sign(t) * divergence(first, t[:, None] * push), goal)
    ids, sides = torch.cat(request.concept()), torch.arange(sum(len(side) for side in request.concept()))
    z, ahead = request.z[:, ids], push[:, ids]
    base = sides.to(z.device) < len(request.concept()[0])
    odds = OddsMeasure(base, ~base)

    def value(t: Tensor) -> Tensor:
        return odds.value(z + t[:, None] * ahead)

    goal = goal.logit()
    wanted = goal.abs() + MORE + 3 * z.abs().nan_to_num(posinf=0.0).amax(-1)
    last = wanted / rise_far_out(ahead, odds)
    steps = steps_outwards(torch.minimum(last, FIRST / push.abs().amax(-1)), last)

    def look(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = (odds.moved(z + t[:, None] * ahead) * ahead).sum(-1)
        return value(t), slope, divergence(first, t[:, None] * push)

    low, high, falls, _ = bracket(look, goal, steps, 1e-4 * goal.abs().clamp_min(1.0))
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        short = (value(middle) < goal) != falls
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return 0.5 * (low + high)
