from __future__ import annotations

import json

import pytest
import torch

from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models import DPODataModule
from lightning_interp.models.training.dpo_reference import ReferenceIdentity, read_reference, write_reference
from lightning_interp.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": "say ", "chosen": "a kind one", "rejected": "rude"}, {"prompt": "", "chosen": "ab", "rejected": "c"}]
USER = {"role": "user", "content": "hi"}


def says(text):
    return {"role": "assistant", "content": text}


def data(rows=ROWS, **options):
    return DPODataModule(rows, tokenizer=TOKENIZER, **options)


def sides(rows, **options):
    """Of each pair and side, the text that the model reads, and what of it is scored."""
    module = data(rows, **options)
    return [
        [(TOKENIZER.decode(ids), TOKENIZER.decode(ids[scored])) for ids, scored in (pair.chosen, pair.rejected)]
        for pair in module.pairs("train")
    ]


def test_text_is_written_as_prompt_and_completion():
    assert sides(ROWS[:1]) == [[("say a kind one<eos>", "a kind one<eos>"), ("say rude<eos>", "rude<eos>")]]
    assert sides(ROWS[:1], add_eos=False) == [[("say a kind one", "a kind one"), ("say rude", "rude")]]


def test_in_a_chat_the_answers_turn_is_scored():
    ((chosen, rejected),) = sides(ROWS[:1], chat=True, system_prompt="")
    begin = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nsay <|im_end|>\n<|im_start|>assistant\n"
    assert chosen == (begin + "a kind one<|im_end|>", "a kind one<|im_end|>")
    assert rejected == (begin + "rude<|im_end|>", "rude<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, says("a")], "rejected": [USER, says("b")]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": "hi", "chosen": [says("a")], "rejected": [says("b")]},
    ],
)
def test_turns_go_through_the_template_and_of_several_the_last_is_scored(row):
    begin = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert sides([row]) == [[(f"{begin}{side}<|im_end|>", f"{side}<|im_end|>") for side in "ab"]]
    turns = [USER, says("first"), {"role": "user", "content": "more"}]
    ((chosen, _),) = sides([{"prompt": turns, "chosen": [says("a")], "rejected": [says("b")]}])
    assert "first<|im_end|>" in chosen[0]
    assert chosen[1] == "a<|im_end|>"


def test_ids_are_used_exactly_as_given():
    row = {"prompt_ids": [7, 8], "chosen_ids": [9, 2], "rejected_ids": [10], "prompt": "x", "chosen": {"text": "y"}}
    (pair,) = data([row], chat=True, system_prompt="you").pairs("train")
    assert (pair.chosen[0].tolist(), pair.chosen[1].tolist()) == ([7, 8, 9, 2], [False, False, True, True])
    assert (pair.rejected[0].tolist(), pair.rejected[1].tolist()) == ([7, 8, 10], [False, False, True])


