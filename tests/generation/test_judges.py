"""Judges against sums by hand; what cannot be judged is NaN."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import (
    ChatJudge,
    ClassifierJudge,
    Completion,
    EmbeddingJudge,
    FunctionGenerator,
    LikelihoodJudge,
    LocalSampler,
    WordShare,
)
from lightning_interp.models.scoring.text_scorer import TextScorer
from lightning_interp.testing import byte_tokenizer, tiny_model

TEXTS = ["A fine film.", " ", "No", "A rather longer text than the others"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def same(found, wanted):
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, nan_ok=True)


def test_whole_words_in_any_case():
    judge = WordShare(["Good", "nice"])
    same(judge.score(["good GOOD bad", "goodness nicely", "12 !", "It's nice"]), [2 / 3, 0, math.nan, 0.5])


@pytest.mark.parametrize("classes", [1, 3])
def test_a_classifier_gives_a_probability(tokenizer, classes):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=classes, pad_token_id=0)  # fmt: skip
    model = LlamaForSequenceClassification(config)
    scorer = TextScorer(model, tokenizer, label=classes - 1, chat=False, max_length=64)
    wanted = []
    for text in TEXTS:
        with torch.no_grad():
            logits = model.eval()(tokenizer(text, return_tensors="pt").input_ids).logits[0].double()
        wanted.append(float(logits[0].sigmoid() if classes == 1 else logits.softmax(-1)[-1]))
    wanted[1] = math.nan
    model.train()
    same(ClassifierJudge(scorer).score(TEXTS), wanted)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_are_means_over_tokens(tokenizer, family):
    model, references = tiny_model(family), ["A film.", "Oh no"]

    @torch.no_grad()
    def unit(text):
        states = model.base_model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0].double()
        return states.mean(0) / states.mean(0).norm()

    reference = sum(unit(text) for text in references)
    wanted = [float(unit(text) @ reference / reference.norm()) for text in TEXTS]
    wanted[1] = math.nan
    same(EmbeddingJudge(model, tokenizer, references).score(TEXTS, ["not read"] * 4), wanted)
    with pytest.raises(DataError, match="EmbeddingJudge got no reference text"):
        EmbeddingJudge(model, tokenizer, [" "])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("chat", [False, True])
def test_likelihood_is_of_the_texts_tokens_alone(tokenizer, family, chat):
    model, prompts = tiny_model(family), ["2+2=", "x", "Why? ", "Say: "]
    wanted = []
    for prompt, text in zip(prompts, TEXTS, strict=True):
        turn = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) if chat else prompt
        after = f"{text}<|im_end|>" if chat else text
        start, ids = len(tokenizer(before).input_ids), tokenizer(before + after).input_ids
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted.append(sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start))
    wanted[1] = math.nan
    same(LikelihoodJudge(model, tokenizer, chat=chat, batch_size=3).score(TEXTS, prompts), wanted)


def test_a_local_judge_gives_the_mean_mark_over_its_digits(tokenizer):
    sampler, question = LocalSampler(tiny_model("llama"), tokenizer, batch_size=2), "{prompt}? {text}! 1 to 5:"
    found = ChatJudge(sampler, question, lowest=1, highest=5, least_mass=0.0).marks(TEXTS, ["p"] * 4)
    wanted = []
    for text in TEXTS:
        turn = [{"role": "user", "content": f"p? {text}! 1 to 5:"}]
        ids = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)).input_ids
        with torch.no_grad():
            p = sampler.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        digits = p[tokenizer("12345").input_ids]
        wanted.append(float(digits @ torch.arange(1.0, 6.0).double() / digits.sum()))
    wanted[1] = math.nan
    same(found.score, wanted)
    assert (found.refused, found.failed) == (0, 0)
    strict = ChatJudge(sampler, question, least_mass=0.99).marks(TEXTS)
    assert strict.score.isnan().all()
    assert (strict.refused, strict.failed) == (3, 0)


def test_a_number_is_read_where_no_probabilities_are_told():
    answers = {"a": "8", "b": "I would say 7.5 of 9", "c": "No.", "d": "12"}
    answers["e"] = Completion(text=None, status="failed")
    answers["f"] = Completion(text="I can not give 5", status="refused")
    judge = ChatJudge(FunctionGenerator(lambda one: answers[one.text[-1]], name="j"), "{prompt}{text}")
    found = judge.marks(list(answers), ["{text}"] * 6)
    same(found.score, [8, 7.5, math.nan, math.nan, math.nan, math.nan])
    assert (found.refused, found.failed) == (3, 1)
    same(judge.score(["a"]), [8])


def test_wrong_questions_and_prompts():
    writer = FunctionGenerator(lambda one: "5", name="five")
    with pytest.raises(RecipeError, match=r"question='How\?', lowest=0, highest=9\): expected a question with"):
        ChatJudge(writer, "How?")
    with pytest.raises(RecipeError, match="lowest=0, highest=10"):
        ChatJudge(writer, "{text}", highest=10)
    with pytest.raises(DataError, match="There are 1 prompts for 2 texts"):
        ChatJudge(writer, "{text}").score(["a", "b"], ["p"])
