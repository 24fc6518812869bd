"""Shared prefixes: tokens that many plans treat alike are computed once.

By causality, two rows may share the keys and values of positions before ``t`` exactly when their tokens and the weights
chosen for them agree at all of these positions, in every module (head and final norm aside, which write no keys). The
rows of many plans over one prompt so form a tree; it is cut into intervals of columns, and each interval is one
forward pass over the different prefixes that reach its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from lightning_interp.core.measure.reduced import first_of_each

__all__ = ["PASS_COST", "PrefixTree"]

PASS_COST = 30
"""What one more forward pass costs, in tokens: weights are read again whatever the number of rows."""

_NO_PARENT = -1


@dataclass(frozen=True)
class _Interval:
    """Columns ``start`` to ``stop``, the row that stands for each different prefix, and the prefix it continues."""

    start: int
    stop: int
    rows: torch.Tensor
    parents: torch.Tensor


class PrefixTree:
    """How to compute the last column of many left-padded rows ``[R, T]`` with every shared prefix computed once.

    ``inner`` and ``full`` class the weights of each token without and with norm and head: equal classes, equal weights.
    ``intervals`` are the passes, in order; ``row_of`` says which row of the last one stands for each row.
    """

    def __init__(
        self, ids: torch.Tensor, valid: torch.Tensor, inner: torch.Tensor, full: torch.Tensor, *, share: bool = True
    ) -> None:
        self.prefix = _prefixes(ids, valid, inner, full)
        counts = [int(column.max()) + 1 for column in self.prefix]
        width = ids.shape[1]
        cuts = _cheapest_cuts(counts) if share else [0, width]
        self.intervals: list[_Interval] = []
        for start, stop in pairwise(cuts):
            rows = first_of_each(self.prefix[stop - 1], counts[stop - 1])
            parents = self.prefix[start - 1][rows] if start else torch.full_like(rows, _NO_PARENT)
            self.intervals.append(_Interval(start, stop, rows, parents))
        self.row_of = self.prefix[-1]
        self.width = width

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model, padding counted."""
        return sum(len(interval.rows) * (interval.stop - interval.start) for interval in self.intervals)


def _prefixes(ids: torch.Tensor, valid: torch.Tensor, inner: torch.Tensor, full: torch.Tensor) -> list[torch.Tensor]:
    """Number of each row's prefix up to and with each column: equal numbers, equal prefixes."""
    found: list[torch.Tensor] = []
    before = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    for t in range(ids.shape[1]):
        classes = full[:, t] if t == ids.shape[1] - 1 else inner[:, t]
        real = valid[:, t].long()
        key = torch.stack([before, real, real * ids[:, t], real * classes], dim=1)
        before = torch.unique(key, dim=0, return_inverse=True)[1]
        found.append(before)
    return found


def _cheapest_cuts(counts: list[int]) -> list[int]:
    """Columns at which to cut, ends included: the fewest tokens, each pass counted as ``PASS_COST`` tokens more."""
    width = len(counts)
    places = [0, *(t for t in range(1, width) if counts[t] > counts[t - 1]), width]
    best = {0: (0, [0])}
    for stop in places[1:]:
        best[stop] = min(
            (best[start][0] + counts[stop - 1] * (stop - start) + PASS_COST, [*best[start][1], stop])
            for start in places
            if start < stop
        )
    return best[width][1]