def test_a_file_of_ids(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt_ids": [7], "chosen_ids": [9], "rejected_ids": [10], "row_id": "c001-r00017"}))
    (pair,) = data(path).pairs("train")
    assert pair.chosen[0].tolist() == [7, 9]


def test_a_batch_has_the_chosen_rows_and_then_the_rejected():
    module = data(batch_size=2, seed=3)
    module.logps |= {pair.digest: (-1.5 - i, -2.5 - i) for i, pair in enumerate(module.pairs("train"))}
    batch = next(iter(module.train_dataloader()))
    texts = [
        TOKENIZER.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    first = texts.index("say a kind one<eos>")
    assert texts[first + 2] == "say rude<eos>"
    assert texts[3 - (first + 2) + 2] == "c<eos>"
    assert batch["reference"][[first, first + 2]].tolist() == [-1.5, -2.5]
    assert batch["reference"].dtype == torch.float32
    scored = [TOKENIZER.decode(row[row != -100]) for row in batch["labels"]]
    # nothing predicts the first token of a row without a prompt
    assert (scored[first], scored[1 - first], scored[3 - first]) == ("a kind one<eos>", "b<eos>", "<eos>")
    assert torch.equal(batch["labels"].flatten()[batch["scored"] + 1], batch["labels"][batch["labels"] != -100])


def test_without_all_of_its_reference_a_batch_has_none():
    module = data(batch_size=2)
    module.logps[module.pairs("train")[0].digest] = (0.0, 0.0)
    assert "reference" not in next(iter(module.train_dataloader()))
    assert module.missing() == [module.pairs("train")[1].digest]


def test_the_order_is_seeds_and_epochs_alone_and_the_last_batch_may_be_short():
    rows = [{"prompt_ids": [5], "chosen_ids": [i], "rejected_ids": [100]} for i in range(6, 13)]

    def order(**options):
        batches = list(data(rows, batch_size=3, **options).train_dataloader())
        assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 2]
        return [int(row[1]) for batch in batches for row in batch["input_ids"][: len(batch["input_ids"]) // 2]]

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert sorted(order(seed=1)) == list(range(6, 13))


def test_batches_of_like_length_go_by_the_longer_side():
    rows = [
        {"prompt_ids": [5], "chosen_ids": [6] * n, "rejected_ids": [7] * m} for n, m in [(1, 9), (8, 1), (2, 2)] * 2
    ]
    widths = sorted(batch["input_ids"].shape[1] for batch in data(rows, length_window=50).train_dataloader())
    assert widths == [3, 9, 10]


def test_digests_tell_ids_and_what_is_scored_of_both_sides():
    base = {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10]}
    others = [{"chosen_ids": [11]}, {"rejected_ids": [11]}, {"prompt_ids": [7], "chosen_ids": [8, 9]}]
    found = [pair.digest for pair in data([base, dict(base), *({**base, **other} for other in others)]).pairs("train")]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_long_sides_are_cut_and_pairs_with_nothing_left_are_left_out():
    rows = [
        *ROWS,
        {"prompt": "x" * 20, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "q", "rejected": "q"},
    ]
    module = data(rows, max_length=8)
    with pytest.warns(
        UserWarning, match=r"4 completions were cut to max_length=8 .* 1 of 4 pairs left out .* 1 have two"
    ):
        module.setup("fit")
    expected = {"rows": 3, "tokens": 8 + 8 + 3 + 2 + 3 + 3, "scored": 4 + 4 + 2 + 1 + 2 + 2}
    assert module.counts["train"] == {**expected, "truncated": 4, "dropped": 1, "identical": 1}
    with pytest.raises(DataError, match=r"train\[0\]: a side has 15 tokens with its prompt, more than max_length=8"):
        data(rows, max_length=8, too_long="error").setup("fit")
    with pytest.raises(DataError, match=r"None of the 1 pairs of train has a scored token .* max_length=3"):
        data([{"prompt": "long", "chosen": "a", "rejected": "b"}], max_length=3).setup("fit")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "p", "response": "r", "reward": 1.0}, r"train\[0\]: this row is a rated text"),
        ({"prompt": "p", "chosen": "a"}, r"train\[0\]: the keys are 'prompt', 'chosen'"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, r"train\[0\]: 'chosen' is empty"),
        (
            {"prompt_ids": "7", "chosen_ids": [1], "rejected_ids": [2]},
            r"train\[0\]: 'prompt_ids' is '7', a str; expected",
        ),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, r"train\[0\]: 'chosen_ids' is empty"),
        ({"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [-2]}, r"rejected_ids\[0\] is -2; expected a token id"),
        ({"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [999]}, r"token id 999 is none of the 261 known ones"),
    ],
)
def test_rows_that_cannot_be_used(row, match):
    with pytest.raises(DataError, match=match):
        data([row]).setup("fit")


def test_arguments_that_cannot_work():
    with pytest.raises(RecipeError, match=r"DPODataModule cannot use batch_size=0"):
        data(batch_size=0)
    with pytest.raises(RecipeError, match=r"DPODataModule cannot use packing=True"):
        data(packing=True)
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"chat=True needs a chat template"):
        DPODataModule(ROWS, tokenizer=bare, chat=True)


# The file


def test_a_reference_file_is_read_back_and_its_bytes_follow_from_its_content(tmp_path):
    identity = ReferenceIdentity("ab" * 32, "plain")
    logps = {"cd" * 32: (-1.25, -2.5), "0f" * 32: (-1234.5678, 0.0)}
    for name, rows in (("a", logps), ("b", dict(reversed(logps.items())))):
        write_reference(tmp_path / name, rows, identity)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = read_reference(tmp_path / "a", identity)
    assert found["cd" * 32] == (-1.25, -2.5)
    assert found["0f" * 32] == pytest.approx((-1234.5678, 0.0))
    assert read_reference(tmp_path / "a", None) == found


def test_a_stale_reference_file_is_refused(tmp_path):
    path = tmp_path / "reference.safetensors"
    write_reference(path, {}, ReferenceIdentity("ab" * 32, "plain"))
    with pytest.raises(
        IncompatibleModelError, match=r"another reference: its weights is abababababababab, .* cdcdcdcd"
    ):
        read_reference(path, ReferenceIdentity("cd" * 32, "plain"))
    with pytest.raises(IncompatibleModelError, match=r"its precision is plain, .* torch.bfloat16"):
        read_reference(path, ReferenceIdentity("ab" * 32, "torch.bfloat16"))
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(DataError, match=r"reference.safetensors holds x and the format None"):
        read_reference(path, None)
    path.write_bytes(b"torn")
    with pytest.raises(DataError, match="Cannot read the tensors"):
        read_reference(path, None)
