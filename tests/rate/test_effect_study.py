"""A study in full: its numbers are those of its parts, and its tables and files hold them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from lightning_interp.errors import DataError
from lightning_interp.rate import (
    Contains,
    RewriteTriples,
    TripleScores,
    compliance_rates,
    dummy_outcome_check,
    effects_rows,
    permutation_check,
    rate_effects,
    read_triples,
    score_triples,
    study_effects,
    text_changes,
    third_rewrite_check,
    write_effects,
    write_triples,
)
from lightning_interp.rate.report.explained import effect_findings

N = 40


def triples(*, third=False, draws=1, cluster=False, **more):
    rows = [(unit, draw) for unit in range(N) for draw in range(draws)]
    w = [unit % 2 for unit, _ in rows]

    def text(unit, draw, marked):
        return f"text {unit} of draw {draw} " + "very " * (unit % 5) + ("oh!" if marked else "oh")

    columns = {
        "original": [text(unit, 0, unit % 2) for unit, _ in rows],
        "rewrite": [text(unit, draw, 1 - unit % 2) for unit, draw in rows],
        "rewrite2": [text(unit, draw, unit % 2) + " so" * (unit % 3) for unit, draw in rows],
    }
    if third:
        columns["rewrite3"] = [text(unit, draw, 1 - unit % 2) + " now" * (unit % 4) for unit, draw in rows]
    return RewriteTriples(
        attr="mark", ids=[f"u{unit}" for unit, _ in rows], w=w, prompts=[""] * len(rows), draw=[d for _, d in rows],
        cluster=[f"c{unit % 7}" for unit, _ in rows] if cluster else None, **columns, **more,
    )  # fmt: skip


def reward(prompts, texts):
    return [text.count("!") + 0.01 * len(text) for text in texts]


def test_its_parts_are_those_of_the_single_functions():
    units = triples()
    scores = score_triples(reward, units)
    study = study_effects(units, scores, labeller=Contains("!"), seed=3, beta=0.5)
    result = scores.effects(units)
    assert study.result.raw == result.raw
    assert list(study.compliance) == compliance_rates(units, Contains("!"))
    assert study.attenuation.factor == {"att": 1.0, "atu": 1.0, "ate": 1.0}
    assert list(study.changes) == text_changes(units.w, units.original, units.rewrite, units.rewrite2)
    assert study.permutation == permutation_check(result, seed=3)
    assert study.dummy == dummy_outcome_check(result, seed=3)
    assert study.line.zero == pytest.approx(result.standardized.rate.ate.value / 0.5)
    assert study.third is None


@pytest.mark.parametrize(("draws", "cluster"), [(1, False), (3, True)])
def test_third_rewrites_are_averaged_over_draws(draws, cluster):
    units = triples(third=True, draws=draws, cluster=cluster)
    scores = score_triples(reward, units)
    options = {"se": "cluster"} if cluster else {}
    study = study_effects(units, scores, **options)
    names = [f"u{unit}" for unit in range(N)]
    means = {
        stage: [
            float(np.mean([r for r, name in zip(column.tolist(), units.ids, strict=True) if name == unit]))
            for unit in names
        ]
        for stage, column in scores.reward.items()
    }
    expected = third_rewrite_check(
        [unit % 2 for unit in range(N)], means["rewrite"], means["rewrite2"], means["rewrite3"], ids=names,
        cluster=[f"c{unit % 7}" for unit in range(N)] if cluster else None,
    )  # fmt: skip
    for name in ("ate", "ate_third", "difference"):
        assert getattr(study.third, name).value == pytest.approx(getattr(expected, name).value, abs=1e-12)
        assert getattr(study.third, name).se == pytest.approx(getattr(expected, name).se, abs=1e-12)
    assert study.third.ate.value == pytest.approx(study.result.rate.ate.value)
    assert any("third rewrite" in row["check"] for row in study.tables()["checks"])


def test_units_that_the_effects_leave_out_are_left_out_of_the_third_rewrite():
    units = triples(third=True)
    scores = score_triples(reward, units)
    cut = {stage: torch.zeros(N, dtype=torch.bool) for stage in units.stages}
    cut["rewrite"][:4] = True
    scores = TripleScores("mine", scores.reward, cut)
    with pytest.warns(UserWarning, match="left out"):
        study = study_effects(units, scores, drop_truncated=True)
    assert study.result.counts.n == study.third.ate.n == N - 4
    assert any("Cut to the scorer's limit: 10.0% of rewrite." in note for note in study.caveats())
    rows = study.tables()["units_used"]
    assert rows == [
        {"units": "used", "w=1": 18, "w=0": 18, "no label": 0},
        {"units": "left out: truncated", "w=1": 2, "w=0": 2, "no label": 0},
    ]


def test_tables_hold_the_numbers():
    units = triples(dropped={"unlabelled": {"none": 3}, "rewrite_refused": {"w1": 2}})
    study = study_effects(units, score_triples(reward, units), labeller=Contains("!"))
    tables = study.tables("a_")
    assert all(name.startswith("a_") and rows for name, rows in tables.items())
    assert {tuple(row) for row in tables["a_checks"]} == {("check", "of", "value", "low", "high", "n", "method")}
    assert tables["a_estimates"] == study.result.rows()
    used = tables["a_units_used"]
    assert used[0] == {"units": "used", "w=1": N // 2, "w=0": N // 2, "no label": 0}
    assert used[1:] == [
        {"units": "left out: unlabelled", "w=1": 0, "w=0": 0, "no label": 3},
        {"units": "left out: rewrite_refused", "w=1": 2, "w=0": 0, "no label": 0},
    ]
    first = effects_rows({"x": study.result}, key="model")[0]
    effect = study.result.naive
    assert first["model"] == "x"
    assert first["raw"] == f"{effect.value:.3f} [{effect.low:.3f}, {effect.high:.3f}]"
    trips = [row for row in effects_rows(study.result) if row["estimator"] == "round trip"]
    assert [row["estimand"] for row in trips] == ["w=1", "w=0"]
    flags = tables["a_rewrites_with_flags"]
    expected = [(stage, direction, 20) for stage in ("rewrite", "rewrite2") for direction in ("1->0", "0->1")]
    assert [(row["stage"], row["direction"], row["rewrites"]) for row in flags] == expected


def test_examples_are_units_of_either_kind_with_their_rewards():
    units = triples()
    scores = score_triples(reward, units)
    rows = study_effects(units, scores).tables()["examples"]
    assert [row["chosen"] for row in rows] == ["at random"] * 10 + ["largest contrast"] * 10
    delta = {}
    for index, name in enumerate(units.ids):
        row = {s: float(scores.reward[s][index]) for s in units.stages}
        delta[name] = (row["rewrite2"] - row["rewrite"]) * (1 if units.w[index] else -1)
        for found in (one for one in rows if one["id"] == name):
            assert found["rewrite2"] == units.rewrite2[index]
            assert found["reward of rewrite2"] == row["rewrite2"]
    middle = np.mean(list(delta.values()))
    far = sorted((abs(value - middle) for value in delta.values()), reverse=True)[:10]
    assert [abs(delta[row["id"]] - middle) for row in rows[10:]] == pytest.approx(far)


def test_flags_and_failed_rewrites_are_told():
    units = triples()
    units.rewrite[0] = "I'm sorry, I cannot do that!"
    units.rewrite[2] = units.original[2]
    study = study_effects(units, score_triples(reward, units), labeller=Contains("!"))
    rows = {(row["stage"], row["direction"]): row for row in study.tables()["rewrites_with_flags"]}
    assert rows["rewrite", "0->1"]["refusal"] == 1
    assert rows["rewrite", "0->1"]["identical"] == 1
    assert rows["rewrite", "1->0"]["identical"] == 0
    notes = study.caveats()
    assert not any("Failed ones" in note for note in notes)  # 19 of 20 are enough
    units.rewrite[4] = units.original[4]
    with pytest.warns(UserWarning, match="2 of 20 units with w=0"):
        study = study_effects(units, score_triples(reward, units), labeller=Contains("!"))
    assert any(
        "to 1 in rewrite. Failed ones pull" in note and "would be 1.05 times as large" in note
        for note in study.caveats()
    )


def test_rewards_without_spread_have_no_checks_that_need_one():
    units = triples()
    with pytest.warns(UserWarning, match="standard deviation within arms is 0"):
        study = study_effects(units, score_triples(lambda prompts, texts: [0.0] * len(texts), units))
    assert (study.dummy, study.line) == (None, None)
    assert set(study.figures()) == {"effects", "overlay"}
    assert study.metrics()["sensitivity"] is None


def test_files_hold_everything_and_come_back(tmp_path):
    units = triples(third=True, cluster=True, dropped={"unlabelled": {"none": 1}}, dropped_ids={"unlabelled": ["x"]})
    assert read_triples(write_triples(tmp_path, units)) == units
    study = study_effects(units, score_triples(reward, units), se="cluster", seed=5)
    found = json.loads(write_effects(tmp_path, study, seed=5).read_text())
    assert found["units"]["delta"] == study.result.delta.tolist()
    assert found["effects"]["raw"]["rate"]["ate"]["estimate"] == study.result.rate.ate.value
    assert (found["seed"], found["left_out_ids"]) == (5, {"unlabelled": ["x"]})
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert write_effects(tmp_path, study, name="again", seed=5).read_bytes() == (tmp_path / "effects.json").read_bytes()


@pytest.mark.parametrize("content", ["{}", "[]", '{"attr": "x"}', '{"nothing": 1}'])
def test_a_file_that_holds_no_units(tmp_path, content):
    (tmp_path / "triples.json").write_text(content)
    with pytest.raises(DataError, match=r"triples\.json"):
        read_triples(tmp_path / "triples.json")
    with pytest.raises(DataError, match=r"no\.json holds no complete units"):
        read_triples(tmp_path / "no.json")


def test_no_unit_at_all():
    units = RewriteTriples(
        attr="mark", ids=[], w=[], prompts=[], original=[], rewrite=[], rewrite2=[], draw=[],
        dropped={"rewrite_empty": {"w1": 2}},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"'mark' has no complete unit: .*rewrite_empty"):
        study_effects(units, TripleScores("x", {}, {}))


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (1.0, "A mark: the reward 'r' rises by 1.0"),
        (-1.0, "A mark: the reward 'r' falls by 1.0"),
        (0.0, "A mark: no effect on the reward 'r' is shown, the interval holds zero: "),
    ],
)
def test_the_finding_says_which_way_the_reward_goes_and_no_more_than_the_interval(shift, said):
    noise = [0.01, -0.01] * 4
    w = [1, 1, 0, 0] * 2
    texts = [
        [value + shift * arm for value, arm in zip(noise, arms, strict=True)] for arms in (w, [1 - a for a in w], w)
    ]
    first, naive, _ = effect_findings(rate_effects(w, *texts), of="a mark", on="the reward 'r'")
    assert first.startswith(said)
    assert first.endswith(", on average over 8 units, by the double rewrite.")
    assert naive.startswith("The naive difference of the 4 texts with it and the 4 without is ")
    low, high = map(float, re.search(r"\[(.*?), (.*?)\]", first).groups())
    assert low <= abs(shift) <= high
