"""Dual steering: golden numbers, the theorem, its closed form, its algebra and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.concepts.probes import ConceptProbe
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import combine, dual_steer
from lightning_interp.steering.softmax.euclidean import euclidean_steer, line_step
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.softmax.request import Target

pytestmark = pytest.mark.kernels

EXACT = SolverOptions(rtol=1e-13)
ROWS = torch.tensor([[1, 0.5], [-1, 0.5], [0.5, -1], [0.25, 1.5], [-0.75, -0.5]], dtype=torch.float64)
LAM = torch.tensor([0.3, -0.2], dtype=torch.float64)
BETA = torch.tensor([1, 0.5], dtype=torch.float64)

GOLDEN = [  # move, alpha, point, multiplier, KL, KL of the Euclidean point
    (1, 0.0, (1.199640450932, 7.190981361826e-4), 0.3903396928459838, 0.2109694127547601, 0.22678109931591076),
    (1, 5e-3, (1.198860480530, 0.002279038941), 0.39465074368557707, 0.210970376579236, None),
    (1, 0.5, (1.155796596388, 0.088406807224), 0.8072001978746852, 0.21402359374558083, None),
    (3, 0.0, (3.098960184056, 0.202079631887), 0.7007582627990236, 1.370336342458186, 1.494011352124543),
    (3, 5e-3, (3.092315565217, 0.215368869566), 0.7143626077235092, 1.3703689208981817, None),
    (3, 0.5, (2.852204237701, 0.695591524598), 1.9414125463882272, 1.4164286195881675, None),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(seed=0, v=60, d=8):
    return SoftmaxGeometry(draw(v, d, seed=seed))


def phi(geometry, lam, alpha):
    return geometry.dual(lam, alpha=alpha)


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64).to(found)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("move", "alpha", "point", "t", "kl", "euclidean"), GOLDEN)
def test_golden_numbers(move, alpha, point, t, kl, euclidean):
    geometry = SoftmaxGeometry(ROWS)
    found = dual_steer(geometry, LAM, BETA, probe_delta=float(move), alpha=alpha, options=EXACT)
    close(found.lam[0], point, 1e-11)
    assert float(found.t) == pytest.approx(t, rel=1e-11)
    assert float(found.kl) == pytest.approx(kl, rel=1e-11)
    assert float(found.probe_after - found.probe_before) == pytest.approx(move, rel=1e-12)
    if euclidean is not None:
        straight = euclidean_steer(geometry, LAM, BETA, probe_delta=float(move))
        assert float(straight.kl) == pytest.approx(euclidean, rel=1e-12)
    if alpha > 0:  # the same point by its step
        by_step = dual_steer(geometry, LAM, BETA, t=t, alpha=alpha, options=EXACT)
        close(by_step.lam[0], point, 1e-10)


class TestTheorem:
    """At equal probe value no other point has a smaller KL; proved without any assumption about the probe."""

    @settings(max_examples=10)
    @given(st.integers(0, 50), st.floats(-4, 4).filter(lambda c: abs(c) > 0.1))
    def test_optimal_and_pythagorean(self, seed, move):
        geometry, lam, beta = family(seed), 0.5 * draw(8, seed=seed + 1), draw(8, seed=seed + 2)
        found = dual_steer(geometry, lam, beta, probe_delta=move, alpha=0.0, options=EXACT)
        end, step = found.lam[0], phi(geometry, found.lam[0], 0) - phi(geometry, lam, 0)
        off = step - beta * (step @ beta) / (beta @ beta)
        assert float(off.norm()) <= 1e-10 * max(1.0, float(step.norm()))
        close(step, float(found.t) * beta, 1e-9)
        for other in (lam + beta * move / (beta @ beta), end + draw(8, seed=seed + 3)):
            other = other - beta * ((beta @ other) - (beta @ end)) / (beta @ beta)
            total = float(geometry.kl(lam, other))
            assert total >= float(found.kl) - 1e-12
            assert total == pytest.approx(float(found.kl) + float(geometry.kl(end, other)), rel=1e-8, abs=1e-11)

    def test_mirror_the_straight_line_minimises_the_reverse_divergence(self):
        geometry, lam, delta = family(), 0.3 * draw(8, seed=1), draw(8, seed=2)
        end = lam + 0.7 * delta
        level = phi(geometry, end, 0) @ delta
        for seed in range(5):  # other points with the same value of the dual probe
            free = draw(8, seed=seed + 10)
            free = free - delta * (free @ delta) / (delta @ delta)
            y = phi(geometry, end, 0) + 0.05 * free
            other = geometry.inverse_dual(y[None], start=end[None])[0]
            assert float(phi(geometry, other, 0) @ delta) == pytest.approx(float(level), rel=1e-9)
            assert float(geometry.kl(end, lam)) <= float(geometry.kl(other, lam)) + 1e-12

    @pytest.mark.parametrize("seed", range(3))
    def test_closed_form_of_a_factorizable_family(self, seed):
        """Pairs that differ by e0 around points with e1 = 1: the optimum is known, and no off-target mass moves."""
        d, pairs, neutral = 5, 6, 4
        centre = draw(pairs, d, seed=seed)
        centre[:, 0], centre[:, 1] = 0, 1
        e = torch.eye(d, dtype=torch.float64)
        rest = draw(neutral, d, seed=seed + 50)
        rest[:, :2] = 0
        geometry = SoftmaxGeometry(torch.cat([centre - 0.5 * e[0], centre + 0.5 * e[0], rest]))
        lam = draw(d, seed=seed + 99)
        lam[0], lam[1] = -6.0, 0.0
        z = geometry.logits(lam)
        lam[1] = math.log(0.985 / 0.015) - (z[: 2 * pairs].logsumexp(0) - z[2 * pairs :].logsumexp(0))
        tokens = CounterfactualPairs([(i, i + pairs) for i in range(pairs)])
        before = geometry.probs(lam)
        masses = {}
        for s in (-6.0, 0.0, 3.0, 6.0):
            expected = lam + (s + 6) * e[0] - (math.log(math.cosh(s / 2)) - math.log(math.cosh(3.0))) * e[1]
            found = dual_steer(geometry, lam, e[0], probe_value=s, alpha=0.0, options=EXACT)
            close(found.lam[0], expected, 1e-8)
            after = geometry.probs(found.lam[0])
            close(tokens.regroup(after), tokens.regroup(before), 1e-9)
            assert float(tokens.target_prob(after)) == pytest.approx(1 / (1 + math.exp(-s)), rel=1e-8)
            straight = euclidean_steer(geometry, lam, e[0], probe_value=s).lam[0]
            masses[s] = float(tokens.pair_mass(geometry.probs(straight)))
        assert masses[0.0] < masses[-6.0] - 0.01  # the leak: pair mass dips half-way and comes back
        assert masses[6.0] == pytest.approx(masses[-6.0], rel=1e-9)


class TestCurve:
    @settings(max_examples=3)
    @given(st.integers(0, 30), st.floats(0.1, 2), st.floats(-2, -0.1))
    def test_group_law(self, seed, s, t):
        geometry, lam, alpha = family(seed), 0.5 * draw(8, seed=seed + 1), 0.05
        u, v = draw(8, seed=seed + 2), draw(8, seed=seed + 3)

        def go(start, direction, step):
            return dual_steer(geometry, start, direction, t=step, alpha=alpha, options=EXACT).lam[0]

        one = go(go(lam, u, s), v, t)
        close(go(go(lam, v, t), u, s), one, 1e-9)
        close(go(lam, combine([u, v], [s, t]), 1.0), one, 1e-9)
        close(go(one, combine([u, v], [s, t]), -1.0), lam, 1e-9)

    def test_the_probe_value_grows_and_the_multiplier_is_the_slope_of_the_cost(self):
        geometry, lam, beta, alpha = family(), 0.5 * draw(8, seed=1), draw(8, seed=2), 0.02
        steps = torch.linspace(-2, 2, 9, dtype=torch.float64)
        found = dual_steer(geometry, lam.expand(9, -1), beta, t=steps, alpha=alpha, options=EXACT)
        assert (found.probe_after.diff() > 0).all()

        def cost(c):
            one = dual_steer(geometry, lam, beta, probe_value=c, alpha=alpha, options=EXACT)
            return float(one.kl + 0.5 * alpha * (one.lam[0] - lam).square().sum()), float(one.t)

        c, h = float(beta @ lam) + 1.5, 1e-4
        assert (cost(c + h)[0] - cost(c - h)[0]) / (2 * h) == pytest.approx(cost(c)[1], rel=1e-6)

    def test_a_large_alpha_is_euclidean_steering(self):
        geometry, lam, beta = family(), draw(8, seed=1), draw(8, seed=2)
        found = dual_steer(geometry, lam, beta, t=0.7e8, alpha=1e8, options=EXACT)
        close(found.lam[0], lam + 0.7 * beta, 1e-7)

    def test_equivariance(self):
        geometry, lam, beta, alpha = family(), draw(8, seed=1), draw(8, seed=2), 0.03
        plain = geometry.probs(dual_steer(geometry, lam, beta, t=0.8, alpha=alpha, options=EXACT).lam)
        s, q = 3.0, torch.linalg.qr(draw(8, 8, seed=3))[0]
        bigger = SoftmaxGeometry(s * geometry.weight)
        scaled = dual_steer(bigger, lam / s, s * beta, t=0.8, alpha=s * s * alpha, options=EXACT).lam
        close(bigger.probs(scaled), plain, 1e-9)
        turned = SoftmaxGeometry(geometry.weight @ q)
        close(turned.probs(dual_steer(turned, lam @ q, beta @ q, t=0.8, alpha=alpha, options=EXACT).lam), plain, 1e-9)

    def test_no_step_gives_the_very_same_bits(self):
        geometry, lam, beta = family(), draw(3, 8, seed=1), draw(8, seed=2)
        assert torch.equal(dual_steer(geometry, lam, beta, t=0.0, alpha=0.1).lam, lam)
        mixed = dual_steer(geometry, lam, beta, t=torch.tensor([0.0, 1.0, 0.0]), alpha=0.1)
        assert torch.equal(mixed.lam[[0, 2]], lam[[0, 2]])
        assert not torch.equal(mixed.lam[1], lam[1])


@pytest.mark.parametrize("target", [{"t": 0.6}, {"probe_delta": 2.0}, {"kl_budget": 0.3}])
def test_a_batch_is_its_rows(target):
    geometry, lam, beta = family(), draw(3, 8, seed=1), draw(8, seed=2)
    settings = {"alpha": 0.02, "options": EXACT if "kl_budget" not in target else None}
    together = dual_steer(geometry, lam, beta, **settings, **target)
    alone = [dual_steer(geometry, row, beta, **settings, **target).lam for row in lam]
    close(together.lam, torch.cat(alone), 1e-9)
    (name, value), goals = next(iter(target.items())), torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    per_row = dual_steer(geometry, lam, beta, **settings, **{name: value * goals})
    single = [
        dual_steer(geometry, row, beta, **settings, **{name: value * float(goal)}).lam
        for row, goal in zip(lam, goals, strict=True)
    ]
    close(per_row.lam, torch.cat(single), 1e-6)


def test_one_direction_a_row():
    geometry, lam, beta = family(), draw(3, 8, seed=1), draw(3, 8, seed=2)
    together = dual_steer(geometry, lam, beta, t=0.5, alpha=0.05, options=EXACT).lam
    alone = [dual_steer(geometry, a, b, t=0.5, alpha=0.05, options=EXACT).lam for a, b in zip(lam, beta, strict=True)]
    close(together, torch.cat(alone), 1e-9)


def peaked(dtype=torch.float64, v=400, d=16, rows=2):
    """An anisotropic head whose distributions are peaked, and a direction between two sets of tokens."""
    weight = draw(v, d, seed=3) * torch.logspace(0, -1.2, d, dtype=torch.float64)
    lam, beta = 2.5 * draw(rows, d, seed=4), weight[:50].mean(0) - weight[50:100].mean(0)
    pairs = CounterfactualPairs([(50 + i, i) for i in range(50)])
    return SoftmaxGeometry(weight.to(dtype)), lam.to(dtype), (beta / beta.norm()).to(dtype), pairs


TARGETS = [{"t": 0.2}, {"probe_delta": 2.0}, {"kl_budget": 0.4}, {"target_prob": 0.6}, {"probe_value": -1.0}]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: next(iter(t)))
def test_a_support_gives_what_the_whole_vocabulary_gives(target):
    geometry, lam, beta, pairs = peaked(rows=1)
    settings = {"alpha": 5e-3, "pairs": pairs, "options": SolverOptions(rtol=1e-7, target_rtol=1e-6)}
    whole = dual_steer(geometry, lam, beta, **settings, **target)
    assert whole.reached.all()
    for size in (16, 48) if "t" in target else (16,):
        part = dual_steer(geometry, lam, beta, support=size, **settings, **target)
        assert part.reached.all()
        assert part.certified.all()
        assert float(part.rel_resid.max()) < 1e-6
        assert (part.covered < 1).any()
        close(geometry.probs(part.lam), geometry.probs(whole.lam), 1e-5)


def test_single_precision_ends_where_double_precision_does():
    for target in TARGETS[:3]:
        ends = []
        for dtype in (torch.float64, torch.float32):
            geometry, lam, beta, _ = peaked(dtype)
            found = dual_steer(geometry, lam, beta, alpha=5e-3, **target)
            assert found.reached.all()
            assert found.lam.dtype == dtype
            ends.append((found.lam - lam).double())
        assert float(((ends[0] - ends[1]).norm(dim=-1) / ends[0].norm(dim=-1)).max()) < 1e-2
        geometry, lam, beta, _ = peaked(torch.float32)
        half = SoftmaxGeometry(geometry.weight.bfloat16())
        found = dual_steer(half, lam.bfloat16(), beta, alpha=5e-3, **target)
        assert found.lam.dtype == torch.float32
        assert found.reached.all()


class TestTargets:
    @pytest.mark.parametrize("budget", [1e-4, 3.0])
    def test_kl_budget(self, budget):
        geometry, lam, beta, _ = peaked()
        for steer in (dual_steer, euclidean_steer):
            options = {"alpha": 5e-3} if steer is dual_steer else {}
            found = steer(geometry, lam, beta, kl_budget=budget, **options)
            assert found.reached.all()
            close(found.kl, torch.full_like(found.kl, budget), 5e-3)
            assert (found.t > 0).all()
        spent = dual_steer(geometry, lam, beta, kl_budget=budget, alpha=1e-4)
        straight = euclidean_steer(geometry, lam, beta, kl_budget=budget)
        assert (spent.probe_after >= straight.probe_after - 1e-3).all()  # as far as the budget carries

    @pytest.mark.parametrize("wanted", [0.02, 0.9])
    def test_target_prob(self, wanted):
        geometry, lam, beta, pairs = peaked()
        for found in (
            dual_steer(geometry, lam, beta, target_prob=wanted, pairs=pairs, alpha=5e-3),
            euclidean_steer(geometry, lam, beta, target_prob=wanted, pairs=pairs),
        ):
            ok = found.reached
            assert ok.float().mean() > 0.6
            got = pairs.target_logit(geometry.log_probs(found.lam)).sigmoid()
            close(got[ok], torch.full_like(got[ok], wanted), 5e-3)

    def test_a_target_that_is_met_already_needs_no_step(self):
        geometry, lam, beta, pairs = peaked()
        now = pairs.target_prob(geometry.probs(lam[:1]))
        found = dual_steer(geometry, lam[:1], beta, target_prob=now, pairs=pairs, alpha=5e-3)
        assert torch.equal(found.lam, lam[:1])
        assert int(found.hvps) == 0

    def test_probe_prob_is_what_the_probe_says(self):
        geometry, lam, beta, _ = peaked()
        probe = ConceptProbe(beta, bias=0.3, scale=1.7)
        found = dual_steer(geometry, lam, probe, probe_prob=0.8, alpha=5e-3)
        close(probe.probability(found.lam), torch.full((len(lam),), 0.8).double(), 1e-6)
        close(found.probe_after, torch.full((len(lam),), probe.value_at(0.8)).double(), 1e-6)

    def test_the_probes_own_alpha_is_used(self):
        geometry, lam, beta, _ = peaked()
        assert dual_steer(geometry, lam, ConceptProbe(beta, alpha=0.123), t=0.1).alpha == 0.123
        assert dual_steer(geometry, lam, beta, t=0.1).alpha == pytest.approx(geometry.resolve_alpha("auto"))

    def test_an_unreachable_target_ends_with_the_nearest_point_and_a_flag(self):
        """A direction that moves both sides of the concept alike never changes their odds."""
        weight = torch.eye(6, dtype=torch.float64)
        pairs, beta = CounterfactualPairs([(0, 1)]), torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)
        lam = torch.zeros(1, 6, dtype=torch.float64)
        for found in (
            dual_steer(SoftmaxGeometry(weight), lam, beta, target_prob=0.9, pairs=pairs, alpha=0.1),
            euclidean_steer(SoftmaxGeometry(weight), lam, beta, target_prob=0.9, pairs=pairs),
        ):
            assert not found.reached.any()
            assert found.reason == ["unreachable"]
            assert found.lam.isfinite().all()
            assert int(found.newton) <= 30 * 40

    def test_work_is_bounded(self):
        geometry, lam, beta, _ = peaked()
        options = SolverOptions(rtol=1e-12, max_newton=2, hvp_budget=5)
        found = dual_steer(geometry, lam, beta, t=3.0, alpha=1e-4, options=options)
        assert not found.reached.any()
        assert set(found.reason) <= {"budget", "max_iter"}
        assert (found.hvps <= 10).all()
        assert found.lam.isfinite().all()

    def test_line_step_finds_roots_on_both_sides(self):
        found = line_step(lambda t: torch.sinh(t), torch.tensor([3.0, -0.5], dtype=torch.float64))
        close(found, [math.asinh(3.0), math.asinh(-0.5)], 1e-9)


def test_many_rows_are_worked_on_in_pieces(monkeypatch):
    geometry, lam, beta, _ = peaked(rows=5)
    whole = dual_steer(geometry, lam, beta, t=0.2, alpha=5e-3)
    monkeypatch.setattr(SoftmaxGeometry, "max_rows", property(lambda self: 2))
    pieces = dual_steer(geometry, lam, beta, t=0.2, alpha=5e-3)
    close(pieces.lam, whole.lam, 1e-9)
    assert pieces.reason == whole.reason
    assert len(pieces.table()) == 5
    assert pieces.table()[0]["alpha"] == 5e-3


def bad(text, error, **change):
    return pytest.param(change, error, text, id=text[:40])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        bad(r"width 8, but got \[1, 7\]", IncompatibleModelError, direction=torch.ones(7)),
        bad(r"width 8, but got \[1, 3\]", IncompatibleModelError, lam=torch.ones(3)),
        bad("direction is zero", IncompatibleModelError, direction=torch.zeros(8)),
        bad("direction is NaN", IncompatibleModelError, direction=torch.full((8,), torch.nan)),
        bad("state to steer holds NaN", IncompatibleModelError, lam=torch.full((8,), torch.nan)),
        bad("state to steer holds an infinite value", IncompatibleModelError, lam=torch.full((8,), torch.inf)),
        bad("2 directions for 3 states", IncompatibleModelError, lam=torch.ones(3, 8), direction=torch.ones(2, 8)),
        bad(r"got none", RecipeError, t=None),
        bad(r"\['t', 'kl_budget'\]", RecipeError, kl_budget=0.5),
        bad(r"target_prob=1\.0: expected probabilities inside", RecipeError, t=None, target_prob=1.0),
        bad(r"probe_prob=0\.0: expected probabilities inside", RecipeError, t=None, probe_prob=0.0),
        bad(r"kl_budget=-0\.5: expected nats >= 0", RecipeError, t=None, kl_budget=-0.5),
        bad(r"t=nan: expected finite numbers", RecipeError, t=math.nan),
        bad(r"t has 2 values, but there are 3 rows", RecipeError, lam=torch.ones(3, 8), t=torch.tensor([1.0, 2.0])),
        bad(r"alpha=0 with the target t", RecipeError, alpha=0.0),
        bad(r"alpha=-1 with the target t", RecipeError, alpha=-1.0),
        bad(r"alpha=nan", RecipeError, alpha=math.nan),
        bad(r"support=2: expected at least 4", RecipeError, support=2),
        bad("target_prob needs pairs=", RecipeError, t=None, target_prob=0.5),
    ],
)
def test_bad_input(change, error, text):
    given_ = {"lam": torch.ones(8), "direction": torch.ones(8), "t": 0.5, "alpha": 0.1, **change}
    lam, direction = given_.pop("lam"), given_.pop("direction")
    with pytest.raises(error, match=text):
        dual_steer(family(), lam, direction, **given_)


def test_targets_are_repeated_for_beams():
    values = Target(kl_budget=torch.tensor([0.25, 0.5])).values(4, torch.float64, "cpu")
    assert values.tolist() == [0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("lead", "budget", "seed", "most"),
    [
        (20, 1e-7, 2, 15),
        (50, 1e-9, 1, 30),
        (50, 1e-7, 51, 30),
        (150, 1e-12, 150, 35),
        (150, 1e-12, 151, 35),
        (50, 1.0, 50, 15),
        (50, 1.0, 51, 15),
    ],
)
def test_starts_with_one_token_that_is_nearly_certain(lead, budget, seed, most):
    """The tangent's first step would be 1e10 times too long; ``lead`` is the top logit's in nats."""
    draw = torch.Generator().manual_seed(seed)
    rows, lam, beta = torch.randn(400, 16, generator=draw), torch.zeros(8, 16), torch.randn(16, generator=draw)
    for row, token in enumerate(rows.norm(dim=-1).topk(8).indices):
        ahead = (rows[token] - rows) @ rows[token]
        ahead[token] = torch.inf
        lam[row] = lead / ahead.min() * rows[token]
    found = dual_steer(SoftmaxGeometry(rows), lam, beta, kl_budget=budget)
    assert found.reached.all(), found.reason
    torch.testing.assert_close(found.kl, torch.full_like(found.kl, budget), rtol=0.1, atol=0)
    assert int(found.hvps.max()) <= most
