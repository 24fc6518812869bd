"""Tables of graft results, worked out by hand."""

from __future__ import annotations

import math

import pytest

from lightning_interp import paper_plans
from lightning_interp.core.measure.statistics import mean_interval, median_interval, proportion_interval
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import GraftEvaluator, GraftPrompt, GraftResult
from lightning_interp.grafting.metrics import METRICS
from lightning_interp.testing import byte_tokenizer


def row(prompt, unit, form, plan, **values):
    head = {"prompt": prompt, "unit": unit, "form": form, "plan": plan, "head": "recipient", "final_norm": "recipient"}
    rest = {"text": "t", "target": "x", "predicted": "y"}
    return {**head, **rest, **dict.fromkeys(METRICS, 0.0), **values}


def table():
    """Two units with one and three prompts; log-probabilities of PRE, SFT and FE."""
    prompts = [("a", "one"), ("b", "one"), ("b", "two"), ("b", "two")]
    log_p = {"PRE": [-4.0, -2.0, -3.0, -4.0], "SFT": [-2.0, -1.0, -1.0, -1.0], "FE": [-3.0, -2.0, -2.0, -2.0]}
    hits = {"PRE": [0.0] * 4, "SFT": [1.0] * 4, "FE": [1.0, 0.0, 0.0, 1.0]}
    ranks = {"PRE": [9.0] * 4, "SFT": [1.0] * 4, "FE": [2.0, 3.0, 4.0, 8.0]}
    rows = [
        row(
            i, unit, form, plan, target_logprob=log_p[plan][i], top1=hits[plan][i], top5=1.0, target_rank=ranks[plan][i]
        )
        for i, (unit, form) in enumerate(prompts)
        for plan in log_p
    ]
    return GraftResult(["PRE", "SFT", "FE"], rows=rows)


def test_prompts_of_a_unit_are_averaged_first():
    found = table()
    assert found.values("FE", "top1") == [1.0, pytest.approx(1 / 3)]
    assert found.values("FE", "top1", "two") == [0.5]
    assert found.values("FE", "target_rank", "one") == [2.0, 3.0]
    assert found.forms() == ["one", "two"]
    # By prompts it would be 1/2.
    assert found.estimate("FE", "top1").value == pytest.approx(2 / 3)
    assert found.estimate("FE", "top1").n == 2


def test_each_metric_has_its_own_interval():
    found = table()
    assert found.estimate("FE", "top1", level=0.8) == proportion_interval([1.0, 1 / 3], level=0.8)
    assert found.estimate("SFT", "top5") == proportion_interval([1.0, 1.0])
    assert found.estimate("FE", "target_rank") == median_interval([2.0, 5.0])
    assert found.estimate("FE", "target_logprob") == mean_interval([-3.0, -2.0])


def test_recovery_is_the_share_of_the_effect():
    found = table()
    # Units: PRE -4 and -3, SFT -2 and -1, FE -3 and -2.
    assert found.recovery("FE").value == pytest.approx(0.5)
    assert (found.recovery("FE").low, found.recovery("FE").high) == (0.5, 0.5)
    assert found.recovery("FE", "top1").value == pytest.approx(2 / 3)
    assert found.recovery("FE", form="one").value == pytest.approx((1 + 0) / (2 + 1))
    for plan, value in (("PRE", 0.0), ("SFT", 1.0)):
        estimate = found.recovery(plan)
        assert (estimate.value, estimate.low, estimate.high) == (value, value, value)
    assert math.isnan(found.recovery("FE", "top5").value), "finetuning changed nothing"


def test_of_a_real_evaluation_too(pairs):
    prompts = [GraftPrompt(f"Ann {i} met", "Bo", {"FE": "Ann"}, unit=str(i)) for i in range(4)]
    found = GraftEvaluator(prompts, byte_tokenizer()).evaluate(*pairs("llama"))
    assert found.recovery("PRE").value == 0.0
    assert found.recovery("SFT").value == 1.0
    assert [entry["plan"] for entry in found.summary()] == list(paper_plans())


def test_the_summary_has_one_row_a_plan():
    rows = table().summary()
    assert [r["plan"] for r in rows] == ["PRE", "SFT", "FE"]
    keys = {"plan", "form", "n"} | {f"{m}{end}" for m in (*METRICS, "recovery") for end in ("", "_low", "_high")}
    assert all(set(r) == keys for r in rows)
    assert [(r["form"], r["n"]) for r in rows] == [("all", 2)] * 3
    assert rows[2]["recovery"] == pytest.approx(0.5)
    two = table().summary(form="two")
    assert (two[2]["n"], two[2]["form"], two[2]["top1"], two[2]["target_rank"]) == (1, "two", 0.5, 6.0)
    assert two[2]["target_rank_low"] is None, "one unit carries no interval"


def test_the_tidy_table_has_one_row_a_prompt_plan_and_metric():
    rows = table().tidy()
    assert len(rows) == 4 * 3 * len(METRICS)
    assert rows[0] == {
        "prompt": 0,
        "unit": "a",
        "form": "one",
        "plan": "PRE",
        "head": "recipient",
        "final_norm": "recipient",
        "metric": "top1",
        "value": 0.0,
    }
    assert {r["metric"] for r in table().tidy(["top5"])} == {"top5"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: r.values("LT", "top1"), "plan 'LT' and metric 'top1'. Plans: PRE, SFT, FE"),
        (lambda r: r.values("FE", "accuracy"), "metric 'accuracy'.* metrics: top1, top5"),
        (lambda r: r.estimate("LT", "top5"), "plan 'LT'"),
        (lambda r: r.recovery("FE", "accuracy"), "metric 'accuracy'"),
        (lambda r: r.values("FE", "top1", "three"), "No prompt has the form 'three'. Forms: 'one', 'two'"),
        (lambda r: r.summary(form="three"), "form 'three'"),
    ],
)
def test_what_is_not_in_the_table(call, match):
    with pytest.raises(RecipeError, match=match):
        call(table())
