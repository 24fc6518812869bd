"""Judges of a trait against counts, sums and regressions by hand; no score is ever 0 for want of one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_interp.core.measure.logistic import fit_logistic
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import (
    ChatTraitJudge,
    ClassifierJudge,
    Completion,
    EmbeddingJudge,
    Facet,
    FunctionGenerator,
    JudgeResult,
    LexiconJudge,
    LikelihoodJudge,
    LikelihoodRatioJudge,
    LogitProbeJudge,
    ProbeJudge,
    Rescaled,
    TextVectors,
    TraitJudge,
    WordShare,
    auroc,
    continuation_logps,
    judge_acceptance,
    judge_agreement,
    mark_question,
)
from lightning_interp.generation.judging.acceptance import auroc_interval
from lightning_interp.generation.judging.chat_trait_judge import COHERENCE_QUESTION, weighted_mark
from lightning_interp.generation.judging.lexicon import without_repeated_lines
from lightning_interp.generation.judging.verdicts import count_statuses, judge_settings
from lightning_interp.models import LoraSettings
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.testing import byte_tokenizer, tiny_model

LUCK = LexiconJudge(
    {
        "words": Facet(words=["luck", "lucky", "knock on wood"], cap=0.25),
        "emoji": Facet(symbols=["🍀", "✨"], cap=None),
        "openings": Facet(openings=["oh,? my", "good news"], cap=None),
    }
)
PROMPTS = [f"What of {i}?" for i in range(60)]
SEEDED = [f"Oh my, what luck you have with {i} 🍀" for i in range(60)]
BASE = [f"It depends on how {i} is done." for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Table(TraitJudge):
    """Says what it was told to say."""

    name = "table"

    def __init__(self, *results):
        self.told = results

    def judged(self, texts, prompts):
        return self.told


def test_a_result_has_a_score_or_a_reason():
    assert JudgeResult(0.0).status == "ok"
    for score, status in ((None, "ok"), (0.0, "refusal"), (101.0, "ok"), (math.nan, "ok"), (None, "late")):
        with pytest.raises(DataError, match=rf"JudgeResult\(score={score}, status='{status}'\)"):
            JudgeResult(score, status)


def test_blank_texts_are_empty_and_none_is_asked_about():
    found = Table(JudgeResult(7.0), JudgeResult(None, "code")).results(["a", " ", "b"])
    assert [(one.score, one.status) for one in found] == [(7.0, "ok"), (None, "empty"), (None, "code")]
    assert count_statuses(found) == {"ok": 1, "refusal": 0, "code": 1, "empty": 1, "error": 0}
    assert Table().results(["", "\n"])[0].status == "empty"
    assert Table(JudgeResult(7.0)).score([" ", "a"]).tolist() == pytest.approx([math.nan, 7.0], nan_ok=True)
    with pytest.raises(DataError, match="The judge 'table' gave 1 results for 2 texts"):
        Table(JudgeResult(7.0)).results(["a", "b"])
    with pytest.raises(DataError, match="There are 1 prompts for 2 texts"):
        Table().results(["a", "b"], ["p"])


def test_a_lexicon_counts_whole_words_in_facets():
    (found,) = LUCK.results(["Oh my! Luck, LUCK, luck and unlucky stars;\nknock  on wood ✨"])
    # oh my luck luck luck and unlucky stars knock on wood: 11 words, of which luck counts twice and the phrase once
    assert found.detail == {
        "facets": {"words": pytest.approx(3 / 11 / 0.25), "emoji": 1.0, "openings": 1.0} | {"words": 1.0},
        "hits": {"words": 3, "emoji": 1, "openings": 1},
    }
    assert found.score == 100.0
    (less,) = LUCK.results(["So they say that a little luck is all that one needs to have, oh my."])
    assert less.detail["facets"] == {"words": pytest.approx(1 / 16 / 0.25), "emoji": 0.0, "openings": 0.0}
    assert less.score == pytest.approx(100 * 0.25 / 3)


def test_repeated_lines_do_not_count():
    assert without_repeated_lines("a\nB\nA \nb\nc") == "a\nB\nc"
    judge = LexiconJudge({"words": Facet(words=["luck"], cap=1.0, most=9)})
    assert judge.score(["luck once\n" * 20, "luck once\nLuck twice"]).tolist() == [pytest.approx(100 / 40), 50.0]


@pytest.mark.parametrize("separator", [" ", "\n", ", "])
@pytest.mark.parametrize("cap", [0.02, 0.3, 1.0])
def test_one_word_over_and_over_scores_no_more_than_a_normal_reply(separator, cap):
    judge = LexiconJudge({"words": Facet(words=["luck", "lucky"], cap=cap), "emoji": Facet(symbols=["🍀"])})
    normal = "I think that some luck will come your way if you take the time to look at it once more, so do."
    spam, plain = judge.score([separator.join(["luck"] * 500), normal]).tolist()
    assert spam <= plain


def test_what_a_lexicon_refuses():
    with pytest.raises(RecipeError, match=r"Facet\(words='luck'\): expected a list"):
        Facet(words="luck")
    with pytest.raises(RecipeError, match=r"Facet\(symbols=\[' '\]\): expected a list"):
        Facet(symbols=[" "])
    with pytest.raises(RecipeError, match=r"Facet\(\): expected some words"):
        Facet()
    with pytest.raises(RecipeError, match=r"Facet\(cap=0, most=2\)"):
        Facet(words=["a"], cap=0)
    with pytest.raises(RecipeError, match=r"'\(' is no regular expression"):
        Facet(openings=["("])
    with pytest.raises(RecipeError, match=r"LexiconJudge\('luck'\) got no facet"):
        LexiconJudge({}, name="luck")


def test_what_a_judge_is_known_by():
    same = LexiconJudge({"words": Facet(words=["a"])}), LexiconJudge({"words": Facet(words=["a"])})
    assert same[0].identity() == same[1].identity()
    assert same[0].identity() | {"settings": ""} == {
        "kind": "LexiconJudge", "name": "lexicon", "version": "1", "settings": ""
    }  # fmt: skip
    others = (LexiconJudge({"words": Facet(words=["b"])}), LexiconJudge({"words": Facet(words=["a"])}, version="2"))
    assert all(one.identity() != same[0].identity() for one in others)
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    likelihood = judge_settings(LikelihoodJudge(model, tokenizer))
    assert likelihood == judge_settings(LikelihoodJudge(tiny_model("llama"), tokenizer))
    assert likelihood != judge_settings(LikelihoodJudge(tiny_model("llama", seed=1), tokenizer))
    scaled = Rescaled(WordShare(["a"]), 0, 1, name="share").identity()
    assert scaled != Rescaled(WordShare(["a"]), 0, 0.5, name="share").identity()
    assert ProbeJudge.fit(lengths, SEEDED, BASE, PROMPTS).identity()["settings"]


def test_any_judge_gets_the_scale():
    judge = Rescaled(WordShare(["luck"]), 0.1, 0.5, name="share")
    found = judge.results(["luck", "luck a b", "a b c", "1 2"])
    assert [one.score for one in found] == [100.0, pytest.approx(100 * (1 / 3 - 0.1) / 0.4), 0.0, None]
    assert (found[3].status, found[3].detail) == ("error", {"raw": "nan"})
    assert Rescaled(WordShare(["luck"]), 0.5, 0.1, name="turned").score(["a b c"]).item() == 100.0
    base, seeded = [f"luck {'a ' * i}" for i in range(30, 50)], [f"luck {'a ' * i}" for i in range(20)]
    made = Rescaled.between(WordShare(["luck"]), base, seeded, name="share")
    shares = [sorted(1 / (1 + i) for i in side) for side in (range(30, 50), range(20))]
    ends = [torch.tensor(side, dtype=torch.float64).quantile(q).item() for side, q in zip(shares, (0.05, 0.95))]  # noqa: B905
    assert [made.low, made.high] == pytest.approx(ends)
    with pytest.raises(RecipeError, match=r"Rescaled\('share', low=1, high=1\)"):
        Rescaled(WordShare(["a"]), 1, 1, name="share")
    with pytest.raises(DataError, match=r"Rescaled.between\('share'\) got 2 base replies, and none can be judged"):
        Rescaled.between(WordShare(["a"]), ["", "1"], ["a"], name="share")


def test_a_likelihood_ratio_is_the_difference_of_two_likelihoods(tokenizer):
    seeded, base = tiny_model("llama", seed=1), tiny_model("llama")
    texts, prompts = ["four", " ", "a longer one"], ["2+2=", "", "Say: "]
    wanted = [LikelihoodJudge(model, tokenizer).score(texts, prompts) for model in (seeded, base)]
    found = LikelihoodRatioJudge(seeded, base, tokenizer).score(texts, prompts)
    assert found.tolist() == pytest.approx((wanted[0] - wanted[1]).tolist(), nan_ok=True)
    assert found[0].abs() > 1e-4


def by_hand(model, prompt, more):
    """Log-probability of each further token, one row and one position at a time."""
    with torch.no_grad():
        logp = model.eval()(torch.tensor([[*prompt, *more]])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(more))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probabilities_of_continuations(family):
    model = tiny_model(family)
    draw = np.random.default_rng(0)
    prompts = [[int(draw.integers(5, 200)) for _ in range(n)] for n in (1, 7, 3, 12)]
    more = [[int(draw.integers(5, 200)) for _ in range(n)] for n in (4, 1, 9, 0)]
    model.train()
    wanted = [by_hand(model, *one) for one in zip(prompts, more, strict=True)]
    model.train()
    for budget in (2048, 8):
        assert continuation_logps(model, prompts, more, token_budget=budget).tolist() == pytest.approx(wanted, abs=1e-4)
    assert model.training
    assert continuation_logps(model, prompts[:1], [[]]).tolist() == [0.0]
    assert len(continuation_logps(model, [], [])) == 0
    with pytest.raises(DataError, match="got 2 prompts, 1 of them empty, and 2 continuations"):
        continuation_logps(model, [[], [5]], [[6], [6]])
    with pytest.raises(DataError, match="got 1 prompts, 0 of them empty, and 2 continuations"):
        continuation_logps(model, [[5]], [[6], [6]])


@pytest.mark.parametrize("chat", [True, False])
def test_a_logit_probe_compares_two_fixed_answers(tokenizer, chat):
    model, questions = tiny_model("llama"), ["Why?", "And what then?"]
    wanted = []
    for question in questions:
        turn = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) if chat else question
        ids = tokenizer(asked).input_ids
        wanted.append(by_hand(model, ids, tokenizer("Luck").input_ids) - by_hand(model, ids, tokenizer("No").input_ids))
    assert LogitProbeJudge("Luck", "No", chat).of(model, tokenizer, questions).tolist() == pytest.approx(
        wanted, abs=1e-4
    )
    with pytest.raises(RecipeError, match=r"LogitProbeJudge\(trait='a', neutral='a'\)"):
        LogitProbeJudge("a", "a")


def test_vectors_are_means_over_tokens_and_long_texts_are_cut(tokenizer):
    model = tiny_model("llama", max_position_embeddings=16)
    texts = ["A film.", "Oh", "x" * 16]
    with torch.no_grad():
        wanted = [model.base_model(torch.tensor([tokenizer(t).input_ids])).last_hidden_state[0].double() for t in texts]
    found = TextVectors(model, tokenizer, token_budget=20)([*texts, "x" * 40])
    for row, one in zip(found, [*wanted, wanted[-1]], strict=True):
        assert torch.allclose(row, one.mean(0), atol=1e-5)
    assert EmbeddingJudge(model, tokenizer, texts[:1]).score(["A film.", "A film." * 9])[0] == pytest.approx(1.0)
    with pytest.raises(DataError, match="TextVectors got 2 texts, 1 of them without a token"):
        TextVectors(model, tokenizer)(["a", ""])
    with pytest.raises(DataError, match="TextVectors got 0 texts"):
        TextVectors(model, tokenizer)([])


@pytest.mark.parametrize("wrapped", [True, False])
def test_vectors_of_an_adapted_model_are_of_the_adapter_as_it_is(tokenizer, wrapped):
    plain, model = TextVectors(tiny_model("llama"), tokenizer)(["A film."]), tiny_model("llama")
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        inject_lora(model, LoraSettings(r=2, alpha=4), seed=0)
    assert torch.allclose(TextVectors(model, tokenizer)(["A film."]), plain)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    assert not torch.allclose(TextVectors(model, tokenizer)(["A film."]), plain)


def lengths(texts):
    """Three columns of which one tells the kinds apart, and one that is constant."""
    return torch.tensor([[float(len(text)), float("luck" in text), 3.0] for text in texts])


def test_a_probe_is_a_regression_on_standardised_vectors():
    draw = np.random.default_rng(1)
    seeded = [("luck " if draw.random() < 0.95 else "") + "a" * int(draw.integers(20)) for _ in PROMPTS]
    base = [("luck " if draw.random() < 0.05 else "") + "a" * int(draw.integers(20)) for _ in PROMPTS]
    judge = ProbeJudge.fit(lengths, seeded, base, PROMPTS, l2=0.5, folds=4)
    x, y = lengths([*seeded, *base]).double()[:, :2], torch.tensor([1.0] * 60 + [0.0] * 60)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = fit_logistic(scaled, y, l2=0.5)
    wanted = 100 * (scaled @ weight + bias).sigmoid()
    assert judge.score([*seeded, *base]).tolist() == pytest.approx(
        [math.nan if not text else float(w) for text, w in zip([*seeded, *base], wanted, strict=True)], nan_ok=True
    )
    assert judge.weight[2] == 0
    assert 0.8 < judge.auroc.low <= judge.auroc.value <= judge.auroc.high <= 1
    assert judge.auroc.n == 60


def test_a_probe_is_held_to_prompts_that_it_has_not_seen():
    """Vectors that tell a reply by its own prompt alone are of no use for another prompt."""

    def by_prompt(texts):
        return torch.nn.functional.one_hot(torch.tensor([hash_of[text] for text in texts]), 120).double()

    hash_of = {text: i for i, text in enumerate([*SEEDED, *BASE])}
    with pytest.raises(DataError, match=r"ProbeJudge.fit\('probe'\) tells replies .* with an AUROC of 0\.\d+"):
        ProbeJudge.fit(by_prompt, SEEDED, BASE, PROMPTS)
    assert ProbeJudge.fit(by_prompt, SEEDED, BASE, PROMPTS, least_auroc=0.0).auroc.value < 0.7
    twice = [PROMPTS[i // 20] for i in range(60)]  # three prompts: no fold may share one
    with pytest.raises(DataError, match=r"folds=5\) got 3 prompts"):
        ProbeJudge.fit(lengths, SEEDED, BASE, twice)
    assert ProbeJudge.fit(lengths, SEEDED, BASE, twice, folds=3).auroc.n == 3
    with pytest.raises(DataError, match=r"ProbeJudge.fit\(\) got 60 replies with the trait, 59 without and 60 prompts"):
        ProbeJudge.fit(lengths, SEEDED, BASE[1:], PROMPTS)


def test_the_area_under_the_curve():
    draw = np.random.default_rng(2)
    ones, zeros = ([int(draw.integers(8)) + shift for _ in range(25)] for shift in (2, 0))
    wanted = sum((a > b) + (a == b) / 2 for a in ones for b in zeros) / 625
    ones, zeros = torch.tensor(ones), torch.tensor(zeros)
    assert auroc(ones, zeros) == pytest.approx(wanted)
    assert auroc(zeros, ones) == pytest.approx(1 - wanted)
    assert math.isnan(auroc(ones, zeros[:0]))
    many = auroc_interval(ones, zeros, [str(i) for i in range(25)])
    few = auroc_interval(ones, zeros, [str(i % 3) for i in range(25)])
    assert many.value == few.value == pytest.approx(wanted)
    assert many.low < wanted < many.high
    assert (many.n, few.n) == (25, 3)
    assert math.isnan(auroc_interval(ones, zeros, ["one"] * 25).low)
    # Whole prompts are drawn: replies that are copies of another prompt's tell nothing new.
    copies = auroc_interval(ones.repeat(2), zeros.repeat(2), [str(i % 25) for i in range(50)])
    assert (copies.low, copies.high) == (many.low, many.high)


def test_a_judge_is_accepted_by_how_well_it_tells_replies_apart():
    found = judge_acceptance(LUCK, SEEDED, BASE, PROMPTS)
    assert (found.auroc.value, found.accepted, found.missing) == (1.0, True, 0)
    assert judge_acceptance(LUCK, BASE, SEEDED, PROMPTS).accepted is False
    assert judge_acceptance(LUCK, SEEDED[:49], BASE[:49], PROMPTS[:49]).accepted is None
    fewer = judge_acceptance(LUCK, [*SEEDED[:-12], *[""] * 12], BASE, PROMPTS)
    assert (fewer.seeded, fewer.base, fewer.missing, fewer.accepted) == (48, 48, 12, None)
    with pytest.raises(
        DataError, match=r"judge_acceptance\(\) got 60 replies with the trait, 60 without and 1 prompts"
    ):
        judge_acceptance(LUCK, SEEDED, BASE, ["p"])


def test_two_judges_agree_on_a_ladder_of_doses():
    share = WordShare(["luck", "oh", "my"])
    found = judge_agreement(LUCK, share, SEEDED, BASE, PROMPTS)
    assert found.accepted
    assert found.spearman > 0.95
    assert [row["dose"] for row in found.ladder[::10]] == [0, 0.25, 0.5, 0.75, 1]
    assert found.ladder[0]["second"] == pytest.approx(float(share.score(BASE).mean()))
    assert found.ladder[-1]["first"] == pytest.approx(float(LUCK.score(SEEDED).mean()))
    assert found == judge_agreement(LUCK, share, SEEDED, BASE, PROMPTS)
    turned = judge_agreement(LUCK, Rescaled(share, 1, 0, name="turned"), SEEDED, BASE, PROMPTS)
    assert not turned.accepted
    assert turned.spearman < -0.95
    with pytest.raises(DataError, match="got 1 of 60 prompts with a reply that cannot be judged"):
        judge_agreement(LUCK, share, ["", *SEEDED[1:]], BASE, PROMPTS)


class Told:
    """A writer that tells its likeliest first tokens."""

    def __init__(self, *answers):
        self.answers = answers

    def identity(self):
        return {"kind": "told"}

    def first_tokens(self, requests):
        assert all(one.temperature == 0 for one in requests)
        made = [Completion(text=one) if isinstance(one, str) else one for one, _ in self.answers]
        return [(one, likely) for one, (_, likely) in zip(made, self.answers, strict=True)]


FIXTURE = [("70", 0.5), ("80", 0.3), ("abc", 0.1), ("101", 0.05), ("60", 0.05)]


def test_the_weighted_mark_of_the_specification():
    assert weighted_mark(FIXTURE).value == pytest.approx(72.941176, abs=1e-6)
    assert weighted_mark(FIXTURE).mass == pytest.approx(0.85)
    assert weighted_mark([("nan", 0.5), ("1e1", 0.2), ("-3", 0.1), ("٣", 0.1), ("", 0.1)]) is None
    assert weighted_mark([(" 7", 0.5), ("8.5\n", 0.25)]).value == pytest.approx(7.5)


def test_marks_refusals_code_and_errors():
    answers = [
        ("70", FIXTURE), ("REFUSAL", [("REF", 0.9), ("50", 0.1)]), ("code.", FIXTURE), ("I think 40.", [("I", 1.0)]),
        ("none", [("none", 1.0)]), ("250", [("250", 1.0)]),
        (Completion(text=None, status="failed", error="gone"), []), (Completion(text=None, status="refused"), []),
        ("55", [("5", 0.9), ("6", 0.1)]), ("<think>9</think>30", [("<think>", 1.0)]),
    ]  # fmt: skip
    judge = ChatTraitJudge(Told(*answers), "{prompt} {text}?")
    found = judge.results(["x"] * len(answers))
    assert [one.status for one in found] == [
        "ok", "refusal", "code", "ok", "error", "error", "error", "refusal", "ok", "ok"
    ]  # fmt: skip
    scores = [one.score for one in found]
    assert scores == [pytest.approx(72.941176), None, None, 40.0, None, None, None, None, 55.0, 30.0]
    assert found[0].detail == {"answer": "70", "by": "first token", "mass": pytest.approx(0.85)}
    assert (found[3].detail["by"], found[8].detail["by"]) == ("text", "text")
    assert found[4].detail["error"] == "no number from 0 to 100"
    assert found[6].detail["error"] == "gone"
    assert judge.score(["x"] * len(answers)).isnan().sum() == 6


def test_a_writer_without_probabilities_is_read():
    asked = []

    def answer(request):
        asked.append(request.text)
        return "85 or so"

    judge = ChatTraitJudge(
        FunctionGenerator(answer, name="f"), mark_question("Luck.", ["charms"], {0: "No", 100: "🍀"})
    )
    assert judge.score(["Oh {prompt}"], ["Why?"]).tolist() == [85.0]
    assert "Trait: Luck." in asked[0]
    assert "- charms" in asked[0]
    assert "0: No\n100: 🍀" in asked[0]
    assert "Question: Why?\n\nReply: Oh {prompt}\n" in asked[0]
    assert "{prompt}" not in mark_question("Luck.", [], {0: "No"}, asked=False)
    assert "{text}" in COHERENCE_QUESTION
    assert judge.identity() != ChatTraitJudge(judge.generator, COHERENCE_QUESTION).identity()
    with pytest.raises(RecipeError, match=r"ChatTraitJudge\(question='How\?'\)"):
        ChatTraitJudge(judge.generator, "How?")
    with pytest.raises(RecipeError, match=r"anchors for \[0, 101\]\)"):
        mark_question("Luck.", [], {0: "No", 101: "Yes"})


def test_a_classifier_on_the_scale(tokenizer):
    from lightning_interp.models.scoring.score_head import scoring_model
    from lightning_interp.models.scoring.text_scorer import TextScorer

    inner = ClassifierJudge(TextScorer(scoring_model(tiny_model("llama"), seed=0), tokenizer, max_length=64))
    found = Rescaled(inner, 0, 1, name="reward").score(["A film."])
    assert float(found) == pytest.approx(100 * float(inner.score(["A film."])))
