"""What became of a chain: detectors on fixtures, intervals against slow references, and what is not said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.cycles import (
    Chain,
    Checkpoint,
    Verdict,
    chain_numbers,
    chain_trajectory,
    late_change,
    paired_difference,
    prefix_slope,
    retention,
    slope,
)
from lightning_interp.errors import DataError

DRAWS = np.random.default_rng(11)

# Scores of seven cycles, last minus first, highest late change from cycle 0 and from cycle 1, mean prefix slope.
FIXTURES = [
    ([40] * 7, 0, 0, 0, 0),
    ([40, 38, 36, 34, 32, 30, 28], -12, -8, -6, -2),
    ([40, 42, 44, 46, 48, 50, 52], 12, 12, 10, 2),
    ([40, 38, 36, 34, 32, 30, 60], 20, 20, 22, -1.4286),
    ([40, 45, 50, 55, 60, 65, 70], 30, 30, 25, 5),
    ([20, 60, 50, 45, 40, 38, 36], 16, 20, -20, 10.75),
]


def checkpoint(mean, *, questions=4, samples=5, spread=0.0, coherence=None, seed=0):
    """An evaluation whose responses lie about a mean."""
    noise = np.random.default_rng(seed).normal(size=(questions, samples)) * spread
    noise -= noise.mean()
    about = {} if coherence is None else {"coherence": (coherence + 0 * noise).tolist()}
    return Checkpoint.of({"scores": (mean + noise).tolist(), **about})


def chain(scores, *, base=None, again=None, coherence=None, base_coherence=None, **how):
    several = [None] * len(scores) if coherence is None else coherence
    return Chain(
        "arm",
        [checkpoint(s, coherence=c, seed=k, **how) for k, (s, c) in enumerate(zip(scores, several, strict=True))],
        base=None if base is None else checkpoint(base, coherence=base_coherence, seed=90, **how),
        again=None if again is None else checkpoint(again, seed=91, **how),
    )


class TestDetectors:
    @pytest.mark.parametrize(("scores", "last", "late0", "late1", "prefix"), FIXTURES)
    def test_fixtures(self, scores, last, late0, late1, prefix):
        assert scores[-1] - scores[0] == last
        assert [float(late_change(scores, anchor=a)[0]) for a in (0, 1)] == [late0, late1]
        assert float(prefix_slope(scores)) == pytest.approx(prefix, abs=5e-5)

    @pytest.mark.parametrize(("row", "wanted"), [(3, 1.4286), (5, -0.2143)])
    def test_slopes_of_the_two_that_detectors_disagree_on(self, row, wanted):
        assert float(slope(FIXTURES[row][0], first=0)) == pytest.approx(wanted, abs=5e-5)

    def test_prefix_slope_is_the_mean_of_scipys(self):
        y = DRAWS.normal(size=(3, 6))
        wanted = [np.mean([stats.linregress(np.arange(m), row[:m]).slope for m in range(2, 7)]) for row in y]
        assert prefix_slope(y) == pytest.approx(wanted)
        assert np.isnan(prefix_slope([3.0]))

    @given(arrays(np.float64, (2, 6), elements=st.floats(0, 100, width=32)), st.floats(0, 4), st.floats(-50, 50))
    def test_shift_and_scale(self, y, scale, shift):
        moved = scale * y + shift
        assert prefix_slope(moved) == pytest.approx(scale * prefix_slope(y), abs=1e-9)
        for one, other in zip(late_change(y), late_change(moved), strict=True):
            assert other == pytest.approx(scale * one, abs=1e-9)

    def test_under_five_cycles_nothing_is_late(self):
        assert late_change([40, 50, 60, 90]) is None
        found = chain_trajectory(chain([40, 50, 60, 90], spread=3))
        assert found.verdicts == {0: None, 1: None}
        assert not [name for name in found.numbers if name.startswith("late")]

    def test_retention(self):
        assert retention([[50, 30, 10]], [10.0]).tolist() == [[1, 0.5, 0]]
        assert np.isnan(retention([10, 20], 10)).all()


class TestVerdict:
    @pytest.mark.parametrize(
        ("scores", "names"),
        [
            (FIXTURES[0][0], ("constant", "constant")),
            (FIXTURES[3][0], ("amplified", "amplified")),
            (FIXTURES[4][0], ("amplified", "amplified")),
            (FIXTURES[5][0], ("amplified", "decayed")),
            ([50, 50, 50, 50, 70, 0, 0], ("unstable", "unstable")),
        ],
    )
    def test_of_each_anchor(self, scores, names):
        found = chain_trajectory(chain(scores), resamples=50)
        assert tuple(found.verdicts[a].name for a in (0, 1)) == names
        assert found.verdicts[0].settled

    def test_is_not_settled_where_an_interval_reaches_the_threshold(self):
        scores = [40, 40, 40, 40, 56]
        wide = chain_trajectory(chain(scores, spread=25)).verdicts[1]
        narrow = chain_trajectory(chain(scores, spread=0.1)).verdicts[1]
        assert (wide.name, wide.settled) == ("amplified", False)
        assert (narrow.name, narrow.settled) == ("amplified", True)
        assert "do not exclude it; 4 questions, 20 responses a cycle, 1 chain" in wide.text()
        assert "amplified against cycle 1 (late maximum 16.00 [" in wide.text()

    def test_rests_on_the_cycle_with_the_fewest_scores(self):
        holes = Checkpoint.of({"scores": [[None, 40, 40, 40, 40], *[[40] * 5] * 3]})
        found = chain_trajectory(Chain("arm", [*(checkpoint(40) for _ in range(4)), holes]), resamples=20)
        assert found.verdicts[1].responses == 19

    def test_is_never_settled_on_one_question(self):
        found = chain_trajectory(chain(FIXTURES[4][0], questions=1, spread=1)).verdicts[1]
        assert math.isnan(found.highest.low)
        assert not found.settled

    def test_boundaries_belong_to_change(self):
        def at(highest, mean):
            exact = [Estimate(x, x, x, 3, 0.95, "") for x in (highest, mean)]
            return Verdict(1, *exact, 15.0, None, 3, 9)

        assert [at(*x).name for x in ((15, 0), (14.9, -14.9), (0, -15), (15, -15))] == [
            "amplified", "constant", "decayed", "unstable",
        ]  # fmt: skip
        assert not at(15, 0).settled

    @pytest.mark.parametrize(("there", "coherently"), [(90, True), (80, True), (79, False)])
    def test_amplified_coherently(self, there, coherently):
        scores, coherence = [20, 20, 20, 20, 60, 30], [90, 90, 90, 90, there, 10]
        found = chain_trajectory(chain(scores, base=5, coherence=coherence, base_coherence=90), resamples=50)
        assert found.verdicts[1].amplified_coherently is coherently
        assert found.numbers["coherence_cost_1"].value == there - 90
        constant = chain_trajectory(chain([20] * 6, base=5, coherence=coherence, base_coherence=90), resamples=50)
        assert constant.verdicts[1].amplified_coherently is False

    def test_without_coherence_of_the_base_it_is_not_known(self):
        found = chain_trajectory(chain([20, 20, 20, 20, 60], coherence=[90] * 5), resamples=50)
        assert found.verdicts[1].amplified_coherently is None

    def test_a_cycle_without_a_score_has_none(self):
        empty = Checkpoint.of({"scores": [[None] * 5] * 4})
        found = chain_trajectory(Chain("arm", [*(checkpoint(40) for _ in range(5)), empty]), resamples=50)
        assert found.verdicts == {0: None, 1: None}
        assert math.isnan(found.numbers["slope"].value)
        assert math.isnan(found.scores[-1].low)


class TestIntervals:
    def test_are_wider_where_responses_of_a_question_are_alike(self):
        """Twelve questions of twenty copies are twelve observations, not 240."""
        per_question = DRAWS.uniform(0, 100, size=(12, 1))
        found = chain_trajectory(
            Chain("arm", [Checkpoint.of({"scores": np.repeat(per_question, 20, axis=1).tolist()})])
        )
        naive = 2 * 1.96 * np.repeat(per_question, 20).std(ddof=1) / math.sqrt(240)
        width = found.scores[0].high - found.scores[0].low
        assert width > 3 * naive
        assert width == pytest.approx(2 * 1.96 * per_question.std() / math.sqrt(12), rel=0.1)

    def test_differences_are_paired_by_question(self):
        """Questions differ by far more than what every one of them gains."""
        hard = DRAWS.uniform(0, 90, size=(12, 6))
        found = chain_trajectory(Chain("arm", [Checkpoint.of({"scores": (hard + 5 * k).tolist()}) for k in range(3)]))
        assert found.scores[2].high - found.scores[2].low > 10
        change = found.from_start[2]
        assert (change.value, change.low, change.high) == pytest.approx((10, 10, 10))
        assert found.numbers["slope"].low == pytest.approx(5)

    def test_a_paired_difference_against_a_slow_loop(self):
        one, two = DRAWS.uniform(0, 100, size=(2, 6, 4))
        checkpoints = [Checkpoint.of({"scores": x.tolist()}) for x in (one, two)]
        change = chain_trajectory(Chain("arm", checkpoints)).from_start[1]
        random, spread = np.random.default_rng(0), []
        for _ in range(3000):
            drawn = [(q, i) for q in random.integers(0, 6, 6) for i in random.integers(0, 4, 4)]
            spread.append(np.mean([two[cell] - one[cell] for cell in drawn]))
        wanted = np.quantile(spread, [0.025, 0.975])
        assert (change.low, change.high) == pytest.approx(wanted, abs=0.1 * np.ptp(wanted))
        assert paired_difference(*reversed(checkpoints)) == change

    def test_a_difference_of_other_questions(self):
        with pytest.raises(DataError, match=r"shape \[4, 5\] and \[3, 5\]"):
            paired_difference(checkpoint(4, questions=3), checkpoint(4))

    @settings(max_examples=20)
    @given(st.permutations(range(5)), st.integers(0, 2**32 - 1))
    def test_the_order_of_questions_changes_no_estimate(self, order, seed):
        tables = np.random.default_rng(seed).uniform(0, 100, size=(6, 5, 3))
        one, other = (
            chain_trajectory(Chain("arm", [Checkpoint.of({"scores": x[rows].tolist()}) for x in tables]), resamples=20)
            for rows in (list(range(5)), list(order))
        )
        for name, number in one.numbers.items():
            assert other.numbers[name].value == pytest.approx(number.value)
        assert [x.value for x in other.scores] == pytest.approx([x.value for x in one.scores])

    def test_cover_the_truth_of_new_questions(self):
        hits = 0
        for _ in range(150):
            table = DRAWS.normal(50, 10, size=(20, 1)) + DRAWS.normal(0, 20, size=(20, 5))
            found = chain_trajectory(Chain("arm", [Checkpoint.of({"scores": table.tolist()})]), resamples=300).scores[0]
            hits += found.low <= 50 <= found.high
        assert hits / 150 > 0.88

    def test_the_same_model_scores_the_same_and_moves_by_exactly_nothing(self):
        found = chain_trajectory(Chain("arm", [checkpoint(100 / 3, spread=20)] * 6))
        assert {(x.value, x.low, x.high) for x in found.from_start} == {(0.0, 0.0, 0.0)}
        assert found.numbers["slope"] == Estimate(0.0, 0.0, 0.0, 4, 0.95, "bootstrap over questions")
        assert found.noise_ratio == 0


class TestChain:
    def test_numbers_of_many_chains_at_once_are_those_of_each(self):
        scores, coherence = DRAWS.uniform(0, 100, size=(2, 3, 6))
        bases = DRAWS.uniform(0, 5, size=(2, 3))
        together = chain_numbers(scores, coherence, *bases)
        for i in range(3):
            alone = chain_numbers(scores[i], coherence[i], bases[0, i], bases[1, i])
            assert together.keys() == alone.keys()
            for name, number in alone.items():
                assert together[name][i] == pytest.approx(float(number)), name
        at = 4 + scores[:, 4:].argmax(axis=1)
        assert together["coherence_cost_0"] == pytest.approx([coherence[i, at[i]] - coherence[i, 0] for i in range(3)])
        wanted = [stats.linregress(scores[i], coherence[i]).slope for i in range(3)]
        assert together["coherence_on_score"] == pytest.approx(wanted)

    def test_noise_of_a_constant_chain_of_responses(self):
        """Questions are fixed, and differ; only the responses to them are drawn anew."""
        question = DRAWS.uniform(20, 80, size=(12, 1))
        cycles = [
            Checkpoint.of({"scores": (question + DRAWS.normal(0, 15, size=(12, 8))).tolist()}) for _ in range(400)
        ]
        found = chain_trajectory(Chain("arm", cycles), resamples=10)
        assert found.noise_ratio == pytest.approx(1, abs=0.1)
        assert np.mean([each.error for each in cycles]) == pytest.approx(15 / math.sqrt(96), rel=0.05)

    def test_the_model_evaluated_again_gives_the_floor_of_noise(self):
        assert chain_trajectory(chain([40, 50], again=43), resamples=50).floor.value == pytest.approx(3)
        assert chain_trajectory(chain([40, 50]), resamples=50).floor is None

    def test_retention_needs_an_effect_of_the_seed(self):
        clear = chain_trajectory(chain([60, 40], base=20, spread=1)).retention
        assert [each.value for each in clear] == pytest.approx([1, 0.5])
        assert clear[1].low < 0.5 < clear[1].high
        unclear = chain_trajectory(chain([60, 40], base=59, spread=30))
        assert all(math.isnan(each.value) for each in unclear.retention)
        assert math.isnan(unclear.numbers["retention"].value)
        exact = chain_trajectory(chain([60, 40], base=20, questions=1, samples=1)).retention
        assert exact[1].value == pytest.approx(0.5)


class TestCheckpoint:
    def test_reads_a_summary(self):
        found = Checkpoint.of(
            {
                "scores": [[80, None], [60, 70]], "coherence": [[90, 80], [None, 100]], "distinct_2": 0.7,
                "statuses": [["ok", "refusal"], ["ok", "ok"]], "perplexity": 12.0, "more": object(),
            }
        )  # fmt: skip
        assert (found.score, found.responses, found.distinct_2, found.perplexity) == (70.0, 3, 0.7, 12.0)
        assert found.statuses == {"ok": 3, "refusal": 1}
        assert found.coherence is not None
        assert Checkpoint.of({"scores": [[1.0]], "statuses": {"ok": 1}}).statuses == {"ok": 1}

    def test_coherence_that_no_response_has_is_none(self):
        assert Checkpoint.of({"scores": [[1.0, 2.0]], "coherence": [[None, None]]}).coherence is None

    def test_the_error_with_fixed_questions(self):
        table = DRAWS.normal(size=(3, 4))
        wanted = math.sqrt((table.var(axis=1, ddof=1) / 4).sum()) / 3
        assert Checkpoint.of({"scores": table.tolist()}).error == pytest.approx(wanted)
        assert math.isnan(Checkpoint.of({"scores": [[1.0], [2.0]]}).error)
        assert math.isnan(Checkpoint.of({"scores": [[None, None]]}).error)

    @pytest.mark.parametrize("scores", [[], [[]], None, [[1], [1, 2]]])
    def test_ragged_or_empty(self, scores):
        with pytest.raises(DataError, match=r"scores of an evaluation: expected lists of one length, at least 1, got"):
            Checkpoint.of({"scores": scores})

    def test_values(self):
        with pytest.raises(DataError, match=r"scores of an evaluation: expected numbers and None, got .*'high'"):
            Checkpoint.of({"scores": [["high"]]})
        with pytest.raises(DataError, match=r"infinite value among \[\[inf\]\]"):
            Checkpoint.of({"scores": [[math.inf]]})
        with pytest.raises(DataError, match=r"coherence of shape \[1, 2\] beside scores of \[1, 1\]"):
            Checkpoint.of({"scores": [[1]], "coherence": [[1, 2]]})

    def test_a_chain_is_of_the_same_questions(self):
        one, other = checkpoint(4), checkpoint(4, questions=3)
        with pytest.raises(DataError, match=r"Chain 'arm' '7' has evaluations of shape \[4, 5\] and \[3, 5\]"):
            Chain("arm", [one], base=other, name="7")
        with pytest.raises(DataError, match=r"Chain 'arm' '0' has no checkpoint"):
            Chain("arm", [])
