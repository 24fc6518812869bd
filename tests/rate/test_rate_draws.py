"""Several draws of a text count as one unit."""

from __future__ import annotations

import numpy as np
import pytest
from rate_oracle import random_units

from lightning_interp.errors import DataError
from lightning_interp.rate import combine_draws, rate_effects


def long_form(n=30, draws=4, seed=0):
    rng = np.random.default_rng(seed)
    w, r_orig, r_rw, r_rw2 = random_units(n, seed)
    ids = np.repeat([f"u{i:02d}" for i in range(n)], draws)
    noisy = [np.repeat(r, draws) + rng.normal(size=n * draws) for r in (r_rw, r_rw2)]
    return ids, np.repeat(w, draws), np.repeat(r_orig, draws), *noisy


def test_contrasts_are_averaged_inside_the_unit():
    ids, w, r_orig, r_rw, r_rw2 = long_form()
    found = rate_effects(**combine_draws(ids, w, r_orig, r_rw, r_rw2).arguments())
    delta = np.where(w, r_rw2 - r_rw, r_rw - r_rw2).reshape(30, 4).mean(axis=1)
    assert found.counts.n == 30
    assert found.delta == pytest.approx(delta)
    assert found.rate.ate.se == pytest.approx(delta.std(ddof=1) / np.sqrt(30))
    assert found.naive.value == pytest.approx(rate_effects(*(x[::4] for x in (w, r_orig, r_rw, r_rw2))).naive.value)


def test_rows_in_any_order_and_units_with_different_numbers_of_draws():
    ids, *columns = long_form()
    keep = np.r_[0:5, 8:120]  # the second unit has one draw left
    order = np.random.default_rng(1).permutation(keep)
    one, other = (combine_draws(ids[rows], *(c[rows] for c in columns)) for rows in (keep, order))
    assert one.draws.tolist()[:3] == [4, 1, 4]
    assert one.ids == other.ids
    assert (one.r_rw == other.r_rw).all()
    assert one.w == other.w


def test_clusters_and_labels_come_along():
    units = combine_draws([2, 1, 2], [1, None, True], [5.0, 1.0, 5.0], [0, 1, 2], [4, 1, 2], cluster=["p", "q", "p"])
    assert (units.ids, units.w, units.cluster) == ([1, 2], [None, 1], ["q", "p"])
    assert units.r_orig.tolist() == [1, 5]
    assert units.r_rw2.tolist() == [1, 3]


def test_a_lacking_draw_makes_the_unit_incomplete():
    units = combine_draws(["a", "a", "b"], [1, 1, 0], None, [0.0, None, 1.0], [2.0, 1.0, float("nan")])
    assert units.incomplete == ["missing_rewrite", None]
    with pytest.raises(DataError, match=r"2 of 2 units are incomplete \(1 missing_rewrite, 1 nonfinite\): 'a', 'b'"):
        rate_effects(**units.arguments())
