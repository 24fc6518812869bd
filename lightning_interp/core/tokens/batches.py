"""Rows of token ids as one batch: the padding, and which tokens are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["aligned_left", "padded"]


def padded(
    rows: Sequence[Sequence[int] | Tensor], pad: int = 0, *, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Rows of token ids of one width.

    On the right a causal model cannot see padding; generation needs it on the left.

    Args:
        rows: Token ids, at least one row.
        pad: What is filled in; what is padding is told by the mask alone, so it may be any token's id.
        side: Where.

    Returns:
        Ids and mask (1 for tokens), int64 ``[rows, width]``.

    Example:
        >>> [x.tolist() for x in padded([[1, 2], [3]], side="left")]
        [[[1, 2], [0, 3]], [[1, 1], [0, 1]]]
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, real] = torch.as_tensor(row).long()
        mask[i, real] = 1
    return ids, mask


def aligned_left(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of every row to its end; a batch that is so already is given back as it is.

    Args:
        input_ids: ``[batch, time]``.
        mask: Nonzero for tokens, of the same shape.

    Returns:
        Ids and mask (True for tokens) of the same shape.

    Example:
        >>> [x.tolist() for x in aligned_left(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))]
        [[[5, 6, 0]], [[True, True, False]]]
    """
    real = mask != 0
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return input_ids, real
    order = real.int().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), real.gather(1, order)
