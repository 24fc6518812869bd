"""What must hold whatever the data: identities, symmetries and order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rate_oracle import random_units

from lightning_interp.rate import rate_effects

VALUES = st.floats(-50, 50, allow_nan=False, width=32)
SCALE = 100.0  # of the values, for absolute tolerances


@st.composite
def units(draw):
    """(w, r_orig, r_rw, r_rw2) with at least two units an arm."""
    n = draw(st.integers(4, 25))
    w = draw(hnp.arrays(np.bool_, n))
    w[:2], w[2:4] = True, False
    return (w, *(draw(hnp.arrays(np.float64, n, elements=VALUES)) for _ in range(3)))


def effects(data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rate_effects(*data, **options)


def values(found):
    return [effect.value for _, _, effect in found.raw.items()]


def errors(found):
    return [effect.se for _, _, effect in found.raw.items()]


def near(numbers):
    return pytest.approx(numbers, rel=1e-9, abs=1e-11 * SCALE)


@given(units())
def test_weights_and_round_trip_identities(data):
    found = effects(data)
    n, n1, n0 = found.counts.n, found.counts.n1, found.counts.n0
    for three in (found.rate, found.single):
        assert n * three.ate.value == near(n1 * three.att.value + n0 * three.atu.value)
    b1, b0 = found.rewrite_effect_w1.value, found.rewrite_effect_w0.value
    assert found.rate.att.value - found.single.att.value == near(b1)
    assert found.rate.atu.value - found.single.atu.value == near(-b0)
    assert found.rate.ate.value - found.single.ate.value == near((n1 * b1 - n0 * b0) / n)


@given(units())
def test_a_perfect_rewriter_gives_the_exact_effect_of_the_sample(data):
    w, reward_with, reward_without, _ = data
    original, flipped = np.where(w, reward_with, reward_without), np.where(w, reward_without, reward_with)
    found = effects((w, original, flipped, original))
    truth = reward_with - reward_without
    assert [e.value for e in found.rate] == near([truth.mean(), truth[w].mean(), truth[~w].mean()])
    assert [(e.value, e.se) for e in found.rate] == [(e.value, e.se) for e in found.single]
    assert (found.rewrite_effect_w1.value, found.rewrite_effect_w0.value) == (0, 0)


def test_under_confounding_the_naive_difference_is_something_else():
    w = np.arange(200) % 2 == 0
    base = np.where(w, 3.0, 0.0)
    found = effects((w, base + w, base + ~w, base + w))
    assert (found.rate.ate.value, found.single.ate.value, found.naive.value) == (1, 1, 4)


@given(units(), st.floats(0.01, 30), st.floats(-50, 50))
def test_scale_and_shift(data, a, c):
    plain = effects(data)
    moved = effects((data[0], *(a * reward + c for reward in data[1:])))
    assert values(moved) == pytest.approx([a * v for v in values(plain)], rel=1e-7, abs=1e-9 * SCALE * max(a, 1))
    assert errors(moved) == pytest.approx([a * e for e in errors(plain)], rel=1e-6, abs=1e-6 * SCALE * max(a, 1))
    if plain.reward_std > 1e-3:
        assert moved.standardized.rate.ate.value == pytest.approx(
            plain.standardized.rate.ate.value, rel=1e-5, abs=1e-5 * SCALE / plain.reward_std
        )


@given(units())
def test_swapped_labels(data):
    one, other = effects(data), effects((~data[0], *data[1:]))
    assert other.naive.value == near(-one.naive.value)
    assert other.naive.se == near(one.naive.se)
    for before, after in ((one.rate, other.rate), (one.single, other.single)):
        assert [after.ate.value, after.att.value, after.atu.value] == near(
            [-before.ate.value, -before.atu.value, -before.att.value]
        )
        assert [after.ate.se, after.att.se, after.atu.se] == near([before.ate.se, before.atu.se, before.att.se])


@given(units(), st.data())
def test_what_the_prompt_adds_to_all_three_rewards_cancels(data, more):
    own = more.draw(hnp.arrays(np.float64, len(data[0]), elements=VALUES))
    plain, moved = effects(data), effects((data[0], *(reward + own for reward in data[1:])))
    assert [e.value for e in moved.rate] == near([e.value for e in plain.rate])
    assert [e.value for e in moved.single] == near([e.value for e in plain.single])


@given(units(), st.floats(-20, 20))
def test_what_every_rewrite_adds_cancels_in_the_double_rewrite_alone(data, c):
    w, r_orig, r_rw, r_rw2 = data
    plain, moved = effects(data), effects((w, r_orig, r_rw + c, r_rw2 + c))
    assert [e.value for e in moved.rate] == near([e.value for e in plain.rate])
    assert moved.single.att.value == near(plain.single.att.value - c)
    assert moved.single.atu.value == near(plain.single.atu.value + c)
    assert moved.naive.value == plain.naive.value


@given(units(), st.data())
def test_the_double_rewrite_does_not_use_the_original(data, more):
    other = more.draw(hnp.arrays(np.float64, len(data[0]), elements=VALUES))
    plain, moved, without = (effects((data[0], r, *data[2:])) for r in (data[1], other, None))
    assert [(e.value, e.se) for e in plain.rate] == [(e.value, e.se) for e in moved.rate]
    assert [(e.value, e.se) for e in plain.rate] == [(e.value, e.se) for e in without.rate]


@given(units(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_byte(data, random):
    order = list(range(len(data[0])))
    random.shuffle(order)
    names = [f"unit {i}" if i % 2 else i for i in range(len(order))]
    clusters = [i // 3 for i in range(len(order))]
    for options in ({}, {"ids": names}, {"ids": names, "se": "cluster", "cluster": clusters}):
        one = effects(data, **options)
        shuffled = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in options.items()}
        other = effects(tuple(column[order] for column in data), **shuffled)
        with_units = "ids" in options
        assert one.to_dict(units=with_units) == other.to_dict(units=with_units)


@pytest.mark.parametrize("options", [{}, {"se": "stratified"}, {"se": "cluster", "cluster": list(np.arange(60) // 4)}])
def test_the_order_of_the_rows_changes_no_byte_of_a_bootstrap(options):
    data, order = random_units(60), np.random.default_rng(1).permutation(60)
    shuffled = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in options.items()}
    one = effects(data, ci="bootstrap", n_boot=1000, **options)
    other = effects(tuple(column[order] for column in data), ci="bootstrap", n_boot=1000, **shuffled)
    assert one.to_dict(units=False) == other.to_dict(units=False)


@given(units())
def test_every_unit_twice(data):
    once, twice = effects(data), effects(tuple(np.tile(column, 2) for column in data))
    assert values(twice) == near(values(once))
    sizes = [once.counts.n, once.counts.n1, once.counts.n0]
    for before, after in ((once.rate, twice.rate), (once.single, twice.single)):
        expected = [e.se * np.sqrt((n - 1) / (2 * n - 1)) for e, n in zip(before, sizes, strict=True)]
        assert [e.se for e in after] == near(expected)


@given(units(), units())
def test_pooled_data_add_up(one, other):
    a, b = effects(one), effects(other)
    both = effects(tuple(np.concatenate(pair) for pair in zip(one, other, strict=True)))
    for estimand, count in (("ate", "n"), ("att", "n1"), ("atu", "n0")):
        parts = [getattr(f.counts, count) * getattr(f.rate, estimand).value for f in (a, b, both)]
        assert parts[0] + parts[1] == near(parts[2])


@given(units())
def test_unpaired_and_paired_differ_by_the_covariance_of_the_two_sides(data):
    w, _, r_rw, r_rw2 = data
    paired, unpaired = (effects(data, se=kind).rate.ate.se for kind in ("paired", "unpaired"))
    u, v = np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2)
    covariance = np.cov(u, v)[0, 1]
    assert unpaired**2 - paired**2 == pytest.approx(2 * covariance / len(w), rel=1e-7, abs=1e-9 * SCALE**2)


@given(units())
def test_clusters_of_one_unit_are_independent_units(data):
    names = [f"p{i}" for i in range(len(data[0]))]
    paired, clustered = effects(data), effects(data, se="cluster", cluster=names)
    for before, after in ((paired.rate, clustered.rate), (paired.single, clustered.single)):
        assert [e.se for e in after] == near([e.se for e in before])
        assert [e.value for e in after] == [e.value for e in before]


def test_a_reward_that_ignores_the_attribute_is_exactly_null():
    """No rounding may turn an exact zero, or an exact constant, into an effect with a tiny error."""
    w = np.arange(101) % 3 == 0
    base = np.random.default_rng(0).normal(size=101)
    null = effects((w, base, base + 0.1, base + 0.1))
    assert [(e.value, e.se, e.low, e.high) for e in null.rate] == [(0, 0, 0, 0)] * 3
    zero = np.zeros(101)
    constant = effects((w, zero, np.where(w, 0.0, 0.1), np.where(w, 0.1, 0.0)))
    assert [(e.value, e.se) for e in constant.rate] == [(0.1, 0)] * 3
