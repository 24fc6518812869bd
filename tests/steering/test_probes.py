"""Probes against scipy, closed forms and slow arithmetic."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import optimize

from lightning_interp.core.measure.logistic import calibrate, fit_logistic
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import DataError, IncompatibleModelError, ManifestError, RecipeError, SiteError
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.steering.concepts.probes import ConceptProbe
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.testing import tiny_model

D, V = 6, 40


def draw(n, m, gap=1.0, seed=0, d=D):
    rng = torch.Generator().manual_seed(seed)
    shift = torch.randn(d, generator=rng, dtype=torch.float64)
    base = torch.randn(n, d, generator=rng, dtype=torch.float64)
    target = torch.randn(m, d, generator=rng, dtype=torch.float64) + gap * shift
    return base, target


def geometry(seed=1, d=D):
    weight = torch.randn(V, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SoftmaxGeometry(weight)


def slow_dual(weight, lam):
    """E[g] at one state, token by token."""
    scores = [math.exp(float(row @ lam)) for row in weight]
    return sum(s * row for s, row in zip(scores, weight, strict=True)) / sum(scores)


class TestDirections:
    def test_primal_mean_difference(self):
        base, target = draw(30, 50)
        probe = ConceptProbe.fit(base, target, "primal_md")
        np.testing.assert_allclose(probe.direction, target.numpy().mean(0) - base.numpy().mean(0), atol=1e-12)
        assert (probe.n_base, probe.n_target, probe.kind) == (30, 50, "primal_md")

    def test_dual_mean_difference(self):
        base, target = draw(7, 5)
        family = geometry()
        probe = ConceptProbe.fit(base, target, geometry=family)
        slow = [torch.stack([slow_dual(family.weight, lam) for lam in states]).mean(0) for states in (base, target)]
        torch.testing.assert_close(probe.direction, slow[1] - slow[0], atol=1e-10, rtol=0)
        assert probe.kind == "dual_md"

    def test_lda_is_the_posterior_of_two_gaussians(self):
        base, target = draw(60, 60)
        probe = ConceptProbe.fit(base, target, "lda")
        spread = (np.cov(base.numpy(), rowvar=False) * 59 + np.cov(target.numpy(), rowvar=False) * 59) / 118
        spread += 1e-6 * np.eye(D)
        from scipy.stats import multivariate_normal as normal

        points = draw(9, 1, seed=4)[0]
        log_odds = normal.logpdf(points, target.numpy().mean(0), spread) - normal.logpdf(
            points, base.numpy().mean(0), spread
        )
        np.testing.assert_allclose(probe.probability(points), 1 / (1 + np.exp(-log_odds)), atol=1e-9)

    @pytest.mark.parametrize(("n", "d"), [(40, 6), (10, 30)])
    @pytest.mark.parametrize("l2", [1e-2, 1.0, 50.0])
    def test_logistic_is_the_minimum_that_scipy_finds(self, n, d, l2):
        base, target = draw(n, n + 3, gap=0.5, d=d)
        probe = ConceptProbe.fit(base, target, "logistic", l2=l2)
        x, sign = np.concatenate([base, target]), np.r_[-np.ones(n), np.ones(n + 3)]

        def loss(w):
            return np.logaddexp(0, -sign * (x @ w[:-1] + w[-1])).sum() + l2 / 2 * (w[:-1] ** 2).sum()

        def slope(w):
            pull = -sign / (1 + np.exp(sign * (x @ w[:-1] + w[-1])))
            return np.r_[x.T @ pull + l2 * w[:-1], pull.sum()]

        found = optimize.minimize(
            loss, np.zeros(d + 1), jac=slope, method="BFGS", options={"gtol": 1e-9, "maxiter": 9999}
        )
        np.testing.assert_allclose(np.r_[probe.direction, probe.bias], found.x, atol=2e-6)
        assert loss(np.r_[probe.direction, probe.bias]) <= found.fun + 1e-10

    def test_states_of_very_different_sizes_are_no_trouble(self):
        base, target = draw(200, 200, gap=0.3)
        base[:, 0], target[:, 0] = base[:, 0] * 3000 + 5000, target[:, 0] * 3000 + 5000  # a massive activation
        weight, bias = fit_logistic(torch.cat([base, target]), torch.cat([torch.zeros(200), torch.ones(200)]))
        p = torch.sigmoid(torch.cat([base, target]) @ weight + bias)
        gradient = torch.cat([base, target]).T @ (p - torch.cat([torch.zeros(200), torch.ones(200)])) + weight
        assert float(gradient.abs().max()) < 1e-7  # float64 sums of 400 terms of 1e4

    @pytest.mark.parametrize(("factor", "below"), [(1, 1e-9), (3, 1e-5), (-1e6, 1e-5), (torch.nan, 1e-5)])
    def test_the_last_step_is_judged_by_the_gradient_where_it_ends(self, factor, below, monkeypatch):
        x, y = torch.cat(draw(60, 60)), torch.cat([torch.zeros(60), torch.ones(60)])
        solve = torch.linalg.solve
        erring = lambda h, g: solve(h, g) * (1 if g.norm() > 1e-5 else factor)  # noqa: E731
        monkeypatch.setattr(torch.linalg, "solve", erring)
        with suppress(DataError):  # "did not converge" is an honest answer too
            weight, bias = fit_logistic(x, y)
            wrong = torch.sigmoid(x @ weight + bias) - y
            assert float(torch.cat([x.T @ wrong + weight, wrong.sum()[None]]).norm()) <= below

    @pytest.mark.parametrize("kind", ["dual_md", "primal_md", "lda"])
    def test_streamed_moments_give_the_same(self, kind):
        base, target = draw(20, 31)
        family = geometry()
        whole = ConceptProbe.fit(base, target, kind, geometry=family, offset="midpoint")
        moments = ClassMoments(D, scatter=True)
        for label, states in ((1, target), (0, base)):
            for part in states.split(6):
                moments.update(part, torch.full((len(part),), label), family.dual(part))
        streamed = ConceptProbe.from_moments(moments, kind)
        torch.testing.assert_close(streamed.direction, whole.direction, atol=1e-9, rtol=1e-9)
        assert streamed.bias == pytest.approx(whole.bias, abs=1e-8)
        assert (streamed.n_base, streamed.n_target) == (20, 31)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_narrow_states(self, dtype):
        base, target = draw(300, 300)
        exact = ConceptProbe.fit(base, target, "primal_md")
        rounded = ConceptProbe.fit(base.to(dtype), target.to(dtype), "primal_md")
        assert rounded.direction.dtype == torch.float64
        assert exact.cosine(rounded) > (0.9999 if dtype == torch.bfloat16 else 0.9999999)


class TestOffsets:
    @pytest.mark.parametrize("kind", ["dual_md", "primal_md", "lda"])
    def test_the_midpoint_is_undecided(self, kind):
        base, target = draw(20, 20)
        probe = ConceptProbe.fit(base, target, kind, geometry=geometry(), offset="midpoint")
        middle = (base.mean(0) + target.mean(0)) / 2
        assert float(probe.probability(middle)) == pytest.approx(0.5, abs=1e-12)
        assert probe.scale == 1.0
        assert probe.meta["offset"] == "midpoint"

    def test_calibration_is_the_minimum_that_scipy_finds(self):
        base, target = draw(40, 25, gap=0.7)
        probe = ConceptProbe.fit(base, target, "primal_md")
        values = np.concatenate([probe.value(base), probe.value(target)])
        soft = np.r_[np.full(40, 1 / 42), np.full(25, 26 / 27)]

        def loss(w):
            z = w[0] * values + w[1]
            return (np.logaddexp(0, z) - soft * z).sum()

        found = optimize.minimize(loss, np.array([0.1, 0.0]), method="BFGS", options={"gtol": 1e-10})
        assert probe.scale == pytest.approx(found.x[0], rel=1e-5)
        assert probe.scale * probe.bias == pytest.approx(found.x[1], abs=1e-4)
        assert probe.meta["offset"] == "calibrated"

    def test_separated_classes_stay_finite_and_uncertain(self):
        scale, offset = calibrate(torch.tensor([0.0, 1.0, 9.0, 10.0]), torch.tensor([0, 0, 1, 1]))
        assert math.isfinite(scale)
        assert offset == pytest.approx(-5.0)
        p = 1 / (1 + math.exp(-scale * (10.0 + offset)))
        assert 0.7 < p < 0.9  # four states support no more: 3/4 is Platt's label

    @pytest.mark.parametrize("probability", [0.01, 0.5, 0.9999])
    def test_value_at_is_the_inverse(self, probability):
        base, target = draw(20, 20)
        probe = ConceptProbe.fit(base, target, "primal_md")
        lam = probe.direction * probe.value_at(probability) / probe.norm**2
        assert float(probe.probability(lam)) == pytest.approx(probability, rel=1e-9)

    def test_a_unit_probe_says_the_same(self):
        base, target = draw(20, 20)
        probe = ConceptProbe.fit(base, target, "primal_md")
        unit = probe.unit()
        assert unit.norm == pytest.approx(1.0)
        torch.testing.assert_close(unit.probability(base), probe.probability(base), atol=1e-12, rtol=0)
        assert unit.cosine(probe) == pytest.approx(1.0)
        assert unit.value_at(0.9) == pytest.approx(probe.value_at(0.9) / probe.norm)


class TestUse:
    def test_values_have_the_shape_of_the_states(self):
        probe = ConceptProbe(torch.tensor([1.0, -2.0]))
        assert probe.value(torch.ones(3, 4, 2)).shape == (3, 4)
        assert probe.value(torch.ones(2)).item() == -1.0

    def test_it_computes_in_float32_at_least(self):
        probe = ConceptProbe(torch.full((512,), 0.1, dtype=torch.bfloat16))
        lam = torch.full((512,), 0.3, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = probe.value(lam)
        assert (probe.direction.dtype, value.dtype) == (torch.float32, torch.float32)
        assert float(value) == pytest.approx(512 * float(lam[0]) * float(probe.direction[0]), rel=1e-5)
        assert probe.value(lam.double()).dtype == torch.float64

    def test_check_takes_its_own_model_only(self):
        model = tiny_model("llama")
        probe = ConceptProbe(torch.ones(32), fingerprint=model_fingerprint(model))
        probe.check(model)
        with pytest.raises(IncompatibleModelError, match=r"This given probe was made for a model with fingerprint"):
            probe.check(tiny_model("llama", seed=1))
        with pytest.raises(IncompatibleModelError, match=r"probe has width 16, but unembed_in of Llama.* has width 32"):
            ConceptProbe(torch.ones(16)).check(model)

    def test_a_probe_inside_a_block_has_the_width_of_its_site(self):
        model = tiny_model("llama")
        width = model.model.layers[1].mlp.up_proj.out_features
        ConceptProbe(torch.ones(width), site=Site("linear:up", 1)).check(model)
        with pytest.raises(SiteError, match="layer 7"):
            ConceptProbe(torch.ones(32), site=Site("resid_post", 7)).check(model)

    def test_fit_with_a_model(self):
        model = tiny_model("llama").double()
        base, target = draw(12, 12, d=32)
        probe = ConceptProbe.fit(base, target, model=model, alpha=0.01, meta={"concept": "test"})
        by_hand = ConceptProbe.fit(base, target, geometry=SoftmaxGeometry(model.lm_head.weight))
        torch.testing.assert_close(probe.direction, by_hand.direction)
        assert probe.fingerprint == model_fingerprint(model)
        assert (probe.alpha, probe.meta["concept"]) == (0.01, "test")


class TestFiles:
    def test_round_trip(self, tmp_path):
        base, target = draw(12, 13)
        site = Site("resid_post", 3)
        kept = ConceptProbe.fit(
            base, target, "logistic", l2=0.5, alpha=5e-3, site=site, meta={"concept": "ing", "k": [1]}
        )
        again = ConceptProbe.load(kept.save(tmp_path / "deep" / "probe.safetensors"))
        assert torch.equal(again.direction, kept.direction)
        assert again.to_dict() == kept.to_dict()
        assert again.site == site
        assert again.meta == {"concept": "ing", "k": [1], "l2": 0.5}

    def test_the_file_is_plain(self, tmp_path):
        path = ConceptProbe(torch.tensor([1.0, 2.0]), bias=3.0, fingerprint="a" * 64).save(tmp_path / "p.safetensors")
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["probe"])
            assert file.get_tensor("direction").tolist() == [1.0, 2.0]
        assert (facts["bias"], facts["fingerprint"], facts["site"]) == (3, "a" * 64, "unembed_in")
        assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]

    def test_loading_for_another_model(self, tmp_path):
        model = tiny_model("llama")
        path = ConceptProbe(torch.ones(32), fingerprint=model_fingerprint(model)).save(tmp_path / "p.safetensors")
        assert ConceptProbe.load(path, model=model).width == 32
        with pytest.raises(IncompatibleModelError, match=model_fingerprint(model)[:12]):
            ConceptProbe.load(path, model=tiny_model("llama", seed=3))

    def test_what_is_no_probe(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.safetensors holds no concept probe"):
            ConceptProbe.load(tmp_path / "gone.safetensors")
        save_file({"direction": torch.ones(3)}, tmp_path / "bare.safetensors")
        with pytest.raises(DataError, match=r"bare\.safetensors .*format is None"):
            ConceptProbe.load(tmp_path / "bare.safetensors")
        metadata = {"format": "lightning_interp.concept_probe/1"}
        for name, probe, message in (
            ("nan", {"site": "unembed_in", "bias": None}, "nan.safetensors holds no concept probe"),
            ("field", {"site": "unembed_in", "colour": 3}, "colour"),
            ("site", {"site": "nowhere"}, "nowhere"),
        ):
            path = tmp_path / f"{name}.safetensors"
            save_file({"direction": torch.ones(3)}, path, metadata={**metadata, "probe": json.dumps(probe)})
            with pytest.raises(DataError, match=message):
                ConceptProbe.load(path)
        save_file(
            {"direction": torch.zeros(3)}, path, metadata={**metadata, "probe": json.dumps({"site": "unembed_in"})}
        )
        with pytest.raises(DataError, match=r"direction \[3\] of a given probe is zero"):
            ConceptProbe.load(path)

    def test_what_cannot_be_written(self, tmp_path):
        with pytest.raises(DataError, match=r"Cannot write meta\.model"):
            ConceptProbe(torch.ones(2), meta={"model": object()}).save(tmp_path / "p.safetensors")
        (tmp_path / "file").write_text("")
        with pytest.raises(ManifestError, match="Cannot write"):
            ConceptProbe(torch.ones(2)).save(tmp_path / "file" / "p.safetensors")


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"direction": torch.tensor([0.0, 0.0])}, r"direction \[2\] of a given probe is zero"),
            ({"direction": torch.tensor([1.0, torch.nan])}, r"direction \[2\] of a given probe is not finite"),
            ({"direction": torch.tensor([1.0, torch.inf])}, "is not finite"),
            ({"direction": torch.ones(2, 2)}, r"has the shape \[2, 2\]"),
            ({"direction": torch.ones(0)}, r"has the shape \[0\]"),
            ({"kind": "pca"}, "Unknown kind of probe 'pca'; expected one of dual_md"),
            ({"bias": math.nan}, "bias=nan"),
            ({"scale": 0.0}, "scale=0.0"),
            ({"alpha": -1.0}, "alpha=-1.0"),
        ],
    )
    def test_probes_that_make_no_sense(self, options, message):
        with pytest.raises(RecipeError, match=message):
            ConceptProbe(**{"direction": torch.ones(2), **options})

    def test_states_of_another_width(self):
        with pytest.raises(IncompatibleModelError, match=r"width 2 was given states of shape \[5, 3\]"):
            ConceptProbe(torch.ones(2)).value(torch.ones(5, 3))
        with pytest.raises(IncompatibleModelError, match=r"States of shape \[4, 3\] do not fit moments of width 2"):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(4, 3), "primal_md")
        with pytest.raises(IncompatibleModelError, match=r"states of shape \[4\] and \[2, 2\]"):
            ConceptProbe.fit(torch.ones(4), torch.ones(2, 2), "primal_md")

    def test_the_same_class_means(self):
        with pytest.raises(RecipeError, match=r"direction \[2\] of a primal_md probe is zero"):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(3, 2), "primal_md")

    def test_classes_without_states(self):
        with pytest.raises(DataError, match=r"There is no target state, .*: 4 base and 0 target"):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(0, 2), "primal_md")
        with pytest.raises(DataError, match=r"There is no base state"):
            ConceptProbe.fit(torch.ones(0, D), torch.ones(3, D), "dual_md", geometry=geometry())

    def test_states_that_are_not_finite(self):
        with pytest.raises(DataError, match="State 1 of the 2 chosen ones holds NaN"):
            ConceptProbe.fit(torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1), "primal_md")

    def test_dual_without_a_geometry(self):
        with pytest.raises(RecipeError, match=r"dual_md probe of 4 \+ 3 states needs geometry="):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(3, 2))

    @pytest.mark.parametrize("kind", ["pca", "given"])
    def test_unknown_kinds(self, kind):
        with pytest.raises(RecipeError, match=f"kind '{kind}'; expected one of dual_md, primal_md, logistic, lda"):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(3, 2), kind)

    def test_unknown_offsets(self):
        with pytest.raises(RecipeError, match="offset='zero' is unknown; expected one of calibrated, midpoint"):
            ConceptProbe.fit(torch.ones(4, 2), torch.ones(3, 2), "primal_md", offset="zero")

    def test_logistic_needs_states(self):
        moments = ClassMoments(2, dual=False)
        moments.update(torch.eye(2), torch.tensor([0, 1]))
        with pytest.raises(RecipeError, match="A logistic probe cannot be made from class means"):
            ConceptProbe.from_moments(moments, "logistic")

    @pytest.mark.parametrize("probability", [0.0, 1.0, -1.0, 2.0, math.nan])
    def test_probabilities_that_no_value_has(self, probability):
        with pytest.raises(RecipeError, match=rf"value_at\({probability}\)"):
            ConceptProbe(torch.ones(2)).value_at(probability)

    def test_regressions_that_have_no_answer(self):
        x = torch.tensor([[-1.0], [1.0]])
        with pytest.raises(RecipeError, match=r"fit_logistic\(l2=0\)"):
            fit_logistic(x, torch.tensor([0.0, 1.0]), l2=0)
        with pytest.raises(RecipeError, match=r"fit_logistic\(l2=-1\)"):
            fit_logistic(x, torch.tensor([0.2, 0.8]), l2=-1)
        with pytest.raises(DataError, match="got 2 rows of one class"):
            fit_logistic(x, torch.tensor([1.0, 1.0]))
        with pytest.raises(DataError, match="on 2 rows did not converge in 1 iterations"):
            fit_logistic(x, torch.tensor([0.0, 1.0]), max_iter=1)
        with pytest.raises(DataError, match="The 3 probe values to calibrate on are all 2"):
            calibrate(torch.full((3,), 2.0), torch.tensor([0, 1, 1]))
        with pytest.raises(DataError, match=r"4 probe values .* tell nothing"):
            calibrate(torch.tensor([-1.0, 1.0, -1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
