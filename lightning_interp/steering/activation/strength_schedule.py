"""How strong: one number or one a row, and how that changes over the tokens that a model generates.

Step 0 is the token that predicts the first new token, the prompt's last one. Tokens before it have the factor of step
0, so a pass over prompt and answer together and a decoding with a cache are steered alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.storage.files import jsonable
from lightning_interp.errors import RecipeError

__all__ = [
    "LinearDecay",
    "Schedule",
    "StepFactors",
    "StrengthSchedule",
    "WarmUp",
    "check_strength",
    "factors",
    "make_schedule",
    "per_row",
    "schedule_to_dict",
]


@dataclass(frozen=True)
class StrengthSchedule(ABC):
    """A factor of the strength at each generation step; subclass it to write your own.

    Example:
        >>> LinearDecay(4).factor(torch.arange(-1, 6)).tolist()
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    @abstractmethod
    def factor(self, steps: Tensor) -> Tensor:
        """Factors float32 ``[B, T]`` at generation steps ``[B, T]``, which are 0 or less in the prompt."""


@dataclass(frozen=True)
class LinearDecay(StrengthSchedule):
    """From 1 at step 0 straight down to ``end``, which it reaches at step ``steps`` and keeps.

    Args:
        steps: Steps until ``end``.
        end: Factor from then on.

    Raises:
        RecipeError: If ``steps`` is below 1 or ``end`` is not finite.
    """

    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.steps, self.end)

    def factor(self, steps: Tensor) -> Tensor:
        """See :meth:`StrengthSchedule.factor`."""
        return _ramp(steps, self.steps, 1.0, self.end)


@dataclass(frozen=True)
class WarmUp(StrengthSchedule):
    """From ``start`` at step 0 straight up to 1, which it reaches at step ``steps`` and keeps.

    Args:
        steps: Steps until 1.
        start: Factor at step 0, and in the prompt.

    Raises:
        RecipeError: If ``steps`` is below 1 or ``start`` is not finite.

    Example:
        >>> WarmUp(2).factor(torch.arange(4)).tolist()
        [0.0, 0.5, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.steps, self.start)

    def factor(self, steps: Tensor) -> Tensor:
        """See :meth:`StrengthSchedule.factor`."""
        return _ramp(steps, self.steps, self.start, 1.0)


@dataclass(frozen=True)
class StepFactors(StrengthSchedule):
    """One factor a step, from a list; steps beyond it have the last one.

    Args:
        values: At least one, not all zero.

    Raises:
        RecipeError: If there is none, one is not finite, or all are zero.

    Example:
        >>> StepFactors((1.0, 0.0)).factor(torch.arange(-1, 3)).tolist()
        [1.0, 1.0, 0.0, 0.0]
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        usable = all(isinstance(v, int | float) and math.isfinite(v) for v in self.values)
        if not usable or not any(self.values):
            raise RecipeError(f"{self} never steers; expected finite factors, one a step, not all of them zero.")

    def factor(self, steps: Tensor) -> Tensor:
        """See :meth:`StrengthSchedule.factor`."""
        table = torch.tensor(self.values, dtype=torch.float32, device=steps.device)
        return table[steps.clamp(0, len(table) - 1)]


Schedule = StrengthSchedule  # the name before other things had schedules too
AnySchedule = StrengthSchedule | Sequence[float] | Callable[[Tensor], Tensor] | None


def make_schedule(given: AnySchedule) -> StrengthSchedule | Callable[[Tensor], Tensor] | None:
    """What a user may pass, checked: None, a schedule, a list of factors, or a function of steps ``[B, T]``."""
    if isinstance(given, list | tuple):
        return StepFactors(tuple(given))
    if given is None or isinstance(given, StrengthSchedule) or callable(given):
        return given
    raise RecipeError(
        f"schedule={given!r} is no schedule. Expected a StrengthSchedule such as LinearDecay(20), a list with one "
        "factor a step, a function of the step, or None."
    )


def factors(schedule: StrengthSchedule | Callable[[Tensor], Tensor], steps: Tensor) -> Tensor:
    """Factors float32 ``[B, T]`` of a schedule or a user's function at generation steps ``[B, T]``."""
    if isinstance(schedule, StrengthSchedule):
        return schedule.factor(steps)
    found = schedule(steps)
    if not isinstance(found, Tensor) or found.shape != steps.shape:
        got = list(found.shape) if isinstance(found, Tensor) else repr(found)
        raise RecipeError(
            f"The schedule {_name(schedule)} gave {got} for steps {list(steps.shape)}. Return a tensor of that shape."
        )
    return found.to(device=steps.device, dtype=torch.float32)


def schedule_to_dict(schedule: StrengthSchedule | Callable[..., Any] | None) -> dict[str, Any] | None:
    """Plain data that says which schedule it was; a function is named."""
    if isinstance(schedule, StrengthSchedule):
        return {"kind": type(schedule).__name__, **jsonable(asdict(schedule))}
    return None if schedule is None else {"kind": "function", "name": _name(schedule)}


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _ramp(steps: Tensor, whole: int, start: float, end: float) -> Tensor:
    return start + (end - start) * (steps.clamp(0, whole).to(torch.float32) / whole)


def _check(schedule: StrengthSchedule, steps: int, value: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or not math.isfinite(value):
        raise RecipeError(f"{schedule}: expected a whole number of steps, at least 1, and a finite factor.")


def check_strength(strength: Any, *, what: str) -> float | Tensor:
    """A float, or a float tensor ``[rows]`` (itself if it requires grad), from a number, a tensor or a list."""
    given = f"{what}(strength={strength!r:.60})"
    try:
        tensor = torch.as_tensor(strength)
        tensor = tensor if tensor.is_floating_point() else tensor.to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{given} is no number and no list of numbers: {error}.") from error
    if isinstance(strength, bool) or tensor.dim() > 1 or tensor.numel() == 0:
        shape = list(tensor.shape)
        raise RecipeError(f"{given} has the shape {shape}; expected one number, or one for each row of the batch [B].")
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise RecipeError(f"{given} is not finite; expected finite numbers.")
    if tensor.requires_grad:
        return tensor
    if tensor.dim() == 0:
        return float(strength)  # not through the tensor, which may be narrower
    with torch.inference_mode(False):
        return tensor.detach().to(torch.float32, copy=True)


def per_row(strength: Tensor, rows: int, *, what: str) -> Tensor:
    """One strength ``[B, 1, 1]`` for each of a pass's ``rows``, from ``[S]`` or a scalar tensor.

    The rows of one prompt (beams, samples) lie next to each other, as ``generate`` puts them, and share its strength.
    """
    given = strength.reshape(-1)
    if rows % len(given):
        raise RecipeError(
            f"{what} has {len(given)} strengths, one a row, but the pass has {rows} rows. Pass one strength for each "
            "row (or for each prompt, with several beams or samples a prompt), or a single number."
        )
    return given.repeat_interleave(1 if strength.dim() == 0 else rows // len(given)).reshape(-1, 1, 1)
