"""Tables, figures and sentences of chains: numbers against NumPy and SciPy, and nothing said that is not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_interp.cycles import Arm, Chain, ChainReport, Checkpoint
from lightning_interp.figures import png

DRAWS = np.random.default_rng(2)


def checkpoint(mean, *, spread=4.0, coherence=None, distinct_2=None, seed=0, missing=0):
    noise = np.random.default_rng(seed).normal(size=(6, 4)) * spread
    scores = (mean + noise - noise.mean()).tolist()
    for i in range(missing):
        scores[0][i] = None
    summary = {"scores": scores, "distinct_2": distinct_2, "statuses": {"ok": 24 - missing, "refusal": missing}}
    if coherence is not None:
        summary["coherence"] = [[coherence] * 4] * 6
    return Checkpoint.of(summary)


def chain(arm, scores, *, coherence=None, **how):
    checkpoints = [
        checkpoint(score, seed=k, coherence=None if coherence is None else coherence[k], distinct_2=0.9 - 0.1 * k)
        for k, score in enumerate(scores)
    ]
    return Chain(arm, checkpoints, **{"base": checkpoint(5.0, seed=50, coherence=90.0, distinct_2=0.95)} | how)


RISING = [20.0, 22.0, 30.0, 40.0, 50.0, 61.0]
FALLING = [20.0, 9.0, 6.0, 5.0, 5.0, 4.0]


@pytest.fixture(scope="module")
def single():
    """A chain an arm: a continual one that rises, its reinit twin that falls, and three more controls."""
    return ChainReport(
        [
            chain("DPO continual", RISING, coherence=[90, 90, 88, 80, 70, 60], again=checkpoint(23.0, seed=9)),
            chain("DPO reinit", FALLING, control="reinit twin", of="DPO continual"),
            chain("no seed", [5.0] * 6, control="no seed", of="none of them"),
            chain("base writes", [20.0, 5.0, 5.0, 5.0, 5.0, 5.0], control="shuffled generator", of="none of them"),
            chain("swapped", FALLING, control="swapped pairs", of="none of them"),
        ],
        trait="luck",
        resamples=300,
    )


@pytest.fixture(scope="module")
def several():
    """Three chains of two arms, paired by name."""
    chains = []
    for name in "abc":
        up = np.array(RISING) + DRAWS.normal(size=6)
        chains.append(chain("continual", up.tolist(), name=name))
        chains.append(chain("reinit", FALLING, name=name, control="reinit twin", of="continual"))
    return ChainReport(chains, resamples=100)


class TestSingle:
    def test_a_row_a_cycle(self, single):
        rows = [row for row in single.tables()["chains"] if row["arm"] == "DPO continual"]
        assert [row["cycle"] for row in rows] == [0, 1, 2, 3, 4, 5, "base"]
        assert [row["score"] for row in rows] == pytest.approx([*RISING, 5])
        assert all(row["score_low"] < row["score"] < row["score_high"] for row in rows[:-1])
        assert [row["change"] for row in rows[:-1]] == pytest.approx([s - 20 for s in RISING])
        assert [row["retention"] for row in rows[:-1]] == pytest.approx([(s - 5) / 15 for s in RISING])
        assert [row["coherence"] for row in rows[:-1]] == [90, 90, 88, 80, 70, 60]
        assert (rows[0]["questions"], rows[0]["responses"], rows[0]["missing"]) == (6, 24, 0)
        assert rows[2]["distinct_2"] == pytest.approx(0.7)

    def test_a_row_an_arm(self, single):
        row, *others = single.tables()["arms"]
        assert (row["chains"], row["cycles"], row["interval over"], row["n"]) == (1, 6, "questions", 6)
        assert (row["class_1"], row["class_0"], row["settled_1"]) == ("amplified", "amplified", True)
        assert row["chains_by_class_1"] == "1 amplified"
        assert row["amplified_coherently_1"] is False
        assert row["coherence_cost_1"].startswith("-30.00 [")
        assert row["late_max_1"].startswith("39.00 [")
        assert row["noise_floor"].startswith("3.00 [")
        assert (row["steps"], row["control"]) == (5, None)
        wanted = stats.linregress(RISING[:-1], RISING[1:])
        assert row["gain"] == f"{wanted.slope:.2f}"
        assert row["fixed_point"] == pytest.approx(wanted.intercept / (1 - wanted.slope))
        assert [other["control"] for other in others] == [
            "reinit twin", "no seed", "shuffled generator", "swapped pairs",
        ]  # fmt: skip
        assert others[0]["class_1"] == "constant"

    def test_sentences_have_direction_size_interval_and_unit(self, single):
        rise, *controls, floor = single.findings()
        assert "DPO continual: the score of luck goes from 20.00 [" in rise
        assert "a change of 41.00 [" in rise
        assert "(it rises; interval over questions; 1 chain, 6 questions, 24 responses a cycle)" in rise
        assert "amplified against cycle 1, which the intervals settle." in rise
        assert "Coherence at the highest late score, minus that of cycle 1: -30.00 [" in rise
        assert "Control DPO reinit (a reinit twin of a continual chain): the score changes by -16.00 [" in controls[0]
        assert "it falls" in controls[0]
        assert "DPO continual minus DPO reinit at cycle 5, paired: 57.00 [" in controls[1]
        assert "(interval over 6 questions of one pair)" in controls[1]
        assert "its interval has 0 in it" in controls[2]
        assert "differs by 3.00 [" in floor

    def test_a_paired_difference_is_over_the_same_questions(self, single):
        one, other = (single.arms[name].chains[0].checkpoints[5].scores for name in ("DPO continual", "DPO reinit"))
        assert "57.00 [57.00, 57.00]" in single.findings()[2], "the same noise at every cycle of one number"
        assert one - other == pytest.approx(57)

    def test_caveats(self, single):
        said = " ".join(single.caveats())
        assert "The threshold of 15 points is a convention and no test" in said
        assert "One chain of DPO continual, DPO reinit, no seed" in said
        assert "not run" not in said
        assert "have no score" not in said

    def test_metrics_are_plain(self, single):
        found = single.metrics()["DPO continual"]
        assert found["scores"][0]["value"] == pytest.approx(20)
        assert (found["class_1"], found["settled_1"], found["slope"]["n"]) == ("amplified", True, 6)


class TestSeveral:
    def test_intervals_are_students_over_chains(self, several):
        arm = several.arms["continual"]
        ends = np.array([each.scores[-1] for each in arm.chains])
        found = arm.by_cycle("scores")[-1]
        reach = stats.t.ppf(0.975, 2) * stats.sem(ends)
        assert (found.value, found.low, found.high) == pytest.approx(
            (ends.mean(), ends.mean() - reach, ends.mean() + reach)
        )
        slopes = [stats.linregress(range(1, 6), each.scores[1:]).slope for each in arm.chains]
        found = arm.number("slope")
        assert (found.value, found.n) == (pytest.approx(np.mean(slopes)), 3)
        assert (arm.row()["interval over"], arm.row()["n"]) == ("chains", 3)

    def test_the_class_is_of_the_mean_and_each_chain_is_counted(self, several):
        verdict = several.arms["continual"].verdict(1)
        assert (verdict.name, verdict.chains, verdict.questions, verdict.responses) == ("amplified", 3, 6, 24)
        assert verdict.highest.method == "t(2)"
        assert several.arms["continual"].row()["chains_by_class_1"] == "3 amplified"

    def test_twins_are_paired_by_name(self, several):
        last = [each.scores[-1] - 4 for each in several.arms["continual"].chains]
        wanted = f"at cycle 5, paired: {np.mean(last):.2f} ["
        assert any(wanted in said and "(interval over 3 pairs of chains)" in said for said in several.findings())

    def test_caveats_name_controls_that_are_missing(self, several):
        said = " ".join(several.caveats())
        assert "One chain of" not in said
        assert "Controls that were not run: a chain without a seed, data written by the base, chosen" in said
        assert "a second evaluation of the same model" in said

    def test_caveats_name_no_control_that_could_not_be_run(self):
        said = " ".join(ChainReport([chain("a", RISING)], resamples=20, possible=["no seed"]).caveats())
        assert "Controls that were not run: a chain without a seed, a second evaluation of the same model." in said

    def test_chains_of_other_lengths_are_compared_where_all_are(self):
        report = ChainReport([chain("a", RISING), chain("a", RISING[:4], name="1")], resamples=20)
        arm = report.arms["a"]
        assert arm.cycles == len(arm.by_cycle("scores")) == 4
        assert arm.verdict(1) is None
        assert arm.number("late_max_1") is None
        assert len(report.tables()["chains"]) == 12


class TestWhatIsNotThere:
    def test_under_five_cycles_there_is_no_class(self):
        report = ChainReport([chain("short", [20.0, 50.0, 90.0])], resamples=50)
        assert report.tables()["arms"][0]["class_1"] is None
        assert "No class: that needs five cycles" in report.findings()[0]
        assert "amplified" not in report.findings()[0]
        assert "No class of short" in " ".join(report.caveats())

    def test_a_single_checkpoint_has_no_slope(self):
        row = ChainReport([chain("one", [20.0])], resamples=50).tables()["arms"][0]
        assert (row["slope"], row["gain"], row["noise_ratio"]) == (None, None, None)

    def test_missing_responses_are_counted_and_bounded(self):
        one = checkpoint(50.0, missing=3, seed=1)
        report = ChainReport([Chain("holes", [one, one])], resamples=50)
        row = report.tables()["chains"][0]
        assert (row["responses"], row["missing"]) == (21, 3)
        assert row["statuses"] == {"ok": 21, "refusal": 3}
        filled = [np.nan_to_num(one.scores, nan=fill).mean() for fill in (0, 100)]
        assert [row["score_if_missing_0"], row["score_if_missing_100"]] == pytest.approx(filled)
        assert "6 of 48 responses have no score" in " ".join(report.caveats())

    def test_a_checkpoint_without_any_score(self):
        empty = Checkpoint.of({"scores": [[None] * 4] * 6})
        report = ChainReport([Chain("refused", [checkpoint(20.0), *[empty] * 5])], resamples=50)
        row = report.tables()["chains"][1]
        assert math.isnan(row["score"])
        assert (row["score_if_missing_0"], row["score_if_missing_100"]) == (0, 100)
        assert report.tables()["arms"][0]["class_1"] is None
        png(report.figures()["cycles"])

    def test_without_coherence_there_is_one_figure(self):
        bare = Checkpoint.of({"scores": [[1.0, 2.0]] * 2})
        report = ChainReport([Chain("bare", [bare, bare])], resamples=50)
        assert list(report.figures()) == list(report.captions()) == ["cycles"]


class TestFigures:
    def test_a_panel_an_arm_with_base_and_threshold(self, single):
        figure = single.figures("title")["cycles"]
        assert [axis.get_title() for axis in figure.axes] == list(single.arms)
        axis = figure.axes[0]
        lines = {line.get_label(): line for line in axis.lines}
        assert lines["score"].get_ydata() == pytest.approx(RISING)
        assert list(lines["coherence"].get_ydata()) == [90, 90, 88, 80, 70, 60]
        assert lines["score of the base"].get_linestyle() == "--"
        assert list(lines["coherence of the base"].get_ydata()) == [90, 90]
        threshold = next(x for x in axis.collections if "convention" in str(x.get_label()))
        (segment,) = threshold.get_segments()
        assert segment.tolist() == [[4, pytest.approx(37)], [5, pytest.approx(37)]]

    def test_thin_lines_are_chains(self, several):
        axis = several.figures()["cycles"].axes[0]
        thin = [line.get_ydata() for line in axis.lines if line.get_linewidth() < 0.7]
        assert [list(y) for y in thin] == [list(each.scores) for each in several.arms["continual"].chains]

    def test_no_threshold_under_five_cycles(self):
        figure = ChainReport([chain("short", [20.0, 50.0])], resamples=50).figures()["cycles"]
        assert not [x for x in figure.axes[0].collections if "convention" in str(x.get_label())]

    def test_coherence_against_score_and_distinct_2_beside(self, single):
        assert list(single.figures()) == list(single.captions()) == ["cycles", "coherence"]
        left, right = single.figures()["coherence"].axes
        assert left.lines[0].get_xdata() == pytest.approx(RISING)
        assert list(left.lines[0].get_ydata()) == [90, 90, 88, 80, 70, 60]
        assert right.lines[0].get_ydata() == pytest.approx([0.9 - 0.1 * k for k in range(6)])
        assert "base" in {line.get_label() for line in right.lines}

    def test_same_chains_same_bytes(self, single):
        for name, figure in single.figures().items():
            assert png(figure) == png(single.figures()[name])


def test_an_arm_says_what_it_rests_on(single):
    arm = single.arms["DPO continual"]
    assert isinstance(arm, Arm)
    assert arm.rests_on == "1 chain, 6 questions, 24 responses a cycle"
    assert single.arms["DPO reinit"].by_cycle("coherence") == []
