"""Scores of steering against slow loops, closed forms and published definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.generation.text_quality import (
    distinct_n,
    loop_period,
    perplexity,
    repeated_share,
    repetition,
)
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.concepts.probes import ConceptProbe
from lightning_interp.steering.effects.metrics import (
    SCORES,
    covering_tokens,
    dual_alignment,
    entropy,
    kl_divergence,
    off_target_kl,
    rank_difference,
    ranks,
    score_distributions,
    score_path,
)
from lightning_interp.steering.effects.path_scores import PathScores, bin_path, value_at_effect
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

V, D = 30, 6
PAIRS = CounterfactualPairs([(0, 10), (1, 11), (2, 12), (3, 12)])


def logs(seed, *shape, sharp=2.0, dtype=torch.float64):
    z = sharp * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return z.log_softmax(-1)


def slow_ranks(values):
    return [1 + sum(other > value for other in values) for value in values]


def slow_rank_difference(z0, z):
    before, after = slow_ranks(z0), slow_ranks(z)
    return sum(p * abs(1 / a - 1 / b) for p, a, b in zip(z0, after, before, strict=True))


class TestDivergences:
    @given(st.integers(0, 50))
    def test_kl_is_that_of_scipy(self, seed):
        p, q = logs(seed), logs(seed + 1000)
        assert float(kl_divergence(p, q)) == pytest.approx(stats.entropy(p.exp(), q.exp()), rel=1e-10)
        assert float(entropy(p)) == pytest.approx(stats.entropy(p.exp()), rel=1e-10)

    def test_the_offset_of_the_authors(self):
        p, q = logs(1).exp().numpy(), logs(2).exp().numpy()
        expected = sum(a * (math.log(a + 1e-6) - math.log(b + 1e-6)) for a, b in zip(p, q, strict=True))
        found = kl_divergence(torch.tensor(p).log(), torch.tensor(q).log(), offset=1e-6)
        assert float(found) == pytest.approx(expected, rel=1e-12)

    def test_the_offset_hides_what_the_exact_one_sees(self):
        p = torch.tensor([0.5, 0.5]).log()
        q = torch.tensor([0.0, -60.0])
        assert float(kl_divergence(p, q)) == pytest.approx(-math.log(2) + 30, rel=1e-5)
        assert float(kl_divergence(p, q, offset=1e-6)) < 7

    def test_what_a_model_excludes(self):
        p, q = torch.tensor([0.0, 1.0]).log(), torch.tensor([0.5, 0.5]).log()
        assert float(kl_divergence(p, q)) == pytest.approx(math.log(2))
        assert float(kl_divergence(q, p)) == math.inf
        assert float(entropy(p)) == 0.0

    def test_off_target_kl_by_hand(self):
        p0, p = logs(3), logs(4)
        z0, z = ([float(x) for x in PAIRS.regroup(q.exp())] for q in (p0, p))
        expected = sum(a * math.log(a / b) for a, b in zip(z0, z, strict=True))
        assert float(off_target_kl(p0, p, PAIRS)) == pytest.approx(expected, rel=1e-10)
        with_offset = sum(a * (math.log(a + 1e-6) - math.log(b + 1e-6)) for a, b in zip(z0, z, strict=True))
        assert float(off_target_kl(p0, p, PAIRS, offset=1e-6)) == pytest.approx(with_offset, rel=1e-10)

    def test_a_negative_offset(self):
        with pytest.raises(RecipeError, match=r"kl_divergence\(offset=-1e-06\)"):
            kl_divergence(logs(0), logs(1), offset=-1e-6)


class TestRanks:
    @given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    def test_ties_share_the_best_rank(self, values):
        """Few distinct values, so that most are tied."""
        found = ranks(torch.tensor(values, dtype=torch.float64))
        assert found.tolist() == slow_ranks(values)
        assert found.tolist() == stats.rankdata([-v for v in values], method="min").tolist()

    def test_of_many_at_once(self):
        x = logs(0, 4, 3)
        assert torch.equal(ranks(x)[2, 1], ranks(x[2, 1]))
        assert torch.equal(ranks(torch.full((3,), -math.inf)), torch.ones(3, dtype=torch.long))

    @given(st.integers(0, 40))
    def test_rank_difference_is_the_slow_loop(self, seed):
        z0, z = logs(seed), logs(seed + 77)
        expected = slow_rank_difference(z0.exp().tolist(), z.exp().tolist())
        assert float(rank_difference(z0, z)) == pytest.approx(expected, abs=1e-12)
        assert float(rank_difference(z0, z0)) == 0.0

    def test_on_a_reduced_vocabulary(self):
        z0, z = logs(5), logs(6, 3)
        keep = torch.rand(V, generator=torch.Generator().manual_seed(1)) < 0.4
        inside = z0.exp()[keep] / z0.exp()[keep].sum()
        for row in range(3):
            expected = slow_rank_difference(inside.tolist(), z[row].exp()[keep].tolist())
            assert float(rank_difference(z0, z, keep=keep)[row]) == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(rank_difference(z0, z, keep=torch.ones(V, dtype=torch.bool)), rank_difference(z0, z))

    def test_another_vocabulary(self):
        with pytest.raises(IncompatibleModelError, match=r"keep has the shape \[4\] for 30 tokens"):
            rank_difference(logs(0), logs(1), keep=torch.ones(4, dtype=torch.bool))

    @pytest.mark.parametrize("mass", [0.3, 0.99, 0.999, 1.0])
    def test_tokens_that_cover(self, mass):
        z = logs(2, 4)
        union = set()
        for row in z.exp():
            total = 0.0
            for token in sorted(range(V), key=lambda t: -float(row[t])):
                if total >= mass - 1e-9:
                    break
                union.add(token)
                total += float(row[token])
        assert set(covering_tokens(z, mass=mass).nonzero().flatten().tolist()) == union

    @pytest.mark.parametrize("mass", [0.0, 1.5, -1.0])
    def test_masses_that_are_none(self, mass):
        with pytest.raises(RecipeError, match=rf"covering_tokens\(mass={mass}\)"):
            covering_tokens(logs(0, 2), mass=mass)


class TestOracle:
    @given(st.integers(0, 30), st.floats(0.001, 0.999))
    def test_the_oracle_has_no_side_effect(self, seed, w):
        log_p0 = logs(seed)
        scores = score_distributions(log_p0, PAIRS.log_resplit(log_p0, w), PAIRS)
        assert float(scores["off_target_kl"]) == pytest.approx(0.0, abs=1e-12)
        assert float(scores["target_prob"]) == pytest.approx(w, abs=1e-12)
        assert float(scores["pair_mass"]) == pytest.approx(float(PAIRS.pair_mass(log_p0.exp())), abs=1e-12)
        # Rounding may swap two entries of P^Z that are equal but for the last bit; random ones are not.
        assert float(scores["rank_difference"]) == 0.0

    def test_one_start_for_many_ends(self):
        log_p0, log_p = logs(1), logs(2, 5)
        scores = score_distributions(log_p0, log_p, PAIRS)
        assert set(scores) == set(SCORES[:7])
        for row in range(5):
            alone = score_distributions(log_p0, log_p[row], PAIRS)
            for name, values in scores.items():
                torch.testing.assert_close(values[row], alone[name])

    def test_a_start_for_each_end(self):
        log_p0, log_p = logs(1, 5), logs(2, 5)
        scores = score_distributions(log_p0, log_p, PAIRS)
        alone = score_distributions(log_p0[3], log_p[3], PAIRS)
        for name, values in scores.items():
            torch.testing.assert_close(values[3], alone[name])


def geometry(seed=0, **options):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SoftmaxGeometry(weight, **options)


class TestPath:
    def path(self, n=7):
        rng = torch.Generator().manual_seed(9)
        lam = torch.randn(D, generator=rng, dtype=torch.float64)
        beta = torch.randn(D, generator=rng, dtype=torch.float64)
        return lam + torch.linspace(0, 3, n, dtype=torch.float64)[:, None] * beta, beta

    def test_every_score_by_hand(self):
        family, (path, beta) = geometry(), self.path()
        hvps = torch.arange(7) * 10
        scores = score_path(family, path, PAIRS, probe=ConceptProbe(beta), hvps=hvps, offset=1e-6, mass=0.9, points=3)
        assert tuple(scores) == SCORES
        p = (path @ family.weight.T).softmax(-1)
        z = PAIRS.regroup(p)
        keep = covering_tokens(z[[0, 3, 6]].log(), mass=0.9)
        phi = p @ family.weight
        for i in range(7):
            expected = {
                "target_prob": float(p[i, 10:13].sum() / (p[i, 10:13].sum() + p[i, :4].sum())),
                "pair_mass": float(p[i, 10:13].sum() + p[i, :4].sum()),
                "off_target_kl": float((z[0] * ((z[0] + 1e-6).log() - (z[i] + 1e-6).log())).sum()),
                "rank_difference": slow_rank_difference((z[0][keep] / z[0][keep].sum()).tolist(), z[i][keep].tolist()),
                "rank_difference_full": slow_rank_difference(z[0].tolist(), z[i].tolist()),
                "total_kl": stats.entropy(p[0], p[i]),
                "entropy": stats.entropy(p[i]),
                "probe_value": float(path[i] @ beta),
                "hvps": 10.0 * i,
            }
            if i:
                expected["alignment"] = 1 - float(
                    np.float64(1) - torch.cosine_similarity(phi[i] - phi[i - 1], beta, dim=0)
                )
            for name, value in expected.items():
                assert float(scores[name][i]) == pytest.approx(value, abs=1e-11), name
        assert math.isnan(float(scores["alignment"][0]))

    def test_without_a_probe(self):
        path, _ = self.path()
        scores = score_path(geometry(), path.float(), PAIRS)
        for name in ("probe_value", "alignment", "hvps"):
            assert bool(scores[name].isnan().all())
        assert all(values.dtype == torch.float64 for values in scores.values())
        assert float(scores["off_target_kl"][0]) == pytest.approx(0.0, abs=1e-7)

    def test_pieces_give_the_same(self, monkeypatch):
        path, beta = self.path(9)
        whole = score_path(geometry(), path, PAIRS, probe=beta)
        monkeypatch.setattr(SoftmaxGeometry, "max_rows", 2)
        pieces = score_path(geometry(), path, PAIRS, probe=beta)
        for name in SCORES:
            torch.testing.assert_close(pieces[name], whole[name], equal_nan=True)

    def test_a_capped_model_is_scored_as_it_is(self):
        path, beta = self.path()
        family = geometry(softcap=2.0, on_softcap="pullback")
        scores = score_path(family, path, PAIRS, probe=beta)
        p = (2 * torch.tanh(path @ family.weight.T / 2)).softmax(-1)
        torch.testing.assert_close(scores["target_prob"], PAIRS.target_prob(p))
        assert bool(scores["alignment"].isnan().all())  # a capped head has no dual coordinate

    def test_a_path_of_one_point(self):
        path, beta = self.path()
        scores = score_path(geometry(), path[:1], PAIRS, probe=beta)
        assert float(scores["rank_difference"]) == 0.0

    def test_paths_that_are_none(self):
        with pytest.raises(IncompatibleModelError, match=r"score_path\(\) got a path of shape \[6\]"):
            score_path(geometry(), torch.ones(6, dtype=torch.float64), PAIRS)
        with pytest.raises(IncompatibleModelError, match=r"width 6, but got \[2, 5\]"):
            score_path(geometry(), torch.ones(2, 5, dtype=torch.float64), PAIRS)
        with pytest.raises(IncompatibleModelError, match=r"width 6, but got \[4\]"):
            score_path(geometry(), torch.ones(2, 6, dtype=torch.float64), PAIRS, probe=torch.ones(4))

    def test_a_step_that_moves_nothing(self):
        found = dual_alignment(torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 0.0]))
        assert math.isnan(float(found[0]))
        assert float(found[1]) == 1.0


class TestClosedForm:
    """Pairs zeta_i +- e0/2 with zeta_i.e1 = 1: along e0, with -log cosh along e1, nothing but the concept changes."""

    def family(self):
        rng = torch.Generator().manual_seed(3)
        n = 5
        zeta, neutral = (torch.randn(k, D, generator=rng, dtype=torch.float64) for k in (n, 9))
        zeta[:, 0], zeta[:, 1], neutral[:, :2] = 0.0, 1.0, 0.0
        half = torch.eye(D, dtype=torch.float64)[0] / 2
        pairs = CounterfactualPairs([(i, n + i) for i in range(n)])
        return SoftmaxGeometry(torch.cat([zeta - half, zeta + half, neutral])), pairs

    def test_the_exact_optimum_has_no_side_effect_and_euclid_leaks(self):
        family, pairs = self.family()
        lam0 = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        lam0[0], lam0[1] = -6.0, 1.0
        e0, e1 = torch.eye(D, dtype=torch.float64)[:2]
        s = torch.linspace(-6, 6, 25, dtype=torch.float64)
        straight = lam0 + (s + 6)[:, None] * e0
        best = straight - (torch.cosh(s / 2) / math.cosh(-3)).log()[:, None] * e1
        exact = score_path(family, best, pairs, probe=e0)
        euclid = score_path(family, straight, pairs, probe=e0)
        torch.testing.assert_close(exact["off_target_kl"], torch.zeros(25, dtype=torch.float64), atol=1e-12, rtol=0)
        assert float(exact["rank_difference_full"].max()) == 0.0
        assert float(exact["pair_mass"].max() - exact["pair_mass"].min()) < 1e-12
        for scores in (exact, euclid):
            torch.testing.assert_close(scores["target_prob"], torch.sigmoid(s))
            torch.testing.assert_close(scores["probe_value"], s)
        assert float(euclid["pair_mass"][12]) < float(euclid["pair_mass"][0]) - 0.01  # the leak, and its way back
        assert float(euclid["pair_mass"][24]) == pytest.approx(float(euclid["pair_mass"][0]), abs=1e-10)
        assert float(euclid["off_target_kl"][12]) > 1e-3


class TestBins:
    def test_by_hand(self):
        x = torch.tensor([0.02, 0.05, 0.15, 0.18, 0.95, 0.9999, 1.0], dtype=torch.float64)
        y = torch.arange(7.0)
        found = bin_path(x, y)
        assert found[[0, 1, 2, 10]].tolist() == [0.0, 1.0, 2.5, 4.0]
        assert bool(found[3:10].isnan().all())

    def test_edges(self):
        x, y = torch.tensor([0.0, 0.0, 0.1, 0.2, 0.99]), torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0])
        assert bin_path(x, y, bins=10)[[0, 1, 2, 3, 10]].tolist() == [9.0, 1.0, 2.0, 3.0, 4.0]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 12))
    def test_the_slow_loop(self, x, bins):
        y = [i * 1.0 for i in range(len(x))]
        found = bin_path(torch.tensor(x, dtype=torch.float64), torch.tensor(y), bins=bins)
        for b in range(bins):
            inside = [y[i] for i in range(1, len(x)) if x[i] < 0.9999 and min(int(x[i] * bins), bins - 1) == b]
            if inside:
                assert float(found[1 + b]) == pytest.approx(sum(inside) / len(inside))
            else:
                assert math.isnan(float(found[1 + b]))

    def test_nothing_is_known(self):
        assert bool(bin_path(torch.tensor([1.0, 1.0]), torch.ones(2)).isnan().all())
        assert bool(bin_path(torch.tensor([0.1, 0.2]), torch.full((2,), math.nan)).isnan().all())

    def test_no_bins(self):
        with pytest.raises(RecipeError, match=r"bin_path\(bins=0\)"):
            bin_path(torch.ones(1), torch.ones(1), bins=0)


class TestEffects:
    @pytest.mark.parametrize(
        ("x", "at", "expected"),
        [
            ([0.1, 0.3, 0.9], 0.6, 1.5),
            ([0.1, 0.3, 0.9], 0.3, 1.0),
            ([0.1, 0.3, 0.9], 0.1, 0.0),
            ([0.1, 0.3, 0.9], 0.05, math.nan),
            ([0.1, 0.3, 0.9], 0.95, math.nan),
            ([0.1, 0.5, 0.2, 0.9], 0.3, 0.5),  # the first crossing
            ([0.5, 0.2, 0.6], 0.55, 1.875),
            ([0.2], 0.2, 0.0),
            ([], 0.2, math.nan),
        ],
    )
    def test_the_first_rise_counts(self, x, at, expected):
        found = value_at_effect(torch.tensor(x, dtype=torch.float64), torch.arange(len(x)), at)
        assert found == pytest.approx(expected, nan_ok=True)

    def result(self):
        rng = np.random.default_rng(0)
        x = torch.linspace(0.02, 0.98, 30, dtype=torch.float64)
        paths = {"euclidean": {}, "dual": {}}
        for context in range(12):
            slope = float(rng.uniform(0.5, 1.5))
            paths["dual"][context] = {"target_prob": x, "off_target_kl": slope * x}
            paths["euclidean"][context] = {"target_prob": x[::3], "off_target_kl": 3 * slope * x[::3]}
        paths["dual"][99] = {"target_prob": x[:5], "off_target_kl": x[:5]}  # never gets far
        return PathScores(paths)

    def test_methods_at_equal_effect(self):
        result = self.result()
        found = result.compare("euclidean", "dual", "off_target_kl", at=0.5)
        assert found.ratio.value == pytest.approx(3.0, abs=1e-9)
        assert (found.ratio.low, found.ratio.high) == (pytest.approx(3.0, abs=1e-9), pytest.approx(3.0, abs=1e-9))
        assert found.difference.value == pytest.approx(2 * found.second.value)
        assert (found.first.n, found.left_out) == (12, 1)
        assert found.difference.high - found.difference.low < found.first.high - found.first.low  # paired
        assert found.to_dict()["ratio"]["n"] == 12
        early = result.at("dual", "off_target_kl", 0.1)
        assert early.n == 13
        assert early.value == pytest.approx(
            np.mean([0.1 * result.paths["dual"][c]["off_target_kl"][-1] / 0.98 for c in range(12)] + [0.1])
        )

    def test_curves_average_within_then_over_contexts(self):
        result = self.result()
        curve = result.curve("dual", "off_target_kl")
        assert curve.start.value == pytest.approx(0.02)
        assert curve.first.n == 13
        assert [e.n for e in curve.bins] == [13, 13, *([12] * 8)]
        table = [bin_path(p["target_prob"], p["off_target_kl"]) for p in result.paths["dual"].values()]
        assert curve.bins[4].value == pytest.approx(np.nanmean([float(row[5]) for row in table]))
        assert curve.bins[4].low < curve.bins[4].value < curve.bins[4].high
        assert curve.centres == pytest.approx([0.05 + 0.1 * i for i in range(10)])
        assert len(curve.points()) == 11
        short = PathScores({"dual": {99: result.paths["dual"][99]}}).curve("dual", "off_target_kl")
        assert [e.n for e in short.bins] == [1, 1, *([0] * 8)]
        assert len(short.points()) == 3
        assert math.isnan(short.bins[0].low)

    def test_rows_round_trip(self):
        result = self.result()
        again = PathScores.from_rows(result.rows())
        assert again.methods == result.methods
        for method, contexts in result.paths.items():
            for context, path in contexts.items():
                for name, values in path.items():
                    assert torch.equal(again.paths[method][context][name], values)
        table = result.table(["off_target_kl"])
        assert len(table) == sum(len(result.curve(method, "off_target_kl").points()) for method in result.methods)
        assert (table[0]["method"], table[0]["interval"], table[0]["n"]) == ("euclidean", "bootstrap", 12)

    def test_what_is_not_known_survives_a_csv(self):
        path = {"target_prob": torch.tensor([0.1, 0.9]), "alignment": torch.tensor([math.nan, 0.5])}
        rows = PathScores({"dual": {3: path}}).rows()
        assert rows[0] == {
            "method": "dual",
            "context": 3,
            "point": 0,
            "target_prob": pytest.approx(0.1),
            "alignment": None,
        }
        texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in reversed(rows)]
        again = PathScores.from_rows(texts)
        torch.testing.assert_close(again.paths["dual"][3]["alignment"], path["alignment"].double(), equal_nan=True)

    def test_errors(self):
        result = self.result()
        with pytest.raises(
            RecipeError, match=r"no score 'entropy' of method 'dual'\. Methods: euclidean, dual; scores: target"
        ):
            result.curve("dual", "entropy")
        with pytest.raises(RecipeError, match="of method 'oracle'"):
            result.compare("oracle", "dual", "off_target_kl", at=0.5)
        for at in (0.0, 1.0, math.nan):
            with pytest.raises(RecipeError, match=rf"P\(W=1\) = {at} cannot be matched"):
                result.at("dual", "off_target_kl", at)
        with pytest.raises(DataError, match=r"no path for any of the methods \['dual'\]"):
            PathScores({"dual": {}})
        with pytest.raises(
            DataError, match=r"method 'dual' in context 4 has no target_prob \[n\], n >= 1, only entropy"
        ):
            PathScores({"dual": {4: {"entropy": torch.ones(2)}}})
        with pytest.raises(DataError, match=r"context 4 has entropy of shape \[2\] beside target_prob of \[3\]"):
            PathScores({"dual": {4: {"target_prob": torch.ones(3), "entropy": torch.ones(2)}}})
        with pytest.raises(DataError, match=r"A row is .*'method': 'dual'.*expected method, context and point"):
            PathScores.from_rows([{"method": "dual", "point": 0}])


class TestTextQuality:
    def test_perplexity_by_hand(self):
        rng = torch.Generator().manual_seed(0)
        logits, ids = torch.randn(3, 5, 7, generator=rng), torch.randint(0, 7, (3, 5), generator=rng)
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
        found = perplexity(logits, ids, mask)
        for row in range(2):
            nll = [-float(logits[row, t - 1].log_softmax(-1)[ids[row, t]]) for t in range(1, 5) if bool(mask[row, t])]
            assert float(found[row]) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
        assert math.isnan(float(found[2]))
        torch.testing.assert_close(perplexity(logits, ids)[0], found[0])
        assert perplexity(logits.bfloat16(), ids).dtype == torch.float32

    def test_padding_may_hold_any_id(self):
        ids = torch.tensor([[-100, 1, 2]])
        mask = torch.tensor([[False, False, True]])
        assert float(perplexity(torch.zeros(1, 3, 8), ids, mask)) == pytest.approx(8.0)

    @pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 2)), ((2, 3, 4), (2, 3), (2, 2))])
    def test_shapes_that_do_not_fit(self, shapes):
        logits, ids, *mask = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(IncompatibleModelError, match=r"perplexity\(\) got shapes \[\[2, 3"):
            perplexity(logits, ids.long(), *mask)

    @given(st.lists(st.integers(0, 3), max_size=25), st.integers(1, 4))
    def test_repeated_share_is_the_slow_loop(self, text, n):
        seen, again, total = set(), 0, 0
        for i in range(len(text) - n + 1):
            gram = tuple(text[i : i + n])
            again, total = again + (gram in seen), total + 1
            seen.add(gram)
        found = repeated_share(text, n)
        assert found == (pytest.approx(again / total) if total else pytest.approx(math.nan, nan_ok=True))

    def test_distinct_counts_over_all_texts(self):
        assert distinct_n([[1, 2, 3], [1, 2, 3]], 1) == 0.5
        assert distinct_n([["a", "b"], ["b", "a"]], 2) == 1.0
        assert math.isnan(distinct_n([[1]], 2))

    @given(
        st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(2, 5)
    )
    def test_a_loop_at_the_end_is_found(self, start, piece, times):
        period = loop_period(start + piece * times, times=times)
        assert 0 < period <= len(piece)
        text = start + piece * times
        assert all(text[-i] == text[-i - period] for i in range(1, period * (times - 1) + 1))

    @given(st.permutations(range(12)))
    def test_no_loop_without_repetition(self, text):
        assert loop_period(text) == 0

    def test_a_summary_has_intervals_over_texts(self):
        found = repetition([[1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [4]])
        assert found["distinct_1"].n == 3
        assert found["repeated_4"].n == 2
        assert (found["looping"].value, found["looping"].n, found["looping"].method) == (0.5, 2, "wilson")
        assert repetition([])["looping"].n == 0

    def test_lengths_that_are_none(self):
        with pytest.raises(RecipeError, match="n-grams of length 0"):
            distinct_n([[1]], 0)
        with pytest.raises(RecipeError, match="n-grams of length -1"):
            repeated_share([1], -1)
        with pytest.raises(RecipeError, match=r"loop_period\(times=1\)"):
            loop_period([1], times=1)
