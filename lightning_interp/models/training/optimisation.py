"""AdamW and its learning rate over time, and how settings are given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from lightning_interp.errors import RecipeError

__all__ = ["Optimisation", "Schedule", "adamw", "check_settings", "no_more", "plain", "schedule_of", "settings_of"]

Schedule = Literal["constant", "linear", "cosine"]

_Settings = TypeVar("_Settings")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are trained. Clipping gradients is the Trainer's part: ``Trainer(gradient_clip_val=1.0)``.

    Attributes:
        lr: Learning rate after warm-up.
        weight_decay: Decoupled decay of matrices (not of biases and norms).
        betas: Decay rates of AdamW's two moments.
        warmup_steps: Steps over which the learning rate rises from zero.
        schedule: What the learning rate does afterwards: stay, or fall to zero by the last step.
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
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        betas = self.betas
        wanted = {
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a number above 0"),
            "weight_decay": (self.weight_decay >= 0, "a number of at least 0"),
            "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers with 0 <= beta < 1"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "schedule": (self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
        }
        check_settings(self, "Training", wanted)
        object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))


def check_settings(settings: object, what: str, wanted: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse the first setting that does not fit; ``wanted`` says by name whether it does, and what is expected."""
    for name, (fits, expected) in wanted.items():
        if not fits:
            raise RecipeError(f"{what} cannot use {name}={getattr(settings, name)!r}: expected {expected}.")


def settings_of(default: _Settings, given: _Settings | Mapping[str, Any], flat: dict[str, Any]) -> _Settings:
    """Settings as an object, a mapping, or under their own names among a class's arguments, as in its checkpoints.

    ``given`` is taken as it is, or fills up ``default`` if it is a mapping; ``default`` itself stands for nothing. The
    dataclass's names are taken out of ``flat``; all of them beside ``given``, as a checkpoint holds them, do not count.
    """
    base: Any = default
    names = {field.name for field in fields(base)}
    own = {name: flat.pop(name) for name in names & flat.keys()}
    if given is default:
        return replace(base, **own)  # type: ignore[no-any-return]
    if own and own.keys() != names:
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
    """A settings object as values that a checkpoint can hold, which is read with ``weights_only=True``."""
    return {
        name: list(value) if isinstance(value, Sequence | set) and not isinstance(value, str) else value
        for name, value in asdict(settings).items()
    }


def adamw(parameters: Iterable[nn.Parameter], settings: Optimisation) -> AdamW:
    """Make an AdamW that decays matrices only, not biases and norms."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.dim() >= 2) is matrix] for matrix in (True, False))
    decays = ((matrices, settings.weight_decay), (others, 0.0))
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    return AdamW(groups, lr=settings.lr, betas=settings.betas)


def schedule_of(optimizer: AdamW, settings: Optimisation, *, total_steps: float) -> LRScheduler | None:
    """Make the scheduler that is stepped after each optimizer step; None if the learning rate never changes.

    ``total_steps`` is infinity if the run has no end; a learning rate that is to fall by then is refused.
    """
    from transformers import get_scheduler

    constant = settings.schedule == "constant"
    if constant and settings.warmup_steps == 0:
        return None
    name = "constant_with_warmup" if constant else settings.schedule
    if not constant and math.isinf(total_steps):
        raise RecipeError(
            f"schedule={settings.schedule!r} falls to zero by the last step, but this run has none. "
            "Give the Trainer max_epochs or max_steps, or choose schedule='constant'."
        )
    steps = None if math.isinf(total_steps) else int(total_steps)
    scheduler: LRScheduler = get_scheduler(name, optimizer, settings.warmup_steps, steps)
    return scheduler
