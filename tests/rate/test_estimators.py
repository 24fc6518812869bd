"""Estimates and errors against hand-checked numbers, a slow loop, and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rate_oracle import GOLDEN, IDS, PROMPTS, random_units, slow
from scipy import stats

from lightning_interp.core.measure.clustered import Point, point_interval
from lightning_interp.errors import RecipeError
from lightning_interp.rate import rate_effects

pytestmark = pytest.mark.kernels

EXACT = 1e-9


def golden(**options):
    return rate_effects(**GOLDEN, ids=IDS, **options)


class TestGolden:
    def test_naive_and_single(self):
        found = golden()
        assert found.naive.value == pytest.approx(2, abs=EXACT)
        assert found.naive.se == pytest.approx(0.7071067812, abs=EXACT)
        expected = [(1.4285714286, 0.2766416676), (1.8333333333, 0.1666666667), (1.125, 0.4269562819)]
        for effect, (value, se) in zip(found.single, expected, strict=True):
            assert (effect.value, effect.se) == pytest.approx((value, se), abs=EXACT)

    @pytest.mark.parametrize(
        ("kind", "errors"),
        [
            ("paired", [0.3167651118, 0.3333333333, 0.5204164999]),
            ("stratified", [0.3299144395, 0.3333333333, 0.5204164999]),
            ("unpaired", [0.4325214792, 0.8498365856, 0.5303300859]),
        ],
    )
    def test_rate(self, kind, errors):
        effects = golden(se=kind).rate
        values = [0.9285714286, 1.1666666667, 0.75]
        assert [effect.value for effect in effects] == pytest.approx(values, abs=EXACT)
        assert [effect.se for effect in effects] == pytest.approx(errors, abs=EXACT)

    def test_clusters(self):
        assert golden(se="cluster", cluster=PROMPTS).rate.ate.se == pytest.approx(0.2350632999, abs=EXACT)

    def test_round_trips_and_standard_deviation(self):
        found = golden()
        trips = [found.rewrite_effect_w1, found.rewrite_effect_w0]
        assert [trip.value for trip in trips] == pytest.approx([-0.6666666667, 0.375], abs=EXACT)
        assert [trip.se for trip in trips] == pytest.approx([0.1666666667, 0.125], abs=EXACT)
        assert found.reward_std == pytest.approx(0.8944271910, abs=EXACT)
        assert found.standardized.rate.ate.value == pytest.approx(1.0381744181, abs=EXACT)
        assert found.standardized.rate.ate.se == pytest.approx(0.3167651118 / 0.8944271910, abs=EXACT)

    def test_intervals(self):
        normal, student, chosen = (golden(ci=ci).rate.ate for ci in ("normal", "t", "auto"))
        assert (normal.low, normal.high) == pytest.approx((0.3077232179, 1.5494196393), abs=EXACT)
        assert (student.low, student.high) == pytest.approx((0.1534751225, 1.7036677347), abs=EXACT)
        assert (chosen.low, chosen.high, chosen.method) == (student.low, student.high, "paired, t(6)")
        assert normal.method == "paired, normal"

    def test_counts_and_units(self):
        found = golden()
        assert (found.counts.n, found.counts.n1, found.counts.n0, found.counts.given) == (7, 3, 4, 7)
        assert found.ids == tuple(IDS)
        assert found.delta == pytest.approx([1.5, 0.5, 1.5, 0.5, 1.0, -0.5, 2.0])


@pytest.mark.parametrize("kind", ["paired", "stratified", "unpaired", "cluster"])
@pytest.mark.parametrize(("n", "seed"), [(9, 0), (60, 1), (301, 2)])
def test_equals_the_slow_loop(kind, n, seed):
    data = random_units(n, seed)
    clusters = np.random.default_rng(seed).integers(0, max(3, n // 3), size=n)
    expected = slow(*data, clusters)
    found = rate_effects(*data, se=kind, cluster=clusters if kind == "cluster" else None)
    for name, effects in (("rate", found.rate), ("single", found.single)):
        for estimand, effect in zip(("ate", "att", "atu"), effects, strict=True):
            plain = {"single": {"unpaired": "paired"}}.get(name, {}).get(kind, kind)
            error = "paired" if plain == "stratified" and estimand != "ate" else plain
            assert effect.value == pytest.approx(expected[f"{name}/{estimand}"], rel=1e-12)
            assert effect.se == pytest.approx(expected[f"{name}/{estimand}/{error}"], rel=1e-12)
    assert found.naive.value == pytest.approx(expected["naive"], rel=1e-12)
    assert found.reward_std == pytest.approx(expected["reward_std"], rel=1e-12)
    assert found.rewrite_effect_w1.value == pytest.approx(expected["b1"], rel=1e-10)
    if kind != "cluster":
        assert found.naive.se == pytest.approx(expected["naive_se"], rel=1e-12)
        assert found.rewrite_effect_w0.se == pytest.approx(expected["b0_se"], rel=1e-12)


def test_clustered_naive_error_is_that_of_a_regression_on_the_arm():
    w, r_orig, r_rw, r_rw2 = random_units(80, 3)
    clusters = np.random.default_rng(4).integers(0, 20, size=80)
    design = np.stack([np.ones(80), w.astype(float)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    residual = r_orig - design @ (inverse @ design.T @ r_orig)
    scores = np.stack([(design * residual[:, None])[clusters == g].sum(axis=0) for g in np.unique(clusters)])
    sandwich = inverse @ (scores.T @ scores) @ inverse * len(scores) / (len(scores) - 1)
    found = rate_effects(w, r_orig, r_rw, r_rw2, se="cluster", cluster=clusters)
    assert found.naive.se == pytest.approx(np.sqrt(sandwich[1, 1]), rel=1e-12)


class TestScipy:
    def test_att_is_the_paired_t_test(self):
        w, r_orig, r_rw, r_rw2 = random_units(150, 5)
        found = rate_effects(w, r_orig, r_rw, r_rw2, ci="t")
        for effect, arm, sides in (
            (found.rate.att, w, (r_rw2, r_rw)),
            (found.rate.atu, ~w, (r_rw, r_rw2)),
            (found.single.att, w, (r_orig, r_rw)),
            (found.rewrite_effect_w1, w, (r_rw2, r_orig)),
        ):
            test = stats.ttest_rel(sides[0][arm], sides[1][arm])
            interval = test.confidence_interval(0.95)
            assert effect.value / effect.se == pytest.approx(test.statistic, rel=1e-12)
            assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-10)

    def test_ate_is_the_paired_t_test_of_both_sides(self):
        w, _, r_rw, r_rw2 = random_units(150, 6)
        test = stats.ttest_rel(np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2))
        effect = rate_effects(w, None, r_rw, r_rw2).rate.ate
        assert effect.value / effect.se == pytest.approx(test.statistic, rel=1e-12)

    def test_naive_is_welchs_test(self):
        w, *rewards = random_units(90, 7)
        test = stats.ttest_ind(rewards[0][w], rewards[0][~w], equal_var=False)
        interval = test.confidence_interval(0.9)
        effect = rate_effects(w, *rewards, ci="t", alpha=0.1).naive
        assert effect.value / effect.se == pytest.approx(test.statistic, rel=1e-12)
        assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


class TestInterval:
    def test_student_below_a_hundred_units_and_normal_from_there(self):
        for n, name in ((99, "paired, t(98)"), (100, "paired, normal")):
            assert rate_effects(*random_units(n)).rate.ate.method == name

    def test_each_effect_goes_by_its_own_number_of_units(self):
        found = rate_effects(*random_units(150))
        n1 = found.counts.n1
        assert n1 < 100
        assert found.rate.ate.method == "paired, normal"
        assert found.rate.att.method == f"paired, t({n1 - 1})"

    def test_clusters_are_what_counts(self):
        data = random_units(200)
        found = rate_effects(*data, se="cluster", cluster=np.arange(200) // 10)
        assert found.rate.ate.method == "cluster, t(19)"

    @pytest.mark.parametrize("alpha", [0.01, 0.32])
    def test_level(self, alpha):
        effect = rate_effects(*random_units(150), ci="normal", alpha=alpha).rate.ate
        assert (effect.high - effect.low) / effect.se == pytest.approx(2 * stats.norm.ppf(1 - alpha / 2), rel=1e-12)
        assert effect.level == 1 - alpha

    def test_no_error_no_interval(self):
        low, high, name = point_interval(Point(1.0, float("nan"), 0, 1, 1), ci="auto", alpha=0.05)
        assert np.isnan([low, high]).all()
        assert name == "none"


@pytest.mark.parametrize(
    "kind", [np.float32, np.float16, torch.float32, torch.bfloat16, torch.float64, "list", "series"]
)
def test_any_container_and_dtype(kind):
    w, *rewards = random_units(40, 8)
    rewards = [np.round(reward * 4) / 4 for reward in rewards]  # exact in every type
    expected = rate_effects(w, *rewards).to_dict()
    if isinstance(kind, torch.dtype):
        given = (torch.tensor(w), *(torch.tensor(reward, dtype=kind, requires_grad=True) for reward in rewards))
    elif kind == "list":
        given = (w.astype(int).tolist(), *(reward.tolist() for reward in rewards))
    elif kind == "series":
        pandas = pytest.importorskip("pandas")
        given = (pandas.Series(w.astype(float)), *map(pandas.Series, rewards))
    else:
        given = (w.astype(kind), *(reward.astype(kind) for reward in rewards))
    assert rate_effects(*given).to_dict() == expected


def test_lists_of_scalars():
    w, *rewards = random_units(10, 9)
    given = ([torch.tensor(int(x)) for x in w], *([torch.tensor(x, dtype=torch.bfloat16) for x in r] for r in rewards))
    rounded = [torch.tensor(r, dtype=torch.bfloat16).double().numpy() for r in rewards]
    assert rate_effects(*given).to_dict() == rate_effects(w, *rounded).to_dict()


def test_without_originals_only_the_double_rewrite():
    data = random_units(50)
    found, whole = rate_effects(data[0], None, *data[2:]), rate_effects(*data)
    assert found.naive is found.single is found.standardized is found.reward_std is found.rewrite_effect_w1 is None
    assert [e.value for e in found.rate] == [e.value for e in whole.rate]


def test_the_random_state_and_the_inputs_stay_as_they_are():
    data = random_units(30)
    copies = [column.copy() for column in data]
    np.random.seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    rate_effects(*data, ci="bootstrap")
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all((a == b).all() for a, b in zip(data, copies, strict=True))


def test_twelve_scored_triples():
    """Rewards of single texts that the authors of arXiv 2410.11348 printed: signs and sums by hand."""
    triples = [
        (0, 0.08408, 0.08410, 0.08566),
        (0, 0.09508, 0.09209, 0.09712),
        (1, 0.10879, 0.09605, 0.10571),
        (0, 0.08852, 0.10251, 0.09427),
        (1, 0.12025, 0.11065, 0.11763),
        (0, 0.10583, 0.11401, 0.08732),
        (1, 0.09682, 0.08516, 0.09681),
        (0, 0.05350, 0.05375, 0.05139),
        (0, 0.12598, 0.04763, 0.05166),
        (0, 0.14286, 0.14150, 0.14684),
        (1, 0.13989, 0.11346, 0.10577),
        (1, 0.13231, 0.10711, 0.11479),
    ]
    found = rate_effects(*zip(*triples, strict=True))
    assert found.rate.att.value == pytest.approx((0.00966 + 0.00698 + 0.01165 - 0.00769 + 0.00768) / 5, abs=1e-12)
    down = (-0.00156 - 0.00503 + 0.00824 + 0.02669 + 0.00236 - 0.00403 - 0.00534) / 7
    assert found.rate.atu.value == pytest.approx(down, abs=1e-12)
    assert found.rate.ate.value == pytest.approx((5 * found.rate.att.value + 7 * down) / 12, abs=1e-12)


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value"),
        [("se", "robust"), ("ci", "z"), ("boot", "bca"), ("missing", "impute"), ("identical", "ignore")],
    )
    def test_unknown(self, option, value):
        with pytest.raises(RecipeError, match=rf"{option}='{value}' is unknown; expected one of '"):
            golden(**{option: value})

    @pytest.mark.parametrize("alpha", [0.0, 1.0, 95, float("nan")])
    def test_alpha(self, alpha):
        with pytest.raises(RecipeError, match=rf"alpha={alpha} is not between 0 and 1"):
            golden(alpha=alpha)

    def test_few_resamples(self):
        with pytest.raises(RecipeError, match="n_boot=999 is too few"):
            golden(ci="bootstrap", n_boot=999)

    def test_cluster_errors_need_clusters(self):
        with pytest.raises(RecipeError, match="se='cluster' needs the cluster of every unit, but cluster is None"):
            golden(se="cluster")

    def test_unused_clusters_are_warned_of(self):
        with pytest.warns(UserWarning, match="7 units come from 4 clusters, but se='paired' takes them as independent"):
            golden(cluster=PROMPTS)

    def test_one_cluster_carries_no_error(self):
        with pytest.warns(UserWarning, match="All units come from one cluster"):
            found = golden(se="cluster", cluster=["p"] * 7)
        assert np.isnan([found.rate.ate.se, found.naive.se, found.rate.att.low]).all()
        assert found.rate.ate.value == pytest.approx(0.9285714286)

    def test_settings_are_kept(self):
        found = golden(se="stratified", alpha=0.1, seed=7, standardize=False)
        assert found.standardized is None
        assert found.reward_std == pytest.approx(0.894427191)
        assert {"se": "stratified", "alpha": 0.1, "seed": 7}.items() <= found.settings.items()
