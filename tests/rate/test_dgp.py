"""Synthetic rewards whose effects are known: coverage, and the closed forms of what broken assumptions do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rate_oracle import asymmetric, heterogeneous

from lightning_interp.rate import rate_effects, third_rewrite_check

pytestmark = pytest.mark.kernels

RUNS = 400  # so that a share of 95 % has a standard error of 1.1 %, and four of those are allowed
TRUTH = {"ate": 0.64, "att": 1.0, "atu": 0.4}
CLOSE = 0.006  # at a quarter of a million units, five standard errors or more


@pytest.fixture(scope="module")
def runs():
    """Samples of two hundred units: paired, stratified and unpaired results of each."""
    rng = np.random.default_rng(2024)
    samples = [heterogeneous(200, rng) for _ in range(RUNS)]
    sizes = {"paired": RUNS, "stratified": RUNS, "unpaired": RUNS // 4}  # the last are wider by far
    return {kind: [rate_effects(*sample, se=kind) for sample in samples[:size]] for kind, size in sizes.items()}


def coverage(results, estimand="ate", estimator="rate", truth=None):
    truth = TRUTH[estimand] if truth is None else truth
    effects = [getattr(getattr(result, estimator), estimand) for result in results]
    return np.mean([effect.low <= truth <= effect.high for effect in effects])


class TestCoverage:
    @pytest.mark.parametrize("estimand", ["ate", "att", "atu"])
    def test_paired_intervals_hold_what_they_promise(self, runs, estimand):
        assert 0.906 <= coverage(runs["paired"], estimand) <= 0.994

    def test_errors_that_fix_the_arms_are_too_narrow_where_the_arms_are_random(self, runs):
        assert coverage(runs["stratified"]) < coverage(runs["paired"])
        errors = [np.mean([result.rate.ate.se for result in runs[kind]]) for kind in ("stratified", "paired")]
        assert errors[0] / errors[1] == pytest.approx(0.917, abs=0.01)

    def test_unpaired_errors_are_far_too_wide(self, runs):
        assert coverage(runs["unpaired"]) == 1
        widths = [np.mean([r.rate.ate.se for r in runs[kind]]) for kind in ("unpaired", "paired")]
        assert widths[0] > 2 * widths[1]

    def test_the_other_estimators_miss(self, runs):
        assert coverage(runs["paired"], estimator="single") < 0.5
        naive = [result.naive for result in runs["paired"]]
        assert np.mean([effect.low <= TRUTH["ate"] <= effect.high for effect in naive]) < 0.02

    def test_expectations(self, runs):
        results = runs["paired"]
        for values, truth in (
            ([r.rate.ate.value for r in results], 0.64),
            ([r.rate.att.value for r in results], 1.0),
            ([r.rate.atu.value for r in results], 0.4),
            ([r.naive.value for r in results], 1.0 + 1.5 - 0.8 * 0.6),
            ([r.single.ate.value for r in results], 0.4 * (1.0 - 0.8 * 0.5) + 0.6 * (0.4 - 0.8 * 0.1)),
        ):
            assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(RUNS)

    def test_the_error_is_the_spread_of_the_estimates(self, runs):
        for estimand in ("ate", "att", "atu"):
            effects = [getattr(result.rate, estimand) for result in runs["paired"]]
            spread = np.std([effect.value for effect in effects], ddof=1)
            assert np.mean([effect.se for effect in effects]) == pytest.approx(spread, rel=0.15)

    def test_small_samples_with_students_t(self):
        rng = np.random.default_rng(5)
        results = [rate_effects(*heterogeneous(50, rng)) for _ in range(RUNS)]
        assert 0.906 <= coverage(results) <= 0.994

    def test_percentile_bootstrap(self):
        rng = np.random.default_rng(6)
        results = [rate_effects(*heterogeneous(60, rng), ci="bootstrap", n_boot=1000, seed=i) for i in range(200)]
        assert 0.87 <= coverage(results) <= 0.995

    def test_clustered_units_need_clustered_errors(self):
        rng = np.random.default_rng(7)
        held = {"paired": [], "cluster": []}
        for _ in range(150):
            prompts = np.repeat(np.arange(60), 5)
            w = rng.random(300) < 0.5
            shift = np.repeat(rng.normal(size=60), 5)  # of the effect, shared by the texts of one prompt
            r_rw = rng.normal(size=300)
            delta = 0.5 + shift + 0.5 * rng.normal(size=300)
            r_rw2 = np.where(w, r_rw + delta, r_rw - delta)
            for kind, cluster in (("paired", None), ("cluster", prompts)):
                effect = rate_effects(w, None, r_rw, r_rw2, se=kind, cluster=cluster).rate.ate
                held[kind].append(effect.low <= 0.5 <= effect.high)
        assert np.mean(held["cluster"]) > 0.87
        assert np.mean(held["paired"]) < 0.75


# Mean estimates of a third party's simulation over 300 seeds (course project on arXiv 2410.11348): RATE does not depend
# on the confounding, its bias is linear in the asymmetry of the rewriter. Their variance over seeds is 0.0011.
THEIRS = {-0.4: 1.2006, -0.2: 1.1003, 0.0: 1.0002, 0.2: 0.9007, 0.4: 0.8008}
SEEDS = 60


def asymmetric_means(difference, asymmetry):
    rng = np.random.default_rng([int(100 * difference), int(100 * asymmetry) + 100])
    results = [rate_effects(*asymmetric(2000, difference, asymmetry, rng)) for _ in range(SEEDS)]
    columns = {
        "rate": [result.rate.ate.value for result in results],
        "single": [result.single.ate.value for result in results],
        "naive": [result.naive.value for result in results],
    }
    return {name: (np.mean(column), np.var(column, ddof=1)) for name, column in columns.items()}


@pytest.mark.parametrize(("difference", "asymmetry"), [(0.3, -0.4), (0.0, -0.2), (0.3, 0.0), (0.0, 0.2), (0.3, 0.4)])
def test_asymmetric_rewrites(difference, asymmetry):
    found = asymmetric_means(difference, asymmetry)
    mean, variance = found["rate"]
    assert abs(mean - THEIRS[asymmetry]) < 4 * math.sqrt(variance / SEEDS + 0.0011 / 300)
    assert variance == pytest.approx(0.0011, rel=0.75)
    expected = {
        "rate": 1 - 0.5 * asymmetry,
        "single": 1 - 0.25 * (difference + asymmetry),
        "naive": 1 - 0.5 * difference,
    }
    for name, truth in expected.items():
        mean, variance = found[name]
        assert abs(mean - truth) < 4 * math.sqrt(variance / SEEDS)


@pytest.mark.parametrize(
    ("estimator", "difference", "asymmetry", "theirs"), [("single", 0.3, 0.2, 0.8741), ("naive", 0.4, 0.0, 0.7989)]
)
def test_the_other_estimators_of_the_third_party(estimator, difference, asymmetry, theirs):
    mean, variance = asymmetric_means(difference, asymmetry)[estimator]
    assert abs(mean - theirs) < 4 * math.sqrt(variance / SEEDS * (1 + SEEDS / 300))


N = 250_000


def test_an_off_target_shift_of_every_rewrite_cancels():
    rng = np.random.default_rng(0)
    w = rng.random(N) < 0.3
    base = rng.normal(size=N)
    found = rate_effects(w, base + w, base + ~w - 0.7, base + w - 0.7)
    assert [e.value for e in found.rate] == pytest.approx([1, 1, 1], abs=1e-12)
    assert [found.single.att.value, found.single.atu.value] == pytest.approx([1.7, 0.3], abs=1e-12)


def test_partial_correction_and_a_third_rewrite():
    """Each pass removes a flaw with probability q and adds none: RATE and single rewrite err with opposite signs."""
    rng = np.random.default_rng(1)
    p, p1, p0, q, beta, effect = 0.4, 0.7, 0.2, 0.6, -0.9, 0.5
    w = rng.random(N) < p
    flaws = [rng.random(N) < np.where(w, p1, p0)]
    for _ in range(3):
        flaws.append(flaws[-1] & (rng.random(N) >= q))
    r0, r1, r2, r3 = (effect * value + beta * flaw for value, flaw in zip((w, ~w, w, ~w), flaws, strict=True))
    bias = beta * q * (p * p1 - (1 - p) * p0)
    found = rate_effects(w, r0, r1, r2)
    assert found.single.ate.value == pytest.approx(effect + bias, abs=CLOSE)
    assert found.rate.ate.value == pytest.approx(effect - (1 - q) * bias, abs=CLOSE)
    third = third_rewrite_check(w, r1, r2, r3)
    assert third.ate == found.rate.ate
    assert third.ate_third.value == pytest.approx(effect + (1 - q) ** 2 * bias, abs=CLOSE)
    assert third.difference.value == pytest.approx(-(1 - q) * (2 - q) * bias, abs=CLOSE)
    assert not third.difference.low <= 0 <= third.difference.high


def test_failed_rewrites_attenuate():
    rng = np.random.default_rng(2)
    a, b, effect = 0.2, 0.3, 1.5
    w = rng.random(N) < 0.5
    first = np.where(rng.random(N) < a, w, ~w)
    second = np.where(rng.random(N) < b, first, w)
    base = rng.normal(size=N)
    found = rate_effects(w, base + effect * w, base + effect * first, base + effect * second)
    assert found.rate.ate.value == pytest.approx((1 - a) * (1 - b) * effect, abs=CLOSE)
    assert found.single.ate.value == pytest.approx((1 - a) * effect, abs=CLOSE)


def test_an_interaction_gives_the_effect_at_the_rewriters_texts():
    rng = np.random.default_rng(3)
    effect, g, q1 = 0.8, 0.6, 0.25
    w = rng.random(N) < 0.5
    flaws = [rng.random(N) < np.where(w, 0.7, 0.1), rng.random(N) < q1, rng.random(N) < q1]
    rewards = [effect * value + g * value * flaw for value, flaw in zip((w, ~w, w), flaws, strict=True)]
    found = rate_effects(w, *rewards)
    assert [e.value for e in found.rate] == pytest.approx([effect + g * q1] * 3, abs=CLOSE)
    assert abs(found.single.ate.value - (effect + g * q1)) > 10 * CLOSE
