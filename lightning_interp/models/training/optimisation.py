"""AdamW and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from lightning_interp.errors import RecipeError

__all__ = ["Schedule", "adamw", "check_optimisation", "configured", "schedule_of"]

Schedule = Literal["constant", "linear", "cosine"]


def check_optimisation(
    *, lr: float, weight_decay: float, betas: Sequence[float], warmup_steps: int, schedule: str
) -> None:
    """Refuse settings that cannot work.

    Args:
        lr: Learning rate.
        weight_decay: Decoupled decay.
        betas: Decay rates of the two moments.
        warmup_steps: Steps of rising learning rate.
        schedule: What the learning rate does afterwards.

    Raises:
        RecipeError: With the name and value of the setting.
    """
    wrong = {
        "lr": (lr, lr > 0 and math.isfinite(lr), "a number above 0"),
        "weight_decay": (weight_decay, weight_decay >= 0, "a number of at least 0"),
        "betas": (betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers with 0 <= beta < 1"),
        "warmup_steps": (warmup_steps, warmup_steps >= 0, "at least 0"),
        "schedule": (schedule, schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
    }
    for name, (value, fits, expected) in wrong.items():
        if not fits:
            raise RecipeError(f"Training cannot use {name}={value!r}: expected {expected}.")


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """Make an AdamW that decays matrices only, not biases and norms.

    Args:
        parameters: All parameters; those without gradient are left out.
        lr: Learning rate.
        weight_decay: Decoupled decay of matrices.
        betas: Decay rates of the two moments.

    Returns:
        The optimizer.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def schedule_of(optimizer: AdamW, schedule: Schedule, *, warmup_steps: int, total_steps: float) -> LRScheduler | None:
    """Make the scheduler that is stepped after each optimizer step.

    Args:
        optimizer: The optimizer.
        schedule: What the learning rate does after warm-up.
        warmup_steps: Steps over which it rises from zero.
        total_steps: Optimizer steps of the run; infinity if the run has no end.

    Returns:
        The scheduler, None if the learning rate never changes.

    Raises:
        RecipeError: If the learning rate is to fall by the end of a run that has none.
    """
    from transformers import get_scheduler

    if schedule == "constant" and warmup_steps == 0:
        return None
    name = "constant_with_warmup" if schedule == "constant" else schedule
    if schedule != "constant" and math.isinf(total_steps):
        raise RecipeError(
            f"schedule={schedule!r} falls to zero by the last step, but this run has none. "
            "Give the Trainer max_epochs or max_steps, or choose schedule='constant'."
        )
    steps = None if math.isinf(total_steps) else int(total_steps)
    scheduler: LRScheduler = get_scheduler(name, optimizer, warmup_steps, steps)
    return scheduler


def configured(module: Any) -> Any:
    """Make what a LightningModule's ``configure_optimizers`` returns: AdamW over everything trained, and its schedule.

    Args:
        module: Has ``lr``, ``weight_decay``, ``betas``, ``warmup_steps`` and ``schedule``.

    Returns:
        The optimizer, or a dict of it and a schedule that moves every step.

    Raises:
        RecipeError: If the learning rate is to fall by the end of a run that has none.
    """
    optimizer = adamw(module.parameters(), lr=module.lr, weight_decay=module.weight_decay, betas=module.betas)
    steps = float("inf") if module.schedule == "constant" else module.trainer.estimated_stepping_batches
    scheduler = schedule_of(optimizer, module.schedule, warmup_steps=module.warmup_steps, total_steps=steps)
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
