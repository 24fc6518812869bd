"""Errors of means and differences against SciPy's and by hand, and nested draws against their exact variance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_interp.core.measure.clustered import difference_point, mean_point, point_interval
from lightning_interp.core.measure.resampling import interval_ends, nested_bootstrap
from lightning_interp.core.measure.statistics import nested_interval
from lightning_interp.errors import DataError, RecipeError

DRAWS = np.random.default_rng(3)
X, Y = DRAWS.normal(size=40), DRAWS.normal(1.0, 2.0, size=40)
CLUSTER = np.repeat(np.arange(8), 5)


def test_independent_units_are_scipys():
    assert mean_point(X).se == pytest.approx(stats.sem(X))
    paired = mean_point(X - Y)
    assert paired.value / paired.se == pytest.approx(stats.ttest_rel(X, Y).statistic)
    first = np.arange(80) < 40
    apart, welch = difference_point(np.concatenate([X, Y]), first), stats.ttest_ind(X, Y, equal_var=False)
    assert (apart.value / apart.se, apart.df) == pytest.approx((welch.statistic, welch.df))
    low, high, _ = point_interval(apart, ci="t", alpha=0.1)
    assert (low, high) == pytest.approx(tuple(welch.confidence_interval(0.9)))


def test_of_clusters_of_one_size_the_means_are_the_sample():
    means = X.reshape(8, 5).mean(axis=1)
    found = mean_point(X, CLUSTER)
    assert (found.se, found.df, found.smallest) == (pytest.approx(stats.sem(means)), 7, 8)
    assert mean_point(X - Y, CLUSTER).se == pytest.approx(stats.sem((X - Y).reshape(8, 5).mean(axis=1)))


def test_nested_draws_have_the_variance_of_both_levels():
    values, groups = DRAWS.normal(size=60) + np.repeat(DRAWS.normal(size=6), 10), np.repeat(np.arange(6), 10)
    table = values.reshape(6, 10)
    exact = table.mean(axis=1).var() / 6 + table.var(axis=1).mean() / 60
    spread = nested_bootstrap(values, groups, resamples=1500)
    assert spread.var() == pytest.approx(exact, rel=0.15)
    assert spread.mean() == pytest.approx(values.mean(), abs=4 * np.sqrt(exact / 1500))
    assert nested_bootstrap(values, resamples=1500).var() == pytest.approx(values.var() / 60, rel=0.15)


def test_three_levels_in_any_order_of_the_rows():
    values = np.arange(24.0)
    levels = np.repeat(["b", "a"], 12), np.tile(np.repeat([0, 1], 6), 2), np.tile(np.repeat(list("xyz"), 2), 4)
    order = DRAWS.permutation(24)
    found = nested_bootstrap(values, *levels, resamples=50)
    mixed = nested_bootstrap(values[order], *(level[order] for level in levels), resamples=50, statistic=np.max)
    assert ((found >= 0) & (found <= 23)).all()
    assert set(mixed.tolist()) <= set(values.tolist())
    constant = nested_bootstrap(np.repeat([1.0, 2.0], 12), levels[0], levels[1], resamples=300)
    assert set(constant.tolist()) == {1.0, 1.5, 2.0}  # a dataset's rows are never drawn apart from it


def test_a_resample_depends_on_seed_and_number_alone():
    few, many = (nested_bootstrap(X, CLUSTER, resamples=n, seed=4) for n in (20, 50))
    assert np.array_equal(few, many[:20])
    assert not np.array_equal(few, nested_bootstrap(X, CLUSTER, resamples=20, seed=5))
    low, high = interval_ends(X.mean(), many, alpha=0.2)
    assert low < X.mean() < high


def test_an_interval_of_few_datasets_is_wider_than_one_of_many_questions():
    answers, sets = [1.0, 1.0, 1.0, 0.0] * 5 + [0.0, 0.0, 0.0, 1.0] * 5, ["a"] * 20 + ["b"] * 20
    nested, flat = (nested_interval(answers, *levels, level=0.9, resamples=600) for levels in ([sets], []))
    assert (nested.value, nested.n, flat.n) == (0.5, 2, 40)
    assert nested.high - nested.low > 1.5 * (flat.high - flat.low)
    assert np.isnan(nested_interval(answers, ["a"] * 40, resamples=9).low)
    with pytest.raises(RecipeError, match=r"Confidence level 95 is not between"):
        nested_interval(answers, sets, level=95)


@pytest.mark.parametrize(("values", "levels"), [([], []), ([1.0, 2.0], [[0]])])
def test_levels_that_do_not_fit(values, levels):
    with pytest.raises(DataError, match=f"got {len(values)} values and levels of length"):
        nested_bootstrap(values, *levels)
