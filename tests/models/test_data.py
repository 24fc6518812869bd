from __future__ import annotations

import json
import warnings
from functools import partial
from itertools import chain

import lightning as L
import pytest
import torch

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models import CausalLM, TextDataModule
from lightning_interp.models.data.batching import EpochSampler, ResumableLoader, token_batch, token_dataset
from lightning_interp.models.data.encoding import EncodedRow
from lightning_interp.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": "p" * (i + 1), "completion": "c" * (1 + i % 3)} for i in range(11)]


def module(rows=ROWS, **options):
    data = TextDataModule(rows, tokenizer=byte_tokenizer(), **{"batch_size": 4, **options})
    data.setup("fit")
    return data


def rows_of(loader):
    """Each batch as the prompt lengths of its rows."""
    p = byte_tokenizer()("p").input_ids[0]
    return [(batch["input_ids"] == p).sum(1).tolist() for batch in loader]


def test_batches_are_padded_on_the_right_to_their_longest_row():
    tokenizer = byte_tokenizer()
    data = module([{"prompt": "ab", "completion": "c"}, {"text": "x"}])
    batch = next(iter(data.train_dataloader()))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (4 - length)
        assert ids[length:].eq(tokenizer.pad_token_id).all()
        assert labels[length:].eq(-100).all()
        text = tokenizer.decode(ids[:length])
        expected = {"abc<eos>": [-100, -100, *ids[2:4].tolist()], "x<eos>": ids[:2].tolist()}[text]
        assert labels[:length].tolist() == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_with_the_end_token_keeps_the_real_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    data = TextDataModule([{"text": "abc"}, {"text": "x"}], tokenizer=tokenizer, batch_size=2)
    batch = next(iter(data.train_dataloader()))
    row = int(batch["attention_mask"].sum(1).argmin())
    assert batch["input_ids"][row].tolist()[1:] == [tokenizer.eos_token_id] * 3
    assert batch["attention_mask"][row].tolist() == [1, 1, 0, 0]
    assert batch["labels"][row].tolist()[1:] == [tokenizer.eos_token_id, -100, -100]


def test_counts_and_truncation():
    rows = [{"prompt": "ab", "completion": "cdef"}, {"prompt": "abcdefg", "completion": "h"}, {"text": "abc"}]
    with pytest.warns(UserWarning, match=r"train: 2 of 3 rows were cut to max_length=5 tokens, and 1 left out"):
        data = module(rows, max_length=5)
    assert data.counts["train"] == {"rows": 2, "tokens": 9, "scored": 6, "truncated": 2, "dropped": 1, "split": 0}
    labels = torch.cat([batch["labels"].flatten() for batch in data.train_dataloader()])
    assert byte_tokenizer().decode(labels[labels != -100].sort().values) == "<eos>abccde"


def test_rows_that_fit_are_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module().counts["train"]["rows"] == 11


def test_a_long_row_can_be_an_error_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * size}) for size in (3, 30)))
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the row has 31 tokens, more than max_length=8"):
        module(path, max_length=8, too_long="error")


def test_only_long_prompts_are_an_error():
    with pytest.raises(DataError, match=r"None of the 1 rows of train has a scored token within max_length=4"):
        module([{"prompt": "abcdef", "completion": "g"}], max_length=4)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"max_length": 1}, "max_length=1: expected at least 2"),
        ({"num_workers": -1}, "num_workers=-1: expected at least 0"),
        ({"too_long": "drop"}, "too_long='drop': expected one of truncate, error"),
    ],
)
def test_wrong_arguments_are_refused(argument, match):
    with pytest.raises(RecipeError, match=match):
        module(**argument)


