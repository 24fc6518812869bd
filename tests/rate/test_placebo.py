"""Exchanged rewrites and meaningless rewards."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from rate_oracle import GOLDEN, heterogeneous, random_units

from lightning_interp.errors import RecipeError
from lightning_interp.rate import dummy_outcome_check, permutation_check, rate_effects


def exact(delta):
    """Share of all sign patterns whose mean is at least as large."""
    means = [
        abs(sum(s * d for s, d in zip(signs, delta, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(delta))
    ]
    return np.mean([mean >= abs(delta.sum()) - 1e-9 for mean in means])


class TestPermutation:
    def test_all_patterns(self):
        result = rate_effects(**GOLDEN)
        found = permutation_check(result, resamples=40_000)
        w, delta = result.units.w, result.delta
        for p, expected in ((found.ate, exact(delta)), (found.att, exact(delta[w])), (found.atu, exact(delta[~w]))):
            assert p == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 40_000))

    def test_clusters_flip_together(self):
        clusters = [0, 1, 2, 0, 1, 2, 3]
        result = rate_effects(**GOLDEN, se="cluster", cluster=clusters)
        sums = np.bincount(result.units.cluster, weights=result.delta)
        found = permutation_check(result, resamples=40_000)
        assert found.exchanged == "clusters"
        assert found.ate == pytest.approx(exact(sums), abs=0.01)

    def test_p_values_are_uniform_without_an_effect(self):
        rng = np.random.default_rng(0)
        p = [
            permutation_check(
                rate_effects(rng.random(30) < 0.5, None, rng.normal(size=30), rng.normal(size=30)), resamples=199
            ).ate
            for _ in range(300)
        ]
        assert np.mean(p) == pytest.approx(0.5, abs=0.07)
        assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)

    def test_no_contrast_at_all(self):
        null = permutation_check(rate_effects([1, 0] * 10, None, [0.3] * 20, [0.3] * 20), resamples=50)
        assert (null.ate, null.att, null.atu) == (1, 1, 1)

    def test_an_empty_arm(self):
        with pytest.warns(UserWarning, match="No unit has w=0"):
            result = rate_effects([1] * 9, None, np.zeros(9), np.ones(9))
        found = permutation_check(result, resamples=99)
        assert math.isnan(found.ate)
        assert math.isnan(found.atu)
        assert found.att == pytest.approx(0.01, abs=0.02)
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ate"] is None

    def test_seed(self):
        result = rate_effects(*random_units(25, 3))
        found = [permutation_check(result, resamples=500, seed=seed) for seed in (0, 0, 1)]
        assert found[0] == found[1]
        assert found[0].resamples == 500

    def test_resamples(self):
        with pytest.raises(RecipeError, match="resamples=0; expected a positive number"):
            permutation_check(rate_effects(**GOLDEN), resamples=0)


class TestDummyOutcome:
    def test_intervals_of_a_plain_sample_hold_what_they_promise(self):
        result = rate_effects(*heterogeneous(200, np.random.default_rng(1)))
        found = dummy_outcome_check(result, repeats=600)
        assert found.level == 0.95
        for name in ("naive", "single", "rate"):
            assert found.covered[name].n == 600
            assert 0.92 <= found.covered[name].value <= 0.98
            assert abs(found.mean[name].value) < 4 * found.mean[name].se
        json.dumps(found.to_dict(), allow_nan=False)

    def test_it_shows_errors_that_are_too_narrow(self):
        """Three units in one arm and a heavy tail: normal intervals of the naive difference cover too little."""
        rng = np.random.default_rng(2)
        w = np.arange(60) < 3
        result = rate_effects(w, *(rng.standard_t(3, size=60) for _ in range(3)), ci="normal")
        found = dummy_outcome_check(result, repeats=400)
        assert found.covered["naive"].high < 0.95
        assert found.covered["rate"].value > 0.92

    def test_a_bootstrap_is_replaced(self):
        result = rate_effects(*random_units(30), ci="bootstrap")
        assert dummy_outcome_check(result, repeats=5).covered["rate"].n == 5

    def test_without_originals(self):
        result = rate_effects(GOLDEN["w"], None, GOLDEN["r_rw"], GOLDEN["r_rw2"])
        assert set(dummy_outcome_check(result, repeats=5).covered) == {"rate"}

    def test_seed(self):
        result = rate_effects(*random_units(30))
        one, same, other = (dummy_outcome_check(result, repeats=20, seed=seed).to_dict() for seed in (1, 1, 2))
        assert one == same
        assert one != other

    @pytest.mark.parametrize(("repeats", "spread"), [(1, 1.0), (20, 0.0)])
    def test_what_it_needs(self, repeats, spread):
        w, *rewards = random_units(20)
        result = rate_effects(w, *(spread * r for r in rewards), standardize=False)
        with pytest.raises(RecipeError, match=rf"repeats={repeats}, \d+ units in the smaller arm and rewards with"):
            dummy_outcome_check(result, repeats=repeats)

    def test_two_units_an_arm(self):
        with pytest.warns(UserWarning, match="One unit"):
            result = rate_effects([1, 0, 0, 0], [1, 2, 3, 4], [0, 1, 2, 1], [1, 0, 2, 1])
        with pytest.raises(RecipeError, match="repeats=200, 1 units in the smaller arm"):
            dummy_outcome_check(result)
