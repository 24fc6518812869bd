"""Scorers behind one call, rewards of whole units, and the file of rewards."""

from __future__ import annotations

import json
import random
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models import RewardModel
from lightning_interp.models.scoring.score_head import scoring_model
from lightning_interp.models.scoring.text_scorer import Scorer, TextScorer
from lightning_interp.rate import TripleScores, rate_effects
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.scoring.rewards import (
    MissingRewardError,
    RewardTable,
    read_rewards,
    reward_record,
    rows_of,
    scorer_sha,
)
from lightning_interp.rate.scoring.scores import CallableScorer, as_scorer, checked_rewards, score_triples, vader_scorer
from lightning_interp.testing import byte_tokenizer, tiny_model


def triples(n=8, *, draws=1, cluster=False, third=False):
    """Units whose originals end in marks if w = 1; a rewrite flips that and removes a blemish."""
    ids = [f"u{i}" for i in range(n) for _ in range(draws)]
    w = [i % 2 for i in range(n) for _ in range(draws)]
    draw = list(range(draws)) * n
    flip = [["text", "text!"][1 - value] + " " * d for value, d in zip(w, draw, strict=True)]
    back = [["text", "text!"][value] + " " * d for value, d in zip(w, draw, strict=True)]
    return RewriteTriples(
        attr="marks",
        ids=ids,
        w=w,
        prompts=[f"p{i}" for i in range(n) for _ in range(draws)],
        original=[["text", "text!"][i % 2] + "~" * (i // 2) for i in range(n) for _ in range(draws)],
        rewrite=flip,
        rewrite2=back,
        draw=draw,
        cluster=[f"c{i // 2}" for i in range(n) for _ in range(draws)] if cluster else None,
        rewrite3=flip if third else None,
    )


def reward(text):
    return text.count("!") - 0.5 * text.count("~") + 0.01 * text.count(" ")


SCORER = CallableScorer(reward, name="rule", each=True)


def hf_scorer(**options):
    return TextScorer(scoring_model(tiny_model("llama"), seed=0), byte_tokenizer(), **options)


# The contract of scorers


@pytest.mark.parametrize("make", [lambda: SCORER, lambda: hf_scorer(token_budget=90), lambda: RewardModel("tiny:gpt2")])
def test_a_reward_depends_on_its_own_text_alone(make):
    scorer = make()
    prompts, texts = ["a", "b", "a", "b", "c"], ["x", "yy!", "x", "x", "~" * 40]
    found = scorer.score(prompts, texts)
    assert found.shape == (5,)
    assert found.is_floating_point()
    assert not found.requires_grad
    assert found[0] == found[2]
    for index in range(5):
        alone = scorer.score(prompts[index : index + 1], texts[index : index + 1])
        torch.testing.assert_close(found[index : index + 1], alone, rtol=1e-4, atol=1e-6)
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(DataError, match="There are 1 prompts for 2 texts"):
        scorer.score(["a"], ["b", "c"])


def test_any_function_leaves_random_states_and_gradients_alone():
    seen = []

    def noisy(prompts, texts):
        seen.append((torch.is_grad_enabled(), len(texts)))
        return torch.rand(len(texts)) + random.random() + np.random.rand()  # noqa: S311

    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    CallableScorer(noisy, name="noisy").score(["a", "a"], ["b", "c"])
    assert seen == [(False, 2)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_equal_texts_are_asked_for_once():
    asked = []

    def count(prompts, texts):
        asked.extend(zip(prompts, texts, strict=True))
        return np.arange(len(texts), dtype=np.float32)

    found = CallableScorer(count, name="count").score(["p", "q", "p", "p"], ["t", "t", "t", "s"])
    assert asked == [("p", "t"), ("q", "t"), ("p", "s")]
    assert found.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ([1, 2], torch.float64),
        (np.array([1.0, 2.0]), torch.float64),
        (torch.tensor([1, 2]), torch.float64),
        (torch.tensor([[1.0], [2.0]]), torch.float32),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.float32),
        (torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), torch.float64),
    ],
)
def test_numbers_of_any_kind_are_taken(found, dtype):
    tensor = checked_rewards(found, 2, "mine")
    assert (tensor.tolist(), tensor.dtype, tensor.requires_grad) == ([1, 2], dtype, False)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ([1.0], r"Scorer 'mine' gave torch.float64 of shape \(1,\) for 2 texts"),
        (torch.zeros(2, 2), r"torch.float32 of shape \(2, 2\)"),
        (torch.tensor([True, False]), "torch.bool of shape"),
        (["good", "bad"], r"Scorer 'mine' gave \['good', 'bad'\]; expected one number a text"),
        ([None, 1.0], r"gave \[None, 1.0\]"),
        (None, "Scorer 'mine' gave None"),
    ],
)
def test_what_is_no_number_a_text_is_refused(found, match):
    with pytest.raises(DataError, match=match):
        CallableScorer(lambda prompts, texts: found, name="mine").score(["a", "b"], ["a", "b"])


