"""AdamW and its learning rate over time, and how settings are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from lightning_interp.errors import RecipeError

__all__ = [
    "Optimisation",
    "Schedule",
    "adamw",
    "check_settings",
    "check_types",
    "no_more",
    "plain",
    "schedule_of",
    "settings_of",
]

Schedule = Literal["constant", "linear", "cosine"]

_Settings = TypeVar("_Settings")
_LATER = {"later": True}  # marks a setting that checkpoints of earlier versions lack


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are trained. Clipping gradients is the Trainer's part: ``Trainer(gradient_clip_val=1.0)``.

    Attributes:
        lr: Learning rate after warm-up.
        weight_decay: Decoupled decay of matrices (not of biases and norms).
        betas: Decay rates of AdamW's two moments.
        eps: What AdamW adds to the root of its second moment.
        warmup_steps: Steps over which the learning rate rises from zero.
        warmup_fraction: The same as a share of all steps, rounded to whole ones; one of the two.
        schedule: What the learning rate does afterwards: stay, or fall by the last step.
        min_lr_fraction: Share of ``lr`` to which it falls.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        RecipeError: With the name and value of a setting that cannot work.

    Example:
        >>> Optimisation(lr=1e-3, schedule="linear").betas
        (0.9, 0.999)
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = field(default=1e-8, metadata=_LATER)
    warmup_steps: int = 0
    warmup_fraction: float = field(default=0.0, metadata=_LATER)
    schedule: Schedule = "constant"
    min_lr_fraction: float = field(default=0.0, metadata=_LATER)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        betas, falls = self.betas, self.schedule != "constant"
        wanted = {
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a number above 0"),
            "weight_decay": (self.weight_decay >= 0, "a number of at least 0"),
            "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers with 0 <= beta < 1"),
            "eps": (self.eps >= 0 and math.isfinite(self.eps), "a number of at least 0"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "warmup_fraction": (
                0 <= self.warmup_fraction < 1 and not (self.warmup_steps and self.warmup_fraction),
                f"a share of all steps, 0 <= share < 1, and 0 beside warmup_steps={self.warmup_steps}",
            ),
            "schedule": (self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            "min_lr_fraction": (
                0 <= self.min_lr_fraction < 1 and (falls or not self.min_lr_fraction),
                f"a share of lr, 0 <= share < 1, and 0 where it does not fall (schedule={self.schedule!r})",
            ),
        }
        check_settings(self, "Training", wanted)
        object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))

    @property
    def needs_end(self) -> bool:
        """Whether the learning rate depends on the number of all steps."""
        return self.schedule != "constant" or self.warmup_fraction > 0


def check_settings(settings: object, what: str, wanted: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse the first setting that does not fit; ``wanted`` says by name whether it does, and what is expected."""
    for name, (fits, expected) in wanted.items():
        if not fits:
            raise RecipeError(f"{what} cannot use {name}={getattr(settings, name)!r}: expected {expected}.")


def check_types(settings: Any, what: str) -> None:
    """Refuse the first setting that is declared a number, truth value or text, and is none: ``"4"`` or True for 4."""
    hints = get_type_hints(type(settings))
    for name in (one.name for one in fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        kinds = set(get_args(hint) if get_origin(hint) is UnionType else (hint,))
        if kinds <= {int, float, bool, str, NoneType} and not kinds & _kinds_of(value):
            expected = " or ".join(sorted(kind.__name__.replace("NoneType", "None") for kind in kinds))
            raise RecipeError(f"{what} cannot use {name}={value!r:.60}: expected {expected}.")


def _kinds_of(value: object) -> set[type]:
    """What a value may be declared as: a whole number also stands for a real one."""
    if isinstance(value, bool | str | None):
        return {type(value)}
    return {int, float} if isinstance(value, Integral) else {float} if isinstance(value, Real) else set()


def settings_of(default: _Settings, given: _Settings | Mapping[str, Any], flat: dict[str, Any]) -> _Settings:
    """Settings as an object, a mapping, or under their own names among a class's arguments, as in its checkpoints.

    ``given`` is taken as it is, or fills up ``default`` if it is a mapping; ``default`` itself stands for nothing. The
    dataclass's names are taken out of ``flat``; all of them beside ``given``, as a checkpoint holds them, do not count
    (one of an earlier version lacks those that came later).
    """
    base: Any = default
    names = {field.name for field in fields(base)}
    early = {field.name for field in fields(base) if not field.metadata.get("later")}
    own = {name: flat.pop(name) for name in names & flat.keys()}
    if given is default:
        return replace(base, **own)  # type: ignore[no-any-return]
    if own and not own.keys() >= early:
        raise RecipeError(
            f"{', '.join(sorted(own))} is given beside {type(default).__name__} settings, so one of the two would "
            "count for nothing. Put it into the settings."
        )
    return replace(base, **given) if isinstance(given, Mapping) else given


def no_more(module: Any, flat: Mapping[str, Any]) -> None:
    """Refuse arguments that nothing has taken."""
    if flat:
        raise TypeError(f"{type(module).__name__}() got an unexpected keyword argument {next(iter(flat))!r}")


def plain(settings: Any) -> dict[str, Any]:
    """A settings object as values that a checkpoint can hold, which is read with ``weights_only=True``.

    Settings that came later are left out while they have their defaults, so it is what an earlier version wrote.
    """
    idle = {f.name for f in fields(settings) if f.metadata.get("later") and getattr(settings, f.name) == f.default}
    return {
        name: list(value) if isinstance(value, Sequence | set) and not isinstance(value, str) else value
        for name, value in asdict(settings).items()
        if name not in idle
    }


def adamw(parameters: Iterable[nn.Parameter], settings: Optimisation) -> AdamW:
    """Make an AdamW that decays matrices only, not biases and norms."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.dim() >= 2) is matrix] for matrix in (True, False))
    decays = ((matrices, settings.weight_decay), (others, 0.0))
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def schedule_of(optimizer: AdamW, settings: Optimisation, *, total_steps: float) -> LRScheduler | None:
    """Make the scheduler that is stepped after each optimizer step; None if the learning rate never changes.

    ``total_steps`` is infinity if the run has no end; a learning rate that is told by the last step is refused then.
    """
    from transformers import get_scheduler

    constant, floor, warmup = settings.schedule == "constant", settings.min_lr_fraction, settings.warmup_steps
    if math.isinf(total_steps) and settings.needs_end:
        what = f"schedule={settings.schedule!r} falls by the last step", "schedule='constant'"
        if constant:
            what = f"warmup_fraction={settings.warmup_fraction!r} is a share of all steps", "warmup_steps"
        raise RecipeError(
            f"{what[0]}, but this run has none. Give the Trainer max_epochs or max_steps, or choose {what[1]}."
        )
    if settings.warmup_fraction:
        warmup = round(settings.warmup_fraction * total_steps)
    if constant and warmup == 0:
        return None
    name = "constant_with_warmup" if constant else settings.schedule
    steps = None if math.isinf(total_steps) else int(total_steps)
    scheduler: Any = get_scheduler(name, optimizer, warmup, steps)
    if floor:  # the first step's rate, 0 or 1 of it, is the same with a floor
        scheduler.lr_lambdas = [partial(_floored, rate, warmup, floor) for rate in scheduler.lr_lambdas]
    return scheduler  # type: ignore[no-any-return]


def _floored(rate: Callable[[int], float], warmup: int, floor: float, step: int) -> float:
    """A rate that falls to a floor instead of zero once it has risen."""
    return rate(step) if step < warmup else floor + (1 - floor) * rate(step)
