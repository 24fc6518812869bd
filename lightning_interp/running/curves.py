"""Curves for TensorBoard that no Trainer logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_scalars"]


def write_scalars(folder: Path, tag: str, values: Sequence[float]) -> None:
    """Write a curve for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step)
