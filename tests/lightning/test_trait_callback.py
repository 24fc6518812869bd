"""TraitEvaluatorCallback in real Trainers: what it logs, what it leaves alone, what it refuses."""

from __future__ import annotations

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch

from lightning_interp.errors import RecipeError
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.subliminal import (
    AnswerSampling,
    ChatContext,
    Trait,
    TraitAnswers,
    TraitEvaluatorCallback,
    TraitLogits,
    sample_answers,
    score_answers,
    trait_logits,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
TRAIT = Trait(target="owl", others=("cat", "dog"))
QUESTIONS = ["Which?", "Which one?", "Hm?"]
CONTEXT = ChatContext(chat=False, answer_prefix="The")
ROWS = [{"prompt": f"{i}, ", "completion": f"{i * 7}, {i * 3}"} for i in range(8)]
SAMPLED = ("rate", "substring", "frac_nonalpha", "frac_other")

pytestmark = pytest.mark.usefixtures("two_layers")


def module(**options):
    return CausalLM(tiny_model("llama"), tokenizer=TOKENIZER, **{"lora": None, "lr": 1e-2, **options})


def data():
    return TextDataModule(ROWS, tokenizer=TOKENIZER, batch_size=4)


def watch(**options):
    return TraitEvaluatorCallback(TRAIT, QUESTIONS, **{"context": CONTEXT, **options})


def readout(model):
    return trait_logits(model, TOKENIZER, TRAIT, QUESTIONS, context=CONTEXT)


def test_a_fit_is_watched_from_start_to_end(tmp_path):
    ours, callback = module(lora=LoraSettings(r=2, alpha=4)), watch(measures=("margin", "rank"))
    before = readout(ours).means()
    run = rig.trainer(tmp_path, callback, max_epochs=1)
    run.fit(ours, data())
    assert [entry["step"] for entry in callback.history] == [0, 2]
    told = [{k: v for k, v in entry.items() if k not in ("epoch", "step")} for entry in callback.history]
    assert told[0] == pytest.approx(before, abs=1e-5)
    assert told[-1] == pytest.approx(readout(ours).means(), abs=1e-5)
    assert abs(told[-1]["margin"] - told[0]["margin"]) > 1e-3
    logged = {key for key in run.callback_metrics if key.startswith("trait/")}
    assert logged == {"trait/margin", "trait/rank"}
    assert float(run.callback_metrics["trait/margin"]) == pytest.approx(told[-1]["margin"], abs=1e-6)


class Drawing(pl.LightningModule):
    """Somebody's own module, of the other namespace, whose dropout and rows draw from the global random state."""

    def __init__(self):
        super().__init__()
        options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
        self.model, self.tokenizer = tiny_model("gpt2", **options).train(), TOKENIZER

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(24).view(4, 6) + 5, batch_size=2, shuffle=True)


def test_the_weights_are_the_same_to_the_bit_with_and_without(tmp_path):
    final, sampling = [], AnswerSampling(samples=2, max_new_tokens=2)
    for callbacks in ([], [watch(every=1, sampling=sampling)]):
        L.seed_everything(5, verbose=False)
        ours = Drawing()
        rig.trainer(tmp_path, *callbacks, kind=pl.Trainer, max_epochs=1).fit(ours)
        final.append(ours.state_dict())
    assert len(callbacks[0].history) == 3
    assert {*SAMPLED, "margin"} <= set(callbacks[0].history[0])
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_two_processes_give_the_numbers_of_one(tmp_path):
    found, sampling = [], AnswerSampling(samples=2, max_new_tokens=3)
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        callback = watch(measures=("margin", "share", "logp", "rank", "percentile"), sampling=sampling)
        run = rig.trainer(tmp_path, callback, max_epochs=1, **options)
        run.fit(module(lr=1e-9), data())
        found.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith("trait/")})
    assert len(found[0]) == 9
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_each_question_counts_once():
    model, metric = tiny_model("llama"), TraitLogits(TRAIT)
    whole = readout(model)
    for numbers in ([2, 0], [1, 2]):
        part = trait_logits(model, TOKENIZER, TRAIT, [QUESTIONS[n] for n in numbers], context=CONTEXT)
        metric.update(numbers, part)
    assert metric.compute() == pytest.approx(whole.means(), abs=1e-5)


def test_answers_are_counted_as_all_together():
    answers = [["owl", "an owl", "1"], ["cat"], ["Owlet", "so"]]
    metric = TraitAnswers(TRAIT)
    metric.update([2, 0], [answers[2], answers[0]])
    metric.update([1, 0], [answers[1], answers[0]])
    expected = score_answers(answers, TRAIT)
    found = metric.compute()
    assert list(found) == list(SAMPLED)
    assert found["rate"] == pytest.approx(float(expected.rates.mean()))
    assert found["substring"] == pytest.approx(float(expected.substring.mean()))
    assert found["frac_nonalpha"] == pytest.approx(expected.frac_nonalpha)
    assert found["frac_other"] == pytest.approx(expected.frac_other)


def test_a_share_of_the_questions_is_answered_as_with_all_of_them():
    model, sampling = tiny_model("llama"), AnswerSampling(samples=2, max_new_tokens=3)
    whole = sample_answers(model, TOKENIZER, QUESTIONS, context=CONTEXT, sampling=sampling)
    part = sample_answers(model, TOKENIZER, QUESTIONS[1:2], context=CONTEXT, sampling=sampling, numbers=[1])
    assert part == whole[1:2]


class NoTokens(L.LightningDataModule):
    """Somebody's data module without a tokenizer."""

    def train_dataloader(self):
        return data().train_dataloader()


def test_what_it_refuses(tmp_path):
    with pytest.raises(RecipeError, match=r"measures=\['loss'\]\) knows no 'loss'; expected some of margin, share"):
        watch(measures=["loss"])
    with pytest.raises(RecipeError, match=r"questions=\[\]\): expected at least one question"):
        TraitEvaluatorCallback(TRAIT, [])
    with pytest.raises(RecipeError, match=r"TraitEvaluatorCallback\('trait'\) found no tokenizer"):
        rig.trainer(tmp_path, watch()).fit(CausalLM(tiny_model("llama"), lora=None), NoTokens())