def test_scorers_are_made_of_what_can_score(tmp_path):
    def length(prompts, texts):
        return [float(len(text)) for text in texts]

    assert as_scorer(SCORER) is SCORER
    assert as_scorer(length).name == "length"
    assert as_scorer(length, name="other").name == "other"
    module = RewardModel("tiny:llama", chat=False)
    assert isinstance(as_scorer(module), TextScorer)
    assert as_scorer(module).model is module.model
    module.export(tmp_path / "out")
    loaded = as_scorer(tmp_path / "out")
    assert loaded.name == "out"
    torch.testing.assert_close(loaded.score(["a"], ["b"]), module.score(["a"], ["b"]))
    with pytest.raises(DataError, match=r"A Linear cannot score texts. Give a Scorer"):
        as_scorer(torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="A int cannot score texts"):
        as_scorer(5)


def test_a_language_model_is_no_scorer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(IncompatibleModelError, match=r"LlamaModel of '.*' is a language model without a score head"):
        as_scorer(str(tmp_path))
    with pytest.raises(IncompatibleModelError, match="GPT2LMHeadModel of 'GPT2LMHeadModel' is a language model"):
        TextScorer(tiny_model("gpt2"), byte_tokenizer())
    with pytest.raises(RecipeError, match="token_budget=0"):
        hf_scorer(token_budget=0)


def test_identities_tell_settings_apart():
    shas = [
        scorer_sha(hf_scorer(**options))
        for options in ({}, {"max_length": 9}, {"chat": False}, {"name": "a"}, {"system_prompt": ""}, {"add_eos": True})
    ]
    assert len(set(shas)) == len(shas)
    assert scorer_sha(hf_scorer(token_budget=3)) == shas[0]  # it does not show in the rewards
    with pytest.raises(TypeError, match="abstract"):
        Scorer()


def test_settings_of_a_folder_hold_unless_others_are_given(tmp_path):
    RewardModel("tiny:llama", chat=False, max_length=33).export(tmp_path / "out")
    assert TextScorer.load(tmp_path / "out").encoder.max_length == 33
    scorer = TextScorer.load(tmp_path / "out", max_length=11, name="short", device="cpu", dtype="bfloat16")
    assert (scorer.encoder.max_length, scorer.encoder.chat, scorer.name) == (11, False, "short")
    assert next(scorer.model.parameters()).dtype == torch.bfloat16
    assert scorer_sha(scorer) != scorer_sha(TextScorer.load(tmp_path / "out", max_length=11, name="short"))


class Analyser:
    """Answers as VADER's analyser does."""

    def polarity_scores(self, text):
        return {"compound": reward(text) / 10, "neg": 0.0}


def test_vader_is_a_scorer(monkeypatch):
    inner = types.SimpleNamespace(SentimentIntensityAnalyzer=Analyser)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", inner)
    scorer = vader_scorer()
    assert scorer.name == "vader"
    assert scorer.score(["", ""], ["oh!!", "oh"]).tolist() == [0.2, 0.0]
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RecipeError, match="vaderSentiment"):
        vader_scorer()


# Units


def test_rewards_of_units_give_the_effects():
    units = triples()
    scores = score_triples(SCORER, units)
    assert scores.scorer == "rule"
    slow = {stage: [reward(text) for text in units.texts(stage)] for stage in units.stages}
    assert {stage: tensor.tolist() for stage, tensor in scores.reward.items()} == slow
    expected = rate_effects(units.w, *slow.values(), ids=units.ids)
    found = scores.effects(units)
    assert found.rate.ate == expected.rate.ate
    assert found.single.ate == expected.single.ate
    assert found.rate.ate.value == 1.0
    assert found.single.att.value < 1.0 < found.single.atu.value  # the rewriter repairs blemishes


def test_draws_are_averaged_inside_their_unit_and_clusters_are_used():
    units = triples(draws=3, cluster=True)
    result = score_triples(SCORER, units).effects(units, se="cluster")
    assert result.counts.n == 8
    assert result.rate.ate.value == pytest.approx(1.0)
    assert "cluster" in result.rate.ate.method


