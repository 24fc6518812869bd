"""Three ways to solve ``(H + alpha I) x = v`` with the softmax's Fisher information ``H``, rows of a batch at once.

Conjugate gradients need only products with ``H`` (two passes over the unembedding each) and about as many of them as
``H`` has eigenvalues above ``alpha``, which is few where the distribution is peaked. The dense and the Woodbury form
are exact, for small widths and small vocabularies. No preconditioner: the diagonal one makes it slower here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["conjugate_gradient", "solve_dense", "solve_woodbury"]


def conjugate_gradient(
    product: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    *,
    tolerance: torch.Tensor,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve ``M x = b`` for each row, with ``M`` symmetric and positive.

    Rows that are done are frozen while the others go on, so one product serves all.

    Args:
        product: ``M v`` for ``[B, d]``.
        b: Right-hand sides ``[B, d]``.
        tolerance: Residual norm at which a row is done, ``[B]``.
        max_iterations: Products at most.

    Returns:
        ``x`` ``[B, d]`` and the products each row needed ``[B]``.

    Example:
        >>> M = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> x, used = conjugate_gradient(lambda v: v @ M, torch.tensor([[1.0, 0.0]]), tolerance=torch.tensor([1e-6]),
        ...                              max_iterations=9)
        >>> torch.allclose(x @ M, torch.tensor([[1.0, 0.0]]), atol=1e-5), int(used)
        (True, 2)
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual.square().sum(-1)
    live = square.sqrt() > tolerance
    used = torch.zeros(len(b), dtype=torch.long, device=b.device)
    for _ in range(max_iterations):
        if not bool(live.any()):
            break
        image = product(direction)
        curvature = (direction * image).sum(-1)
        used += live
        live = live & (curvature > 0)
        length = torch.where(live, square / curvature, torch.zeros_like(square))[:, None]
        x += length * direction
        residual -= length * image
        after = residual.square().sum(-1)
        live = live & (after.sqrt() > tolerance)
        ratio = torch.where(live, after / square, torch.zeros_like(square))[:, None]
        direction = torch.where(live[:, None], residual + ratio * direction, torch.zeros_like(residual))
        square = after
    return x, used


def solve_dense(weight: torch.Tensor, p: torch.Tensor, v: torch.Tensor, alpha: float) -> torch.Tensor:
    """Form the covariance ``[d, d]`` and factor it (Cholesky); the reference for small widths.

    Args:
        weight: Rows ``g_y`` ``[V, d]``.
        p: Probabilities ``[V]``.
        v: Right-hand side ``[d]``.
        alpha: Regularisation, > 0 unless the covariance has full rank.

    Returns:
        ``x`` ``[d]``.
    """
    rows = weight - p @ weight
    covariance = (rows * p[:, None]).T @ rows
    covariance.diagonal().add_(alpha)
    return torch.cholesky_solve(v[:, None], torch.linalg.cholesky(covariance))[:, 0]


def solve_woodbury(weight: torch.Tensor, p: torch.Tensor, v: torch.Tensor, alpha: float) -> torch.Tensor:
    """Solve in the space of tokens instead, ``[K, K]``: exact and cheap for small supports.

    Args:
        weight: Rows ``g_y`` ``[K, d]``.
        p: Probabilities ``[K]``.
        v: Right-hand side ``[d]``.
        alpha: Regularisation, > 0.

    Returns:
        ``x`` ``[d]``.
    """
    rows = p.sqrt()[:, None] * (weight - p @ weight)
    inner = rows @ rows.T
    inner.diagonal().add_(alpha)
    solved = torch.cholesky_solve((rows @ v)[:, None], torch.linalg.cholesky(inner))[:, 0]
    return (v - rows.T @ solved) / alpha
