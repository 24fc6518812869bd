"""The recipe of the toy: data of one's own, the theorem in its tables, and settings that make no sense."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from lightning_interp import cli
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal import gaussian_task
from lightning_interp_recipes.subliminal._toy import own_task, theorem_steps


@pytest.fixture(scope="module")
def smoke(smoke_run):
    folder = smoke_run("subliminal/toy")
    return folder, json.loads((folder / "metrics.json").read_text())


def test_every_net_with_a_shared_start_goes_the_teachers_way(smoke):
    with (smoke[0] / "tables/steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["start"] for row in rows] == ["shared"] * 4 + ["other"] * 4
    assert all(
        row["same direction"].startswith("1.00 [") and row["loss falls"].startswith("1.00 [") for row in rows[:4]
    )
    assert not theorem_steps(8, shared=False, distance="mse", eps=1e-3, seed=0).inner.gt(0).all()


def test_accuracies_are_of_all_arms_and_a_report_without_a_language_model(smoke):
    assert list(smoke[1]["accuracy"]) == ["reference", "teacher", "student(aux)", "cross(aux)"]
    assert {found["n"] for found in smoke[1]["accuracy"].values()} == {3}
    assert "tiny:" not in (smoke[0] / "report.html").read_text()


def test_data_of_ones_own(tmp_path):
    task = gaussian_task(train=20, test=10, width=5, classes=3)
    tensors = {key: x for key, x in vars(task).items() if x is not None}
    read = own_task(str(save_tensors(tmp_path / "mine.safetensors", tensors)))
    assert torch.equal(read.inputs, task.inputs)
    assert read.carrier is None
    del tensors["labels"]
    with pytest.raises(DataError, match=r"other.safetensors has no tensor 'labels'"):
        own_task(str(save_tensors(tmp_path / "other.safetensors", tensors)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["--nets=1"], "nets=1: expected at least 2"),
        (["--model=org/own"], "no use for model='org/own'"),
    ],
)
def test_settings(settings, match):
    with pytest.raises(RecipeError, match=match):
        cli._configured("subliminal/toy", settings)
