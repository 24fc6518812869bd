"""Newton's method with conjugate gradients for the strictly convex potentials of dual steering, rows at once.

Each potential is ``F(lam) = A(lam) - q . lam + alpha/2 |lam - m|^2``, on all of space or on a hyperplane. Its minimiser
is a point of the regularised dual curve. One iteration costs a transposed product with the unembedding for the
gradient, a product for the step's image, and two for each Hessian-vector product in between; the line search works on
the image alone.

Plain conjugate gradients take about as many products as ``H`` has eigenvalues above ``alpha``; preconditioned with the
exact inverse for the likeliest tokens alone, which hold nearly all of ``H``, one or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from lightning_interp.steering.softmax.arithmetic import centred, exact_arithmetic

__all__ = [
    "REASONS",
    "Family",
    "NewtonResult",
    "Potential",
    "Tolerance",
    "conjugate_gradient",
    "likely_inverse",
    "minimise",
    "rows_of",
    "solve_dense",
]

REASONS = ("converged", "stalled", "max_iter", "budget", "unreachable", "rounding", "max_search")
"""Why a row stopped, by code; the last three are of a search for a step whose points all converged."""
_CONVERGED, _STALLED, _MAX_ITER, _BUDGET = range(4)
_COLUMNS = ("lam", "gradient", "residual", "reason", "newton", "hvps")
_ARMIJO, _FLAT, _SEARCHES = 1e-4, 0.1, 30
_LIKELY = 64  # tokens of which the curvature is inverted exactly, to precondition; that costs about one product
Map = Callable[[Tensor], Tensor]
Tolerance = Tensor | Map
T = TypeVar("T")


def rows_of(part: T, index: Tensor) -> T:
    """A part of a batch's problem for some of its rows; what has no rows of its own serves them all."""
    take: Callable[[Tensor], T] | None = getattr(part, "rows", None)
    return part if take is None else take(index)


class Family(Protocol):
    """An exponential family over some tokens, for ``B`` states at once."""

    def logits(self, lam: Tensor) -> Tensor:
        """``[B, d] -> [B, K]``."""

    def logits_change(self, v: Tensor) -> Tensor:
        """Linear part of :meth:`logits`, ``[B, d] -> [B, K]``."""

    def mean(self, weights: Tensor) -> Tensor:
        """Its transpose, ``[B, K] -> [B, d]``."""

    def gradients(self, index: Tensor) -> Tensor:
        """Gradients of the logits in columns ``index`` ``[B, k]``: ``[B, k, d]``."""


