"""Every recipe of the package: header, settings, a smoke run, and all that a run promises to leave."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import fields

import pytest
import yaml

from lightning_interp import cli
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.running.catalog import header, recipes_dir

ROOT = recipes_dir()
FILES = sorted(path for path in ROOT.rglob("*") if path.suffix in (".yaml", ".yml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]
# Grows with the package: a recipe that is not collected is not tested.
EXPECTED = (
    {f"grafting/{name}" for name in ("components", "facts", "hybrid", "pair", "reproduce_tiny")}
    | {f"steering/{name}" for name in ("calibrate", "dual_vs_euclidean", "generate", "vectors")}
    | {f"rate/{name}" for name in ("audit", "llm_rewriter", "train_reward", "typos")}
    | {f"cycles/{name}" for name in ("documents", "dpo", "dpo_contrast", "judges", "one_parameter", "sft")}
    | {f"subliminal/{name}" for name in ("context", "localise", "numbers", "rank_sweep", "steered", "toy")}
)

recipes = pytest.mark.parametrize("name", NAMES)
finetuning = pytest.mark.parametrize(
    "name", [name for name in NAMES if "watch_every" in (ROOT / f"{name}.yaml").read_text()]
)


def test_all_are_collected():
    assert set(NAMES) >= EXPECTED
    code = [path for path in ROOT.rglob("*.py") if not path.name.startswith("_")]
    assert sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in code) == NAMES


@recipes
def test_header_says_what_how_how_long_and_on_what(name):
    text = header(ROOT / f"{name}.yaml")
    assert len(text.splitlines()[0]) > 10
    assert f"lightning-interp run {name}" in text
    assert f"lightning-interp run {name} --smoke=true" in text
    assert re.search(r"\b(seconds|minutes?|hours?)\b", text)
    assert "Hardware:" in text


@recipes
def test_settings_parse_and_name_only_fields(name):
    recipe = cli._configured(name, [])
    settings = yaml.safe_load((ROOT / f"{name}.yaml").read_text(encoding="utf-8"))
    assert settings.pop("recipe") == name
    assert set(settings) <= {field.name for field in fields(recipe)}
    assert {key: getattr(recipe, key) for key in settings} == settings
    assert not recipe.smoke


@recipes
def test_list_shows_it_with_its_purpose(name, capsys):
    assert cli.main(["list"]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert [name, header(ROOT / f"{name}.yaml").splitlines()[0]] in lines


@recipes
def test_a_smoke_run_leaves_settings_and_manifest(name, smoke_run):
    run = smoke_run(name)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (config["recipe"], config["smoke"], config["run_dir"]) == (name, True, str(run))
    assert config["model"].startswith("tiny:")
    state = read_manifest(run)
    assert state["phases"]
    assert {phase["status"] for phase in state["phases"].values()} == {"finished"}
    assert [session["status"] for session in state["sessions"]] == ["finished"]
    assert state["outcome"]["question"].endswith("?")
    assert state["outcome"]["caveats"]


@recipes
def test_a_smoke_run_leaves_numbers(name, smoke_run):
    metrics = json.loads((smoke_run(name) / "metrics.json").read_text(encoding="utf-8"))
    assert metrics
    tables = sorted((smoke_run(name) / "tables").glob("*.csv"))
    assert tables
    for path in tables:
        with path.open(encoding="utf-8", newline="") as file:
            names, *rows = csv.reader(file)
        assert len(set(names)) == len(names) > 1
        assert rows
        assert all(len(row) == len(names) for row in rows)


@recipes
def test_a_smoke_run_leaves_figures_that_show_something(name, smoke_run):
    from matplotlib.image import imread

    figures = sorted((smoke_run(name) / "figures").glob("*.png"))
    assert figures
    for path in figures:
        image = imread(path)
        assert min(image.shape[:2]) >= 200
        assert (image[..., :3].reshape(-1, 3) != image[0, 0, :3]).any(axis=1).mean() > 0.01


@recipes
def test_a_smoke_run_leaves_a_report_that_needs_no_other_file(name, smoke_run):
    run = smoke_run(name)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"<script|<link|@import|url\(", page)
    sources = re.findall(r"<img[^>]*\bsrc=\"([^\"]*)\"", page)
    figures = {path.read_bytes() for path in (run / "figures").glob("*.png")}
    assert {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources} == figures
    assert str(run.parent) not in re.sub(r"<code>[^<]*</code>|<pre>[^<]*</pre>", "", page)


@recipes
def test_a_report_explains_itself(name, smoke_run):
    outcome = read_manifest(smoke_run(name))["outcome"]
    assert any(re.search(r"\d \[.*\d, .*\d\]", finding) for finding in outcome["findings"])  # with its interval
    unit = r"\d+ (?:facts|units|prompts|items|contexts|questions|chains)\b"
    assert any(re.search(unit, finding) for finding in outcome["findings"])
    said = " ".join([*outcome["findings"], *outcome["caveats"]])
    assert not re.search(r"\b1 (?:layer|fact|unit|prompt|item|context|text|token)s\b|[( ]-0\.0+[] ,.;)]|e\+\d", said)
    assert set(outcome["captions"]) == set(outcome["figures"])
    assert all(len(text) > 60 for text in outcome["captions"].values())
    page = re.sub('src="[^"]*"', "", (smoke_run(name) / "report.html").read_text(encoding="utf-8"))
    codes = set(
        re.findall(r"\b(?:PRE|SFT|FE|LT|FULL|E[3-8]|RATE|ATE|P\(W=1\)|dual_md|primal_md|pair_share)(?![\w])", page)
    )
    explained = " ".join([*outcome["terms"], *outcome["terms"].values()])
    assert [code for code in codes if code not in explained] == []
    if "PRE/top1" in page:  # the curves of a training show the complements too
        assert "^C" in outcome["terms"]
    assert bool(outcome["source"]) == ("tiny:" in page)  # a language model is named where one was used


def scalars(folder):
    """Steps and values by tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        reader = EventAccumulator(str(path)).Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in reader.Scalars(tag))
    return found


@recipes
def test_a_smoke_run_leaves_curves(name, smoke_run):
    assert any(len(curve) > 1 for curve in scalars(smoke_run(name) / "tensorboard").values())


@finetuning
def test_curves_are_the_scores_of_every_plan_during_training(name, smoke_run):
    from lightning_interp import paper_plans

    curves = scalars(smoke_run(name) / "tensorboard")
    with (smoke_run(name) / "tables/training.csv").open(encoding="utf-8", newline="") as file:
        history = list(csv.DictReader(file))
    for plan in paper_plans():
        for metric in ("top5", "target_prob", "target_logprob"):
            told = [value for _, value in curves[f"graft/{plan}/{metric}"]]
            kept = [float(row[f"{plan}/{metric}"]) for row in history if float(row["step"]) > 0]
            assert told[-len(kept) :] == pytest.approx(kept, rel=1e-6)
