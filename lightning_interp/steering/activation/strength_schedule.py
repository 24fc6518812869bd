"""How strength changes over the tokens that a model generates: pure functions of the generation step.

Step 0 is the token that predicts the first new token, the prompt's last one. Tokens before it have the factor of step
0, so a pass over prompt and answer together and a decoding with a cache are steered alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import RecipeError

__all__ = ["LinearDecay", "Schedule", "StepFactors", "StrengthSchedule", "WarmUp", "make_schedule", "schedule_to_dict"]


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
        return 1 + (self.end - 1) * _progress(steps, self.steps)


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
        return self.start + (1 - self.start) * _progress(steps, self.steps)


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
    if given is None or isinstance(given, StrengthSchedule):
        return given
    if isinstance(given, list | tuple):
        return StepFactors(tuple(given))
    if callable(given):
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
            f"The schedule {_name(schedule)} gave {got} for steps {list(steps.shape)}. Return one factor for each "
            "step, as a tensor of that shape."
        )
    return found.to(device=steps.device, dtype=torch.float32)


def schedule_to_dict(schedule: StrengthSchedule | Callable[..., Any] | None) -> dict[str, Any] | None:
    """Plain data that says which schedule it was; a function is named."""
    if schedule is None:
        return None
    if isinstance(schedule, StrengthSchedule):
        values: Mapping[str, Any] = asdict(schedule)
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"kind": type(schedule).__name__, **plain}
    return {"kind": "function", "name": _name(schedule)}


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _progress(steps: Tensor, whole: int) -> Tensor:
    return steps.clamp(0, whole).to(torch.float32) / whole


def _check(schedule: StrengthSchedule, steps: int, value: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or not math.isfinite(value):
        raise RecipeError(f"{schedule}: expected a whole number of steps, at least 1, and a finite factor.")
