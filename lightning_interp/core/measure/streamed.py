"""Means of many vectors without keeping them: sums that add up over batches and over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["StreamedSums", "reduced_sum"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class StreamedSums:
    """Count and sum of vectors ``[w]``, and the scatter of the first ``d`` columns or None; adding gives those of both.

    Without a scatter, rows may have any shape, such as ``[layers, w]``. The scatter (sum of outer products) is taken
    about the vectors' own mean and merged as Chan, Golub and LeVeque (1979) do, so that it loses no digits where the
    mean is large.
    """

    count: int
    total: Tensor
    scatter: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, *, square: int = 0) -> StreamedSums:
        """Sums of ``[n, w]``; the scatter covers the first ``square`` columns, 0 for none."""
        if not square:
            return cls(len(rows), rows.sum(0))
        inside = rows[:, :square]
        centred = inside - inside.mean(0) if len(rows) else inside
        return cls(len(rows), rows.sum(0), centred.T @ centred)

    @property
    def mean(self) -> Tensor:
        """Mean vector ``[w]``; NaN without vectors."""
        return self.total / self.count if self.count else torch.full_like(self.total, torch.nan)

    def __add__(self, other: StreamedSums) -> StreamedSums:
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        total, scatter = self.total + other.total, None
        if self.scatter is not None and other.scatter is not None:
            gap = (other.mean - self.mean)[: len(self.scatter)]
            weight = self.count * other.count / (self.count + other.count)
            scatter = self.scatter + other.scatter + weight * torch.outer(gap, gap)
        return StreamedSums(self.count + other.count, total, scatter)


def reduced_sum(part: T | None, group: Any = None) -> T | None:
    """Sum (``+``) of the parts of all processes, the same on each; every process must call this.

    Args:
        part: Of this process; None if it has none.
        group: The process group; None for all processes.

    Returns:
        The sum; ``part`` without a process group, None if no process has one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return part
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, part, group=group)
    held = [each for each in parts if each is not None]
    return sum(held[1:], held[0]) if held else None
