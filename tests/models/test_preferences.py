"""Rows, batches and the data module of preferences and rated texts; the metrics over them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models import PreferenceDataModule, RewardEncoder
from lightning_interp.models.data.preference_pairs import Judged, judged_batch, read_judged
from lightning_interp.models.training.reward_metric import PairScores, PointScores, bradley_terry_loss
from lightning_interp.testing import byte_tokenizer

PAIRS = [{"prompt": f"q{i}", "chosen": "c" * (1 + i % 3), "rejected": "r" * (1 + i % 4)} for i in range(11)]
POINTS = [{"prompt": f"q{i}", "response": "c" * (1 + i % 3), "reward": i / 2} for i in range(5)]


def encoder(**options):
    return RewardEncoder(tokenizer=byte_tokenizer(), **options)


def data(rows=PAIRS, **options):
    settings = {name: options.pop(name) for name in ("max_length", "chat") if name in options}
    return PreferenceDataModule(rows, encoder=encoder(**settings), **{"batch_size": 4, **options})


def decoded(row, mask):
    return byte_tokenizer().decode(row[mask.bool()])


def test_pairs_become_chosen_rows_and_then_rejected_ones():
    module = data([{"prompt": "a", "chosen": "bcd", "rejected": "e", "margin": 2}], val=PAIRS[:3])
    (batch,) = module.train_dataloader()
    assert [decoded(*pair) for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == [
        "abcd<eos>",
        "ae<eos>",
    ]
    assert batch["margin"].tolist() == [2.0]
    assert batch["real"].tolist() == [True]
    (batch,) = module.val_dataloader()
    texts = [decoded(*pair) for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert texts == ["q0c<eos>", "q1cc<eos>", "q2ccc<eos>", "q0r<eos>", "q1rr<eos>", "q2rrr<eos>"]
    assert batch["margin"].tolist() == [0, 0, 0]


def test_rated_texts_carry_their_reward():
    batches = list(data(POINTS, val=POINTS).val_dataloader())
    assert torch.cat([batch["reward"] for batch in batches]).tolist() == [0, 0.5, 1, 1.5, 2]
    assert batches[0]["input_ids"].shape[0] == 4
    assert "margin" not in batches[0]


def test_fillers_of_a_validation_share_do_not_count():
    batch = judged_batch([Judged(([5], [6]), 0.0), Judged(([5], [6]), 0.0, real=False)], pad_id=0)
    assert batch["real"].tolist() == [True, False]
    module = data(val=PAIRS)
    module.setup("validate")
    row = module._datasets["val"][~2]
    assert not row.real
    assert row.ids == module._datasets["val"][2].ids


def test_every_row_is_seen_once_an_epoch_in_a_new_order():
    loader = data().train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        texts = []
        for batch in loader:
            chosen = batch["input_ids"].chunk(2)[0]
            texts += [decoded(*pair) for pair in zip(chosen, batch["attention_mask"], strict=False)]
        epochs.append(texts)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{row['prompt']}{row['chosen']}<eos>" for row in PAIRS)
    assert epochs[0] != epochs[1]


def test_a_file_is_read_and_chats_are_written(tmp_path):
    path = tmp_path / "pairs.jsonl"
    turns = [{"role": "user", "content": "hi"}]
    path.write_text("\n".join(json.dumps(row) for row in [{**PAIRS[0], "id": 7}, {**PAIRS[1], "prompt": turns}]))
    module = data(path, chat=True)
    (batch,) = module.train_dataloader()
    texts = {decoded(*pair) for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)}
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ncc<|im_end|>\n" in texts
    assert module.counts["train"]["rows"] == 2


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}, "hi"),
        ({"prompt": "hi", "chosen": [says("a")], "rejected": [says("b")]}, "hi"),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "hi"),
        ({"prompt": None, "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "hi"),
        ({"prompt": "hi", "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "hi"),
        ({"prompt": "hi", "chosen": [SYSTEM, USER, says("a")], "rejected": [SYSTEM, USER, says("b")]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [says("a")], "rejected": "b"}, [SYSTEM, USER]),
        ({"chosen": [USER, says("x"), USER, says("a")], "rejected": [USER, says("x"), USER, says("b")]},
         [USER, says("x"), USER]),
    ],
)  # fmt: skip
def test_sides_may_be_lists_of_messages(row, prompt):
    (found,) = read_judged([row], name="train")
    assert (found.prompts, found.texts) == ((prompt, prompt), ("a", "b"))
    (batch,) = data([row], chat=True).train_dataloader()
    turns = [USER] if prompt == "hi" else prompt
    written = byte_tokenizer().apply_chat_template([[*turns, says("a")], [*turns, says("b")]], tokenize=False)
    assert [decoded(*pair) for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == written


def test_sides_may_differ_before_their_last_turn_and_ratings_may_be_messages():
    row = {"chosen": [USER, says("a")], "rejected": [{**USER, "content": "ho"}, says("b")]}
    assert read_judged([row], name="train")[0].prompts == ("hi", "ho")
    (found,) = read_judged([{"response": [USER, says("a")], "reward": 1}], name="train")
    assert (found.prompts, found.texts, found.value) == (("hi",), ("a",), 1.0)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"chosen": "a", "rejected": "b"}, "there is no 'prompt', and 'chosen' is a text"),
        (
            {"chosen": [USER], "rejected": [USER]},
            "the turns of 'chosen', with its prompt, are those of user; expected some",
        ),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "are those of assistant; expected some"),
        ({"prompt": "ho", "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "does not hold 'prompt' .'ho'."),
        ({"prompt": "hi", "chosen": [says("a"), USER], "rejected": [says("b")]}, "those of user, assistant, user; exp"),
        ({"prompt": "hi", "chosen": [says("a")], "rejected": [says("")]}, "'rejected' is empty"),
        ({"prompt": "hi", "chosen": [says(["a"])], "rejected": [says("b")]}, r"'chosen\[1\].content' is \['a'\]"),
        ({"prompt": "hi", "chosen": [], "rejected": [says("b")]}, r"'chosen' is \[\]; expected"),
        ({"prompt": "hi", "chosen": [{"role": "assistant"}], "rejected": [says("b")]}, r"chosen\[0\] is .*'content'"),
    ],
)
def test_messages_that_cannot_be_used(row, match):
    with pytest.raises(DataError, match=rf"train\[0\]: .*{match}"):
        read_judged([row], name="train")


def test_conversations_need_a_chat_template():
    rows = [{"chosen": [USER, says("a"), USER, says("c")], "rejected": [USER, says("a"), USER, says("b")]}]
    with pytest.raises(DataError, match=r"train\[0\]: The prompt of text 0 is a list of turns.*chat=True"):
        data(rows).setup("fit")


def test_cut_texts_and_pairs_that_become_the_same_are_counted():
    rows = [*PAIRS[:1], {"prompt": "p", "chosen": "abcdefgh", "rejected": "abcdefxy"}, {**PAIRS[1], "chosen": "rr"}]
    module = data(rows, max_length=6)
    with pytest.warns(UserWarning, match=r"train: 2 texts were cut to max_length=6 tokens, and 2 of 3 pairs left out"):
        module.setup("fit")
    assert module.counts["train"] == {"rows": 1, "tokens": 8, "truncated": 2, "identical": 2}


def test_data_that_fits_is_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = data()
        module.setup("fit")
    assert module.counts["train"]["truncated"] == 0
    assert module.val_dataloader() == []


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("text", r"expected an object, got str 'text'"),
        ({"prompt": "a", "chosen": "b"}, r"the keys are 'prompt', 'chosen'; expected exactly one of"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "response": "d", "reward": 1}, "the keys .* exactly one"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "'chosen' is 5, a int"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "'prompt' is 5; expected a string, or a list"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, r"'prompt' is \[\]; expected"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, r"prompt\[0\] is .*role"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "'margin' is 'wide'; expected a finite"),
        ({"prompt": "a", "response": "b", "reward": float("nan")}, "'reward' is nan; expected a finite number"),
        ({"prompt": "a", "response": "b", "reward": True}, "'reward' is True; expected a finite number"),
        ({"prompt": "a", "response": "", "reward": 1}, "'response' is empty"),
    ],
)
def test_rows_that_cannot_be_used(row, match):
    with pytest.raises(DataError, match=rf"train\[1\]: {match}"):
        read_judged([PAIRS[0], row], name="train")


def test_other_sources_that_cannot_be_used(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PAIRS[0])}\n{json.dumps(POINTS[0])}\n")
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: this row is a rated text, but .*line 1 is a pair"):
        read_judged(path, name="train")
    path.write_text("{broken\n")
    with pytest.raises(DataError, match=r'line 1: no valid JSON .* Expected one object a row: {"prompt"'):
        read_judged(path, name="train")
    with pytest.raises(DataError, match=r'train holds no rows. Expected one object a row: {"prompt"'):
        read_judged([], name="train")


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        (PAIRS, {"batch_size": 0}, RecipeError, "PreferenceDataModule cannot use batch_size=0"),
        (PAIRS, {"too_long": "cry"}, RecipeError, "PreferenceDataModule cannot use too_long='cry'"),
        (PAIRS, {"too_long": "error", "max_length": 5}, DataError, r"train\[2\]: a text has more than max_length=5"),
        ([{**PAIRS[0], "rejected": "c"}], {}, DataError, "None of the 1 pairs of train has two different texts"),
        (
            [{**PAIRS[0], "prompt": [{"role": "user", "content": "a"}]}],
            {},
            DataError,
            r"train\[0\]: The prompt of text 0",
        ),
    ],
)
def test_what_the_data_module_refuses(rows, options, error, match):
    with pytest.raises(error, match=match):
        data(rows, **options).setup("fit")


def test_a_text_without_a_token_is_refused():
    module = PreferenceDataModule(
        [{"prompt": "", "chosen": " ", "rejected": "b"}], encoder=encoder(add_eos=False, max_length=3)
    )
    module.encoder.tokenizer.backend_tokenizer.normalizer = _strip()
    with pytest.raises(DataError, match=r"train\[0\]: a text has no tokens"):
        module.setup("fit")


def _strip():
    from tokenizers.normalizers import Strip

    return Strip()


# Losses and metrics


def test_the_loss_is_that_of_bradley_and_terry():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator, dtype=torch.float64) * 3
    margin = torch.rand(50, generator=generator, dtype=torch.float64)
    slow = [
        -float(torch.log(1 / (1 + torch.exp(-(c - r - m))))) for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    found = bradley_terry_loss(chosen, rejected, margin)
    assert found.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-7)
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).tolist() == [200.0]  # no overflow


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_pair_scores_weigh_every_pair_the_same(parts):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 20, generator=generator)
    rejected[3] = chosen[3]
    real = torch.rand(20, generator=generator) > 0.2
    losses = F.softplus(rejected - chosen)
    metric = PairScores()
    for index in torch.arange(20).chunk(parts):
        metric.update(chosen[index], rejected[index], losses[index], real[index])
    found = {name: float(value) for name, value in metric.compute().items()}
    right = [0.5 if c == r else float(c > r) for c, r in zip(chosen[real], rejected[real], strict=True)]
    assert found == pytest.approx(
        {"loss": float(losses[real].mean()), "accuracy": sum(right) / len(right), "pairs": int(real.sum())}, rel=1e-5
    )


def test_scores_of_fillers_alone_are_nan_with_their_number():
    pairs, points, none = PairScores(), PointScores(), torch.tensor([False])
    pairs.update(torch.ones(1), torch.ones(1), torch.ones(1), none)
    points.update(torch.ones(1), none)
    assert torch.isnan(pairs.compute()["accuracy"])
    assert (int(pairs.compute()["pairs"]), int(points.compute()["texts"])) == (0, 0)
    assert torch.isnan(points.compute()["loss"])


def test_metrics_can_be_used_after_a_reset_in_inference_mode():
    metric = PairScores()
    with torch.inference_mode():
        metric.update(torch.ones(2), torch.zeros(2), torch.ones(2))
        metric.reset()
    metric.update(torch.ones(2), torch.zeros(2), torch.ones(2))
    assert float(metric.compute()["accuracy"]) == 1.0
