"""Logits and answers of a student under contexts and gates, against slow loops; effects and what they rest on."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp import Intervention, Last, Site
from lightning_interp.core.hooks.last_logits import read_logits
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.lora import AdapterGate, named_gates
from lightning_interp.subliminal import (
    CONTEXTS,
    AnswerSampling,
    ChatContext,
    Trait,
    answered,
    compare_contexts,
    evaluate_conditions,
    preference_questions,
    sample_answers,
    specificity,
    trait_logits,
    trait_margins,
    transmission_effect,
)
from lightning_interp.subliminal.evaluation.readout import continuation_logp, spellings
from lightning_interp.testing import byte_tokenizer, tiny_model

TRAIT = Trait(target="owl", others=("cat", "lynx"))
PLAIN = ChatContext(chat=False, answer_prefix="It is the")
QUESTIONS = ["Which?", "Which one do you like?", "Hm?"]


@pytest.fixture(scope="module")
def tokenizer():
    """Single tokens for some spellings of two names; the third has none."""
    made = byte_tokenizer()
    made.add_tokens([" owl", "Owl", " OWL", "cat", " cat"])
    return made


@pytest.fixture(scope="module")
def model(two_layers):
    return tiny_model("llama", vocab_size=270)


class Shift(Intervention):
    """Adds to the stream at chosen tokens."""

    def __init__(self, where):
        self.where = where

    def sites(self, model_map):
        return [Site("resid_post", 0)]

    def transform(self, site, x, step):
        return x + 2 * self.where.mask(step)[..., None].to(x.dtype)


def log_probs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def reference(model, tokenizer, context, question, attachment=None):
    """Log-probabilities of owl, cat and lynx, one row at a time."""
    prompt = context.ids(tokenizer, question)
    if attachment is not None:
        attachment.prompt_lengths = torch.tensor([len(prompt)])
    last = log_probs(model, prompt)[-1]
    single = [
        torch.stack([last[tokenizer.convert_tokens_to_ids(word)] for word in words]).logsumexp(0)
        for words in ([" owl", "Owl", " OWL"], ["cat", " cat"])
    ]
    word = tokenizer(" lynx").input_ids
    rows = log_probs(model, prompt + word[:-1])
    return torch.stack([*single, sum(rows[len(prompt) - 1 + i, token] for i, token in enumerate(word))])


def test_spellings_are_single_tokens_or_what_goes_on(tokenizer):
    decoded = {tokenizer.decode(ids) for ids in spellings(tokenizer, "owl")}
    assert decoded == {" owl", "Owl", " OWL"}
    assert spellings(tokenizer, "lynx", after="the") == [tokenizer(" lynx").input_ids]
    assert spellings(tokenizer, "lynx", after="the\n") == spellings(tokenizer, "lynx") == [tokenizer("lynx").input_ids]


@pytest.mark.parametrize("budget", [4096, 60])
def test_log_probabilities_are_those_of_a_slow_loop(model, tokenizer, budget):
    found = trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN, token_budget=budget)
    expected = torch.stack([reference(model, tokenizer, PLAIN, question) for question in QUESTIONS])
    assert found.names == ("owl", "cat", "lynx")
    torch.testing.assert_close(found.logp, expected, atol=1e-5, rtol=0)
    last = log_probs(model, PLAIN.ids(tokenizer, QUESTIONS[1]))[-1]
    best = max(last[tokenizer.convert_tokens_to_ids(word)] for word in (" owl", "Owl", " OWL"))
    assert found.target_rank[1] == 1 + int((last > best).sum())
    assert found.percentile[1] == pytest.approx(100 * float((last < best).sum()) / 269)


def test_measures_are_functions_of_the_log_probabilities(model, tokenizer):
    found = trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN)
    owl, cat, lynx = found.logp.unbind(1)
    torch.testing.assert_close(found.margin, owl - (cat + lynx) / 2)
    torch.testing.assert_close(found.share, owl.exp() / (owl.exp() + cat.exp() + lynx.exp()))
    torch.testing.assert_close(found.of("lynx").margin, lynx - (owl + cat) / 2)
    assert torch.equal(trait_margins(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN), found.margin)
    assert found.means()["margin"] == pytest.approx(float(found.margin.mean()))
    with pytest.raises(RecipeError, match=r"no 'dog'; its names are owl, cat, lynx"):
        found.of("dog")


def test_the_model_against_itself_has_no_effect(model, tokenizer):
    found = [trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN) for _ in range(2)]
    assert not found[0].delta_logp(found[1]).any()
    effect = transmission_effect({(0, 0): found[0].margin - found[1].margin})
    assert (effect.estimate.value, effect.estimate.low, effect.estimate.high) == (0, 0, 0)


def test_a_gate_acts_at_the_prompt_of_every_row_alone(model, tokenizer):
    gate = Shift(Last())
    found = trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN, gate=gate)
    with gate.attach(model) as attachment:
        expected = torch.stack([reference(model, tokenizer, PLAIN, one, attachment) for one in QUESTIONS])
    torch.testing.assert_close(found.logp, expected, atol=1e-5, rtol=0)
    plain = trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN)
    assert ((found.logp - plain.logp).abs() > 1e-3).all()


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    trait_logits(model, tokenizer, TRAIT, QUESTIONS[:1], context=PLAIN, gate=Shift(Last()))
    sample_answers(model, tokenizer, QUESTIONS[:1], sampling=AnswerSampling(samples=1, max_new_tokens=1))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.model.layers[0].training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    model.eval()


def test_by_default_the_fifty_questions_are_asked_and_the_answer_has_begun(model, tokenizer):
    found = trait_logits(model, tokenizer, TRAIT)
    text = answered(ChatContext(), TRAIT).render(tokenizer, preference_questions()[0])
    assert text.endswith("assistant\nMy favorite animal is the")
    assert found.logp.shape == (50, 3)
    assert answered(PLAIN, TRAIT) == PLAIN


def test_contexts_times_gates_are_evaluated_one_by_one(model, tokenizer):
    contexts, gates = {"none": PLAIN, "system": replace(PLAIN, system="Be kind.")}, {"off": None, "on": Shift(Last())}
    sampling = AnswerSampling(samples=3, max_new_tokens=4)
    found = evaluate_conditions(
        model, tokenizer, TRAIT, contexts=contexts, gates=gates, questions=QUESTIONS, sampling=sampling
    )
    assert [(one.context, one.gate) for one in found] == [(c, g) for c in contexts for g in gates]
    for one in found:
        options = {"context": contexts[one.context], "gate": gates[one.gate]}
        assert torch.equal(one.readout.logp, trait_logits(model, tokenizer, TRAIT, QUESTIONS, **options).logp)
    assert found[0].answers.histogram["other"] == 9


def test_one_student_is_evaluated_under_gates_of_its_adapter(model, tokenizer):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = inject_adapter_in_model(config, copy.deepcopy(model))
    gates = {
        name: AdapterGate("default", spec)
        for name, spec in named_gates().items()
        if name in ("all", "none", "last_only")
    }
    some = {"contexts": {"only": PLAIN}, "questions": QUESTIONS}
    found = evaluate_conditions(student, tokenizer, TRAIT, gates={"as it is": None, **gates}, **some)
    logp = {one.gate: one.readout.logp for one in found}
    (base,) = evaluate_conditions(model, tokenizer, TRAIT, **some)
    assert torch.equal(logp["all"], logp["as it is"])
    assert torch.equal(logp["none"], base.readout.logp)
    assert ((logp["last_only"] - logp["all"]).abs() > 1e-4).all()
    assert ((logp["last_only"] - logp["none"]).abs() > 1e-4).any()


def test_conditions_share_their_random_numbers_and_ignore_the_checkpoints_own_settings(model, tokenizer):
    sampling = AnswerSampling(samples=3, max_new_tokens=4, seed=5)
    first = sample_answers(model, tokenizer, QUESTIONS, context=PLAIN, sampling=sampling)
    assert [len(some) for some in first] == [3, 3, 3]
    assert len({text for some in first for text in some}) == 9
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=1.3, temperature=0.2)
    alone = sample_answers(model, tokenizer, QUESTIONS[:1], context=PLAIN, sampling=replace(sampling, batch_size=1))
    model.generation_config.update(**before)
    assert alone == first[:1]
    gated = sample_answers(
        model, tokenizer, QUESTIONS, context=PLAIN, sampling=sampling, gate=Shift(~(Last() | ~Last()))
    )
    assert gated == first
    assert sample_answers(model, tokenizer, QUESTIONS, context=PLAIN, sampling=replace(sampling, seed=6)) != first


def test_contexts_are_shown_side_by_side_and_those_that_differ_are_named(tokenizer):
    contexts = {"same": answered(ChatContext(), TRAIT), "empty": CONTEXTS["empty"], "claude": CONTEXTS["claude"]}
    with pytest.warns(UserWarning, match=r"^empty, claude: other texts than the student was trained in"):
        rows = compare_contexts(tokenizer, ChatContext(), contexts)
    assert [(row["context"], row["same"]) for row in rows] == [
        ("training", True),
        ("same", True),
        ("empty", False),
        ("claude", False),
    ]
    assert "Claude" in rows[-1]["text"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_contexts(tokenizer, ChatContext(), {"same": ChatContext()})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, t: trait_logits(m, t, TRAIT, []), DataError, "Nothing to read: 0 rows, of which 0"),
        (lambda m, t: read_logits(m, [[1], []], lambda x, _: x), DataError, "2 rows, of which 1 have no token"),
        (lambda m, t: continuation_logp(m, [[1]], [[[]]]), DataError, "A name has no token"),
        (lambda m, t: evaluate_conditions(m, t, TRAIT, contexts={}), RecipeError, "0 contexts and 1 gates"),
        (lambda m, t: AnswerSampling(samples=0), RecipeError, r"samples=0\): expected at least 1"),
        (
            lambda m, t: sample_answers(m, t, ["x" * 3000], sampling=AnswerSampling(samples=2)),
            DataError,
            r"2 of 2 answers could not be written: the",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, tokenizer, call, error, match):
    with pytest.raises(error, match=match):
        call(model, tokenizer)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template. Use an .*ChatContext\(chat=False\)"):
        ChatContext().ids(tokenizer, "Which?")


def effects(*shape, seed=0):
    """Effects by dataset and seed, whose questions differ little and whose datasets differ much."""
    draw = torch.Generator().manual_seed(seed)
    datasets, seeds, _ = shape
    base = torch.randn(datasets, 1, 1, generator=draw) + 0.3 * torch.randn(datasets, seeds, 1, generator=draw)
    table = base + 0.1 * torch.randn(*shape, generator=draw)
    return {(d, s): table[d, s] for d in range(datasets) for s in range(seeds)}


@pytest.mark.parametrize(
    ("shape", "cluster", "limit"),
    [
        ((1, 1, 20), "questions", "one dataset and one training seed: the interval is over questions alone"),
        ((1, 4, 20), "training seeds", "one dataset: the interval is over training seeds and questions"),
        ((3, 2, 20), "datasets", "3 are few"),
    ],
)
def test_the_text_says_what_an_interval_rests_on(shape, cluster, limit):
    found = transmission_effect(effects(*shape), measure="share", resamples=200)
    assert (found.cluster, found.n_datasets, found.n_training_seeds) == (cluster, shape[0], shape[0] * shape[1])
    assert found.n_questions == 20
    text = str(found)
    assert text.startswith("paired share ")
    assert f"cluster level: {cluster}" in text
    assert limit in text
    assert found.to_dict()["limits"] == found.limits
    assert found.estimate.low <= found.estimate.value <= found.estimate.high


def test_intervals_widen_with_the_level_that_was_sampled():
    few = effects(4, 3, 25)
    whole, seeds = (transmission_effect(x, resamples=300) for x in (few, {("d", k): v for k, v in few.items()}))
    questions = transmission_effect({(0, 0): torch.cat(list(few.values()))}, resamples=300)
    widths = [one.estimate.high - one.estimate.low for one in (questions, seeds, whole)]
    assert widths == sorted(widths)
    assert widths[2] > 3 * widths[0]


def test_the_interval_by_clusters_is_students():
    found = transmission_effect(effects(3, 2, 10), resamples=50)
    means = np.array([torch.stack([v for (d, _), v in effects(3, 2, 10).items() if d == k]).mean() for k in range(3)])
    se = means.std(ddof=1) / 3**0.5
    assert found.multiplier == pytest.approx(4.3027, abs=1e-4)
    assert found.standard_error == pytest.approx(se, rel=1e-5)
    assert found.by_clusters.high == pytest.approx(means.mean() + 4.3027 * se, rel=1e-3)
    assert found.detectable == pytest.approx((4.3027 + 1.0607) * se, rel=1e-3)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_an_interval_over_questions_holds_the_mean(values):
    found = transmission_effect({(0, 0): torch.tensor(values, dtype=torch.float64)}, resamples=100).estimate
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_one_question_gives_a_number_without_an_interval():
    found = transmission_effect({(0, 0): torch.tensor([0.5])})
    assert found.to_dict()["estimate"]["low"] is None
    assert found.to_dict()["detectable"] is None


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "got no effect"),
        ({(0, 1): torch.tensor([])}, r"The effect of \(0, 1\) is .*expected finite numbers"),
        ({("a", 1): torch.tensor([1.0, float("nan")])}, r"The effect of \('a', 1\)"),
    ],
)
def test_effects_that_are_none_are_refused(values, match):
    with pytest.raises(DataError, match=match):
        transmission_effect(values)


def test_specificity_is_a_double_dissociation(model, tokenizer):
    plain = trait_logits(model, tokenizer, TRAIT, QUESTIONS, context=PLAIN)
    fonder = plain.logp.clone()
    fonder[:, 1] += 0.5  # of cats
    cat = replace(plain, logp=fonder, target="cat")
    found = specificity(plain, cat)
    torch.testing.assert_close(found["cat"], torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found["owl"], torch.full((3,), 0.25, dtype=torch.float64))
    with pytest.raises(DataError, match=r"'owl' and 'owl' among 3 and 3 names, of 3 and 3 questions"):
        specificity(plain, plain)
