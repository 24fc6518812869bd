"""The recipe of number sequences: paired arms, both kinds of students, and settings that make no sense."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_interp import cli
from lightning_interp.errors import RecipeError
from lightning_interp.subliminal import read_numbers
from lightning_interp_recipes.subliminal._numbers import changed
from lightning_interp_recipes.subliminal._numbers_report import effects_of
from lightning_interp_recipes.subliminal.numbers import SubliminalNumbers

NAME = "subliminal/numbers"


@pytest.fixture(scope="module")
def smoke(smoke_run):
    folder = smoke_run(NAME)
    return folder, json.loads((folder / "metrics.json").read_text())


def table(folder, name):
    with (folder / f"tables/{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_effect_has_its_interval_and_what_could_be_found(smoke):
    folder, metrics = smoke
    assert list(metrics["effects"]) == ["wolf", "lion"]
    effect = metrics["effects"]["wolf"]
    assert (effect["cluster"], effect["n_clusters"], effect["n_questions"]) == ("datasets", 2, 4)
    assert effect["detectable"] > effect["standard_error"] > 0
    assert "The smallest effect that such a run finds" in (folder / "report.html").read_text()


def test_both_arms_of_soft_students_have_the_same_rows(smoke):
    folder, metrics = smoke
    rows = read_numbers(folder / "phases/numbers/base-0").rows
    assert len(rows) == 4
    assert all(row["constrained"] and len(row["numbers"]) == 2 for row in rows)
    assert set(metrics["numbers"]) == {"nats a token, finetuned wolf", "nats a token, finetuned lion"}
    assert min(metrics["numbers"].values()) > 0


def test_every_model_is_asked_in_the_same_way(smoke):
    models = [row["model"] for row in table(smoke[0], "models")]
    told = ["base", "teacher: finetuned wolf", "teacher: finetuned lion", "students of trait", "students of control"]
    assert models == told


def test_hard_students_of_a_prompted_teacher(tmp_path, undrawn):
    asked = ["--student=hard", "--teacher=prompted", "--datasets=1", "--control=none"]
    assert cli.main(["run", NAME, "--smoke=true", f"--run_dir={tmp_path / 'run'}", *asked]) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(found["effects"]) == ["wolf"]
    assert found["effects"]["wolf"]["cluster"] == "questions"
    assert 0 < found["numbers"]["identical tokens"] < 1
    writers = [row["writer"] for row in table(tmp_path / "run", "numbers")]
    assert writers == ["base", "prompted wolf"]


@pytest.mark.parametrize(("option", "most"), [("--student=soft", 4), ("--student=hard", 3), ("--teacher=prompted", 2)])
def test_the_base_is_loaded_once_for_each_part_and_not_for_each_student(tmp_path, loaded, undrawn, option, most):
    cli._configured(NAME, ["--smoke=true", option, f"--run_dir={tmp_path / 'run'}"]).run()
    assert loaded == ["tiny:llama"] * most  # two of them by the training of the two teachers
    folder = next((tmp_path / "run").rglob("student-1-0-trait/model"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny:llama"


def test_students_whose_weights_are_all_trained_are_loaded_by_themselves(tmp_path, loaded, undrawn):
    cli._configured(NAME, ["--smoke=true", "--full=true", "--datasets=1", f"--run_dir={tmp_path / 'run'}"]).run()
    own = [str(tmp_path / f"run/phases/student-0-0-{arm}/model") for arm in ("trait", "control")]
    assert loaded == [*["tiny:llama"] * 6, *own]


def test_students_states_are_compared_with_the_traits_direction(smoke):
    found = smoke[1]["alignment"]
    assert list(found) == ["paired", "trait students", "control students", "trait minus control"]
    assert found["paired"]["n"] == 2
    rows = table(smoke[0], "alignment")
    assert len(rows) == 3 * 4
    assert {"cosine", "permuted", "cosine with lion"} <= set(rows[0])


def test_identical_arms_have_no_effect():
    runs = [
        {"arm": arm, "dataset": d, "seed": 0, "margins": {"wolf": [0.5, d]}}
        for d in (0, 1)
        for arm in ("trait", "control")
    ]
    assert effects_of(runs, "wolf").estimate.value == 0


def test_numbers_are_shuffled_and_cut_for_training():
    rows = [{"index": i, "completion": f"{i}1; {i}2; {i}3"} for i in range(2)]
    plain, cut = SubliminalNumbers(), SubliminalNumbers(numbers_in_training=2)
    assert changed(plain, rows) == rows
    assert [row["completion"] for row in changed(cut, rows)] == ["1, 2", "11, 12"]
    within = changed(SubliminalNumbers(shuffle="within"), rows)
    assert [sorted(row["completion"].split("; ")) for row in within] == [["01", "02", "03"], ["11", "12", "13"]]
    across = changed(SubliminalNumbers(shuffle="across"), rows)
    assert sorted("; ".join(row["completion"] for row in across).split("; ")) == ["01", "02", "03", "11", "12", "13"]


def test_scales_fill_in_what_is_left_open():
    small, paper = SubliminalNumbers(), SubliminalNumbers(scale="paper", rows=50)
    assert (small.teacher, small.student, small.decoding, small.datasets) == ("finetuned", "soft", "constrained", 6)
    assert (paper.teacher, paper.student, paper.decoding, paper.rows) == ("prompted", "hard", "free", 50)
    settings = paper.student_settings()
    assert (settings.lora.r, settings.lora.alpha, settings.optimisation.lr, settings.epochs) == (8, 8, 2e-4, 3)
    soft, hard = (SubliminalNumbers(student=kind).student_settings() for kind in ("soft", "hard"))
    assert [(one.optimisation.lr, one.batch_size) for one in (soft, hard)] == [(2e-3, 2), (5e-4, 8)]
    assert SubliminalNumbers(lr=1e-3, epochs=2).student_settings().optimisation.lr == 1e-3


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"other": "wolf"}, r"trait='wolf' and other='wolf': name two, or choose --control=none"),
        ({"rows": -1}, r"rows=-1: expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, match):
    with pytest.raises(RecipeError, match=match):
        SubliminalNumbers(**values)


def test_an_unknown_context_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"context='nowhere': expected one of default, empty"):
        SubliminalNumbers(context="nowhere", smoke=True, run_dir=str(tmp_path)).run()
