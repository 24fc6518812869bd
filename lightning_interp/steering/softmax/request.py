"""What steering is asked for, checked once and put into one form, and what a solve found, one row a state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.arithmetic import ROUNDED, divergence, entropy, rounding, working_dtype
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.newton import NewtonResult

__all__ = ["SteerRequest", "SteerResult", "Target", "check_alpha", "described", "ends_there", "rounded"]

TARGETS = ("t", "probe_value", "probe_delta", "probe_prob", "target_prob", "kl_budget")


@dataclass(frozen=True)
class Target:
    """Where to steer to: exactly one of these, a number or one number a row.

    Args:
        t: Dual step (with ``beta`` as given); of the state, for Euclidean steering.
        probe_value: ``beta . lam``.
        probe_delta: Change of ``beta . lam``.
        probe_prob: ``sigmoid(beta . lam + bias)``.
        target_prob: ``P(target tokens) / P(base or target tokens)``, which needs pairs.
        kl_budget: ``KL(P_start || P_end)`` in nats; the sign of the step is that of ``beta``.

    Raises:
        RecipeError: If not exactly one is given, or a value is out of its range.

    Example:
        >>> Target(kl_budget=0.5).kind, Target(t=torch.tensor([0.0, 1.0])).values(2, torch.float32, "cpu").tolist()
        ('kl_budget', [0.0, 1.0])
    """

    t: float | Tensor | None = None
    probe_value: float | Tensor | None = None
    probe_delta: float | Tensor | None = None
    probe_prob: float | Tensor | None = None
    target_prob: float | Tensor | None = None
    kl_budget: float | Tensor | None = None

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(f"A steering target needs exactly one of {', '.join(TARGETS)}; got {given or 'none'}.")
        values = self.numbers.double().flatten()
        bad, expected = ~values.isfinite(), "finite numbers"
        if given[0] in ("probe_prob", "target_prob"):
            bad, expected = bad | (values <= 0) | (values >= 1), "probabilities inside (0, 1)"
        if given[0] == "kl_budget":
            bad, expected = bad | (values < 0), "nats >= 0"
        if not len(values) or bool(bad.any()):
            shown = float(values[bad][0]) if len(values) else "nothing"
            raise RecipeError(f"Steering target {given[0]}={shown}: expected {expected}.")

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(name for name in TARGETS if getattr(self, name) is not None)

    @property
    def numbers(self) -> Tensor:
        """What is given, as a tensor that keeps all digits of a Python number."""
        given = getattr(self, self.kind)
        return given.detach() if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)

    def values(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """One value a row ``[B]``; with fewer (one a prompt, for beams) each is repeated.

        Raises:
            RecipeError: If the number of values does not divide that of the rows.
        """
        values = self.numbers.to(device=device, dtype=dtype).flatten()
        if rows % len(values):
            raise RecipeError(
                f"Steering target {self.kind} has {len(values)} values, but there are {rows} rows. Pass one number, or "
                "one for each row (or for each prompt, with several beams or samples a prompt)."
            )
        return values.repeat_interleave(rows // len(values))


@dataclass
class SteerRequest:
    """Steering of some states ``[B, d]`` along ``beta`` ``[B, d]``, in the working dtype."""

    geometry: SoftmaxGeometry
    lam: Tensor
    beta: Tensor
    kind: str  # t, probe_value, target_prob or kl_budget, to which the other targets come down
    goal: Tensor  # [B]
    pairs: CounterfactualPairs | None
    alpha: float
    support: int | None
    options: SolverOptions
    warm: tuple[Tensor, Tensor] | None = None  # a point [B, d] and its step [B] from a coarser solve
    _z: Tensor | None = field(default=None, repr=False)

    @classmethod
    def made(
        cls,
        geometry: SoftmaxGeometry,
        lam: Tensor,
        direction: Any,
        target: Target,
        pairs: CounterfactualPairs | None,
        bias: float | None,
        alpha: float | Literal["auto"] = 0.0,
        support: int | None = None,
        options: SolverOptions | None = None,
    ) -> SteerRequest:
        """Check what a user asks for."""
        given = direction if isinstance(direction, Tensor) else direction.direction
        dtype = working_dtype(geometry.weight, lam)
        states = lam.detach().reshape(-1, lam.shape[-1]).to(dtype)
        beta = given.detach().to(states)
        beta = beta.expand(len(states), -1) if beta.dim() == 1 else beta
        _check_vectors(geometry, states, beta)
        if support is not None and support < 4:
            raise RecipeError(f"support={support}: expected at least 4 tokens, or None for the whole vocabulary.")
        own = getattr(direction, "alpha", None)
        resolved = geometry.resolve_alpha(own if alpha == "auto" and own is not None else alpha)
        kind, goal = target.kind, target.values(len(states), dtype, states.device)
        if kind == "probe_delta":
            kind, goal = "probe_value", goal + (beta * states).sum(-1)
        elif kind == "probe_prob":
            offset = getattr(direction, "bias", 0.0) if bias is None else bias
            kind, goal = "probe_value", goal.logit() / getattr(direction, "scale", 1.0) - float(offset)
        request = cls(geometry, states, beta, kind, goal, pairs, resolved, support, options or SolverOptions())
        if kind == "target_prob":
            request.concept()
        return request

    def rows(self, index: Tensor) -> SteerRequest:
        """The same for some of the rows."""
        taken: dict[str, Any] = {name: getattr(self, name)[index] for name in ("lam", "beta", "goal")}
        return replace(self, **taken, warm=None, _z=None)

    @property
    def z(self) -> Tensor:
        """Logits of the starts over the whole vocabulary."""
        if self._z is None:
            self._z = self.geometry.logits(self.lam)
        return self._z

    def concept(self) -> tuple[Tensor, Tensor]:
        """Token ids of the base and the target side; refused without pairs."""
        if self.pairs is None:
            raise RecipeError("The target target_prob needs pairs=, the tokens of the concept's two sides.")
        return self.pairs.base_ids.to(self.lam.device), self.pairs.target_ids.to(self.lam.device)


def _check_vectors(geometry: SoftmaxGeometry, states: Tensor, beta: Tensor) -> None:
    geometry.check_state(states, beta)
    if beta.shape != states.shape:
        raise IncompatibleModelError(f"{len(beta)} directions for {len(states)} states; expected one, or one a state.")
    for name, values in (("state to steer holds", states), ("steering direction is", beta)):
        if not bool(values.isfinite().all()):
            odd = "NaN" if bool(values.isnan().any()) else "an infinite value"
            raise IncompatibleModelError(f"A {name} {odd}; expected finite values.")
    if bool((beta.norm(dim=-1) == 0).any()):
        raise IncompatibleModelError("A steering direction is zero; expected values that are not all zero.")


def check_alpha(kind: str, alpha: float) -> None:
    """Refuse a regularisation under which a target may not exist."""
    if not math.isfinite(alpha) or alpha < 0 or (alpha == 0 and kind in ("t", "target_prob", "kl_budget")):
        raise RecipeError(
            f"alpha={alpha:g} with the target {kind}: without regularisation a dual step leaves the hull of the "
            "unembedding at a finite length. Use alpha > 0, or a probe target with alpha >= 0."
        )


CERTIFIED = 1e-2
"""Relative error of the dual coordinate, over the whole vocabulary, up to which a row counts as certified."""


@dataclass
class SteerResult:
    """Steered states and their diagnostics, one row a state.

    Args:
        lam: Steered states ``[B, d]``, in the working dtype.
        t: Step along the direction as given ``[B]``: of the dual coordinate, or of the state in Euclidean steering.
        reached: Whether the solve converged and these states meet the target (:func:`ends_there`), bool ``[B]``.
        reason: Why each row stopped, ``converged`` exactly where it reached the target. A solve of a point: ``stalled``
            (rounding), ``max_iter``, ``budget`` (of products). A search for a step: ``unreachable`` (no step was
            found that has the goal; on both sides, for odds), ``rounding`` (none lies between the last two),
            ``max_search``.
        newton, hvps: Newton iterations and Hessian-vector products ``[B]``.
        probe_before, probe_after: ``beta . lam`` at the start and at the end ``[B]``.
        kl: ``KL(P_start || P_end)`` in nats, over the whole vocabulary ``[B]``.
        entropy_before, entropy_after: In nats ``[B]``.
        rel_resid: ``|phi_a(lam) - phi_a(lam0) - t beta| / (|t| |beta|)`` over the whole vocabulary ``[B]``; 0 where
            nothing moved, NaN for Euclidean steering.
        covered: Probability at the end that the support of the solve covers ``[B]``; 1 for the whole vocabulary.
        certified: Whether ``rel_resid`` is within the accepted error and the KL is a number, bool ``[B]``.
        alpha: Regularisation that was used.
    """

    lam: Tensor
    t: Tensor
    reached: Tensor
    reason: list[str]
    newton: Tensor
    hvps: Tensor
    probe_before: Tensor
    probe_after: Tensor
    kl: Tensor
    entropy_before: Tensor
    entropy_after: Tensor
    rel_resid: Tensor
    covered: Tensor
    certified: Tensor
    alpha: float

    def table(self) -> list[dict[str, Any]]:
        """One plain row a state, without the state itself."""
        columns = {name: value for name, value in vars(self).items() if name not in ("lam", "alpha")}
        plain = {k: v if isinstance(v, list) else v.tolist() for k, v in columns.items()}
        return [{name: plain[name][row] for name in plain} | {"alpha": self.alpha} for row in range(len(self.lam))]

    @classmethod
    def joined(cls, parts: Sequence[SteerResult]) -> Self:
        """One result of several, in order."""
        names = [name for name in vars(parts[0]) if name not in ("alpha", "reason")]
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(alpha=parts[0].alpha, reason=[reason for part in parts for reason in part.reason], **columns)


def described(
    request: SteerRequest,
    point: NewtonResult,
    change: Tensor,
    t: Tensor,
    resid: Tensor,
    covered: Tensor,
    slope: Tensor | None = None,
) -> SteerResult:
    """Diagnostics of states whose logits moved by ``change`` ``[B, V]`` and their mean gradient by ``slope``."""
    beta, lam, geometry, z = request.beta, point.lam, request.geometry, request.z + change
    kl = geometry.kl_of_move(request.z, z, change)
    there = ends_there(request, lam, t, change, resid, slope)
    said = zip(point.reasons(), there.tolist(), strict=True)
    entropies = [entropy(geometry.capped(logits).log_softmax(-1)) for logits in (request.z, z)]
    return SteerResult(
        lam=lam,
        t=t,
        reached=point.converged & there,
        reason=["stalled" if name == "converged" and not ends else name for name, ends in said],
        newton=point.newton,
        hvps=point.hvps,
        probe_before=(beta * request.lam).sum(-1),
        probe_after=(beta * lam).sum(-1),
        kl=kl,
        entropy_before=entropies[0],
        entropy_after=entropies[1],
        rel_resid=resid,
        covered=covered,
        certified=(resid <= max(CERTIFIED, 10 * request.options.accepted(lam.dtype))) & kl.isfinite(),
        alpha=request.alpha,
    )


def rounded(geometry: SoftmaxGeometry, start: Tensor, found: SteerResult, beta: Tensor, stored: Tensor) -> SteerResult:
    """A result whose divergence and probe values are those of states ``[B, d]`` that were rounded to be stored."""
    dtype = found.lam.dtype
    if stored.dtype == dtype:
        return found
    kl = []
    for first, last in zip(*(torch.split(x, geometry.max_rows) for x in (start, stored)), strict=True):
        z, change = geometry.logits(first.to(dtype)), geometry.logits_change(last.to(dtype) - first.to(dtype))
        kl.append(geometry.kl_of_move(z, z + change, change))
    return replace(found, lam=stored.to(dtype), kl=torch.cat(kl), probe_after=stored.to(dtype) @ beta.to(found.lam))


def ends_there(
    request: SteerRequest, lam: Tensor, t: Tensor, change: Tensor, resid: Tensor, slope: Tensor | None = None
) -> Tensor:
    """Whether states meet what was asked for ``[B]``, from the states alone and nothing that a solver says.

    A dual step may be off by ten times the accepted share, a probe value by that share of the move, a KL or odds by
    twice ``target_rtol`` (ten times for a walk in the state, as its line search does), and all by what the rounding of
    the states makes of it. NaN is False. A target is one of the family's logits, without the cap.
    """
    options, goal, beta, z = request.options, request.goal, request.beta, request.z + change
    eps, size, length = 64 * torch.finfo(lam.dtype).eps, lam.norm(dim=-1), beta.norm(dim=-1)
    slack = torch.where(resid.isnan(), 10.0, 2.0) * options.target_rtol
    if request.kind == "t":
        walked = (lam - request.lam - t[:, None] * beta).norm(dim=-1)
        dual = 10 * options.accepted(lam.dtype) + eps * (1 + request.alpha * size / length)
        straight = walked <= eps * (size + t.abs() * length)
        near = (t == goal) & torch.where(resid.isnan(), straight, (t == 0) | (resid <= dual))
    elif request.kind == "probe_value":
        move = (goal - (beta * request.lam).sum(-1)).abs()
        rounded = eps * length * (size + request.lam.norm(dim=-1))
        near = ((beta * lam).sum(-1) - goal).abs() <= options.accepted(lam.dtype) * move + rounded
    elif request.kind == "kl_budget":
        error = (divergence(request.z.log_softmax(-1), change) - goal).abs()
        slope = request.geometry.mean(z.softmax(-1) - request.z.softmax(-1)) if slope is None else slope
        near = error <= slack * goal + torch.minimum(rounding(lam, slope), ROUNDED * goal)
    else:
        base, target = (z.log_softmax(-1)[:, ids].logsumexp(-1) for ids in request.concept())
        wanted = goal.logit()
        rounded = eps * (1 + target.abs() + base.abs())
        size = wanted.abs().clamp_min(1.0)
        near = (target - base - wanted).abs() <= slack * size + torch.minimum(rounded, ROUNDED * size)
    return lam.isfinite().all(-1) & t.isfinite() & near
