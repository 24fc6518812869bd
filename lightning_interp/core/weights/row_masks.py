"""Which source each row uses, and how the rows of a tensor lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_interp.errors import PositionError

__all__ = ["RowLayout", "RowMask"]


class RowMask:
    """Which weight source each row uses (int ``[B, T]``; 0 is the recipient), and what modules need of it."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source = source
        self.shape = (int(source.shape[0]), int(source.shape[1]))
        self._rows: dict[int, torch.Tensor] = {}
        self._tails: dict[int, RowMask] = {}
        self._joined: dict[tuple[int, int], tuple[RowMask, RowMask, torch.Tensor]] = {}

    @cached_property
    def _here(self) -> torch.Tensor:
        """The mask, flat, where Python reads it: a GPU is waited for once, whatever is asked."""
        return self.source.flatten().cpu()

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Sources that occur, in order."""
        return tuple(int(k) for k in torch.bincount(self._here).nonzero()[:, 0].tolist())

    @property
    def uniform(self) -> int | None:
        """The only source, or None if there are several."""
        return self.used[0] if len(self.used) == 1 else None

    @cached_property
    def share(self) -> float:
        """Share of rows that do not use source 0."""
        return int(torch.count_nonzero(self._here)) / self.source.numel()

    def rows(self, source: int) -> torch.Tensor:
        """Flat indices ``[n]`` of the rows that use a source."""
        if source not in self._rows:
            self._rows[source] = (self._here == source).nonzero().flatten().to(self.source.device)
        return self._rows[source]

    def tail(self, n: int) -> RowMask:
        """The mask of the last ``n`` columns."""
        if n == self.shape[1]:
            return self
        if n not in self._tails:
            self._tails[n] = RowMask(self.source[:, -n:])
        return self._tails[n]

    def join(self, other: RowMask, table: torch.Tensor) -> RowMask:
        """Two masks as one: ``table[mine, theirs]`` is each row's source in it. Worked out once a pair of masks."""
        key = (id(other), id(table))
        if key not in self._joined:
            source = table.to(self.source.device)[self.source, other.source]
            self._joined[key] = (RowMask(source), other, table)  # both are kept, so that their ids stay theirs
        return self._joined[key][0]


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a tensor lie: ``[B, T, ...]``, flat ``[B*T, ...]``, or heads first ``[B, H, T, d]``."""

    shape: tuple[int, int]
    kind: str

    @classmethod
    def of(cls, x: torch.Tensor, mask: RowMask) -> RowLayout:
        """How a tensor has its rows."""
        batch, length = mask.shape
        rows = x.dim() >= 2 and tuple(x.shape[:2]) == (batch, length)
        heads = x.dim() == 4 and (x.shape[0], x.shape[2]) == (batch, length)
        if rows and heads and x.shape[1] == x.shape[2]:
            rows = x.stride(1) >= x.stride(2)  # a transposed view keeps the strides of [B, T, H, d]
        if rows:
            return cls(mask.shape, "rows")
        if heads:
            return cls(mask.shape, "heads")
        if x.dim() >= 1 and x.shape[0] == batch * length:
            return cls(mask.shape, "flat")
        raise PositionError(
            f"A masked module received a tensor of shape {tuple(x.shape)}, which has no row for each of the "
            f"{batch} x {length} tokens of this pass."
        )

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """One row a token, ``[B*T, ...]``."""
        if self.kind == "heads":
            x = x.transpose(1, 2)
        return x if self.kind == "flat" else x.reshape(self.shape[0] * self.shape[1], *x.shape[2:])

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`flatten`."""
        if self.kind == "flat":
            return flat
        out = flat.reshape(*self.shape, *flat.shape[1:])
        return out.transpose(1, 2) if self.kind == "heads" else out

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows as a batch of one, ``[1, n, ...]`` (or ``[1, H, n, d]``), as the module knows its input."""
        flat = self.flatten(x)
        chosen = (flat.index_select(0, rows.to(x.device)) if len(rows) else flat[:0])[None]
        return chosen.transpose(1, 2) if self.kind == "heads" else chosen

    def scatter(self, out: torch.Tensor) -> torch.Tensor:
        """What a module made of gathered rows, as ``[n, ...]``."""
        if self.kind == "heads" and out.dim() == 4:
            out = out.transpose(1, 2)
        return out[0] if out.shape[0] == 1 else out.reshape(-1, *out.shape[2:])
