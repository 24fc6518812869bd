"""The experiment with a known answer: what is misspelt, and what an estimator should find."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import (
    Fluency,
    OpenerToggle,
    RepairTranspositions,
    Review,
    RuleRewriter,
    StartsWithVowel,
    fluency_scorer,
    rate_effects,
)
from lightning_interp.rate.report.typo_study import made_up_reviews, misspelt_units
from lightning_interp_recipes.rate._typos import exact_effect, own_reviews, slope, slope_rows

COUNTS = {word.strip("."): 3 * len(word) for review in made_up_reviews() for word in review.text.lower().split()} | {
    "well": 900,
    "also": 300,
}
OPENERS = OpenerToggle("Well,", "Also,")


class TestUnits:
    @pytest.mark.parametrize("percent", [5, 30, 100])
    def test_only_reviews_with_the_attribute_are_misspelt_and_no_label_changes(self, percent):
        clean, misspelt = (misspelt_units(made_up_reviews(), p, seed=0) for p in (0, percent))
        assert [unit.id for unit in clean] == [unit.id for unit in misspelt]
        for before, after in zip(clean, misspelt, strict=True):
            assert after.w == before.w == StartsWithVowel().label(after.text)
            assert sorted(after.text) == sorted(before.text)
            assert before.w or after.text == before.text
            assert before.text == made_up_reviews()[int(before.id)].text
        assert any(a.text != b.text for a, b in zip(clean, misspelt, strict=True)) == (percent > 5)

    def test_seed_count_and_clusters(self):
        def texts(seed):
            return [unit.text for unit in misspelt_units(made_up_reviews(), 40, seed=seed)]

        assert texts(0) == texts(0) != texts(1)
        few = misspelt_units([Review("1 star", "fresh", "x"), *made_up_reviews()], 0, seed=0, count=9, clusters=False)
        assert len(few) == 9
        assert {unit.cluster for unit in few} == {None}
        assert misspelt_units(made_up_reviews(), 0, seed=0)[0].cluster == "made-up 0"

    def test_one_arm_alone_is_refused(self):
        with pytest.raises(DataError, match="Of 2 reviews 2 begin with a vowel and 0 with another letter"):
            misspelt_units([Review("A b", "fresh", "m"), Review("O b", "fresh", "m")], 0, seed=0)

    def test_own_files(self, tmp_path):
        (tmp_path / "mine.jsonl").write_text(
            '{"text": " A b ", "cluster": "c"}\n{"text": "C d", "id": "x", "cluster": "e"}\n'
        )
        assert [(one.text, one.movie) for one in own_reviews(tmp_path / "mine.jsonl")] == [("A b", "c"), ("C d", "e")]
        (tmp_path / "mine.csv").write_text("category,text,movie_name\nrotten,A b,heat\n")
        assert own_reviews(tmp_path / "mine.csv") == [Review("A b", "rotten", "heat")]


def study(percent):
    units = misspelt_units(made_up_reviews(), percent, seed=0)
    rewriter, score = RuleRewriter(OPENERS, always=[RepairTranspositions(COUNTS)]), Fluency(COUNTS)
    first = [rewriter.apply(unit.text, 1 - unit.w) for unit in units]
    second = [rewriter.apply(text, unit.w) for unit, text in zip(units, first, strict=True)]
    columns = [[score(text) for text in texts] for texts in ([unit.text for unit in units], first, second)]
    return rate_effects([unit.w for unit in units], *columns, ids=[unit.id for unit in units])


def test_the_double_rewrite_finds_the_effect_of_the_openers_at_every_rate_of_typos():
    clean = misspelt_units(made_up_reviews(), 0, seed=0)
    truth = exact_effect(clean, OPENERS, Fluency(COUNTS))
    by_hand = [(np.log(300) - np.log(900)) / (1 + len(unit.text.split())) for unit in clean]
    assert truth == pytest.approx(np.mean(by_hand), rel=1e-12)
    results = {float(percent): study(percent) for percent in (0, 20, 40)}
    for result in results.values():
        assert result.rate.ate.value == pytest.approx(truth, abs=1e-12)
    assert results[40.0].naive.value < results[20.0].naive.value < results[0.0].naive.value - 0.1
    assert results[40.0].single.ate.value < results[20.0].single.ate.value
    rows = {row["estimator"]: row for row in slope_rows(results)}
    values = [result.standardized.naive.value for result in results.values()]
    assert slope(results, "naive") == rows["naive"]["sd per percentage point"]
    assert slope(results, "naive") == pytest.approx((values[2] - values[0]) / 40, rel=1e-9)  # evenly spaced points
    assert rows["naive"]["range of ATE (sd)"] == pytest.approx(max(values) - min(values))
    assert abs(rows["rate"]["sd per percentage point"]) < 0.05 * abs(rows["naive"]["sd per percentage point"])


class TestFluency:
    def test_by_hand(self):
        fluency = Fluency({"the": 8, "film": 2, "l'amour": 4}, unknown=0.5)
        assert fluency("The FILM!") == pytest.approx((np.log(8) + np.log(2)) / 2)
        assert fluency("l'amour l\u2019amour") == pytest.approx((np.log(4) + np.log(0.5)) / 2)
        assert fluency("3 1/2 ...") == 0
        assert fluency.misspelt("The flim of film") == 2

    def test_its_name_says_of_which_words(self):
        one, other = fluency_scorer({"film": 2}), fluency_scorer({"film": 3})
        assert one.name != other.name
        assert one.name.startswith("fluency:")

    @pytest.mark.parametrize(
        ("counts", "unknown", "match"), [({}, 0.5, "Fluency of 0 words"), ({"a": 1}, 0, "unknown=0:")]
    )
    def test_wrong_settings(self, counts, unknown, match):
        with pytest.raises(RecipeError, match=match):
            Fluency(counts, unknown)


def test_a_made_up_review_is_valid_json_and_there_are_both_arms():
    reviews = made_up_reviews()
    assert len({review.text for review in reviews}) == 96
    assert json.loads(json.dumps([review.text for review in reviews])) == [review.text for review in reviews]
    assert 20 < sum(StartsWithVowel().label(review.text) for review in reviews) < 76
