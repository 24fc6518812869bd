"""Rows of like length in a batch: each row once, in an order of seed and epoch alone."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from lightning_interp.errors import RecipeError
from lightning_interp.models import TextDataModule
from lightning_interp.models.data.batching import EpochSampler, LengthWindow, bucketed, padding_of
from lightning_interp.testing import byte_tokenizer

LENGTHS = torch.randint(1, 9, (43,), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [{"prompt_ids": [5 + i], "completion_ids": [5] * length} for i, length in enumerate(LENGTHS)]


def order(seed=3, epoch=0, rank=0, world=1, batch=4, window=2, start=0):
    lengths = LengthWindow(LENGTHS, batch, window) if window else None
    sampler = EpochSampler(len(LENGTHS), seed=seed, shuffle=True, rank=rank, world_size=world, lengths=lengths)
    sampler.set_epoch(epoch)
    sampler.start = start
    return list(sampler)


def batches(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def module(**options):
    data = TextDataModule(ROWS, tokenizer=byte_tokenizer(), **{"batch_size": 4, "length_window": 3, **options})
    data.setup("fit")
    return data


def seen(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [(batch["input_ids"][:, 0] - 5).tolist() for batch in loader]


@pytest.mark.parametrize("window", [1, 2, 50])
@pytest.mark.parametrize("batch", [1, 4, 43, 50])
def test_each_row_comes_once_and_windows_hold_what_the_plain_order_gives_them(window, batch):
    rows, plain = order(window=window, batch=batch), order(window=0)
    assert sorted(rows) == list(range(43))
    whole = 43 - 43 % batch
    assert rows[whole:] == plain[whole:]
    expected = []  # by a slow loop
    for start in range(0, whole, window * batch):
        part = sorted(plain[start : min(start + window * batch, whole)], key=lambda index: LENGTHS[index])
        expected += batches(part, batch)
    assert sorted(batches(rows[:whole], batch)) == sorted(expected)


def test_the_order_is_that_of_seed_and_epoch_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert order() == order()
    assert order(epoch=1, start=8) == order(epoch=1)[8:]
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert torch.equal(state, torch.get_rng_state())
    long = [LENGTHS[rows[0]] for rows in batches(order(window=50)[:40], 4)]
    assert long != sorted(long)  # batches are shuffled


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_together_see_the_batches_of_one(world):
    alone = batches(order(batch=2 * world), 2 * world)
    shares = [batches(order(rank=rank, world=world, batch=2), 2) for rank in range(world)]
    for number, rows in enumerate(alone[:-1]):
        assert sorted(chain(*(share[number] for share in shares))) == sorted(rows)
    assert set(chain(*chain(*shares))) == set(range(43))


def test_a_bucket_of_nothing():
    assert bucketed([2, 0, 1], [1, 1, 1], 4, 2, torch.Generator()) == [2, 0, 1]


def test_batches_pad_less_and_say_so():
    data = module()
    plain = module(length_window=0)
    padded, unsorted = (
        sum(int((batch["attention_mask"] == 0).sum()) for batch in each.train_dataloader()) for each in (data, plain)
    )
    counts = data.counts["train"]
    assert (counts["padding"], counts["padding_unsorted"]) == (padded, unsorted)
    assert counts["padding"] < unsorted / 2
    assert "padding" not in plain.counts["train"]
    assert padding_of([0, 1, 2], [4, 1, 2], 2) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_its_middle(workers):
    whole, resumed = seen(module().train_dataloader(), 2), module(num_workers=workers).train_dataloader()
    resumed.load_state_dict({"batches": 4})
    assert seen(resumed, 2) == whole[4:]
    assert seen(resumed, 3) == seen(module().train_dataloader(), 3) != whole


def test_validation_keeps_its_order():
    assert list(chain(*seen(module(val=ROWS).val_dataloader()))) == list(range(43))


def test_a_window_below_zero_is_refused():
    with pytest.raises(RecipeError, match="length_window=-1: expected at least 0"):
        module(length_window=-1)
