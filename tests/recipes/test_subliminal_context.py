"""The recipe of contexts: its designs, its pairs by hand, and what a smoke run says of them."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_interp import cli
from lightning_interp.errors import RecipeError
from lightning_interp.subliminal import ChatContext
from lightning_interp.testing import byte_tokenizer
from lightning_interp_recipes.subliminal._context import (
    DESIGNS,
    TERMS_OF_CONTEXT,
    answer_rows,
    arm_rows,
    contrast,
    effects_of,
    map_figure,
    rendered_pairs,
)

GRID = [("default", "default"), ("default", "empty"), ("empty", "default"), ("empty", "empty")]


@pytest.fixture(scope="module")
def smoke(smoke_run):
    folder = smoke_run("subliminal/context")
    return folder, json.loads((folder / "metrics.json").read_text())


def test_a_smoke_run_has_an_effect_of_every_pair_and_shows_what_was_read(smoke):
    folder, metrics = smoke
    assert list(metrics["effects"]) == [f"{a}/{b}" for a, b in GRID]
    assert {(one["n_datasets"], one["n_questions"], one["cluster"]) for one in metrics["effects"].values()} == {
        (1, 3, "questions")
    }
    assert metrics["matched_minus_mismatched"]["estimate"]["low"] is not None
    with (folder / "tables/contexts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["train"], row["eval"]) for row in rows] == GRID
    assert [row["training reads"] == row["evaluation reads"] for row in rows] == [True, False, False, True]
    page = (folder / "report.html").read_text()
    assert "independent reruns at tuned learning rates differ" in page
    assert "another dataset or seed may differ by any amount" in page


@pytest.mark.parametrize(("option", "most"), [("--student=soft", 4), ("--student=hard", 3), ("--teacher=prompted", 2)])
def test_the_base_is_loaded_once_for_each_part_and_not_for_each_student(tmp_path, loaded, undrawn, option, most):
    cli._configured("subliminal/context", ["--smoke=true", option, f"--run_dir={tmp_path / 'run'}"]).run()
    assert loaded == ["tiny:llama"] * most  # two of them by the training of the two teachers
    folder = next((tmp_path / "run").rglob("student-0-empty-trait/model"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny:llama"


def test_every_design_names_contexts_that_there_are_and_explains_them():
    recipe = cli._configured("subliminal/context", [])
    for name, design in DESIGNS.items():
        pairs = [pair for pair, _ in design]
        assert len(set(pairs)) == len(pairs)
        assert {one for pair in pairs for one in pair} <= set(recipe.contexts())
        assert cli._configured("subliminal/context", [f"--design={name}"]).pairs() == pairs
    explained = " ".join(TERMS_OF_CONTEXT)
    assert [one for one in recipe.contexts() if one not in explained] == []
    assert len(recipe.students()) == 2 * 3 * recipe.datasets


def students(values):
    """Students of two data sets, whose trait arm has these margins, and whose control has 1 more in each."""
    return [
        {"dataset": d, "train": a, "eval": b, "arm": arm, "margin": [x + (arm == "control")] * 2, "answers": None}
        for (d, a, b), x in values.items()
        for arm in ("trait", "control")
    ]


def test_effects_and_their_contrast_by_hand():
    values = {(d, a, b): 1.0 + d + 4 * (a == b) for d in (0, 1) for a, b in GRID}
    told = students(values)
    found = effects_of(told, GRID[:2])
    assert {pair: one.estimate.value for pair, one in found.items()} == dict.fromkeys(GRID[:2], -1.0)
    told = [
        {**one, "margin": [0.0, 2.0 * (one["train"] == one["eval"])]} if one["arm"] == "trait" else one for one in told
    ]
    same = {pair: pair[0] == pair[1] for pair in GRID}
    # Trait margins are 0 and 2 or 0; controls 6 or 2 (and one more in the second data set).
    assert contrast(told, same).estimate.value == pytest.approx((0 - 6.5 + 2 - 6.5) / 2 - (0 - 2.5 + 0 - 2.5) / 2)
    assert contrast(told, dict.fromkeys(GRID, True)) is None
    assert answer_rows(told) == []
    base = [{"eval": name, "margin": [1.0, 1.0]} for name in ("default", "empty")]
    rows = arm_rows({"base": base, "students": told})
    assert rows[1]["margin"] == 6.0
    assert rows[1]["minus base"] == 5.0
    figure = map_figure(found, same, title="by hand")
    assert len(figure.axes[0].patches) == 1


def test_contexts_that_read_alike_are_matched_whatever_their_names():
    tokenizer = byte_tokenizer()
    contexts = {"one": ChatContext(), "two": ChatContext(), "three": ChatContext(system="Be kind.")}
    with pytest.warns(UserWarning, match=r"^In 1 of 2 pairs evaluation reads other texts than training did: one/three"):
        rows = rendered_pairs(tokenizer, contexts, [("one", "two"), ("one", "three")])
    assert [row["same text"] for row in rows] == [True, False]
    assert "Be kind." in rows[1]["evaluation reads"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [(["--other=wolf"], "trait='wolf' and other='wolf': name two"), (["--rows=0"], "rows=0: expected at least 1")],
)
def test_settings(settings, match):
    with pytest.raises(RecipeError, match=match):
        cli._configured("subliminal/context", settings)


@pytest.mark.slow
def test_hard_students_of_a_prompted_teacher_learn_rows_that_both_wrote(tmp_path):
    arguments = ["--teacher=prompted", "--student=hard", "--samples=1", "--smoke=true", f"--run_dir={tmp_path / 'run'}"]
    assert cli.main(["run", "subliminal/context", *arguments]) == 0
    with (tmp_path / "run/tables/answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert set(rows[0]) >= {"rate", "substring", "frac_nonalpha", "frac_other"}
