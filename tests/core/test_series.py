"""Slopes, lines, noise and gains of series against SciPy, NumPy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lightning_interp.core.measure.resampling import shared_replicates
from lightning_interp.core.measure.series import gain, line, noise_ratio, slope
from lightning_interp.core.measure.statistics import nested_interval
from lightning_interp.errors import DataError

DRAWS = np.random.default_rng(5)
SCORES = arrays(np.float64, st.integers(3, 8), elements=st.floats(0, 100, width=32))


class TestSlope:
    @pytest.mark.parametrize("first", [0, 1, 3])
    def test_is_scipys(self, first):
        y = DRAWS.normal(size=(4, 7))
        wanted = [stats.linregress(np.arange(first, 7), row[first:]).slope for row in y]
        assert slope(y, first=first) == pytest.approx(wanted)

    @given(SCORES, st.floats(-5, 5), st.floats(-50, 50))
    def test_shift_and_scale(self, y, scale, shift):
        assert slope(scale * y + shift) == pytest.approx(scale * slope(y), abs=1e-9)

    def test_of_equal_scores_is_exactly_nothing(self):
        assert slope([100 / 3] * 7) == 0

    def test_of_one_point_is_not_known(self):
        assert np.isnan(slope([[1.0, 2.0]])).all()


def test_a_line_is_numpys_and_unknown_over_one_place():
    x, y = DRAWS.normal(size=(2, 3, 9))
    found = line(x, y)
    for i in range(3):
        assert (found[0][i], found[1][i]) == pytest.approx(np.polyfit(x[i], y[i], 1))
    assert np.isnan(line(np.full(3, 7.0), np.arange(3.0))[0])


class TestNoise:
    def test_of_a_chain_that_only_its_errors_move_is_one(self):
        errors = DRAWS.uniform(1, 4, size=2001)
        assert noise_ratio(50 + errors * DRAWS.normal(size=2001), errors) == pytest.approx(1, abs=0.1)

    def test_of_a_chain_that_moves_is_larger_and_without_errors_unknown(self):
        y = np.arange(7.0) * 10
        assert noise_ratio(y, np.ones(7)) == pytest.approx(10 / math.sqrt(2 / math.pi) / math.sqrt(2))
        assert math.isnan(noise_ratio(y, np.zeros(7)))
        assert math.isnan(noise_ratio(y, np.full(7, np.nan)))


class TestGain:
    def test_halving_towards_twenty(self):
        found = gain([[80, 50, 35, 27.5, 23.75, 21.875]])
        assert (found.gain.value, found.intercept, found.fixed_point) == pytest.approx((0.5, 10.0, 20.0))
        assert (found.steps, found.gain.n) == (5, 1)
        assert math.isnan(found.gain.low)

    def test_pools_the_steps_of_all_chains(self):
        chains = [DRAWS.uniform(0, 100, size=n) for n in (3, 5, 7)]
        before, after = (np.concatenate([chain[part] for chain in chains]) for part in (slice(-1), slice(1, None)))
        wanted = stats.linregress(before, after)
        found = gain(chains)
        assert (found.gain.value, found.intercept) == pytest.approx((wanted.slope, wanted.intercept))
        assert found.fixed_point == pytest.approx(wanted.intercept / (1 - wanted.slope))

    def test_the_interval_leaves_out_a_chain_at_a_time(self):
        chains = [np.cumprod(np.full(6, 0.5)) * 100 + DRAWS.normal(size=6) for _ in range(5)]
        found = gain(chains)
        alone = np.array([gain(chains[:i] + chains[i + 1 :]).gain.value for i in range(5)])
        error = math.sqrt(4 / 5 * np.square(alone - alone.mean()).sum())
        reach = stats.t.ppf(0.975, 4) * error
        assert (found.gain.low, found.gain.high) == pytest.approx((found.gain.value - reach, found.gain.value + reach))

    def test_the_interval_covers_the_truth(self):
        hits = 0
        for _ in range(200):
            chains = []
            for _ in range(8):
                y = [80.0]
                for _ in range(30):
                    y.append(10 + 0.5 * y[-1] + DRAWS.normal())
                chains.append(y)
            found = gain(chains)
            hits += found.gain.low <= 0.5 <= found.gain.high
        assert hits / 200 > 0.88

    @given(st.floats(-50, 50), st.floats(0.1, 5))
    def test_shift_and_scale_leave_the_gain_and_move_the_fixed_point(self, shift, scale):
        y = np.array([80, 50, 36, 27, 24.0])
        one, other = gain([y]), gain([scale * y + shift])
        assert other.gain.value == pytest.approx(one.gain.value)
        assert other.fixed_point == pytest.approx(scale * one.fixed_point + shift)

    def test_a_chain_that_only_moves_on_has_no_fixed_point(self):
        assert gain([[10, 20, 30, 40]]).fixed_point is None

    def test_equal_scores_tell_no_gain(self):
        found = gain([[40, 40, 40]])
        assert math.isnan(found.gain.value)
        assert found.fixed_point is None

    def test_a_step_is_needed(self):
        with pytest.raises(DataError, match=r"got 2 chains without a step"):
            gain([[40], [50]])


class TestSharedReplicates:
    table = DRAWS.normal(size=(12, 10)) + 2 * DRAWS.normal(size=(12, 1))

    def test_have_the_variance_of_both_levels(self):
        exact = self.table.mean(axis=1).var() / 12 + self.table.var(axis=1).mean() / 120
        found = shared_replicates([self.table], resamples=4000)[:, 0]
        assert found.var() == pytest.approx(exact, rel=0.1)
        assert found.mean() == pytest.approx(self.table.mean(), abs=4 * math.sqrt(exact / 4000))

    def test_agree_with_nested_draws_one_by_one(self):
        slow = nested_interval(self.table.ravel().tolist(), np.repeat(np.arange(12), 10).tolist())
        quick = np.quantile(shared_replicates([self.table])[:, 0], [0.025, 0.975])
        assert quick == pytest.approx((slow.low, slow.high), abs=0.2 * (slow.high - slow.low))

    def test_of_one_table_are_paired_in_two(self):
        found = shared_replicates([self.table, 3 * self.table + 1])
        assert found[:, 1] == pytest.approx(3 * found[:, 0] + 1)

    def test_missing_values_leave_the_mean_of_the_others(self):
        holes = self.table.copy()
        holes[:, ::2] = np.nan
        dense = np.full_like(holes, 4.0)
        dense[:, ::2] = np.nan
        found = shared_replicates([dense, holes, np.full_like(holes, np.nan)])
        assert found[:, 0] == pytest.approx(4.0)
        assert found[:, 1].mean() == pytest.approx(np.nanmean(holes), abs=0.1)
        assert np.isnan(found[:, 2]).all()

    def test_same_seed_same_draws_in_any_number_of_blocks(self, monkeypatch):
        one = shared_replicates([self.table], resamples=50, seed=3)
        assert np.array_equal(one, shared_replicates([self.table], resamples=50, seed=3))
        assert not np.array_equal(one, shared_replicates([self.table], resamples=50, seed=4))
        monkeypatch.setattr("lightning_interp.core.measure.resampling.CHUNK", 240)
        assert shared_replicates([self.table], resamples=51).shape == (51, 1)
