"""The recipe of the steered teacher: its controls, what it saves, that it goes on after a kill, and its settings."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from lightning_interp import cli
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import RecipeError
from lightning_interp.models import load_causal_lm
from lightning_interp.subliminal import Trait
from lightning_interp.testing import tiny_model
from lightning_interp_recipes.subliminal import _steered


@pytest.fixture(scope="module")
def smoke(smoke_run):
    folder = smoke_run("subliminal/steered")
    return folder, json.loads((folder / "metrics.json").read_text())


def shift_in(folder):
    return read_tensors(folder / "shift.safetensors")[0]["shift"]


def shift(folder, writer, kind, k):
    return shift_in(folder / f"phases/student_{kind}_{writer}_{k}")


class TestSmoke:
    def test_every_arm_is_there_with_an_interval_over_seeds(self, smoke):
        arms = ["trait", "other trait", "plain SGD", "foreign start", "control alone"]
        assert list(smoke[1]["cosine"]) == arms
        assert {found["n"] for found in smoke[1]["cosine"].values()} == {2}
        with (smoke[0] / "tables/arms.csv").open(newline="") as file:
            assert [row["arm"] for row in csv.DictReader(file)] == arms
        assert "could not have been told from 0" in (smoke[0] / "report.html").read_text()

    def test_cosines_are_those_of_student_minus_control(self, smoke):
        folder, metrics = smoke
        directions = read_tensors(folder / "phases/direction/directions.safetensors")[0]
        layer, u = metrics["layer"], directions["steered.trait"]
        assert u[:layer].abs().max() == 0
        torch.testing.assert_close(u[layer], 20 * directions["prompt.trait"][layer], atol=1e-4, rtol=1e-3)
        for arm, (writer, control, kind) in _steered.ARMS.items():
            gaps = [(shift(folder, writer, kind, k) - shift(folder, control, kind, k)).mean(0) for k in (0, 1)]
            expected = [float(torch.cosine_similarity(gap[layer:], u[layer:], dim=-1).mean()) for gap in gaps]
            assert metrics["each_seed"][arm] == pytest.approx(expected, abs=1e-4)

    def test_students_of_a_pair_differ_by_their_numbers_alone(self, smoke):
        found = [json.loads((smoke[0] / f"phases/numbers/{name}/0/rows.jsonl").read_text().splitlines()[0])
                 for name in _steered.WRITERS]  # fmt: skip
        assert len({row["prompt"] for row in found}) == 1
        assert shift(smoke[0], "none", "base", 0).shape == shift(smoke[0], "none", "foreign", 0).shape
        assert not torch.equal(shift(smoke[0], "none", "base", 0), shift(smoke[0], "none", "base", 1))


def test_the_base_and_the_foreign_start_are_loaded_once_and_not_for_each_student(tmp_path, loaded, undrawn):
    cli._configured("subliminal/steered", ["--smoke=true", f"--run_dir={tmp_path / 'run'}"]).run()
    assert loaded == ["tiny:llama"] * 2


class TestStarts:
    def test_each_is_asked_once_and_is_as_it_was_when_a_student_has_been_trained(self, tmp_path, monkeypatch):
        asked = []
        original = _steered.hidden_states
        monkeypatch.setattr(
            _steered, "hidden_states", lambda model, *a, **k: asked.append(model) or original(model, *a, **k)
        )
        recipe = cli._configured("subliminal/steered", ["--smoke=true", f"--run_dir={tmp_path / 'run'}"])
        recipe.trainer_kwargs = lambda run, **more: {**more, "logger": False, "enable_progress_bar": False}
        starts = _steered.Starts(recipe)
        before = {part: starts.before(part).clone() for part in ("base", "foreign")}
        assert not torch.equal(before["base"], before["foreign"])
        assert len(asked) == 2
        rows = [{"prompt": "More: 4, 5.", "completion": "678, 123"}] * 4
        for kind in ("base", "foreign", "sgd"):
            _steered.train_student(recipe, None, starts, tmp_path, rows, kind, 3)
            assert shift_in(tmp_path).abs().max() > 0
        assert len(asked) == 2 + 3
        for part, states in before.items():
            assert torch.equal(starts.states(starts.of(part)), states)


def test_a_killed_run_goes_on_at_the_student_where_it_was(tmp_path, monkeypatch, undrawn):
    calls = []

    def student(recipe, run, starts, folder, rows, kind, seed):
        calls.append(folder.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        random = torch.Generator().manual_seed(len(folder.name) + seed % 1000)
        save_tensors(folder / "shift.safetensors", {"shift": torch.randn(2, 4, 32, generator=random)})
        return {"first": 1.0, "last": 1.0, "steps": 1}

    monkeypatch.setattr(_steered, "train_student", student)
    monkeypatch.setattr(_steered, "distilled", lambda *given: {name: torch.ones(1, 32) for name in given[2]})
    asked = ["run", "subliminal/steered", "--smoke=true", f"--run_dir={tmp_path / 'cut'}"]
    assert cli.main(asked) != 0
    written = (tmp_path / "cut/phases/numbers/trait/1/rows.jsonl").stat().st_mtime_ns
    assert cli.main(asked) == 0
    assert (tmp_path / "cut/phases/numbers/trait/1/rows.jsonl").stat().st_mtime_ns == written
    assert calls[3:] == [calls[2], *calls[4:]]
    assert sorted(set(calls)) == sorted(calls[:2] + calls[3:])
    assert len(calls) == 2 * len(_steered.STUDENTS) + 1


class TestPieces:
    def test_a_foreign_start_keeps_the_spread_and_loses_the_weights(self):
        model, other = tiny_model("llama"), tiny_model("llama")
        _steered.foreign(other, 3.0, seed=0)
        before, after = (m.model.layers[0].mlp.up_proj.weight.detach() for m in (model, other))
        assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1)
        assert float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]) == pytest.approx(
            0.316, abs=0.05
        )
        assert torch.equal(model.model.norm.weight, other.model.norm.weight)

    def test_a_direction_is_of_the_target_and_not_of_any_system_text(self):
        loaded, wolf, owl = load_causal_lm("tiny:llama"), Trait(target="wolf"), Trait(target="owl")
        found = _steered.trait_directions(loaded, wolf, owl, ["Which?"])
        assert {name: tuple(x.shape) for name, x in found.items()} == {"trait": (4, 32), "other": (4, 32)}
        swapped = _steered.trait_directions(loaded, owl, wolf, ["Which?"])
        torch.testing.assert_close(found["trait"], swapped["other"], atol=1e-5, rtol=1e-3)

    def test_the_plain_student_has_no_moments(self):
        student = _steered.PlainStudent("tiny:llama", lora={"r": 2}, lr=0.5)
        optimizer = student.configure_optimizers()
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.defaults["lr"] == 0.5


@pytest.mark.parametrize("wrong", ["--seeds=1", "--other=wolf", "--strength=0"])
def test_settings(wrong):
    name, value = wrong.removeprefix("--").split("=")
    with pytest.raises(RecipeError, match=rf"{name}='?{value}.*at least 2 seeds"):
        cli._configured("subliminal/steered", [wrong])
