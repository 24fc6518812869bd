"""The result as text, plain data and a table."""

from __future__ import annotations

import json
import sys

import pytest
from rate_oracle import GOLDEN, IDS, random_units

from lightning_interp.errors import RecipeError
from lightning_interp.rate import Effect, rate_effects


def golden(**options):
    return rate_effects(**{**GOLDEN, "ids": IDS, **options})


def test_to_dict_is_json_and_holds_everything():
    plain = golden().to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["raw"]["rate"]["ate"].keys() == {"estimate", "se", "ci_low", "ci_high", "n", "method"}
    assert plain["raw"]["naive"]["estimate"] == 2
    assert plain["standardized"]["single"]["atu"]["n"] == 4
    assert plain["counts"]["n1"] == 3
    assert plain["units"]["ids"] == IDS
    assert plain["units"]["w"] == [1, 1, 1, 0, 0, 0, 0]
    assert plain["units"]["delta"] == pytest.approx([1.5, 0.5, 1.5, 0.5, 1.0, -0.5, 2.0])
    assert plain["settings"]["ci"] == "auto"
    assert "units" not in golden().to_dict(units=False)


def test_nan_becomes_null():
    with pytest.warns(UserWarning, match="No unit has w=0"):
        plain = golden(w=[1] * 7).to_dict()
    json.dumps(plain, allow_nan=False)
    assert plain["raw"]["naive"]["estimate"] is plain["reward_std"] is None
    assert plain["warnings"][0].startswith("No unit has w=0")


def test_without_originals():
    found = golden(r_orig=None)
    plain = found.to_dict()
    assert (
        plain["raw"]["naive"] is plain["raw"]["single"] is plain["standardized"] is plain["rewrite_effect_w1"] is None
    )
    assert [row["estimator"] for row in found.rows()] == ["rate"] * 3
    assert "naive" not in found.summary()


def test_rows_and_frame():
    pandas = pytest.importorskip("pandas")
    found = golden()
    rows = found.rows()
    assert len(rows) == 14
    assert rows[4] | {"method": ""} == {
        "scale": "raw",
        "estimator": "rate",
        "estimand": "ate",
        "estimate": found.rate.ate.value,
        "se": found.rate.ate.se,
        "ci_low": found.rate.ate.low,
        "ci_high": found.rate.ate.high,
        "n": 7,
        "method": "",
    }
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.query("scale == 'standardized' and estimand == 'att'").estimate.tolist() == pytest.approx(
        [1.8333333333 / 0.894427191, 1.1666666667 / 0.894427191]
    )


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RecipeError, match=r"to_frame\(\) needs pandas, which is missing. Install it or use rows\(\)"):
        golden().to_frame()


def test_summary():
    lines = golden(ci="normal").summary().splitlines()
    assert lines[0] == "Rewrite-based effects: 7 units, 3 with w=1 and 4 with w=0"
    assert lines[1].split() == ["estimate", "se", "95", "%", "interval", "in", "sd"]
    assert lines[2].split() == ["naive", "2", "0.7071", "[0.6141,", "3.386]", "2.236"]
    assert [line.split()[:3] for line in lines[3:9]] == [
        ["single", "ATE", "1.429"],
        ["single", "ATT", "1.833"],
        ["single", "ATU", "1.125"],
        ["rate", "ATE", "0.9286"],
        ["rate", "ATT", "1.167"],
        ["rate", "ATU", "0.75"],
    ]
    assert lines[9].split() == ["round", "trip", "w=1", "-0.6667", "0.1667", "[-0.9933,", "-0.34]"]


def test_summary_says_what_is_missing():
    w, *rewards = random_units(20)
    rewards[2][3] = float("nan")
    with pytest.warns(UserWarning, match="left out"):
        text = rate_effects([None, *w[1:]], *rewards, missing="drop").summary()
    assert "(1 nonfinite, 1 unlabelled left out)" in text
    assert "\n! " in text
    with pytest.warns(UserWarning, match="No unit has w=0"):
        empty = golden(w=[1] * 7).summary()
    assert next(line.split() for line in empty.splitlines() if line.startswith("rate")) == [
        "rate",
        "ATE",
        "-",
        "-",
        "-",
        "-",
    ]


def test_effects_in_another_unit():
    effect = Effect(4.0, 2.0, 6.0, 9, 0.95, "paired, normal", se=1.0)
    assert effect.scaled(2.0) == Effect(2.0, 1.0, 3.0, 9, 0.95, "paired, normal", se=0.5)
    for none in (0.0, float("nan"), float("inf")):
        assert str(effect.scaled(none)) == "nan"
