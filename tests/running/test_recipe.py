import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.recipe import Recipe, RecipeResult, RunFolder


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        loss = ((self.w * batch[:, 0] - batch[:, 1]) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


@dataclass(kw_only=True)
class Squares(Recipe):
    """Fits a line to squares."""

    epochs: int = 2
    scale: float = 1.0
    seen: ClassVar[list[Any]] = []

    def study(self, run: RunFolder) -> RecipeResult:
        data = run.phase("data", self.data)
        w = run.phase("fit", lambda folder: self.fit(run, folder, data), every_rank=True)
        with run.progress("evaluate", total=len(data)) as bar:
            rows = [{"x": x, "y": y, "fitted": w * x} for x, y in data]
            bar.advance(len(data))
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([row["fitted"] for row in rows])
        return RecipeResult(
            metrics={"w": w, "random": torch.rand(1).item()},
            tables={"extra": [{"a": 1}], "points": rows},
            figures={"line": figure},
            artifacts={"fit": run.folder("fit")},
            question="Which line?",
            caveats=["Eight points."],
            summary="points",
        )

    def data(self, folder: Path) -> Any:
        return [[x / 4, self.scale * x * x / 16] for x in range(8)]

    def fit(self, run: RunFolder, folder: Path, data: Any) -> Any:
        checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
        kwargs = self.trainer_kwargs(run, max_epochs=self.epochs, accelerator="cpu", callbacks=[checkpoint])
        self.seen.append(kwargs)
        module, last = Line(), folder / "last.ckpt"
        Trainer(**kwargs).fit(
            module, DataLoader(torch.tensor(data), batch_size=4), ckpt_path=last if last.exists() else None
        )
        return module.w.item()


@dataclass(kw_only=True)
class Other(Recipe):
    """A recipe whose study is given."""

    do: ClassVar[Any] = None

    def study(self, run: RunFolder) -> RecipeResult:
        return type(self).do(run)


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Squares, "seen", [])


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestRun:
    def test_everything_is_left_in_the_run_folder_and_the_main_table_is_printed(self, tmp_path, capsys):
        result = Squares().run()
        folder = tmp_path / "runs/Squares"
        names = ("config.yaml", "manifest.json", "metrics.json", "report.html", "tables/points.csv", "tables/extra.csv")
        assert {*names, "figures/line.png"} <= files(folder)
        assert any(name.startswith("tensorboard/fit/events.out") for name in files(folder))
        assert json.loads((folder / "metrics.json").read_text()) == result.metrics
        out = capsys.readouterr().out
        assert "Squares: points" in out
        assert out.splitlines()[-1] == "report: runs/Squares/report.html"
        manifest = read_manifest(folder)
        assert manifest["outcome"]["artifacts"] == {"fit": "phases/fit"}
        assert manifest["outcome"]["summary"] == "points"
        assert set(manifest["sessions"][0]["versions"]) >= {"lightning_interp", "torch", "lightning", "python"}

    def test_the_same_seed_gives_the_same_files_and_another_seed_others(self, tmp_path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            Squares(run_dir=name, seed=seed).run()
        read = {name: (tmp_path / name / "metrics.json").read_bytes() for name in "abc"}
        assert read["a"] == read["b"] != read["c"]
        assert (tmp_path / "a/tables/points.csv").read_bytes() == (tmp_path / "b/tables/points.csv").read_bytes()

    def test_a_finished_run_is_not_computed_again_but_its_results_are_written_again(self, tmp_path, monkeypatch):
        first = Squares().run()
        (tmp_path / "runs/Squares/metrics.json").unlink()
        monkeypatch.setattr(Squares, "fit", lambda *_: pytest.fail("fitted again"))
        assert Squares().run().metrics["w"] == first.metrics["w"]
        assert (tmp_path / "runs/Squares/metrics.json").exists()

    def test_another_configuration_is_refused_and_the_run_folder_does_not_count(self, tmp_path):
        Squares(run_dir="a").run()
        (tmp_path / "a").rename(tmp_path / "moved")
        Squares(run_dir="moved").run()
        with pytest.raises(ManifestError, match=r'max_time: not set there, "00:01.*; scale: 1\.0 there, 2\.0 now'):
            Squares(run_dir="moved", scale=2.0, trainer={"max_time": "00:01:00:00"}).run()
        with pytest.raises(ManifestError, match=r"holds a run of 'Squares', not of 'Other'"):
            Other(run_dir="moved").run()

    def test_where_and_how_it_is_shown_may_differ_when_a_run_goes_on(self, tmp_path, monkeypatch):
        first = Squares(run_dir="a", trainer={"devices": 1, "enable_progress_bar": False}).run()
        monkeypatch.setattr(Squares, "fit", lambda *_: pytest.fail("fitted again"))
        for trainer in (
            {"devices": "auto", "num_nodes": 1, "enable_progress_bar": True, "enable_model_summary": True},
            {"logger": False, "log_every_n_steps": 7, "profiler": "simple", "default_root_dir": "elsewhere"},
            {},
        ):
            assert Squares(run_dir="a", trainer=trainer).run().metrics["w"] == first.metrics["w"]
            assert read_manifest(tmp_path / "a")["config"]["trainer"] == trainer  # of the last start
        for changed, message in (
            ({"seed": 1}, "seed: 0 there, 1 now"),
            ({"trainer": {"precision": "64-true"}}, r'trainer\.precision: not set there, "64-true" now'),
            ({"trainer": {"strategy": "ddp"}}, r'trainer\.strategy: not set there, "ddp" now'),
            (
                {"trainer": {"devices": 2, "accelerator": "gpu"}},
                r'configuration: trainer\.accelerator: not set there, "gpu"',
            ),
        ):
            with pytest.raises(ManifestError, match=message):
                Squares(run_dir="a", **changed).run()

    def test_a_subclass_adds_settings_that_may_differ(self):
        @dataclass(kw_only=True)
        class Patient(Squares):
            not_identity: ClassVar[tuple[str, ...]] = ("workers",)
            workers: int = 1

            def fit(self, run, folder, data):
                return 0.5

        Patient(run_dir="a").run()
        Patient(run_dir="a", workers=2, trainer={"devices": 1}).run()
        with pytest.raises(ManifestError, match=r"another configuration: scale: 1\.0 there, 2\.0 now\. "):
            Patient(run_dir="a", workers=3, scale=2.0).run()

    def test_an_unwritable_folder_is_refused_before_the_study(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Squares, "study", lambda *_: pytest.fail("it ran"))
        (tmp_path / "file").write_text("")
        with pytest.raises(ManifestError, match=r"Cannot write 'file/run': Not a directory"):
            Squares(run_dir="file/run").run()
        with pytest.raises(ManifestError, match=r"Cannot write '/proc/here'"):
            Squares(run_dir="/proc/here").run()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/config.yaml").write_text("recipe: mine")
        with pytest.raises(ManifestError, match=r"mine/config\.yaml' exists, but its folder is no run folder"):
            Squares(run_dir="mine").run()
        assert (tmp_path / "mine/config.yaml").read_text() == "recipe: mine"

    def test_the_written_settings_name_the_class(self, tmp_path):
        Squares(trainer={"callbacks": [Timer()], "limit_train_batches": 0.5}).run()
        text = (tmp_path / "runs/Squares/config.yaml").read_text()
        assert f"recipe: {__name__}.Squares\n" in text
        assert "- lightning.pytorch.callbacks.timer.Timer\n" in text
        assert "limit_train_batches: 0.5\n" in text


class TestTrainer:
    def test_a_phase_has_its_own_root_and_the_user_wins(self, tmp_path):
        timer = Timer()
        recipe = Squares(trainer={"max_epochs": 1, "callbacks": [timer], "enable_progress_bar": False})
        recipe.run()
        (kwargs,) = recipe.seen
        assert kwargs["max_epochs"] == 1
        assert kwargs["default_root_dir"] == Path("runs/Squares/phases/fit")
        assert [type(callback) for callback in kwargs["callbacks"]] == [ModelCheckpoint, Timer]
        assert kwargs["callbacks"][1] is timer
        assert kwargs["enable_model_summary"] is False
        assert Path(kwargs["logger"].log_dir) == Path("runs/Squares/tensorboard/fit")

    def test_a_root_of_the_user_is_divided_among_the_phases(self, tmp_path):
        recipe = Squares(trainer={"default_root_dir": "scratch", "logger": False})
        recipe.run()
        assert recipe.seen[0]["default_root_dir"] == Path("scratch/fit")
        assert recipe.seen[0]["logger"] is False
        assert not (tmp_path / "runs/Squares/tensorboard").exists()

    def test_the_users_arguments_are_read_once(self, tmp_path, monkeypatch):
        read, built = [], []

        def once(trainer, imports):
            read.append(trainer)
            return lambda: built.append(1) or {"max_epochs": 1}

        monkeypatch.setattr("lightning_interp.running.settings.trainer_arguments", once)
        recipe = Squares(trainer={"max_epochs": 1})
        recipe.run()
        assert (read, len(built)) == ([{"max_epochs": 1}], 2)  # built before the run to see that it can be, and for it

    def test_a_wrong_argument_is_said_before_the_folder_is_made(self, tmp_path):
        with pytest.raises(RecipeError, match=r"no argument 'max_epoch'. Did you mean 'max_epochs'"):
            Squares(trainer={"max_epoch": 3}).run()
        assert list(tmp_path.iterdir()) == []

    def test_outside_of_a_phase_there_is_no_trainer(self, monkeypatch):
        recipe = Other()
        monkeypatch.setattr(Other, "do", recipe.trainer_kwargs)
        with pytest.raises(RecipeError, match=r"trainer_kwargs\(\) was called outside of a phase"):
            recipe.run()

    def test_a_phase_that_begins_anew_begins_its_curves_anew(self, tmp_path):
        old = tmp_path / "runs/Squares/tensorboard/fit/events.out.tfevents.0.old"
        Squares().run()
        old.write_text("curves of weights that are gone")
        Squares().run()
        assert old.exists()
        for path in (tmp_path / "runs/Squares/phases/fit").iterdir():
            path.unlink()
        (tmp_path / "runs/Squares/phases/fit").rmdir()
        Squares().run()
        assert not old.exists()


class TestInterruption:
    class Stop(Callback):
        def __init__(self, error):
            self.error = error

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise self.error

    @pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
    def handler(self, request):
        """What Ctrl-C does when a run begins: a shell starts what is in its background with it ignored."""
        found = signal.signal(signal.SIGINT, request.param)
        yield request.param
        signal.signal(signal.SIGINT, found)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
    def test_a_run_goes_on_from_its_checkpoint_to_the_same_result(self, tmp_path, monkeypatch, handler, error):
        plain = Squares(run_dir="plain").run()
        steps = []
        original = Line.training_step

        def counted(module, batch, index):
            steps.append(module.global_step)
            return original(module, batch, index)

        monkeypatch.setattr(Line, "training_step", counted)
        recipe = Squares(run_dir="stopped")
        kwargs = Recipe.trainer_kwargs
        monkeypatch.setattr(
            Squares,
            "trainer_kwargs",
            lambda self, run, **more: kwargs(self, run, **more | {"callbacks": [*more["callbacks"], self_stop]}),
        )
        self_stop = self.Stop(error)
        with pytest.raises(type(error)):
            recipe.run()
        assert signal.getsignal(signal.SIGINT) == handler  # Lightning leaves Ctrl-C ignored
        status = "failed" if isinstance(error, Exception) else "interrupted"
        state = read_manifest(tmp_path / "stopped")
        assert [phase["status"] for phase in state["phases"].values()] == ["finished", status]
        assert state["phases"]["fit"]["message"].startswith(type(error).__name__)
        assert steps == [0, 1, 2]
        monkeypatch.setattr(Squares, "trainer_kwargs", kwargs)
        result = Squares(run_dir="stopped").run()
        assert steps == [0, 1, 2, 2, 3]  # stopped before step 2 was saved, so it is done again
        assert result.metrics["w"] == plain.metrics["w"]
        for name in ("tables/points.csv", "figures/line.png"):
            assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"seed": -1}, "seed=-1: expected a number from 0"),
            ({"seed": None}, "seed=None: expected a number from 0"),
            ({"seed": True}, "seed=True: expected a number from 0"),
            ({"seed": 1.0}, "seed=1.0: expected a number from 0"),
            ({"run_dir": "a\nb"}, "it holds a line break or another control character"),
            ({"run_dir": "a\u2028b"}, "it holds a line break or another control character"),
            ({"seed": 2**32}, "seed=4294967296"),
            ({"run_dir": " "}, "run_dir=' ': expected a folder"),
            ({"trainer": ["a"]}, r"trainer=\['a'\]: expected a dict"),
        ],
    )
    def test_wrong_values_are_refused_at_once(self, fields, message):
        with pytest.raises(RecipeError, match=message):
            Squares(**fields)

    def test_a_class_that_forgot_to_be_a_dataclass_is_refused(self):
        class Forgetful(Squares):
            width: int = 3

        with pytest.raises(RecipeError, match="Forgetful has the fields width but is no dataclass"):
            Forgetful()

    def test_the_model_of_a_smoke_run_is_tiny_unless_one_is_named(self):
        assert Squares().source == "smollm2-135m-instruct"
        assert Squares(model="gpt2").source == "gpt2"
        assert Squares(smoke=True).source == "tiny:llama"
        assert Squares(smoke=True, model="tiny:gpt2").source == "tiny:gpt2"

    def test_run_folders(self):
        assert Squares().run_path == Path("runs/Squares")
        assert Squares(smoke=True).run_path == Path("runs/Squares-smoke")
        assert Squares(smoke=True, run_dir="here").run_path == Path("here")


