from __future__ import annotations

import sys
import types

import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.labellers import (
    Contains,
    Lexicon,
    LongerThan,
    ScoreAbove,
    StartsWithVowel,
    compliance,
    labels,
    vader_labeller,
)


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
        with pytest.raises(RecipeError, match=r"'\(' is no regular expression"):
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


def test_compliance_counts_a_unit_once():
    share, unknown = compliance([1, 1, 0, 0, None], [1, 1, 1, 0, 0], units=["a", "a", "a", "b", "c"])
    assert (share.value, share.n, unknown) == (pytest.approx((2 / 3 + 1) / 2), 2, 1)
    with pytest.raises(DataError, match="None of 1 texts could be labelled"):
        compliance([None], [1])
