"""BagOfWords: what it sees of a text, what it learns, and that it is scored, saved and resumed like others."""

from __future__ import annotations

import math
import re

import lightning as L
import pytest
import rig
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_interp.errors import DataError, IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.models import BagOfWords, PreferenceDataModule, word_tokenizer
from lightning_interp.rate import as_scorer
from lightning_interp.testing import byte_tokenizer

TEXTS = ["Great flight, great crew!", "Late again @air", "Don't lose my bag", "great bag", "Zoë is late", "crew"]
RATED = [{"prompt": "", "response": text, "reward": float("reat" in text)} for text in TEXTS]
PAIRS = [{"prompt": "", "chosen": TEXTS[a], "rejected": TEXTS[b]} for a, b in ((0, 1), (3, 2), (0, 4), (3, 5))]


@pytest.fixture
def make():
    """Modules whose weights are all different, with known values."""

    def build(texts=TEXTS, **options):
        module = BagOfWords(word_tokenizer(texts, min_count=1), **options)
        with torch.no_grad():
            module.weights.weight.copy_(torch.arange(len(module.tokenizer)).sqrt()[:, None] - 2.0)
        return module

    return build


def by_hand(module, text):
    """Sum of the weights of the different known words, by a loop of its own, and the intercept."""
    vocabulary, weight = module.tokenizer.get_vocab(), module.weights.weight.detach().double()[:, 0]
    words = {found.lower() for found in re.findall(r"[a-zë]+(?:'[a-z]+)*", text, re.IGNORECASE)}
    known = [vocabulary[word] for word in words if word in vocabulary]
    return math.fsum([*weight[known].tolist(), float(weight[module.tokenizer.eos_token_id])])


def trainer(folder, **options):
    return rig.trainer(folder, **{"max_epochs": 3, **options})


def data(module, rows, **options):
    return PreferenceDataModule(rows, encoder=module.encoder, batch_size=2, **options)


class TestTokenizer:
    def test_words_are_counted_and_numbered_by_frequency(self):
        tokenizer = word_tokenizer(TEXTS, min_count=2)
        assert set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) == {"great", "late", "crew", "bag"}
        assert tokenizer.convert_ids_to_tokens(3) == "great"

    def test_marks_digits_and_case_are_not_seen(self):
        tokenizer = word_tokenizer(TEXTS, min_count=1)
        assert tokenizer("GREAT 22, flight!!! #crew").input_ids == tokenizer("great flight crew").input_ids
        assert tokenizer("don\u2019t").input_ids == tokenizer("Don't").input_ids

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"min_count": 0}, RecipeError, "min_count=0"),
            ({"min_count": 4}, DataError, r"No word occurs 4 times in the texts \(12 different words\)"),
        ],
    )
    def test_errors(self, options, kind, message):
        with pytest.raises(kind, match=message):
            word_tokenizer(TEXTS, **options)


class TestScores:
    def test_are_the_sums_of_the_different_words(self, make):
        module = make()
        texts = [*TEXTS, "great great late", "", "an unknown word", "12 !"]
        found = module.score([""] * len(texts), texts)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx([by_hand(module, text) for text in texts], abs=1e-12)

    @given(words=st.lists(st.sampled_from("great flight crew late again bag unknown lose my".split()), max_size=12))
    def test_depend_on_the_set_of_words_alone_to_the_bit(self, words):
        module = BagOfWords(word_tokenizer(TEXTS, min_count=1))
        torch.nn.init.normal_(module.weights.weight, generator=torch.Generator().manual_seed(0))
        marked, sorted_once = "!! ".join([*words, *words]).upper(), ", ".join(sorted(set(words)))
        alone = module.score([""], [marked])
        together = module.score([""] * 3, [sorted_once, "a longer text that changes the batch " * 9, marked])
        assert alone[0] == together[0] == together[2]

    def test_a_batch_of_ids_is_the_same_but_for_float32(self, make):
        module = make()
        rows = [text.ids for text in module.encoder.encode_texts([""] * len(TEXTS), TEXTS)]
        longest = max(map(len, rows))
        ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])  # padded on the left, with any id
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        torch.testing.assert_close(module(ids, mask).double(), module.score([""] * len(TEXTS), TEXTS))
        torch.testing.assert_close(module(torch.tensor([rows[0]])), module(ids, mask)[:1])

    def test_words_of_the_prompt_count(self, make):
        module = make()
        assert module.score(["late "], ["crew"]) == module.score([""], ["crew late"])

    def test_it_is_a_scorer_whose_identity_is_that_of_its_weights(self, make):
        module = make()
        scorer = as_scorer(module)
        before = scorer.identity()
        assert before == as_scorer(make()).identity()
        assert torch.equal(scorer.score([""], ["crew"]), module.score([""], ["crew"]))
        with torch.no_grad():
            module.weights.weight[-1] += 1e-3
        assert scorer.identity() != before
        assert make([*TEXTS[:-1], "crows crew"]).scorer.identity()["weights"] != before["weights"]

    def test_mode_and_random_state_are_left_alone(self, make):
        module = make().train()
        state = torch.get_rng_state()
        module.score([""], ["crew"])
        assert module.training
        assert torch.equal(state, torch.get_rng_state())
        assert module.weights.weight.grad is None

    def test_top_words(self, make):
        module = make()
        top = module.top_words(2)
        words = dict((*top["raise"], *top["lower"]))
        values = module.weights.weight.detach()[:, 0]
        assert [weight for _, weight in top["raise"]] == values.sort(descending=True).values[:2].tolist()
        assert [weight for _, weight in top["lower"]] == values[3:5].tolist()  # the first three are no words
        assert all(values[module.tokenizer.get_vocab()[word]] == weight for word, weight in words.items())


