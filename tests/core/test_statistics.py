"""Intervals against SciPy's, and how often they hold the truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from lightning_interp.core.measure.statistics import (
    Estimate,
    bootstrap_interval,
    mean_interval,
    median_interval,
    proportion_interval,
    ratio_interval,
)
from lightning_interp.errors import RecipeError

DRAWS = np.random.default_rng(5)
SAMPLE = DRAWS.gamma(2.0, size=37).tolist()


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 16), (16, 16), (3, 7), (50, 100), (999, 1000)])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_a_share_has_wilsons_interval(hits, n, level):
    found = proportion_interval([1.0] * hits + [0.0] * (n - hits), level=level)
    interval = stats.binomtest(hits, n).proportion_ci(level, "wilson")
    assert (found.value, found.n, found.level, found.method) == (hits / n, n, level, "wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_shares_of_several_trials_count_as_one_unit_each():
    assert proportion_interval([0.5] * 8) == proportion_interval([1.0, 0.0] * 4)


@pytest.mark.parametrize(
    ("interval", "statistic"), [(mean_interval, np.mean), (median_interval, np.median)], ids=["mean", "median"]
)
def test_the_bootstrap_is_scipys_within_monte_carlo_error(interval, statistic):
    ours = np.array([(e.low, e.high) for e in (interval(SAMPLE, seed=s, level=0.9) for s in range(20))])
    theirs = stats.bootstrap(
        [SAMPLE], statistic, method="percentile", n_resamples=40_000, confidence_level=0.9, rng=7, vectorized=True
    ).confidence_interval
    assert interval(SAMPLE).value == pytest.approx(statistic(SAMPLE))
    error = ours.std(axis=0) + 1e-12
    assert (np.abs(ours.mean(axis=0) - (theirs.low, theirs.high)) < 4 * error / math.sqrt(20) + 0.005).all()
    assert (error < 0.05).all()


def test_a_ratio_is_paired_over_units():
    bottom = DRAWS.normal(4.0, 1.0, size=30)
    top = 0.5 * bottom + DRAWS.normal(0.0, 0.01, size=30)
    found = ratio_interval(top.tolist(), bottom.tolist())
    assert found.value == pytest.approx(top.mean() / bottom.mean())
    assert found.high - found.low < 0.01  # the noise of the two cancels; unpaired it would be about 0.1
    theirs = stats.bootstrap(
        [top, bottom],
        lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=3,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=5e-4)


def test_a_ratio_to_nothing_is_no_number():
    found = ratio_interval([1.0, 2.0], [0.0, 0.0])
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert found.n == 2
    # Zero in some resamples only: those say nothing, the others do.
    some = ratio_interval([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])
    assert some.value == 1.0
    assert 0.5 <= some.low <= 1.0 <= some.high <= 3.0


@pytest.mark.parametrize("interval", [mean_interval, median_interval])
def test_few_units_carry_no_interval(interval):
    none, one, two = interval([]), interval([3.0]), interval([3.0, 5.0])
    assert (none.n, one.n, two.n) == (0, 1, 2)
    assert all(map(math.isnan, (none.value, none.low, none.high, one.low, one.high)))
    assert one.value == 3.0
    assert (two.value, two.low, two.high) == (4.0, 3.0, 5.0)
    assert math.isnan(ratio_interval([], []).value)
    assert ratio_interval([1.0], [2.0]).value == 0.5
    assert math.isnan(proportion_interval([]).value)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(11)
    shares = [proportion_interval((draws.random(25) < 0.3).astype(float).tolist()) for _ in range(400)]
    means = [mean_interval(draws.normal(1.0, 2.0, size=40).tolist()) for _ in range(200)]
    assert 0.92 <= np.mean([e.low <= 0.3 <= e.high for e in shares]) <= 0.985
    assert 0.89 <= np.mean([e.low <= 1.0 <= e.high for e in means]) <= 0.985


def test_a_higher_level_is_wider():
    narrow, wide = (mean_interval(SAMPLE, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval_and_the_global_state_is_left_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    assert mean_interval(SAMPLE, seed=4) == mean_interval(SAMPLE, seed=4)
    assert mean_interval(SAMPLE, seed=4) != mean_interval(SAMPLE, seed=5)
    assert np.array_equal(before, np.random.get_state()[1])


def test_an_estimate_is_json_and_text():
    assert json.dumps(mean_interval([2.0]).to_dict()) == (
        '{"value": 2.0, "low": null, "high": null, "n": 1, "level": 0.95, "method": "bootstrap"}'
    )
    assert str(mean_interval([2.0])) == "2.00"
    assert str(Estimate(0.5, 0.25, 1.0, 3, 0.95, "wilson")) == "0.50 [0.25, 1.00]"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.00096, 0.000439, 0.00139), "0.0010 [0.0004, 0.0014]"),
        ((0.0574, 0.0574, 0.0574), "0.057 [0.057, 0.057]"),
        ((-0.001, -0.004, 0.25), "0.00 [0.00, 0.25]"),  # no zero with a minus
        ((0.0, 0.0, 0.0), "0.00 [0.00, 0.00]"),
        ((1e-12, math.nan, math.nan), "0.00000000"),
        ((math.nan, math.nan, math.nan), "nan"),
    ],
)
def test_a_small_estimate_does_not_read_as_zero(numbers, text):
    assert str(Estimate(*numbers, 3, 0.95, "bootstrap")) == text


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: proportion_interval([0.5, 1.5]), r"got 1\.5; expected shares"),
        (lambda: proportion_interval([math.nan]), "got nan; expected shares"),
        (lambda: proportion_interval([1.0], level=95), "level 95 is not between 0 and 1"),
        (lambda: mean_interval([1.0], level=1.0), r"level 1\.0 is not between"),
        (lambda: ratio_interval([1.0, 2.0], [1.0]), "their lengths are 2, 1"),
        (lambda: bootstrap_interval(np.mean, [[]], level=0, seed=0), "level 0 is not"),
    ],
)
def test_what_is_no_share_no_level_and_no_pair(call, match):
    with pytest.raises(RecipeError, match=match):
        call()
