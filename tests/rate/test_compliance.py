from __future__ import annotations

import sys
import types

import pytest

from lightning_interp.core.measure.statistics import proportion_interval
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.checks.compliance import (
    Contains,
    Lexicon,
    LongerThan,
    ScoreAbove,
    StartsWithVowel,
    compliance_rates,
    label_units,
    labels,
    vader_labeller,
)
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit


def label(labeller, *texts):
    return labels(labeller, texts, [""] * len(texts))


class TestLabellers:
    def test_length(self):
        assert label(LongerThan(3), "", "abc", "abcd", "    ") == [0, 0, 1, 1]
        assert label(LongerThan(1, "words"), "", "one", "one two") == [0, 0, 1]

    def test_the_median_splits_in_halves(self):
        texts = ["x" * n for n in (5, 1, 3, 2)]
        labeller = LongerThan.median(texts)
        assert labeller.limit == 2.5
        assert sum(label(labeller, *texts)) == 2
        assert LongerThan.median(["a b", "a", "a b c"], "words") == LongerThan(2, "words")
        with pytest.raises(DataError, match=r"LongerThan\.median got no texts"):
            LongerThan.median([])

    def test_vowels(self):
        texts = ("An", "the", " Umbrella", '"Oh"', "1st", "", "Ärger", "y")
        assert label(StartsWithVowel(), *texts) == [1, 0, 1, None, None, None, 0, 0]
        assert label(StartsWithVowel(skip="\"'("), *texts) == [1, 0, 1, 1, None, None, 0, 0]

    def test_patterns(self):
        assert label(Contains(r"\bthanks\b"), "Thanks a lot", "Thanksgiving") == [1, 0]
        assert label(Contains("A", ignore_case=False), "a", "A") == [0, 1]
        with pytest.raises(RecipeError, match=r"Contains\('\('\) is no regular expression"):
            Contains("(")

    def test_words(self):
        labeller = Lexicon(frozenset({"good", "don't"}), frozenset({"bad"}))
        assert label(labeller, "Good.", "BAD, bad!", "good bad", "", "Don't", "goodbye") == [1, 0, None, None, 1, None]

    def test_scores(self):
        assert label(ScoreAbove(float, 0.5), "0.4", "0.5", "0.6") == [0, None, 1]

    def test_vader(self, monkeypatch):
        class Analyser:
            def polarity_scores(self, text):
                return {"compound": {"good": 0.4, "bad": -0.4}.get(text, 0.0)}

        module = types.ModuleType("vaderSentiment.vaderSentiment")
        module.SentimentIntensityAnalyzer = Analyser
        monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
        assert label(vader_labeller(), "good", "bad", "a film") == [1, 0, None]
        assert label(vader_labeller(0.5), "good") == [0]

    def test_the_real_vader(self):
        pytest.importorskip("vaderSentiment")
        assert label(vader_labeller(), "A great, great film!", "An awful film.", "A film.") == [1, 0, None]

    def test_without_vader(self, monkeypatch):
        for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RecipeError, match="package vaderSentiment, which is not installed"):
            vader_labeller()


class TestLabels:
    def test_any_function_that_sees_the_prompts(self):
        def answers_itself(texts, prompts):
            return [text == prompt for text, prompt in zip(texts, prompts, strict=True)]

        assert labels(answers_itself, ["a", "b"], ["a", "a"]) == [1, 0]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([1], "gave 1 labels for 2 texts; expected 0, 1 or None"),
            ([1, 2], "gave 2 labels for 2 texts, among them 2; expected"),
            (["1", 0], "among them '1'"),
            ([0.5, 1], "among them 0.5"),
        ],
    )
    def test_wrong_labels(self, given, message):
        with pytest.raises(DataError, match=message):
            labels(lambda texts, prompts: given, ["a", "b"], ["", ""])


class TestUnits:
    def test_one_a_text(self):
        assert label_units(["An idea", "The idea", "1"], StartsWithVowel()) == [
            Unit(id="0", text="An idea", w=1),
            Unit(id="1", text="The idea", w=0),
            Unit(id="2", text="1", w=None),
        ]
        more = {"prompts": ["p", "q"], "ids": ["a", "b"], "clusters": ["c", "c"]}
        assert label_units(["An", "The"], StartsWithVowel(), **more)[1] == Unit(
            id="b", text="The", w=0, prompt="q", cluster="c"
        )
        assert {unit.prompt for unit in label_units(["An", "The"], StartsWithVowel(), prompts="Write.")} == {"Write."}

    @pytest.mark.parametrize("name", ["prompts", "ids", "clusters"])
    def test_other_lengths(self, name):
        with pytest.raises(DataError, match=f"{name} has 1 values and texts has 2"):
            label_units(["a", "b"], StartsWithVowel(), **{name: ["x"]})


class TestRates:
    def triples(self, draws=1):
        """Of four units with w=1, pass 1 fails for one; of two with w=0, pass 2 fails for one."""
        w = [1, 1, 1, 1, 0, 0]
        rewrite = ["no", "no", "no", "yes!", "yes!", "yes!"]
        back = ["yes!", "yes!", "yes!", "yes!", "no", "no!"]
        n = len(w)
        return RewriteTriples(
            attr="mark", ids=[str(i // draws) for i in range(n)], w=w, prompts=[""] * n, original=["x"] * n,
            rewrite=rewrite, rewrite2=back, rewrite3=None, draw=[i % draws for i in range(n)],
        )  # fmt: skip

    def test_each_pass_and_direction(self):
        rows = {(row.stage, row.target): row.share for row in compliance_rates(self.triples(), Contains("!"))}
        assert {key: (share.value, share.n) for key, share in rows.items()} == {
            ("rewrite", 0): (0.75, 4),
            ("rewrite", 1): (1.0, 2),
            ("rewrite2", 0): (0.5, 2),
            ("rewrite2", 1): (1.0, 4),
        }
        assert rows["rewrite", 0] == proportion_interval([1, 1, 1, 0])

    def test_draws_are_no_further_units(self):
        (row,) = [
            r for r in compliance_rates(self.triples(draws=2), Contains("!")) if (r.stage, r.target) == ("rewrite", 0)
        ]
        assert row.share == proportion_interval([1.0, 0.5])

    def test_what_cannot_be_told_is_counted_apart(self):
        rows = compliance_rates(self.triples(), Lexicon(frozenset({"yes"}), frozenset()))
        first = rows[0]
        assert (first.stage, first.target, first.share.value, first.share.n, first.unknown) == ("rewrite", 0, 0.0, 1, 3)
        assert first.to_dict()["unknown"] == 3
        assert first.to_dict()["value"] == 0.0

    def test_directions_that_do_not_occur_are_left_out(self):
        one = RewriteTriples(
            attr="m", ids=["a"], w=[1], prompts=[""], original=["a!"], rewrite=["a"], rewrite2=["a!"], draw=[0]
        )
        assert [(row.stage, row.target) for row in compliance_rates(one, Contains("!"))] == [
            ("rewrite", 0),
            ("rewrite2", 1),
        ]
