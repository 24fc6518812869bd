"""The recipe of the policy of one parameter: its table is the model's, its chains go through the report, settings."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_interp import cli
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.cycles import OneParameter, one_parameter_chains
from lightning_interp.errors import RecipeError
from lightning_interp_recipes.cycles._one_parameter import trend


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def smoke(smoke_run):
    return smoke_run("cycles/one_parameter")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The defaults, without drawing."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipe = cli._configured("cycles/one_parameter", [f"--run_dir={folder}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
        recipe.run()
    return folder


def test_the_table_of_the_expected_loss_is_the_models(whole):
    rows = {row["arm"]: row for row in table(whole, "expected")}
    assert len(rows) == 12
    for name, wanted in {
        "DPO lr 2, 50 steps, continual": [0.300, 0.528, 0.893, 0.997, 1.00, 1.00, 1.00],
        "DPO lr 2, 50 steps, reinit": [0.300, 0.225, 0.169, 0.134, 0.116, 0.107, 0.103],
        "SFT lr 0.1, 100 steps, reinit": [0.300, 0.256, 0.217, 0.183, 0.157, 0.137, 0.124],
    }.items():
        assert [float(rows[name][f"p{k}"]) for k in range(7)] == pytest.approx(wanted, abs=1e-3)
    assert {name for name, row in rows.items() if row["trend"] == "grows"} == {
        *(f"DPO lr {lr}, 50 steps, continual" for lr in ("0.5", "2", "8")), "DPO lr 8, 50 steps, reinit",
    }  # fmt: skip
    assert all(
        (float(row["gain near the base"]) > 1) == (row["trend"] == "grows") for row in rows.values() if row["beta"]
    )


def test_sampled_chains_go_through_the_report(whole):
    rows = table(whole, "chains")
    assert len(rows) == 12 * 30 * 8
    how = OneParameter(setting="dpo", init="reinit", lr=8.0, steps=50)
    wanted = one_parameter_chains(how, samples=64, chains=30)
    mine = [row for row in rows if row["arm"] == "DPO lr 8, 50 steps, reinit" and row["cycle"] != "base"]
    assert [float(row["score"]) for row in mine] == pytest.approx((100 * wanted).ravel().tolist())
    arms = {row["arm"]: row for row in table(whole, "arms")}
    assert {row["interval over"] for row in arms.values()} == {"chains"}
    assert {row["n"] for row in arms.values()} == {"30"}
    assert arms["DPO lr 0.5, 50 steps, continual"]["class_1"] == "amplified"
    assert arms["DPO lr 0.5, 50 steps, reinit"]["class_0"] == "decayed"
    found = read_manifest(whole)["outcome"]["findings"]
    assert any(
        "preferring own outputs to the base's, reinit: the trait grows in 1, fades in 2 of 3" in x for x in found
    )
    assert any("of 30 chains of 64 outputs a cycle, continual ones end at 100.00 [" in x for x in found)
    assert any("constant against cycle 1; amplified against cycle 0" in x for x in found), "the ceiling is told"


def test_a_smoke_run_has_the_same_tables(smoke):
    assert {path.name for path in (smoke / "tables").iterdir()} == {"arms.csv", "chains.csv", "expected.csv"}
    assert len(json.loads((smoke / "metrics.json").read_text())["sampled"]) == 10


def test_betas_are_named_where_there_are_several():
    recipe = cli._configured("cycles/one_parameter", ["--betas=[0.1,1]", "--sft_lrs=[]", "--dpo_lrs=[2]"])
    assert list(recipe.settings()) == [
        f"DPO lr 2, 50 steps, beta {beta}, {init}" for beta in ("0.1", "1") for init in ("continual", "reinit")
    ]


def test_a_trend():
    assert [trend([0.3, p]) for p in (0.2, 0.299, 0.301, 0.4)] == ["fades", "holds", "holds", "grows"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["--chains=1"], "chains=1, samples=64: expected at least 2 chains"),
        (["--samples=0"], "chains=30, samples=0"),
        (["--sft_lrs=[]", "--dpo_lrs=[]"], "No setting is left: give sft_lrs"),
        (["--base=1"], r"OneParameter\(base=1.0\)"),
        (["--model=org/own"], "no use for model='org/own'"),
    ],
)
def test_settings(settings, match):
    with pytest.raises(RecipeError, match=match):
        cli._configured("cycles/one_parameter", settings)
