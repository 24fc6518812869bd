"""Checks of the assumptions: third rewrites, failed rewrites, asymmetry, and off-target changes of texts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rate_oracle import random_units
from scipy import stats

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import asymmetry_line, attenuation_hint, rate_effects, text_changes, third_rewrite_check


class TestThirdRewrite:
    def test_paired_t_tests(self):
        w, _, r1, r2 = random_units(80, 1)
        r3 = r1 + np.random.default_rng(2).normal(size=80)
        found = third_rewrite_check(w, r1, r2, r3, ci="t")
        sign = np.where(w, 1, -1)
        for effect, contrast in zip(
            (found.ate, found.ate_third, found.difference), (r2 - r1, r2 - r3, r3 - r1), strict=True
        ):
            interval = stats.ttest_1samp(sign * contrast, 0).confidence_interval()
            assert effect.value == pytest.approx((sign * contrast).mean())
            assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high))
        assert found.ate.value - found.ate_third.value == pytest.approx(found.difference.value)
        assert found.ate == rate_effects(w, None, r1, r2, ci="t").rate.ate
        json.dumps(found.to_dict(), allow_nan=False)

    def test_clusters(self):
        w, _, r1, r2 = random_units(80, 1)
        prompts = np.arange(80) // 5
        found = third_rewrite_check(w, r1, r2, r1, cluster=prompts)
        assert found.ate.se == pytest.approx(rate_effects(w, None, r1, r2, se="cluster", cluster=prompts).rate.ate.se)
        assert found.difference.value == found.difference.se == 0

    def test_the_rows_are_matched_by_id(self):
        w, _, r1, r2 = random_units(30, 1)
        r3, order = r1 + np.arange(30), np.random.default_rng(0).permutation(30)
        one = third_rewrite_check(w, r1, r2, r3, ids=range(30))
        other = third_rewrite_check(w[order], r1[order], r2[order], r3[order], ids=order)
        assert one == other

    @pytest.mark.parametrize(("value", "reason"), [(None, "missing_rewrite3"), (float("nan"), "nonfinite")])
    def test_missing(self, value, reason):
        w, _, r1, r2 = random_units(30, 1)
        r3 = [value, *r1[1:].tolist()]
        with pytest.raises(DataError, match=rf"1 of 30 units are incomplete \(1 {reason}\): 0"):
            third_rewrite_check(w, r1, r2, r3)
        found = third_rewrite_check(w, r1, r2, r3, missing="drop")
        assert found.ate == third_rewrite_check(w[1:], r1[1:], r2[1:], r3[1:]).ate

    def test_lengths(self):
        with pytest.raises(DataError, match="r_rw3 has 2 values, but w has 3"):
            third_rewrite_check([1, 0, 1], [0, 1, 2], [1, 2, 3], [0, 1])

    def test_options(self):
        with pytest.raises(RecipeError, match=r"third_rewrite_check\(\) has ci='bootstrap'; expected 'auto'"):
            third_rewrite_check([1, 0], [0, 1], [1, 2], [0, 1], ci="bootstrap")
        with pytest.raises(RecipeError, match="missing='skip' is unknown"):
            third_rewrite_check([1, 0], [0, 1], [1, 2], [0, 1], missing="skip")


class TestAttenuation:
    W = (1, 1, 1, 1, 0, 0, 0, 0, None)
    FIRST = (0, 0, 0, 1, 1, 1, None, 0, 1)
    SECOND = (1, 1, 0, 1, 0, 1, 0, 1, 1)

    def test_rates_by_direction(self):
        found = attenuation_hint(self.W, self.FIRST, self.SECOND)
        assert {d: (e.value, e.n) for d, e in found.rewrite.items()} == {"1->0": (0.75, 4), "0->1": (2 / 3, 3)}
        assert {d: (e.value, e.n) for d, e in found.rewrite2.items()} == {"1->0": (0.5, 4), "0->1": (0.75, 4)}
        assert found.factor["att"] == pytest.approx(1 / (0.75 * 0.75))
        assert found.factor["atu"] == pytest.approx(1 / (2 / 3 * 0.5))
        assert found.factor["ate"] == pytest.approx(1 / (5 / 7 * 5 / 8))
        assert found.rewrite["1->0"].method == "wilson"

    def test_no_success_has_no_factor(self):
        found = attenuation_hint([1, 0], [1, 0], [1, 0])
        assert all(math.isnan(hint) for hint in found.factor.values())
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["factor"]["ate"] is None

    def test_errors(self):
        with pytest.raises(DataError, match="label_rw2 has 1 values, but w has 2"):
            attenuation_hint([1, 0], [0, 1], [1])
        with pytest.raises(DataError, match=r"label_rw\[1\] is 5.0"):
            attenuation_hint([1, 0], [0, 5], [1, 0])


class TestAsymmetry:
    def test_line_and_zero(self):
        result = rate_effects(*random_units(60))
        line = asymmetry_line(result, beta=-2.0)
        ate = result.rate.ate
        assert len(line.asymmetry) == 41
        assert line.zero == pytest.approx(ate.value / -2)
        assert (line.zero_low, line.zero_high) == pytest.approx((ate.high / -2, ate.low / -2))
        for d, effect in zip(line.asymmetry, line.effect, strict=True):
            assert [effect.value, effect.low, effect.high] == pytest.approx(
                [ate.value + 2 * d, ate.low + 2 * d, ate.high + 2 * d]
            )
        assert line.possible
        assert not asymmetry_line(result, beta=0.1).possible
        json.dumps(line.to_dict(), allow_nan=False)

    def test_it_undoes_the_bias_of_an_asymmetric_rewriter(self):
        rng = np.random.default_rng(0)
        w = rng.random(200_000) < 0.5
        after = [rng.random(w.size) < np.where(to_1, 0.5, 0.2) for to_1 in (~w, w)]
        result = rate_effects(w, None, ~w - 0.8 * after[0], w - 0.8 * after[1])
        line = asymmetry_line(result, beta=-0.8, asymmetry=[0.0, 0.3])
        assert line.effect[0].value == pytest.approx(1 - 0.8 * 0.3, abs=0.01)
        assert line.effect[1].low < 1 < line.effect[1].high

    def test_standardized(self):
        result = rate_effects(*random_units(60))
        line = asymmetry_line(result, beta=0.5, standardized=True)
        assert line.zero == pytest.approx(result.standardized.rate.ate.value / 0.5)

    @pytest.mark.parametrize("beta", [0, 0.0, float("nan"), float("inf")])
    def test_beta(self, beta):
        with pytest.raises(RecipeError, match=f"beta={beta}: expected what the off-target feature adds"):
            asymmetry_line(rate_effects(*random_units(20)), beta=beta)

    def test_range(self):
        with pytest.raises(RecipeError, match=r"asymmetry holds 1\.5; a difference of two shares"):
            asymmetry_line(rate_effects(*random_units(20)), beta=1, asymmetry=[0, 1.5])

    def test_no_standardised_effects(self):
        result = rate_effects(*random_units(20), standardize=False)
        with pytest.raises(RecipeError, match="standardized=True, but the result holds no standardised effects"):
            asymmetry_line(result, beta=1, standardized=True)


class TestTextChanges:
    TEXTS = (
        ["A <b>good</b> film.<br />", "good good good", "bad film", "so bad"],
        ["A bad film.", "bad bad bad", "good film", "so good it is"],
        ["A good film.", "good good good", "bad film", "so bad"],
    )

    def rows(self, w=(1, 1, 0, 0), **options):
        return {(r.measure, r.stage, r.direction): r for r in text_changes(w, *self.TEXTS, **options)}

    def test_changes_by_pass_and_direction(self):
        rows = self.rows()
        assert len(rows) == 4 * 2 * 2
        markup = {key[1:]: row.change.value for key, row in rows.items() if key[0] == "markup"}
        assert markup == {
            ("rewrite", "1->0"): -1.5,
            ("rewrite", "0->1"): 0,
            ("rewrite2", "1->0"): 0,
            ("rewrite2", "0->1"): 0,
        }
        longer = rows["characters", "rewrite", "0->1"]
        assert (longer.before, longer.change.value, longer.change.n) == (7, (1 + 7) / 2, 2)
        assert longer.change.se == pytest.approx(3)
        assert rows["words", "rewrite", "0->1"].change.value == 1
        assert rows["type_token_ratio", "rewrite", "1->0"].change.value == 0
        assert longer.to_dict()["direction"] == "0->1"

    def test_own_measures_and_unlabelled_units(self):
        rows = self.rows((1, None, 0, 0), measures={"bads": lambda text: float(text.count("bad"))})
        assert {key[1:]: (row.change.value, row.change.n) for key, row in rows.items()} == {
            ("rewrite", "1->0"): (1, 1),
            ("rewrite", "0->1"): (-1, 2),
            ("rewrite2", "0->1"): (-1, 1),
            ("rewrite2", "1->0"): (1, 2),
        }

    def test_a_text_without_a_value_is_left_out(self):
        rows = text_changes([1, 1], ["...", "a a"], ["b b", "b b"], ["a", "a b"])
        first = next(r for r in rows if (r.measure, r.stage) == ("type_token_ratio", "rewrite"))
        assert (first.before, first.change.value, first.change.n) == (0.5, 0, 1)

    def test_errors(self):
        with pytest.raises(DataError, match="rewrite2 has 1 values, but w has 2; expected one text a unit"):
            text_changes([1, 0], ["a", "b"], ["a", "b"], ["a"])
        with pytest.raises(RecipeError, match=r"measures is \{\}; expected at least one function"):
            text_changes([1, 0], ["a", "b"], ["a", "b"], ["a", "b"], measures={})
