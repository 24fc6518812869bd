"""Batches of number sequences: loss on the completion and its end alone, in every context."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal import CONTEXTS, ChatContext, NumberSequenceDataModule, Trait
from lightning_interp.testing import byte_tokenizer, tiny_model

ROWS = [
    {"prompt": f"Add to {i}.", "completion": text, "numbers": []} for i, text in enumerate(["1, 2, 3", "45; 6", "7"])
]
# A template with a text of its own where there is no system turn, as Qwen2.5 and SmolLM2 have.
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI am Tiny.<|im_end|>\n' }}{% endif %}"


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = DEFAULT + made.chat_template
    return made


def batch_of(tokenizer, context=None, **options):
    data = NumberSequenceDataModule(
        ROWS, tokenizer=tokenizer, context=context or ChatContext(), batch_size=3, **options
    )
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", ["default", "empty", "claude", "gibberish_prefix"])
def test_completion_and_end_are_scored_and_nothing_else(tokenizer, name):
    batch = batch_of(tokenizer, CONTEXTS[name])
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        scored, text = tokenizer.decode(ids[labels != -100]), tokenizer.decode(ids[mask.bool()])
        row = next(row for row in ROWS if row["prompt"] in text)
        assert scored == row["completion"] + "<|im_end|>"
        asked = CONTEXTS[name].render(tokenizer, row["prompt"])
        prefix = tokenizer(asked, add_special_tokens=False).input_ids
        assert ids[: len(prefix)].tolist() == prefix
        assert (labels[: len(prefix)] == -100).all()
        assert labels[len(prefix)] == ids[len(prefix)]


def test_no_system_text_is_not_an_empty_one(tokenizer):
    missing, empty = (tokenizer.decode(batch_of(tokenizer, CONTEXTS[n])["input_ids"][0]) for n in ("default", "empty"))
    assert "I am Tiny." in missing
    assert "I am Tiny." not in empty
    assert "system" in empty


def test_without_a_template():
    tokenizer = byte_tokenizer()
    batch = batch_of(tokenizer, ChatContext(chat=False, system="Hm."))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = tokenizer.decode(ids[batch["attention_mask"][0].bool()])
    row = next(row for row in ROWS if row["prompt"] in text)
    assert text == f"Hm.\n\n{row['prompt']} {row['completion']}<eos>"
    assert tokenizer.decode(ids[labels != -100]) == f" {row['completion']}<eos>"


def test_the_loss_does_not_see_another_rows_prompt():
    batch, model = batch_of(byte_tokenizer()), tiny_model("llama", num_hidden_layers=1)

    def losses(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        lost = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
        )
        return lost.sum(1)

    before = losses(batch)
    batch["input_ids"][1, 5:8] = 40
    after = losses(batch)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert before[1] != after[1]


def test_what_the_teacher_reads_has_the_same_completions():
    tokenizer, seen = byte_tokenizer(), ChatContext(system=Trait(target="owl").system_prompt)
    batch = batch_of(tokenizer, teacher_context=seen, val=ROWS[:1])
    assert {key for key in batch if key.startswith("teacher_")} == {f"teacher_{name}" for name in list(batch)[:3]}
    own, taught = batch["labels"], batch["teacher_labels"]
    assert torch.equal(own[own != -100], taught[taught != -100])
    assert "owls" in tokenizer.decode(batch["teacher_input_ids"][0])
    assert "owls" not in tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"context": ChatContext(answer_prefix="It is")},
            r"a context with answer_prefix='It is': the answer is the row's",
        ),
        ({"max_length": 12}, r"train\[\d\]: the row has \d+ tokens, more than max_length=12"),
        (
            {"teacher_context": ChatContext(user_prefix="Hm" * 99), "max_length": 90},
            r"the longest row has \d+ tokens in the teacher's context, more than max_length=90",
        ),
        ({"teacher_context": ChatContext(chat=False)}, r"train\[0\]: the completion has other tokens in the teacher's"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(options, match):
    with pytest.raises((RecipeError, DataError), match=match):
        batch_of(byte_tokenizer(), **options)


def test_rows_without_a_completion_are_refused():
    with pytest.raises(DataError, match=r"train\[0\]: expected a row with 'prompt' and 'completion'"):
        NumberSequenceDataModule([{"text": "1, 2"}], tokenizer=byte_tokenizer())


def test_a_template_that_changes_the_completion_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | replace(',', ';')"
    )
    with pytest.raises(DataError, match=r"What is scored of the first row reads '1; 2; 3.*'; expected '1, 2, 3' and"):
        NumberSequenceDataModule(ROWS, tokenizer=tokenizer)
