"""Quantities that come in batches on several processes, and are the same on every one of them once computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["KeyedRows", "Sums", "first_of_each"]


class Sums(Metric):
    """Sums of named quantities over batches and processes: ``update`` calls :meth:`add`, ``compute`` :meth:`totals`."""

    full_state_update = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.add_state("sums", default=torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Always: sums over nothing are zero, and a process that saw nothing is no cause for a warning."""
        return True

    def add(self, found: Tensor) -> None:
        """Add one value a name, ``[names]``; what was summed so far follows it to its device."""
        # Not in place: sums made inside inference mode could not be changed outside of it.
        self.sums = self.sums.to(found.device) + found.detach().double()

    def totals(self) -> list[float]:
        """The sums, in the order of their names."""
        return [float(total) for total in self.sums.tolist()]


class KeyedRows(Metric):
    """Rows of ``width`` numbers, known by ``keys`` integers below 2**53; each counts once, however often it came."""

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, width: int, *, keys: int = 1) -> None:
        super().__init__()
        self.width, self.keys = width, keys
        # Flat and in one type: what a process without any row gives has one dimension and the type of the metric.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Float64 where the device has it; also of what a process without any row sends."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add rows: ``[n]`` or ``[n, keys]`` integers, and as many times ``width`` numbers."""
        count = len(keys)
        parts = (keys.reshape(count, self.keys), values.reshape(count, self.width))
        self.rows.append(torch.cat([part.detach().to(self.device, self.dtype) for part in parts], dim=1).flatten())

    def table(self) -> tuple[Tensor, Tensor]:
        """Keys ``[N, keys]`` in increasing order and their rows ``[N, width]``, the first that came for each key."""
        found = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(found, Tensor):
            found = torch.zeros(0, dtype=torch.float64)
        rows = found.reshape(-1, self.keys + self.width)
        if not len(rows):
            return rows[:, : self.keys].long(), rows[:, self.keys :]
        keys, place = torch.unique(rows[:, : self.keys], dim=0, return_inverse=True)
        return keys.long(), rows[first_of_each(place, len(keys)), self.keys :]


def first_of_each(number: Tensor, count: int) -> Tensor:
    """Where each number below ``count`` comes first in ``[n]``, ``[count]``."""
    first = torch.full((count,), len(number), dtype=torch.long, device=number.device)
    return first.scatter_reduce_(0, number, torch.arange(len(number), device=number.device), reduce="amin")