class TestTraining:
    def test_logistic_regression_is_that_of_an_independent_fit(self, tmp_path):
        """Full batches until nothing moves, against Newton's method on dense columns."""
        rated = (("good day", 1.0), ("good", 1.0), ("bad day", 0.0), ("bad", 0.0), ("day", 1.0), ("good bad", 0.0),
                 ("day bad good", 1.0), ("good day", 0.0), ("bad day", 1.0))  # fmt: skip
        rows = [{"prompt": "", "response": text, "reward": reward} for text, reward in rated]
        module = BagOfWords(word_tokenizer([text for text, _ in rated], min_count=1), lr=0.2)
        loaded = PreferenceDataModule(rows, encoder=module.encoder, batch_size=len(rows))
        trainer(tmp_path, max_epochs=250).fit(module, loaded)
        names = ("good", "day", "bad")
        columns = torch.tensor([[float(name in text.split()) for name in names] + [1.0] for text, _ in rated]).double()
        goal, beta = torch.tensor([reward for _, reward in rated]).double(), torch.zeros(4).double()
        for _ in range(50):
            p = torch.sigmoid(columns @ beta)
            beta += torch.linalg.solve(columns.T @ (columns * (p * (1 - p))[:, None]), columns.T @ (goal - p))
        weight, vocabulary = module.weights.weight.detach()[:, 0], module.tokenizer.get_vocab()
        found = [float(weight[vocabulary[name]]) for name in names] + [float(weight[module.tokenizer.eos_token_id])]
        assert found == pytest.approx(beta.tolist(), abs=0.02)

    def test_pairs_are_learned(self, tmp_path):
        module = BagOfWords(word_tokenizer(TEXTS, min_count=1), lr=0.1)
        run = trainer(tmp_path, max_epochs=10)
        run.fit(module, data(module, PAIRS, val=PAIRS))
        assert float(run.callback_metrics["val/accuracy"]) == 1.0
        assert float(run.callback_metrics["val/pairs"]) == 4
        first = module.score([""] * 4, [row["chosen"] for row in PAIRS])
        second = module.score([""] * 4, [row["rejected"] for row in PAIRS])
        loss = torch.nn.functional.softplus(second - first).mean()
        assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)

    def test_ratings_are_counted_on_their_side_of_a_half(self, tmp_path, make):
        module = make()
        run = trainer(tmp_path)
        (told,) = run.validate(module, data(module, RATED, val=RATED), verbose=False)
        rewards = module.score([""] * len(TEXTS), TEXTS)
        goal = torch.tensor([row["reward"] for row in RATED])
        assert told["val/accuracy"] == pytest.approx(float(((rewards > 0) == (goal > 0.5)).double().mean()))
        expected = torch.nn.functional.binary_cross_entropy_with_logits(rewards, goal.double())
        assert told["val/loss"] == pytest.approx(float(expected), rel=1e-5)
        assert told["val/texts"] == len(TEXTS)
        assert "val/pairs" not in told

    def test_the_squared_error(self, tmp_path, make):
        module = make(loss="squared")
        rows = [{**row, "reward": 10 * row["reward"] - 3} for row in RATED]
        (told,) = trainer(tmp_path).validate(module, data(module, rows, val=rows), verbose=False)
        errors = module.score([""] * len(TEXTS), TEXTS) - torch.tensor([row["reward"] for row in rows])
        assert told["val/loss"] == pytest.approx(float((errors**2).mean()), rel=1e-5)
        assert set(told) == {"val/loss", "val/texts"}

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, tmp_path):
        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 8:
                    raise RuntimeError("out of power")

        def fit(folder, *callbacks, ckpt=None):
            module = BagOfWords(word_tokenizer(TEXTS, min_count=1), schedule="linear")
            keep = ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)
            run = trainer(folder, max_epochs=4, enable_checkpointing=True, callbacks=[keep, *callbacks])
            run.fit(module, data(module, RATED), ckpt_path=ckpt)
            return run.global_step, module.weights.weight.detach()

        steps, whole = fit(tmp_path / "whole")
        assert steps == 12
        with pytest.raises(RuntimeError, match="out of power"):
            fit(tmp_path / "half", Stop())
        steps, resumed = fit(tmp_path / "half", ckpt=tmp_path / "half/last.ckpt")
        assert steps == 12
        assert torch.equal(resumed, whole)

    @pytest.mark.slow
    def test_two_processes_train_what_one_does_with_a_larger_batch(self, tmp_path):
        alone = BagOfWords(word_tokenizer(TEXTS, min_count=1))
        one = trainer(tmp_path)
        one.fit(alone, PreferenceDataModule(RATED, encoder=alone.encoder, batch_size=2))
        both = BagOfWords(word_tokenizer(TEXTS, min_count=1))
        halves = PreferenceDataModule(RATED, encoder=both.encoder, batch_size=1, val=RATED)
        run = trainer(tmp_path, devices=2, strategy="ddp_fork")
        run.fit(both, halves)
        torch.testing.assert_close(both.weights.weight, alone.weights.weight, rtol=1e-4, atol=1e-5)
        assert float(run.callback_metrics["val/texts"]) == len(RATED)
        assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(one.callback_metrics["train/loss"]))


