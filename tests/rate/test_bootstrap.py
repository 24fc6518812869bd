"""The bootstrap against a plain loop over resamples, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from rate_oracle import GOLDEN, random_units, slow

from lightning_interp.core.measure.resampling import draw_counts, interval_ends
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.rate import rate_effects
from lightning_interp.rate.estimators.bootstrap import bootstrap_effects
from lightning_interp.rate.estimators.unit_table import UnitTable

pytestmark = pytest.mark.kernels

NAMES = ["rate/ate", "rate/att", "rate/atu", "single/ate", "single/att", "single/atu", "naive", "b1", "b0"]


def clean(data, **more):
    return UnitTable.read(*data, **more).usable().units()


def generator(seed, stratum=0):
    return np.random.default_rng(derived_seed(seed, "rewrite-based bootstrap", stratum))


def test_each_resample_is_the_slow_estimate_of_the_drawn_rows():
    units = clean(random_units(40, 1))
    found = bootstrap_effects(units, n_boot=25, seed=3)
    drawn = np.r_[np.flatnonzero(units.w), np.flatnonzero(~units.w)][generator(3).integers(0, 40, size=(25, 40))]
    columns = (units.w, units.r_orig, units.r_rw, units.r_rw2)
    for b, rows in enumerate(drawn):
        expected = slow(*(column[rows] for column in columns))
        assert {name: found.values[name][b] for name in NAMES} == pytest.approx({n: expected[n] for n in NAMES})
        assert found.reward_std[b] == pytest.approx(expected["reward_std"])


def test_whole_clusters_are_drawn():
    clusters = np.random.default_rng(0).integers(0, 9, size=60)
    units = clean(random_units(60, 2), cluster=clusters)
    found = bootstrap_effects(units, n_boot=20, seed=4, clusters=True)
    drawn = generator(4).integers(0, 9, size=(20, 9))
    for b, groups in enumerate(drawn):
        rows = np.concatenate([np.flatnonzero(units.cluster == group) for group in groups])
        expected = slow(*(column[rows] for column in (units.w, units.r_orig, units.r_rw, units.r_rw2)))
        assert {name: found.values[name][b] for name in NAMES} == pytest.approx({n: expected[n] for n in NAMES})


def test_within_arms_the_arms_keep_their_sizes():
    units = clean(random_units(50, 3))
    found = bootstrap_effects(units, n_boot=20, seed=5, within_arms=True)
    sides = [np.flatnonzero(units.w), np.flatnonzero(~units.w)]
    draws = [generator(5, s).integers(0, side.size, size=(20, side.size)) for s, side in enumerate(sides)]
    for b in range(20):
        rows = np.concatenate([side[drawn[b]] for side, drawn in zip(sides, draws, strict=True)])
        expected = slow(*(column[rows] for column in (units.w, units.r_orig, units.r_rw, units.r_rw2)))
        assert {name: found.values[name][b] for name in NAMES} == pytest.approx({n: expected[n] for n in NAMES})


def test_the_block_size_changes_nothing():
    units = clean(random_units(37, 4))
    whole, single = (bootstrap_effects(units, n_boot=50, seed=0, chunk=chunk) for chunk in (10**6, 1))
    for name in NAMES:
        assert whole.values[name] == pytest.approx(single.values[name], rel=1e-12)


def test_counts_are_drawn_with_replacement():
    blocks = list(draw_counts(np.random.default_rng(0), 5, 4001, chunk=1000))
    counts = np.concatenate(blocks)
    assert counts.shape == (4001, 5)
    assert len(blocks) == 21
    assert (counts.sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx([1] * 5, abs=0.05)
    assert counts.var(axis=0) == pytest.approx([0.8] * 5, rel=0.1)  # multinomial: 1 - 1/n


def test_the_spread_of_the_replicates_is_the_analytic_error():
    data = random_units(400, 5)
    found = bootstrap_effects(clean(data), n_boot=4000, seed=1)
    expected = slow(*data)
    for name in ("rate/ate", "rate/att", "single/atu"):
        assert found.values[name].std() == pytest.approx(expected[f"{name}/paired"], rel=0.05)
    assert found.values["naive"].std() == pytest.approx(expected["naive_se"], rel=0.05)
    arms = bootstrap_effects(clean(data), n_boot=4000, seed=1, within_arms=True)
    assert arms.values["rate/ate"].std() == pytest.approx(expected["rate/ate/stratified"], rel=0.05)
    prompts = np.arange(400) // 4
    whole = bootstrap_effects(clean(data, cluster=prompts), n_boot=4000, seed=1, clusters=True)
    error = rate_effects(*data, se="cluster", cluster=prompts).rate.ate.se
    assert whole.values["rate/ate"].std() == pytest.approx(error, rel=0.07)


class TestInterval:
    def test_percentile_and_basic(self):
        draws = np.arange(101.0)
        assert interval_ends(40.0, draws, alpha=0.1) == pytest.approx((5, 95))
        assert interval_ends(40.0, draws, alpha=0.1, kind="basic") == pytest.approx((-15, 75))

    def test_resamples_without_an_arm_are_left_out_unless_they_are_most(self):
        draws = np.r_[np.arange(60.0), np.full(40, np.nan)]
        assert interval_ends(30.0, draws, alpha=0.5) == pytest.approx((14.75, 44.25))
        assert np.isnan(interval_ends(30.0, np.r_[1.0, np.nan, np.nan], alpha=0.5)).all()
        assert np.isnan(interval_ends(np.nan, np.arange(9.0), alpha=0.5)).all()


class TestEffects:
    def test_intervals_are_those_of_the_replicates(self):
        data = random_units(80, 6)
        units = clean(data)
        for kind, clusters, arms in (("paired", False, False), ("stratified", False, True)):
            found = rate_effects(*data, se=kind, ci="bootstrap", n_boot=1500, seed=9, alpha=0.1)
            draws = bootstrap_effects(units, n_boot=1500, seed=9, clusters=clusters, within_arms=arms).values
            assert [found.rate.att.low, found.rate.att.high] == pytest.approx(
                np.quantile(draws["rate/att"], [0.05, 0.95]).tolist()
            )
            assert found.rewrite_effect_w0.low == pytest.approx(np.quantile(draws["b0"], 0.05))
        assert found.rate.ate.method == "stratified, percentile bootstrap of units within arms, B=1500"

    def test_basic_is_mirrored(self):
        data = random_units(80, 6)
        one, other = (rate_effects(*data, ci="bootstrap", boot=kind).rate.ate for kind in ("percentile", "basic"))
        assert (other.low, other.high) == pytest.approx((2 * one.value - one.high, 2 * one.value - one.low))

    def test_seed(self):
        same, again, other = (rate_effects(*random_units(80), ci="bootstrap", seed=seed) for seed in (1, 1, 2))
        assert same.to_dict() == again.to_dict()
        assert same.rate.ate.low != other.rate.ate.low
        assert same.rate.ate.value == other.rate.ate.value

    def test_the_standard_deviation_is_held_or_drawn_along(self):
        data = random_units(80, 7)
        held, inside = (rate_effects(*data, ci="bootstrap", standardize_inside=inside) for inside in (False, True))
        assert held.standardized.rate.ate.low == pytest.approx(held.rate.ate.low / held.reward_std)
        draws = bootstrap_effects(clean(data), n_boot=2000, seed=0)
        low = np.quantile(draws.values["rate/ate"] / draws.reward_std, 0.025)
        assert inside.standardized.rate.ate.low == pytest.approx(low)
        assert inside.standardized.rate.ate.low != held.standardized.rate.ate.low
        assert inside.standardized.rate.ate.value == held.standardized.rate.ate.value
        assert inside.rate.ate == held.rate.ate

    def test_rewards_far_from_zero_keep_their_digits(self):
        w, *rewards = random_units(60, 8)
        near = bootstrap_effects(clean((w, *rewards)), n_boot=200, seed=0)
        far = bootstrap_effects(clean((w, *(r + 1e6 for r in rewards))), n_boot=200, seed=0)
        assert far.reward_std == pytest.approx(near.reward_std, rel=1e-6)

    def test_without_originals(self):
        found = rate_effects(GOLDEN["w"], None, GOLDEN["r_rw"], GOLDEN["r_rw2"], ci="bootstrap")
        assert found.rate.ate.low < found.rate.ate.value < found.rate.ate.high

    def test_an_arm_of_one_unit_has_no_interval(self):
        with pytest.warns(UserWarning, match="One unit has w=1, so ATT"):
            found = rate_effects([1, 0, 0, 0], [1, 2, 3, 4], [0, 1, 2, 1], [1, 0, 2, 1], ci="bootstrap")
        assert np.isnan([found.rate.att.low, found.rate.att.high, found.rate.att.se]).all()
        assert found.rate.atu.low <= found.rate.atu.value <= found.rate.atu.high