def test_setup_reads_what_the_stage_needs_and_once(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    data = TextDataModule("missing.jsonl", tokenizer=byte_tokenizer(), val=path)
    data.setup("validate")
    path.unlink()
    data.setup("validate")
    assert data.counts == {"val": data.counts["val"]}
    with pytest.raises(DataError, match=r"missing.jsonl cannot be read"):
        data.setup("fit")


def test_without_validation_data_there_are_no_batches():
    assert module().val_dataloader() == []


def test_validation_keeps_the_order():
    assert rows_of(module(ROWS[:1], val=ROWS).val_dataloader()) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


# Token ids

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_labels_of_a_prompt_change_no_loss():
    data = module(
        [{"prompt_ids": [9, 8, 7], "completion_ids": [6, 5]}, {"prompt_ids": [], "completion_ids": [5, 6, 7]}]
    )
    batch = next(iter(data.train_dataloader()))
    model = CausalLM("tiny:llama")
    told = model._loss(batch, 0, trim=True)
    document = int(batch["attention_mask"].sum(1).argmin())
    assert batch["input_ids"][document].tolist() == [5, 6, 7, *[byte_tokenizer().pad_token_id] * 2]
    assert batch["labels"][document].tolist() == [5, 6, 7, -100, -100]
    assert batch["labels"][1 - document].tolist() == [-100, -100, -100, 6, 5]
    rows = [{"ids": [6, 5], "of": [9, 8, 7]}, {"ids": [6, 7], "of": [5]}]  # the first token of all is never predicted
    with torch.no_grad():
        alone = [model(torch.tensor([row["of"] + row["ids"]])).logits[0].log_softmax(-1) for row in rows]
        expected = [-scores[len(row["of"]) - 1 : -1].gather(1, torch.tensor(row["ids"])[:, None]).sum()
                    for scores, row in zip(alone, rows, strict=True)]  # fmt: skip
    assert (told[0].item(), int(told[1])) == (pytest.approx(float(sum(expected)), rel=1e-5), 4)
    other = batch["labels"].clone()
    other[document, 0] = 3  # the label of a token that nothing predicts
    assert torch.equal(model._loss(batch | {"labels": other}, 0, trim=True)[0], told[0])


def test_the_vocabulary_is_that_of_the_model_that_is_trained(tmp_path):
    data = TextDataModule([{"prompt_ids": [], "completion_ids": [260, 261]}], tokenizer=byte_tokenizer())
    with pytest.raises(DataError, match=r"the token id 261 is none of the 261 known ones"):
        data.setup("fit")
    small = CausalLM(tiny_model("llama", vocab_size=300), optimisation={"lr": 1e-3})
    L.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET).fit(small, data)
    assert data.counts["train"]["scored"] == 1


# Order


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return rows_of(loader)


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second = module().train_dataloader(), module().train_dataloader()
    torch.manual_seed(5)
    zero, one = epoch(first, 0), epoch(first, 1)
    torch.manual_seed(6)
    assert epoch(second, 1) == one  # without having seen epoch 0
    assert epoch(second, 0) == zero != one
    assert epoch(module(seed=1).train_dataloader(), 0) != zero
    assert sorted(chain(*zero)) == sorted(chain(*one)) == list(range(1, 12))


def test_the_order_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(EpochSampler(20, seed=0, shuffle=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_together_see_the_batches_of_one(size, world):
    def shares(shuffle):
        return [list(EpochSampler(size, seed=3, shuffle=shuffle, rank=rank, world_size=world)) for rank in range(world)]

    alone = list(EpochSampler(size, seed=3, shuffle=True))
    train, val = shares(True), shares(False)
    for parts in (train, val):
        assert {len(part) for part in parts} == {-(-size // world)}
    together = [index for step in zip(*train, strict=True) for index in step]
    assert together[:size] == alone
    assert set(together[size:]) <= set(alone)
    together = [index for step in zip(*val, strict=True) for index in step]
    assert together[:size] == list(range(size))
    assert all(index < 0 for index in together[size:])


def test_fillers_score_nothing():
    dataset = token_dataset([EncodedRow([5, 6], [False, True], False), EncodedRow([7, 8, 9], [True] * 3, False)])
    batch = token_batch([dataset[1], dataset[~0]], pad_id=0)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 6, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [-100] * 3]
    assert len(dataset) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers):
    whole = epoch(module(num_workers=workers).train_dataloader(), 3)
    broken = module(num_workers=workers).train_dataloader()
    broken.sampler.set_epoch(3)
    iterator = iter(broken)
    next(iterator)
    state = broken.state_dict()
    assert state == {"batches": 1}
    resumed = module(num_workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    assert epoch(resumed, 3) == whole[1:]
    assert epoch(resumed, 4) == epoch(module().train_dataloader(), 4)
    assert len(resumed) == 3


def test_a_loader_saved_at_the_end_of_an_epoch_starts_a_whole_one():
    loader = module().train_dataloader()
    whole = epoch(loader, 0)
    assert loader.state_dict() == {"batches": 3}
    loader.load_state_dict(loader.state_dict())
    assert epoch(loader, 0) == whole


def test_a_replaced_sampler_is_left_alone():
    """Lightning's overfit_batches puts a plain sampler into a copy of the loader."""
    loader = ResumableLoader(
        token_dataset([EncodedRow([1, 2], [True] * 2, False)]), collate_fn=partial(token_batch, pad_id=0)
    )
    assert len(list(loader)) == 1