class TestFolder:
    def test_weights_and_words_come_back(self, tmp_path, make):
        module = make()
        assert module.export(tmp_path / "model") == tmp_path / "model"
        again = BagOfWords.load(tmp_path / "model", lr=0.5)
        assert again.lr == 0.5
        assert again.scorer.identity() == module.scorer.identity()
        texts = [*TEXTS, "GREAT unknown"]
        assert torch.equal(again.score([""] * 7, texts), module.score([""] * 7, texts))
        assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))

    def test_a_folder_in_use_is_not_replaced_unasked(self, tmp_path, make):
        module = make()
        module.export(tmp_path / "model")
        with pytest.raises(ManifestError, match="model"):
            module.export(tmp_path / "model")
        module.export(tmp_path / "model", overwrite=True)

    def test_what_is_no_such_folder(self, tmp_path, make):
        with pytest.raises(DataError, match=r"no folder .*nowhere"):
            BagOfWords.load(tmp_path / "nowhere")
        make().export(tmp_path / "model")
        make([*TEXTS, "another"]).export(tmp_path / "other")
        (tmp_path / "other/model.safetensors").replace(tmp_path / "model/model.safetensors")
        with pytest.raises(IncompatibleModelError, match=r"'weights': \(16, 1\).* each of the 15 tokens"):
            BagOfWords.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"BagOfWords\(loss='hinge'\): expected one of logistic, squared"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"schedule": "up"}, "schedule='up'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(RecipeError, match=message):
        BagOfWords(word_tokenizer(TEXTS, min_count=1), **options)


def test_a_tokenizer_without_an_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(IncompatibleModelError, match=f"the {type(tokenizer).__name__} of 261 tokens has none"):
        BagOfWords(tokenizer)


def test_wrong_batches(make):
    module = make()
    batch = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(DataError, match=r"Batch 7 has neither .* only input_ids, attention_mask"):
        module.training_step(batch, 7)
    with pytest.raises(DataError, match=r"Batch 7 has the rating 1\.5"):
        module.training_step({**batch, "reward": torch.tensor([1.5])}, 7)


def test_a_learning_rate_that_falls_to_an_end_that_is_not_there(tmp_path, make):
    module = make(schedule="linear")
    endless = trainer(tmp_path, max_epochs=-1, max_steps=-1)
    with pytest.raises(RecipeError, match="schedule='linear'"):
        endless.fit(module, data(module, RATED))
