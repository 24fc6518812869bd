"""What a command line names: labellers, toggles, rules, templates, and the pieces of an audit."""

from __future__ import annotations

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from rate_oracle import random_units
from rewriting import ATTR, Counting, store_of

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.work import Prices
from lightning_interp.rate import (
    Contains,
    LongerThan,
    MarkToggle,
    OpenerToggle,
    Review,
    RewriteResult,
    RewriteRun,
    RewriteTriples,
    StartsWithVowel,
    rate_effects,
)
from lightning_interp_recipes.rate._audit import agreed, labelled, read_any, rewrite_all, running_estimates
from lightning_interp_recipes.rate._example import emphasis_rewriter, emphatic_units, exact_effects, made_up_scorer
from lightning_interp_recipes.rate._named import named_labeller, named_rule, named_scorer, named_template, named_toggle


class TestNames:
    @pytest.mark.parametrize(
        ("name", "labeller"),
        [
            ("vowel", StartsWithVowel()),
            ("length:3", LongerThan(3.0)),
            ("words:2.5", LongerThan(2.5, "words")),
            ("length", LongerThan(4.0)),
            ("words", LongerThan(1.5, "words")),
            ("contains:a:b|c", Contains("a:b|c")),
        ],
    )
    def test_labellers(self, name, labeller):
        assert named_labeller(name, ["abc", "ab cd"]) == labeller

    def test_sentiment_needs_its_package(self, monkeypatch):
        monkeypatch.setattr(
            "lightning_interp_recipes.rate._named.vader_labeller", lambda threshold: ("vader", threshold)
        )
        assert named_labeller("vader") == ("vader", 0.0)
        assert named_labeller("vader:0.3") == ("vader", 0.3)

    @pytest.mark.parametrize("name", ["", "vowels", "contains", "contains:", "vowel:3", "tone"])
    def test_unknown_labellers(self, name):
        with pytest.raises(RecipeError, match=f"There is no labeller '{name}'; expected vowel"):
            named_labeller(name)

    @pytest.mark.parametrize("name", ["length:long", "words:", "vader:x"])
    def test_a_limit_that_is_no_number(self, name):
        with pytest.raises(RecipeError, match=f"'{name}': '{name.partition(':')[2]}' is no number"):
            named_labeller(name)

    def test_toggles_and_rules(self):
        assert named_toggle("mark:!!") == MarkToggle("!!")
        assert named_toggle("opener: |Thanks!") == OpenerToggle("", "Thanks!")
        assert named_rule("mentions")("@ann hi") == "hi"
        assert named_rule("markup")("a<br />b") == "a b"
        assert named_rule("phrase: so to say ")("It is, so to say, done") == "It is, , done"

    @pytest.mark.parametrize("name", ["mark:", "opener:Well,", "opener:a|b|c", "marks:!"])
    def test_unknown_toggles(self, name):
        with pytest.raises(RecipeError, match=re.escape(f"There is no toggle {name!r}; expected mark")):
            named_toggle(name)

    @pytest.mark.parametrize("name", ["link", "phrase:", "typos:x"])
    def test_unknown_rules(self, name):
        with pytest.raises(RecipeError, match=f"There is no rule '{name}'; expected mentions, links, markup, typos"):
            named_rule(name)

    def test_templates(self, tmp_path):
        assert named_template("sentiment", "chat").name == "sentiment/chat"
        fields = {"name": "mood", "version": 2, "body": "{text} {phrase}", "phrases": ["sad", "glad"]}
        (tmp_path / "mood.json").write_text(json.dumps(fields))
        assert named_template(str(tmp_path / "mood.json")).render("x", w_target=1) == "x glad"

    @pytest.mark.parametrize("content", [None, "{", "[1]", '{"name": "mood"}', '{"colour": 1}'])
    def test_templates_that_cannot_be_read(self, tmp_path, content):
        if content is not None:
            (tmp_path / "mood.json").write_text(content)
        with pytest.raises(DataError, match=r"mood\.json holds no template"):
            named_template(str(tmp_path / "mood.json"))


