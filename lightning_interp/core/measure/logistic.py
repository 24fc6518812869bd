"""Logistic regression with an L2 penalty, solved to the end by Newton's method in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.errors import DataError, RecipeError

__all__ = ["calibrate", "fit_logistic"]

_ARMIJO = 1e-4
_SMALLEST_STEP = 1e-10


def fit_logistic(
    x: Tensor, y: Tensor, *, l2: float = 1.0, tolerance: float = 1e-10, max_iter: int = 200
) -> tuple[Tensor, float]:
    """``(w, b)`` that minimise ``sum log(1 + exp(-(+-)(x w + b))) + l2/2 |w|^2``, float64, for ``x`` ``[n, d]``.

    ``y`` ``[n]`` are classes 0 and 1, or probabilities of class 1 (for which ``l2`` may be 0). The solve ends when
    Newton's method predicts that the loss falls by less than ``tolerance``. With more columns than rows it is done in
    the span of the rows, where the solution lies.
    """
    x, y = x.detach().double(), y.detach().double().to(x.device)
    if l2 < 0 or (l2 == 0 and bool(((y == 0) | (y == 1)).any())):
        raise RecipeError(f"fit_logistic(l2={l2}): expected a penalty above 0; without one, separable classes diverge.")
    if len(y) == 0 or bool((y == y[0]).all()):
        raise DataError(f"fit_logistic() got {len(y)} rows of one class; expected rows of both classes.")
    basis = None
    if x.shape[1] > x.shape[0]:
        u, s, basis = torch.linalg.svd(x, full_matrices=False)
        x = u * s
    found = _newton(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), y, l2, tolerance, max_iter)
    weight = found[:-1] if basis is None else found[:-1] @ basis
    return weight, float(found[-1])


def calibrate(values: Tensor, y: Tensor) -> tuple[float, float]:
    """Scale and offset under which ``sigmoid(scale * (value + offset))`` is the probability of class ``y = 1``.

    Logistic regression on Platt's smoothed labels (1999), which stays finite where the classes are separated: the scale
    then says how far the sample supports certainty.
    """
    values, y = values.detach().double(), y.detach().double().to(values.device)
    middle, spread = values.mean(), values.std(correction=0)
    if not bool(spread > 0):
        raise DataError(
            f"The {len(values)} probe values to calibrate on are all {float(middle):g}; expected two classes."
        )
    ones = float(y.sum())
    zeros = len(y) - ones
    smoothed = torch.where(y > 0, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    weight, bias = fit_logistic(((values - middle) / spread)[:, None], smoothed, l2=0.0)
    slope = float(weight[0]) / float(spread)
    if abs(float(weight[0])) < 1e-8:
        raise DataError(f"The {len(values)} probe values to calibrate on tell nothing about the class (slope 0).")
    return slope, bias / slope - float(middle)


def _newton(x: Tensor, y: Tensor, l2: float, tolerance: float, max_iter: int) -> Tensor:
    """Minimise over the weights of ``x`` ``[n, k]``, of which the last is not penalised."""
    penalty = torch.full_like(x[0], l2)
    penalty[-1] = 0.0
    weights = torch.zeros_like(x[0])
    decrease = torch.inf
    for _ in range(max_iter):
        gradient, p = _gradient(x, y, penalty, weights)
        hessian = (x.T * (p * (1 - p))) @ x + torch.diag(penalty)
        hessian.diagonal().mul_(1 + 1e-12)  # keeps it solvable where all probabilities are near 0 or 1
        step: Tensor = torch.linalg.solve(hessian, gradient)
        decrease = float(gradient @ step) / 2
        # The second follows from the first where the step is Newton's, and holds whatever the solve has made of it.
        if decrease <= tolerance and bool(gradient.square().sum() <= 2 * tolerance * hessian.trace()):
            last = weights - step  # here each step squares the error, unless rounding has it all
            return last if bool(_gradient(x, y, penalty, last)[0].norm() <= gradient.norm()) else weights
        weights = _descend(x, y, penalty, weights, step, 2 * decrease)
    raise DataError(
        f"Logistic regression on {len(y)} rows did not converge in {max_iter} iterations (the loss "
        f"would fall by another {decrease:.2g}). Raise l2, or scale the features."
    )


def _gradient(x: Tensor, y: Tensor, penalty: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of the penalised loss ``[k]``, and the probabilities ``[n]``."""
    p = torch.sigmoid(x @ weights)
    return x.T @ (p - y) + penalty * weights, p


def _descend(x: Tensor, y: Tensor, penalty: Tensor, weights: Tensor, step: Tensor, decrease: float) -> Tensor:
    """Go along the Newton step as far as the loss falls enough (Armijo's rule)."""

    def loss(at: Tensor) -> Tensor:
        misfit = F.binary_cross_entropy_with_logits(x @ at, y, reduction="sum")
        total: Tensor = misfit + 0.5 * (penalty * at * at).sum()
        return total

    size, now = 1.0, loss(weights)
    slack = 1e-14 * float(now.abs())  # rounding of the loss itself
    while size > _SMALLEST_STEP and bool(loss(weights - size * step) > now - _ARMIJO * size * decrease + slack):
        size /= 2
    return weights - size * step