def test_third_rewrites_are_scored_too():
    units = triples(third=True)
    assert set(score_triples(SCORER, units).reward) == {"original", "rewrite", "rewrite2", "rewrite3"}


def test_identical_rewrites_are_counted():
    units = triples()
    same = RewriteTriples(**{**vars(units), "rewrite": list(units.original)})
    with pytest.warns(UserWarning, match="a rewrite that is the text it was made from"):
        result = score_triples(SCORER, same).effects(same)
    assert sum(result.counts.identical["rewrite"].values()) == 8


def test_an_exact_null_is_exactly_zero():
    """A model that cannot see the attribute: rewrites are the same to it, whatever batch they are in."""
    units = triples(20)
    model = hf_scorer(token_budget=70)
    blind = CallableScorer(lambda p, t: model.score(p, [text.strip("! ") for text in t]), name="blind")
    result = score_triples(blind, units).effects(units)
    assert (result.rate.ate.value, result.rate.ate.se) == (0.0, 0.0)
    assert result.naive.value != 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rewards_that_are_not_finite_follow_the_policy(value):
    units = triples(8)
    scorer = CallableScorer(lambda text: value if text == "text!~~" else reward(text), name="rule", each=True)
    scores = score_triples(scorer, units)
    with pytest.raises(DataError, match="u5"):
        scores.effects(units)
    with pytest.warns(UserWarning, match="left out"):
        result = scores.effects(units, missing="drop")
    assert result.counts.n == 7


def test_truncation_is_reported_by_stage_and_cut_units_can_be_left_out():
    units = triples(8)
    scorer = hf_scorer(chat=False, add_eos=False, max_length=8)
    scores = score_triples(scorer, units)
    lengths = {
        stage: [len(p + t) > 8 for p, t in zip(units.prompts, units.texts(stage), strict=True)]
        for stage in units.stages
    }
    assert scores.truncation() == {stage: sum(cut) / 8 for stage, cut in lengths.items()}
    assert scores.truncation()["original"] == 0.375
    with pytest.warns(UserWarning, match="left out"):
        result = scores.effects(units, drop_truncated=True)
    assert result.counts.n == 5
    assert result.counts.dropped["truncated"] == 3
    broken = CallableScorer(lambda text: float("nan") if text == "text" else 1.0, name="nan", each=True)
    gone = score_triples(broken, units)
    with pytest.raises(DataError, match="u0"):
        gone.effects(units, drop_truncated=True)


def test_rewards_of_other_units_are_refused():
    scores = score_triples(SCORER, triples(8))
    with pytest.raises(DataError, match=r"'rule' has 8 rewards of stage 'original', but there are 6 rows of 'marks'"):
        scores.effects(triples(6))


# The file