@dataclass
class Potential:
    """``A(lam) - linear . lam + alpha/2 |lam - centre|^2`` for rows ``[B, d]``, moved at right angles to ``normal``."""

    family: Family
    linear: Tensor
    centre: Tensor
    alpha: float
    normal: Tensor | None = None

    def rows(self, index: Tensor) -> Potential:
        """The same for some of the rows."""
        normal = None if self.normal is None else self.normal[index]
        return Potential(rows_of(self.family, index), self.linear[index], self.centre[index], self.alpha, normal)

    def gradient(self, p: Tensor, lam: Tensor) -> Tensor:
        """Of the potential in all of space, ``[B, d]``."""
        return self.family.mean(p) - self.linear + self.alpha * (lam - self.centre)

    def allowed(self, v: Tensor) -> Tensor:
        """The part of ``v`` that is an allowed move."""
        return v if self.normal is None else v - self.normal * (v * self.normal).sum(-1, keepdim=True)

    def curvature(self, p: Tensor, v: Tensor) -> Tensor:
        """Hessian times an allowed move, ``[B, d]``."""
        own = getattr(self.family, "curvature", None)
        if own is not None:
            return self.allowed(own(p, v)) + self.alpha * v
        u = self.family.logits_change(v)
        return self.allowed(self.family.mean(centred(p, u))) + self.alpha * v

    def solve(self, p: Tensor, b: Tensor, *, tolerance: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
        """The allowed move whose product with the Hessian is ``b`` ``[B, d]``, and the products it took."""
        return conjugate_gradient(
            lambda v: self.curvature(p, v),
            b,
            tolerance=tolerance,
            max_iterations=max_iterations,
            inverse=self._nearly_inverse(p),
        )

    def _nearly_inverse(self, p: Tensor) -> Map | None:
        likely = p.topk(min(_LIKELY, p.shape[-1]), dim=-1)
        return likely_inverse(self.family.gradients(likely.indices), likely.values, self.alpha, self.normal)


@dataclass
class NewtonResult:
    """Minimisers and how they were reached, one row each."""

    lam: Tensor
    gradient: Tensor  # of the potential in all of space; on a hyperplane it is along the normal
    residual: Tensor  # norm of its allowed part
    reason: Tensor  # index into REASONS
    newton: Tensor
    hvps: Tensor
    z: Tensor = field(default_factory=lambda: torch.empty(0))  # the family's logits, as the descent kept them

    @property
    def converged(self) -> Tensor:
        """Rows that reached their minimum, bool ``[B]``."""
        return self.reason == _CONVERGED

    def reasons(self) -> list[str]:
        """Why each row stopped, in words."""
        return [REASONS[code] for code in self.reason.tolist()]

    @classmethod
    def empty(cls, lam: Tensor) -> Self:
        """Room for the rows of ``lam``."""
        size, counts = lam.new_zeros(len(lam)), torch.zeros(len(lam), dtype=torch.long, device=lam.device)
        return cls(lam.clone(), torch.zeros_like(lam), size, counts + _MAX_ITER, counts.clone(), counts.clone())

    def put(self, rows: Tensor, other: NewtonResult, index: Tensor) -> None:
        """Copy rows ``index`` of another result into ``rows`` of this one, but for the logits."""
        for name in _COLUMNS:
            getattr(self, name)[rows] = getattr(other, name)[index]


def minimise(
    potential: Potential,
    start: Tensor,
    tolerance: Tolerance,
    max_newton: int = 30,
    cg_max: int = 50,
    hvp_budget: int | None = None,
) -> NewtonResult:
    """Minimise a potential from ``start`` ``[B, d]``; a row that does not converge has its best point and the reason.

    ``tolerance`` is the norm of the allowed gradient ``[B]`` at which a row is done, or a function of the gradient.
    """
    with exact_arithmetic(start.device):
        return _Descent(potential, start, tolerance, (max_newton, cg_max, hvp_budget)).run()


class _Descent:
    """The rows that are still on their way."""

    def __init__(
        self, potential: Potential, start: Tensor, tolerance: Tolerance, limits: tuple[int, int, int | None]
    ) -> None:
        self.potential, self.tolerance = potential, tolerance
        self.max_newton, self.cg_max, self.hvp_budget = limits
        self.found = NewtonResult.empty(start)
        self.here = NewtonResult.empty(start)
        self.rows = torch.arange(len(start), device=start.device)
        self.z = potential.family.logits(start)
        self.found.z = self.z.clone()
        self.first = start.new_zeros(len(start))
        self.unsure = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        self.before = start.new_full((len(start),), float("inf"))
        self.kept: dict[str, Tensor] = {}
        self.kept_z = self.z

    def run(self) -> NewtonResult:
        for iteration in range(self.max_newton + 1):
            if not len(self.rows):
                break
            p = self.z.softmax(-1)
            self._look(p, iteration, last=iteration == self.max_newton)
            if not len(self.rows):
                break
            self._step(self.z.softmax(-1) if len(p) != len(self.rows) else p)
        return self.found

    def _look(self, p: Tensor, iteration: int, *, last: bool) -> None:
        """Find the gradient, and let the rows go that are done."""
        here, potential = self.here, self.potential
        here.gradient = potential.gradient(p, here.lam)
        here.residual = potential.allowed(here.gradient).norm(dim=-1)
        if iteration == 0:
            self.first = here.residual.clone()
        wanted = self.tolerance(here.gradient) if callable(self.tolerance) else self.tolerance[self.rows]
        eps = torch.finfo(here.lam.dtype).eps
        floor = 32 * eps * (potential.linear.norm(dim=-1) + potential.alpha * here.lam.norm(dim=-1))
        converged = here.residual <= torch.maximum(wanted.to(floor), floor)
        stalled = ~converged & (self.unsure & (here.residual >= 0.9 * self.before) | ~here.residual.isfinite())
        self._undo(stalled & ~(here.residual <= self.before))  # not ">", which lets NaN stay
        spent = torch.zeros_like(stalled) if self.hvp_budget is None else here.hvps >= self.hvp_budget
        spent = spent & ~converged & ~stalled
        here.newton += iteration - here.newton
        here.reason[:] = _MAX_ITER
        here.reason[converged], here.reason[stalled], here.reason[spent] = _CONVERGED, _STALLED, _BUDGET
        self.before = here.residual.clone()
        done = converged | stalled | spent
        self._release(torch.ones_like(done) if last else done)

    def _undo(self, worse: Tensor) -> None:
        """Take back the last step of rows that it left worse off; they stop here."""
        for name, old in self.kept.items():
            now = getattr(self.here, name)
            setattr(self.here, name, torch.where(worse[:, None] if now.dim() > 1 else worse, old, now))
        if self.kept:
            self.z = torch.where(worse[:, None], self.kept_z, self.z)

    def _release(self, done: Tensor) -> None:
        if not bool(done.any()):
            return
        index = done.nonzero().flatten()
        self.found.put(self.rows[index], self.here, index)
        self.found.z[self.rows[index]] = self.z[index]
        keep = (~done).nonzero().flatten()
        self.rows, self.z, self.first = self.rows[keep], self.z[keep], self.first[keep]
        self.unsure, self.before, self.kept = self.unsure[keep], self.before[keep], {}
        if len(keep):
            self.potential = self.potential.rows(keep)
        self.here = NewtonResult(*(getattr(self.here, name)[keep] for name in _COLUMNS))

    def _step(self, p: Tensor) -> None:
        here, potential = self.here, self.potential
        self.kept, self.kept_z = {name: getattr(here, name) for name in ("lam", "gradient", "residual")}, self.z
        # Twice: near the minimum the gradient is nearly all normal, and what rounding leaves of that once is as large
        # as the part that is wanted.
        r = potential.allowed(potential.allowed(here.gradient))
        # Tighter than this, the linear solve would chase rounding, which on a hyperplane has no curvature to stop it.
        loose = (here.residual / self.first.clamp_min(torch.finfo(r.dtype).tiny)).sqrt()
        loose = loose.clamp(min=torch.finfo(r.dtype).eps ** 0.4, max=0.1)
        limit = self.cg_max if self.hvp_budget is None else min(self.cg_max, self.hvp_budget)
        step, used = potential.solve(p, r, tolerance=loose * here.residual, max_iterations=limit)
        here.hvps += used
        step = potential.allowed(step)  # the solve may have left the hyperplane, and nothing else would bring it back
        image = potential.family.logits_change(step)
        length, self.unsure = _line_search(potential, here.lam, self.z, step, image, (r * step).sum(-1))
        here.lam = here.lam - length[:, None] * step
        self.z = self.z - length[:, None] * image


def _line_search(
    potential: Potential, lam: Tensor, z: Tensor, step: Tensor, image: Tensor, decrease: Tensor
) -> tuple[Tensor, Tensor]:
    """How far to go along ``-step`` ``[B]``: all of it, or else near the minimum of the convex function along it.

    Also where the predicted decrease is below the potential's rounding ``[B]``, so that the step was taken on trust.
    """
    away = lam - potential.centre
    slope0 = (potential.linear * step).sum(-1) - potential.alpha * (away * step).sum(-1)
    bend = potential.alpha * step.square().sum(-1)
    base = z.logsumexp(-1)
    ones = torch.ones_like(base)

    def value(k: Tensor) -> Tensor:
        return (z - k[:, None] * image).logsumexp(-1) - base + k * slope0 + 0.5 * k * k * bend

    rounding = 8 * torch.finfo(z.dtype).eps * (1 + base.abs())
    unsure = decrease <= rounding
    fine = unsure | (value(ones) <= -_ARMIJO * decrease)
    if bool(fine.all()):
        return ones, unsure
    low, high, k = torch.zeros_like(ones), ones.clone(), 0.5 * ones
    for _ in range(_SEARCHES):
        q = (z - k[:, None] * image).softmax(-1)
        mean = (q * image).sum(-1)
        slope = slope0 - mean + k * bend
        second = (q * (image - mean[:, None]).square()).sum(-1) + bend
        flat = (slope.abs() <= _FLAT * decrease) & (value(k) < 0)  # the slope may be small far behind the minimum too
        if bool((fine | flat).all()):
            break
        low, high = torch.where(slope < 0, k, low), torch.where(slope < 0, high, k)
        newton = k - slope / second.clamp_min(torch.finfo(z.dtype).tiny)
        inside = (newton > low) & (newton < high)
        k = torch.where(flat, k, torch.where(inside, newton, 0.5 * (low + high)))
    good = value(k) < 0
    return torch.where(fine, ones, torch.where(good, k, low.clamp_min(1e-12))), unsure


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
