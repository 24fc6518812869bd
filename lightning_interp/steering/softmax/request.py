"""What steering is asked for: a target, a direction and states, checked once and put into one form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.softmax.arithmetic import working_dtype
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

__all__ = ["SteerRequest", "Target", "TokenPairs", "check_alpha"]

TARGETS = ("t", "probe_value", "probe_delta", "probe_prob", "target_prob", "kl_budget")


class TokenPairs(Protocol):
    """Counterfactual tokens of a concept; see ``CounterfactualPairs``."""

    @property
    def base_ids(self) -> Tensor:
        """Token ids of the base side."""

    @property
    def target_ids(self) -> Tensor:
        """Token ids of the target side."""


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
        bad = ~values.isfinite()
        expected = "finite numbers"
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
    pairs: TokenPairs | None
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
        pairs: TokenPairs | None,
        bias: float | None,
        alpha: float | Literal["auto"],
        support: int | None,
        options: SolverOptions | None,
    ) -> SteerRequest:
        """Check what a user asks for."""
        beta = direction if isinstance(direction, Tensor) else direction.direction
        dtype = working_dtype(geometry.weight, lam)
        states = lam.detach().reshape(-1, lam.shape[-1]).to(dtype)
        beta = beta.detach().to(states).expand(len(states), -1) if beta.dim() == 1 else beta.detach().to(states)
        _check_vectors(geometry, states, beta)
        own = getattr(direction, "alpha", None)
        resolved = geometry.resolve_alpha(own if alpha == "auto" and own is not None else alpha)
        kind, goal = target.kind, target.values(len(states), dtype, states.device)
        if support is not None and support < 4:
            raise RecipeError(f"support={support}: expected at least 4 tokens, or None for the whole vocabulary.")
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
    if not bool(states.isfinite().all()):
        raise IncompatibleModelError(f"A state to steer holds {_odd(states)}; expected finite values.")
    if not bool(beta.isfinite().all()) or bool((beta.norm(dim=-1) == 0).any()):
        what = "zero" if bool(beta.isfinite().all()) else _odd(beta)
        raise IncompatibleModelError(f"A steering direction is {what}; expected finite values that are not all zero.")


def check_alpha(kind: str, alpha: float) -> None:
    """Refuse a regularisation under which a target may not exist."""
    if not math.isfinite(alpha) or alpha < 0 or (alpha == 0 and kind in ("t", "target_prob", "kl_budget")):
        raise RecipeError(
            f"alpha={alpha:g} with the target {kind}: without regularisation a dual step leaves the hull of the "
            "unembedding at a finite length. Use alpha > 0, or a probe target with alpha >= 0."
        )


def _odd(values: Tensor) -> str:
    return "NaN" if bool(values.isnan().any()) else "an infinite value"