class TestResult:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"tables": {"../x": []}}, r"'\.\./x' cannot name a table"),
            ({"figures": {"a/b": None}}, "'a/b' cannot name a figure"),
            ({"tables": {"a": [], "b": []}, "summary": "c"}, "summary='c' names no table; the tables are a, b"),
            ({"artifacts": {"adapter": Path("/nowhere")}}, "Artifact 'adapter' does not exist: '/nowhere'"),
        ],
    )
    def test_wrong_names_are_refused(self, fields, message):
        with pytest.raises(RecipeError, match=message):
            RecipeResult(**fields)

    def test_the_first_table_is_the_summary(self):
        assert RecipeResult(tables={"b": [], "a": []}).summary == "b"
        assert RecipeResult().summary == ""

    def test_a_result_of_nothing_is_fine(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(Other, "do", lambda run: RecipeResult())
        Other().run()
        assert capsys.readouterr().out == "report: runs/Other/report.html\n"

    def test_a_study_that_returns_something_else(self, monkeypatch):
        monkeypatch.setattr(Other, "do", lambda run: {"accuracy": 1})
        with pytest.raises(RecipeError, match=r"Other\.study\(\) returned {'accuracy': 1}: expected a RecipeResult"):
            Other().run()

    def test_a_value_that_cannot_be_written_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr(Other, "do", lambda run: RecipeResult(metrics={"model": object()}))
        with pytest.raises(DataError, match="Cannot write model as JSON"):
            Other().run()
        assert read_manifest(tmp_path / "runs/Other")["sessions"][-1]["status"] == "failed"
        monkeypatch.setattr(Other, "do", lambda run: RecipeResult(metrics={"ok": 1}))
        Other().run()
        assert read_manifest(tmp_path / "runs/Other")["sessions"][-1]["status"] == "finished"


def test_further_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    config = Squares().config()
    with RunManifest.open(tmp_path / "runs/Squares", config=config, name="Squares") as manifest:
        manifest.phase("data", lambda folder: [[0.0, 0.0]] * 8)
        manifest.phase("fit", lambda folder: 2.0)
        before = files(tmp_path)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert Squares().run().metrics["w"] == 2.0
    assert files(tmp_path) == before
    assert capsys.readouterr().out == ""


def test_importing_recipes_costs_nothing_heavy():
    heavy = ("torch", "lightning", "transformers", "jsonargparse", "rich", "matplotlib")
    code = f"import sys, lightning_interp.recipe; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.stdout == "[]\n", out.stderr


class _Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_could_run_code_ends_the_run_before_it_does(tmp_path, zipped):
    for attempt in range(2):
        with RunManifest.open(tmp_path / "run", config={}, name="demo") as manifest:

            def fit(folder, first=attempt == 0):
                if first:
                    torch.save(_Command(tmp_path / "HIT"), folder / "last.ckpt", _use_new_zipfile_serialization=zipped)
                    raise KeyboardInterrupt
                return torch.load(folder / "last.ckpt")

            error, match = (
                (KeyboardInterrupt, "") if attempt == 0 else (ManifestError, r"holds more than numbers.*Delete")
            )
            with pytest.raises(error, match=match):
                RunFolder(manifest).phase("fit", fit)
    assert not (tmp_path / "HIT").exists()
