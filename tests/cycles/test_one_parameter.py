"""The policy of one parameter: its fixtures, its optimum against a minimiser, its gain, and the walk of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from lightning_interp.cycles import OneParameter, gain_near_base, one_parameter_chains
from lightning_interp.errors import RecipeError


def chain(**how):
    return one_parameter_chains(OneParameter(**how))[0]


class TestFixtures:
    @pytest.mark.parametrize(
        ("beta", "continual", "reinit"), [(0.5, 1.8526, 0.5026), (1, 0.5026, -0.8473), (2, -0.1723, -1.5223)]
    )
    def test_optimum_of_one_cycle(self, beta, continual, reinit):
        for init, theta in (("continual", continual), ("reinit", reinit)):
            found = chain(setting="dpo", init=init, steps=None, beta=beta, cycles=2)
            assert logit(found[1]) == pytest.approx(theta, abs=1e-4)
        assert chain(init="continual", steps=None, beta=0.5, cycles=2)[1] == pytest.approx(0.8644, abs=1e-4)
        assert chain(init="reinit", steps=None, beta=1, cycles=2)[1] == pytest.approx(0.3, abs=1e-4)

    @pytest.mark.parametrize(
        ("lr", "init", "wanted"),
        [
            (0.5, "continual", [0.300, 0.354, 0.429, 0.530, 0.657, 0.791, 0.898]),
            (0.5, "reinit", [0.300, 0.125, 0.103, 0.100, 0.100, 0.100, 0.100]),
            (2, "continual", [0.300, 0.528, 0.893, 0.997, 1.000, 1.000, 1.000]),
            (2, "reinit", [0.300, 0.225, 0.169, 0.134, 0.116, 0.107, 0.103]),
            (8, "continual", [0.300, 0.928, 1.000, 1.000, 1.000, 1.000, 1.000]),
            (8, "reinit", [0.300, 0.770, 0.999, 1.000, 1.000, 1.000, 1.000]),
        ],
    )
    def test_preferring_own_outputs(self, lr, init, wanted):
        assert chain(setting="dpo", init=init, lr=lr, steps=50, beta=0.1) == pytest.approx(wanted, abs=1e-3)

    @pytest.mark.parametrize(
        ("steps", "wanted"),
        [
            (20, [0.300, 0.138, 0.106, 0.101]),
            (100, [0.300, 0.256, 0.217, 0.183, 0.157, 0.137, 0.124]),
            (2000, [0.300] * 7),
        ],
    )
    def test_finetuning_on_own_outputs(self, steps, wanted):
        found = chain(setting="sft", init="reinit", lr=0.1, steps=steps)
        assert found[: len(wanted)] == pytest.approx(wanted, abs=1e-3)


class TestOptimum:
    @given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.3, 3))
    def test_is_the_minimum_of_the_loss(self, p, q, beta):
        def loss(d):
            return p * (1 - q) * np.logaddexp(0, -beta * d) + (1 - p) * q * np.logaddexp(0, beta * d)

        reach = (abs(logit(p) - logit(q)) + 1) / beta
        d = minimize_scalar(loss, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-9}).x
        found = one_parameter_chains(OneParameter(init="reinit", steps=None, beta=beta, base=q, start=p, cycles=2))
        assert found[0, 1] == pytest.approx(float(expit(logit(q) + d)), abs=1e-4)

    @pytest.mark.parametrize("init", ["reinit", "continual"])
    def test_of_finetuning_is_where_the_policy_was(self, init):
        assert chain(setting="sft", init=init, steps=None) == pytest.approx([0.3] * 7)

    @pytest.mark.parametrize("init", ["reinit", "continual"])
    def test_gradient_descent_gets_there(self, init):
        how = {"setting": "dpo", "init": init, "beta": 1.0, "cycles": 3}
        assert chain(**how, lr=5, steps=3000) == pytest.approx(chain(**how, steps=None), abs=1e-6)

    def test_of_preferences_multiplies_log_odds(self):
        for init, factor in (("reinit", 1 / 0.5), ("continual", 1 + 1 / 0.5)):
            x = logit(chain(init=init, steps=None, beta=0.5, cycles=3)) - logit(0.1)
            assert x[1:] / x[:-1] == pytest.approx([factor] * 2)

    def test_the_base_stays_where_it_is(self):
        assert chain(start=0.1, lr=8) == pytest.approx([0.1] * 7)

    @given(st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.sampled_from(["sft", "dpo"]))
    def test_a_trait_and_its_opposite_mirror_each_other(self, p, q, setting):
        how = {"setting": setting, "init": "reinit", "lr": 2.0, "steps": 9, "cycles": 3}
        assert chain(base=q, start=p, **how) == pytest.approx(1 - chain(base=1 - q, start=1 - p, **how))


class TestGain:
    @pytest.mark.parametrize("setting", ["sft", "dpo"])
    @pytest.mark.parametrize("init", ["reinit", "continual"])
    @pytest.mark.parametrize("steps", [1, 50, None])
    def test_is_the_slope_at_the_base(self, setting, init, steps):
        settings = {"setting": setting, "init": init, "steps": steps, "lr": 0.7, "beta": 0.4}
        x = 1e-4
        found = chain(**settings, start=float(expit(logit(0.1) + x)), cycles=2)
        assert (logit(found[1]) - logit(0.1)) / x == pytest.approx(gain_near_base(OneParameter(**settings)), abs=1e-3)

    @pytest.mark.parametrize(("lr", "grows"), [(0.5, False), (2, False), (8, True)])
    def test_above_one_the_trait_grows(self, lr, grows):
        settings = OneParameter(setting="dpo", init="reinit", lr=lr)
        assert (gain_near_base(settings) > 1) == grows
        assert (one_parameter_chains(settings)[0, -1] > 0.3) == grows
        assert gain_near_base(OneParameter(setting="dpo", init="continual", lr=lr)) > 1


class TestSamples:
    def test_make_a_walk_without_drift_of_known_variance(self):
        """Finetuned to the optimum on n own outputs: variance p (1-p) / n in the first cycle, and no drift in any."""
        found = one_parameter_chains(
            OneParameter(setting="sft", init="continual", steps=None), samples=100, chains=20000
        )
        assert found[:, 1].var() == pytest.approx(0.3 * 0.7 / 100, rel=0.05)
        assert found.mean(axis=0) == pytest.approx([0.3] * 7, abs=4 * math.sqrt(6 * 0.21 / 100 / 20000))
        # Each cycle takes 1/n off what is left of p (1-p).
        assert (found * (1 - found)).mean(axis=0) == pytest.approx(0.21 * 0.99 ** np.arange(7), rel=0.02)

    @pytest.mark.parametrize("setting", ["sft", "dpo"])
    def test_of_many_are_the_expected_loss(self, setting):
        settings = OneParameter(setting=setting, init="continual", lr=0.5)
        sampled = one_parameter_chains(settings, samples=10**8, chains=3)
        assert sampled == pytest.approx(np.repeat(one_parameter_chains(settings), 3, axis=0), abs=2e-3)

    def test_pairs_are_drawn_one_by_one(self):
        """A slow loop over pairs has the same mean and spread after one cycle."""
        settings = OneParameter(setting="dpo", init="reinit", lr=4, steps=10, beta=0.5, cycles=2)
        quick = one_parameter_chains(settings, samples=20, chains=3000)[:, 1]
        random, slow = np.random.default_rng(0), []
        for _ in range(600):
            chosen, rejected = random.random(20) < 0.3, random.random(20) < 0.1
            d = 0.0
            for _ in range(10):
                sign = chosen.astype(float) - rejected
                d += 4 * np.mean(sign * 0.5 * expit(-0.5 * d * sign))
            slow.append(expit(logit(0.1) + d))
        assert np.mean(quick) == pytest.approx(np.mean(slow), abs=4 * np.std(slow) / math.sqrt(600))
        assert np.std(quick) == pytest.approx(np.std(slow), rel=0.12)

    def test_same_seed_same_chain(self):
        how = OneParameter(lr=2)
        one, same = (one_parameter_chains(how, samples=30, chains=4, seed=1) for _ in range(2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, one_parameter_chains(how, samples=30, chains=4, seed=2))

    def test_a_trait_that_is_lost_or_complete_stays_so(self):
        found = one_parameter_chains(
            OneParameter(setting="sft", init="reinit", steps=None, cycles=60), samples=5, chains=50
        )
        assert set(found[:, -1].tolist()) == {0.0, 1.0}


class TestErrors:
    @pytest.mark.parametrize(
        "wrong",
        [{"setting": "rl"}, {"init": "x"}, {"steps": 0}, {"lr": 0.0}, {"beta": -1.0}, {"base": 1.0}, {"start": 0.0},
         {"cycles": 0}],
    )  # fmt: skip
    def test_settings(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(RecipeError, match=rf"OneParameter\({name}={value!r}\): expected sft or dpo"):
            OneParameter(**wrong)

    def test_samples(self):
        with pytest.raises(RecipeError, match=r"samples=0, chains=1\): expected 1 or more"):
            one_parameter_chains(OneParameter(), samples=0)
        with pytest.raises(RecipeError, match=r"samples=8\) of dpo with steps=None"):
            one_parameter_chains(OneParameter(steps=None), samples=8)
