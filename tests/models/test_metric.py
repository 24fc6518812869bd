from __future__ import annotations

import math

import pytest
import torch

from lightning_interp.errors import DataError
from lightning_interp.models.training.metric import TokenLoss, completion_loss


def slow(logits, labels):
    """Token by token, in double precision."""
    total, tokens = 0.0, 0
    for row, targets in zip(logits.double(), labels, strict=True):
        for position in range(len(targets) - 1):
            target = int(targets[position + 1])
            if target != -100:
                total += math.log(sum(math.exp(float(x)) for x in row[position])) - float(row[position, target])
                tokens += 1
    return total, tokens


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :3] = -100
    labels[1, 1:5] = -100
    labels[2, 0] = -100
    return logits, labels


def test_the_sum_equals_the_slow_one(batch):
    total, tokens = completion_loss(*batch)
    expected, count = slow(*batch)
    assert int(tokens) == count == 3 + 1 + 5
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_the_last_logits_are_enough(batch):
    logits, labels = batch
    labels[:, :3] = -100
    whole, trimmed = completion_loss(logits, labels), completion_loss(logits[:, 2:], labels)
    assert int(whole[1]) == int(trimmed[1])
    assert float(whole[0]) == pytest.approx(float(trimmed[0]), rel=1e-6)


def test_half_precision_logits_are_summed_in_float32_inside_autocast_too(batch):
    logits, labels = batch
    half = logits.bfloat16()
    expected, _ = slow(half.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = completion_loss(half, labels)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_the_mean_weighs_tokens_and_not_batches(batch):
    logits, labels = batch
    metric = TokenLoss()
    for row in range(3):
        metric.update(*completion_loss(logits[row : row + 1], labels[row : row + 1]))
    expected, count = slow(logits, labels)
    assert float(metric.compute()) == pytest.approx(expected / count, rel=1e-6)
    metric.reset()
    assert int(metric.tokens) == 0


def test_gradients_of_the_update_are_dropped(batch):
    logits, labels = batch
    metric = TokenLoss()
    metric.update(*completion_loss(logits.requires_grad_(), labels))
    assert not metric.total.requires_grad


def test_no_scored_token_is_an_error():
    metric = TokenLoss()
    metric.update(torch.tensor(0.0), torch.tensor(0))
    with pytest.raises(DataError, match="No batch had a labelled token"):
        metric.compute()
