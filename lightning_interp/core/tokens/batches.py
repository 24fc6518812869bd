"""Rows of token ids as batches: which go together, the padding, and which tokens are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["aligned_left", "packed", "padded"]


def padded(
    rows: Sequence[Sequence[int] | Tensor], pad: int = 0, *, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one block, int64 ``[rows, width]``, and its mask (1 for tokens)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, real] = torch.as_tensor(row).long()
        mask[i, real] = 1
    return ids, mask


def aligned_left(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and bool mask ``[B, T]`` with all padding at the end of its row; such a batch is given back as it is."""
    real = mask != 0
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return input_ids, real
    order = real.int().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), real.gather(1, order)


def packed(lengths: Sequence[int], token_budget: int, *, one_length: bool = False) -> list[list[int]]:
    """Which rows share a batch: the longest first, so that a batch that does not fit into memory fails at once.

    A batch that has a sixteenth of the budget (tokens, padding included) ends before a row that would be padded by more
    than a seventh; a row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        used = len(batches[-1]) * longest if batches else 0
        fits = batches and used + longest <= token_budget
        wasteful = 8 * lengths[index] < 7 * longest and 16 * used >= token_budget
        if not fits or wasteful or (one_length and lengths[index] != longest):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches
