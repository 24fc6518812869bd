"""Count, sum and scatter of vectors that come in batches and from several processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StreamedSums"]


@dataclass(frozen=True, eq=False)
class StreamedSums:
    """Count and sum ``[w]`` of vectors, and the scatter of the first ``d`` columns or None; adding gives those of both.

    The scatter (sum of outer products) is taken about the vectors' own mean and merged as Chan, Golub and LeVeque
    (1979) do, so that it loses no digits where the mean is large.
    """

    count: int
    total: Tensor
    scatter: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, *, square: int = 0) -> StreamedSums:
        """Sums of ``[n, w]``; the scatter covers the first ``square`` columns, 0 for none."""
        inside = rows[:, :square]
        centred = inside - inside.mean(0) if len(rows) else inside
        return cls(len(rows), rows.sum(0), centred.T @ centred if square else None)

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