class TestBudget:
    def test_a_plan_is_shown_and_calls_are_agreed_to(self, tmp_path):
        run = RewriteRun(store_of(tmp_path / "s"), Counting(), attr=ATTR, prices=Prices(1.0, 2.0))
        with pytest.raises(
            RecipeError, match=r"counting would be called up to 12 times: .* 0\.00 in money.*max_calls=12"
        ):
            agreed(run, max_calls=None, max_cost=None)
        assert "at most 12" in agreed(run, max_calls=12, max_cost=None)
        assert "at most 12" in agreed(run, max_calls=None, max_cost=1.0)
        run.run()
        assert "at most 0" in agreed(run, max_calls=None, max_cost=None)  # nothing to ask: nothing to agree to

    def test_a_stop_is_an_error_that_says_how_to_go_on(self, tmp_path):
        store = store_of(tmp_path / "s")
        with pytest.raises(RecipeError, match=r"ended at max_calls=5 after 5 calls; .* another budget"):
            rewrite_all(RewriteRun(store, Counting(), attr=ATTR, max_calls=5))
        counting = Counting()
        assert rewrite_all(RewriteRun(store, counting, attr=ATTR)).calls == 7
        assert max(counting.asked.values()) == 1

    def test_too_many_errors(self, tmp_path):
        store = store_of(tmp_path / "s")
        broken = RewriteResult(text=None, status="error", error="no such model")
        rewriter = Counting(answers={(unit.text, 1 - unit.w): broken for unit in store.units(ATTR)})
        with (
            pytest.warns(UserWarning, match="3 errors in a row"),
            pytest.raises(RecipeError, match="ended at too many errors, the last of them 'no such model'"),
        ):
            rewrite_all(RewriteRun(store, rewriter, attr=ATTR, give_up_after=3))


def test_labels_of_the_file_or_of_a_labeller(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"text": "An idea", "w": 0}\n{"text": "The idea"}\n{"text": "1 idea", "w": 1}\n')
    given = read_any(path)
    assert [unit.w for unit in labelled(given, None).units] == [0, None, 1]
    assert [unit.w for unit in labelled(given, StartsWithVowel()).units] == [1, 0, None]
    with pytest.raises(DataError, match=r"m\.jsonl: none of the 3 texts has a label"):
        labelled(given, lambda texts, prompts: [None] * len(texts))


def test_running_estimates_end_at_the_result_and_are_those_of_the_first_units():
    result = rate_effects(*random_units(60, 3))
    rows = running_estimates(result, steps=6, seed=1)
    assert [row["units"] for row in rows] == [10, 20, 30, 40, 50, 60]
    last = {"naive": result.naive.value, "single": result.single.ate.value, "rate": result.rate.ate.value}
    assert {name: rows[-1][name] for name in last} == pytest.approx(last)
    assert running_estimates(result, steps=6, seed=1) == rows != running_estimates(result, steps=6, seed=2)
    bare = rate_effects([1, 0, 1], None, [0.0, 1.0, 0.0], [1.0, 0.0, 3.0])
    assert [set(row) for row in running_estimates(bare, steps=2)] == [{"units", "rate"}] * 2
    with pytest.warns(UserWarning, match="No unit has w=0"):
        one = rate_effects([1, 1], None, [0.0, 1.0], [1.0, 2.0])
    assert math.isnan(running_estimates(one)[-1]["rate"])


def test_the_example_is_confounded_and_its_double_rewrite_is_the_exact_edit():
    reviews = [Review(f"Film {number} is fine.", "fresh", f"m{number % 5}") for number in range(400)]
    units, rewriter, scorer = emphatic_units(reviews, seed=0), emphasis_rewriter(), made_up_scorer()
    kind = np.array(["I love the cinema" in unit.text for unit in units])
    w = np.array([bool(unit.w) for unit in units])
    assert [unit.w for unit in units] == Contains("!")([unit.text for unit in units], [""] * 400)
    assert kind[w].mean() == pytest.approx(0.8, abs=0.1)
    assert kind[~w].mean() == pytest.approx(0.1, abs=0.1)
    first = [rewriter.apply(unit.text, 1 - unit.w) for unit in units]
    second = [rewriter.apply(text, unit.w) for text, unit in zip(first, units, strict=True)]
    assert not any("love" in text for text in first)
    triples = RewriteTriples(
        attr="marks", ids=[unit.id for unit in units], w=[unit.w for unit in units], prompts=[""] * 400,
        original=[unit.text for unit in units], rewrite=first, rewrite2=second, draw=[0] * 400,
    )  # fmt: skip
    columns = [scorer.score(triples.prompts, triples.texts(stage)) for stage in triples.stages]
    result, truth = rate_effects(triples.w, *columns), exact_effects(triples, scorer)
    assert result.rate.ate.value == pytest.approx(truth["rewritten"], abs=1e-12)
    assert truth["originals"] == pytest.approx(0.098)
    assert result.naive.value > 0.3


class _Command:
    def __reduce__(self):
        return os.system, ("touch HIT",)


@pytest.mark.parametrize("kept", [_Command(), {"state_dict": {}, "hyper_parameters": {"model": _Command()}}, {}, None])
def test_a_checkpoint_that_is_none_runs_nothing(tmp_path, monkeypatch, kept):
    monkeypatch.chdir(tmp_path)
    torch.save(kept, "m.ckpt")
    if kept is None:
        (tmp_path / "m.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"'m.ckpt' is no checkpoint of a RewardModel, or holds more than numbers"):
        named_scorer("m.ckpt")
    assert os.listdir() == ["m.ckpt"]