def written(path, units, scorer=SCORER):
    rows = rows_of(units)
    found = scorer.scores([row.prompt for row in rows], [row.text for row in rows])
    records = [
        reward_record(row, value, flag, scorer=scorer.name, sha=scorer_sha(scorer))
        for row, value, flag in zip(rows, found.reward.tolist(), found.truncated.tolist(), strict=True)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_what_is_written_is_read(tmp_path):
    units = triples(draws=2)
    records = written(tmp_path / "rewards.jsonl", units)
    assert len({record["index"] for record in records}) == len(records) == 48
    table = read_rewards(tmp_path / "rewards.jsonl")
    assert len(table) == 48
    for scorer in (SCORER, "rule"):
        found = table.scores(units, scorer)
        expected = score_triples(SCORER, units)
        assert all(torch.equal(found.reward[stage], expected.reward[stage]) for stage in units.stages)
    assert list(table.scorers.values()) == ["rule"]


def test_rewards_that_are_not_finite_are_written_as_a_status(tmp_path):
    units = triples(4)
    scorer = CallableScorer(
        lambda text: {"text": float("nan"), "text!": float("inf")}.get(text, 1.0), name="s", each=True
    )
    written(tmp_path / "rewards.jsonl", units, scorer)
    content = (tmp_path / "rewards.jsonl").read_text()
    assert "NaN" not in content
    assert "Infinity" not in content
    assert '"reward": null, "status": "nonfinite"' in content
    found = read_rewards(tmp_path / "rewards.jsonl").scores(units, scorer)
    assert torch.isnan(found.reward["rewrite"]).all()


def test_a_missing_reward_names_scorer_and_unit(tmp_path):
    units = triples(4)
    records = written(tmp_path / "rewards.jsonl", units)
    (tmp_path / "rewards.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:5]))
    table = read_rewards(tmp_path / "rewards.jsonl")
    match = r"no reward of scorer 'rule' for the 'rewrite' text of unit 'u1' of 'marks' \(7 of 12 texts lack one\)"
    for kind in (KeyError, DataError, MissingRewardError):
        with pytest.raises(kind, match=match):
            table.scores(units, SCORER)
    with pytest.raises(MissingRewardError, match="scorer 'other' for the 'original' text of unit 'u0'"):
        table.scores(units, "other")
    changed = RewriteTriples(**{**vars(units), "original": ["new", *units.original[1:]]})
    with pytest.raises(MissingRewardError, match="'original' text of unit 'u0'"):
        table.scores(changed, SCORER)


def test_two_scorers_of_one_name_are_told_apart(tmp_path):
    units = triples(4)
    scorers = [hf_scorer(name="rm", max_length=length) for length in (8, 64)]
    records = [record for scorer in scorers for record in written(tmp_path / "x", units, scorer)]
    table = RewardTable({record["index"]: record for record in records}, "rewards.jsonl")
    for scorer in scorers:
        expected = score_triples(scorer, units).reward["original"].double()
        assert torch.equal(table.scores(units, scorer).reward["original"], expected)
    with pytest.raises(DataError, match=r"rewards\.jsonl has rewards of 2 scorers called 'rm'"):
        table.scores(units, "rm")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", r"line 2: no valid JSON .*Expected the file that RewardScorer wrote"),
        ('{"index": 5}', r"line 2: 'id' is None"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"index": "5", "id": "", "scorer": "", "scorer_sha": "", "reward": 1, "truncated": true}', "'index' is '5'"),
        ('{"index": 5, "id": "", "scorer": "", "scorer_sha": "", "reward": "x", "truncated": true}', "'reward' is 'x'"),
    ],
)
def test_damaged_files(tmp_path, line, match):
    path = tmp_path / "rewards.jsonl"
    records = written(path, triples(2))
    path.write_text(f"{json.dumps(records[0])}\n{line}\n")
    with pytest.raises(DataError, match=match):
        read_rewards(path)
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        read_rewards(tmp_path / "absent.jsonl")


def test_units_that_occur_twice_are_refused():
    units = triples(2)
    twice = RewriteTriples(
        **{name: value * 2 if isinstance(value, list) else value for name, value in vars(units).items()}
    )
    with pytest.raises(DataError, match="2 units of 'marks' occur twice with one draw: 'u0', 'u1'"):
        rows_of(twice)


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=6, unique=True))
def test_keys_differ_where_anything_differs(pairs):
    from lightning_interp.rate.scoring.rewards import ScoreRow

    rows = [
        ScoreRow("u", "a", stage, draw, p, t) for p, t in pairs for stage in ("original", "rewrite") for draw in (0, 1)
    ]
    keys = {row.key(sha) for row in rows for sha in ("x", "y")}
    assert len(keys) == 2 * len(rows)
    assert all(0 <= key < 2**60 for key in keys)


def test_rewards_are_read_back_and_divided():
    scores = TripleScores(
        "mine",
        {stage: torch.tensor([1.0, 2.0, float("nan")]) + k for k, stage in enumerate(("original", "rewrite"))},
        {stage: torch.tensor([False, True, k == 0]) for k, stage in enumerate(("original", "rewrite"))},
    )
    again = TripleScores.from_dict(scores.to_dict())
    assert again.scorer == "mine"
    for stage in ("original", "rewrite"):
        torch.testing.assert_close(again.reward[stage], scores.reward[stage].double(), equal_nan=True, rtol=0, atol=0)
        assert torch.equal(again.truncated[stage], scores.truncated[stage])
    few = scores.select([1, 0])
    assert few.reward["rewrite"].tolist() == [3.0, 2.0]
    assert few.truncated["original"].tolist() == [True, False]
    assert not TripleScores.from_dict({"scorer": "s", "reward": {"original": [1]}}).truncated["original"].any()


@pytest.mark.parametrize("found", [{}, {"scorer": "s"}, {"scorer": "s", "reward": [1]}, {"reward": {"original": [1]}}])
def test_what_holds_no_rewards(found):
    with pytest.raises(DataError, match=r"holds no rewards .* Expected scorer, and reward by stage"):
        TripleScores.from_dict(found)
