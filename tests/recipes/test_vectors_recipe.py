"""steering/vectors: its files are usable, its numbers are those of its parts, and a user's own settings reach it."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_interp import Site, cli, load_causal_lm
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering import AddDirection, SteeringVector, load_control_vector
from lightning_interp_recipes.steering._contrasts import read_contrasts, split_contrasts


def run(folder, *settings):
    assert cli.main(["run", "steering/vectors", "--smoke=true", f"--run_dir={folder}", *settings]) == 0
    return json.loads((folder / "metrics.json").read_text())


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(smoke_run):
    folder = smoke_run("steering/vectors")
    return folder, json.loads((folder / "metrics.json").read_text())


def test_the_vector_can_be_used_at_once(finished):
    folder, metrics = finished
    (path,) = folder.rglob("vector.safetensors")
    vector, control = SteeringVector.load(path), load_control_vector(path.with_suffix(".gguf"))
    assert vector.describe() == control.describe() == metrics["vector"]
    assert (vector.concept, vector.n) == ("mood", 12)
    assert vector.sites == tuple(Site("resid_post", layer) for layer in (1, 2, 3))
    model = load_causal_lm("tiny:llama").model
    AddDirection.load(path, site="resid_post.2").attach(model).remove()


def test_tables_hold_every_cell_and_text(finished):
    folder, metrics = finished
    cells = table(folder, "sweep")
    assert {(row["layer"], row["strength"]) for row in cells} == {(x, s) for x in "13" for s in ("-2.0", "0.0", "2.0")}
    assert {row["layer"] for row in table(folder, "chosen_layer")} == {str(metrics["chosen"]["layer"])}
    for row in cells:
        if row["strength"] == "0.0":
            assert row["effect (nats a token)"] == "0.00 [0.00, 0.00]"
    assert len(table(folder, "texts")) == 3 * 6
    assert [row["strength"] for row in table(folder, "writing")] == ["-2.0", "0.0", "2.0"]
    assert metrics["chosen"]["effect"]["n"] == 3
    assert metrics["chosen"]["strength"] in (-2.0, 2.0)


def test_the_report_shows_an_item_and_says_which_way_the_effect_goes(finished):
    folder, metrics = finished
    outcome = read_manifest(folder)["outcome"]
    assert "differ in 'mood'" in outcome["terms"]["item"]
    assert "(positive)" in outcome["terms"]["item"]
    effect = metrics["chosen"]["effect"]
    way = "gain" if effect["low"] > 0 else "lose" if effect["high"] < 0 else "are not shown to move"
    assert f"positive endings {way} against their negative ones: " in outcome["findings"][0]


def test_the_same_seed_gives_the_same_numbers_and_a_finished_run_is_read_back(finished, tmp_path, undrawn):
    _, metrics = finished
    assert run(tmp_path / "again") == metrics
    assert run(tmp_path / "again") == metrics
    assert run(tmp_path / "other", "--seed=1")["vector"]["sha256"] != metrics["vector"]["sha256"]


def test_a_users_own_file_layers_and_method(tmp_path, undrawn):
    path = tmp_path / "colour.jsonl"
    rows = [{"positive": f"red {word}", "negative": f"blue {word}"} for word in "sky sea hat car door pen box".split()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run(tmp_path / "run", f"--behaviour={path}", "--layers=[2]", "--method=logistic", "--read=last")
    assert (metrics["vector"]["concept"], metrics["vector"]["method"]) == ("colour", "logistic")
    assert metrics["vector"]["n"] == 2 * len(split_contrasts(read_contrasts(str(path)), seed=0).train)
    assert metrics["chosen"]["layer"] == 2


def test_wrong_settings_are_said_before_anything_is_done(tmp_path, capsys):
    recipe = cli._configured("steering/vectors", [])
    with pytest.raises(RecipeError, match=r"strengths=\[0.0\]"):
        type(recipe)(strengths=[0.0])
    with pytest.raises(RecipeError, match="new_tokens=0"):
        type(recipe)(new_tokens=0)
    with pytest.raises(RecipeError, match="max_damage=-1"):
        type(recipe)(max_damage=-1)
    with pytest.raises(RecipeError, match="no contrast set 'moody'"):
        type(recipe)(behaviour="moody").split()
    short = tmp_path / "short.jsonl"
    short.write_text('{"positive": "a", "negative": "b"}\n')
    with pytest.raises(DataError, match="There are 1 contrast items"):
        type(recipe)(behaviour=str(short)).split()
