"""Rows of token ids as blocks, and which of them share a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.tokens.batches import aligned_left, packed, padded

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4)


@given(ROWS)
def test_padding_and_aligning(rows):
    for side in ("left", "right"):
        ids, mask = padded(rows, 7, side=side)
        width = max(map(len, rows))
        fill = [[7] * (width - len(row)) for row in rows]
        pairs = list(zip(rows, fill, strict=True))
        assert ids.tolist() == [f + r if side == "left" else r + f for r, f in pairs]
        assert mask.sum(dim=1).tolist() == list(map(len, rows))
        moved, real = aligned_left(ids, mask)
        assert [row[on].tolist() for row, on in zip(moved, real, strict=True)] == rows
        assert not bool((real[:, 1:] & ~real[:, :-1]).any())


def test_an_aligned_batch_is_given_back():
    ids, mask = padded([[1, 2], [3]])
    assert aligned_left(ids, mask)[0] is ids


@pytest.mark.parametrize(
    ("budget", "batches"), [(1000, [[1, 3, 2, 0]]), (12, [[1, 3], [2], [0]]), (1, [[1], [3], [2], [0]])]
)
def test_rows_that_share_a_batch(budget, batches):
    assert packed([2, 5, 4, 5], budget) == batches


def test_one_length_a_batch():
    assert packed([2, 5, 4, 5], 1000, one_length=True) == [[1, 3], [2], [0]]
    assert torch.equal(padded([[1], [2]])[0], torch.tensor([[1], [2]]))
