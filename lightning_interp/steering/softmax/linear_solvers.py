"""Two ways to solve ``(H + alpha I) x = v`` with the softmax's Fisher information ``H``, rows of a batch at once.

Conjugate gradients need only products with ``H`` (two passes over the unembedding each). Plain, they take about as many
as ``H`` has eigenvalues above ``alpha``; preconditioned with the exact inverse for the likeliest tokens alone, which
hold nearly all of ``H``, one or two. The dense form is exact, for small widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradient", "likely_inverse", "solve_dense"]

Map = Callable[[Tensor], Tensor]


def conjugate_gradient(
    product: Map, b: Tensor, *, tolerance: Tensor, max_iterations: int, inverse: Map | None = None, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Solve ``M x = b`` for each row, ``M`` symmetric and positive: ``x`` ``[B, d]``, and each row's products ``[B]``.

    Rows that are done, by their residual's norm or a curvature not above ``least``, are frozen while the others go on,
    so one product ``M v`` serves all. ``inverse`` preconditions: nearly that of ``M``, symmetric and positive.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = _preconditioned(inverse, residual)
    live = residual.norm(dim=-1) > tolerance
    used = torch.zeros(len(b), dtype=torch.long, device=b.device)
    for _ in range(max_iterations):
        if not bool(live.any()):
            break
        image = product(direction)
        curvature = (direction * image).sum(-1)
        used += live
        live = live & (curvature > least)
        length = torch.where(live, square / curvature, torch.zeros_like(square))[:, None]
        x += length * direction
        residual -= length * image
        live = live & (residual.norm(dim=-1) > tolerance)
        ahead, after = _preconditioned(inverse, residual)
        ratio = torch.where(live, after / square, torch.zeros_like(square))[:, None]
        direction = torch.where(live[:, None], ahead + ratio * direction, torch.zeros_like(residual))
        square = after
    return x, used


def _preconditioned(inverse: Map | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``P r`` and ``r . P r``, with ``P = I`` for rows where rounding made it no positive map."""
    plain = residual.square().sum(-1)
    if inverse is None:
        return residual.clone(), plain
    ahead = inverse(residual)
    square = (residual * ahead).sum(-1)
    usable = square > 0
    return torch.where(usable[:, None], ahead, residual), torch.where(usable, square, plain)


def likely_inverse(rows: Tensor, p: Tensor, alpha: float, normal: Tensor | None = None) -> Map | None:
    """The inverse of ``H + alpha I`` as if only some tokens were there, a map of ``[B, d]``, for preconditioning.

    They are each row's likeliest, by the gradients of their logits ``[B, K, d]`` and their probabilities ``[B, K]``;
    with ``normal`` ``[B, d]`` the system lives at right angles to it. None without regularisation, or beyond rounding.
    """
    if alpha <= 0:
        return None
    wide = p.dtype if p.device.type == "mps" else torch.float64  # v loses its digits along the rows, up to 1 / alpha
    rows, weights = rows.to(wide), p.to(wide)
    mean = (weights[:, None] @ rows) / weights.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)[:, None, None]
    scaled = weights.sqrt()[..., None] * (rows - mean)
    inner = scaled @ scaled.mT
    inner.diagonal(dim1=1, dim2=2).add_(alpha)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed.any()):
        return None

    def inverse(v: Tensor) -> Tensor:
        inside = torch.cholesky_solve(scaled @ v.to(wide)[..., None], factor)
        return ((v - (scaled.mT @ inside)[..., 0]) / alpha).to(v.dtype)

    if normal is None:
        return inverse
    raised = inverse(normal)
    height = (normal * raised).sum(-1, keepdim=True)

    def constrained(v: Tensor) -> Tensor:
        x = inverse(v)
        x = x - raised * ((normal * x).sum(-1, keepdim=True) / height)
        return x - normal * (normal * x).sum(-1, keepdim=True)  # rounding of the large x above

    return constrained


def solve_dense(weight: Tensor, p: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Form the covariance of rows ``[V, d]`` under ``p``, factor it (Cholesky) and solve for ``v`` ``[d]``."""
    rows = weight - p @ weight
    covariance = (rows * p[:, None]).T @ rows
    covariance.diagonal().add_(alpha)
    return torch.cholesky_solve(v[:, None], torch.linalg.cholesky(covariance))[:, 0]
