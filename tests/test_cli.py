import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from lightning_interp import cli
from lightning_interp.cli import main
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.running import catalog

ROOT = Path(__file__).parents[1]

CODE = '''
"""A recipe for tests: a line through squares, trained with a checkpoint at each step."""
from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_interp.errors import DataError
from lightning_interp.recipe import Recipe, RecipeResult

if TYPE_CHECKING:  # jsonargparse would import this for a help text
    import torch


@dataclass(kw_only=True)
class Squares(Recipe):
    """Fits a line to squares."""

    epochs: int = 2
    """How often the data is seen."""
    learning_rate: float = 0.1
    """Step size."""
    mode: Literal["lora", "full"] = "lora"
    """What is trained."""
    broken: bool = False
    """Whether a phase fails."""

    def study(self, run):
        data = run.phase("data", self.data)
        w = run.phase("fit", lambda folder: self.fit(run, folder, data), every_rank=True)
        pid = run.phase("evaluate", lambda folder: os.getpid())
        rows = [{"x": x, "fitted": w * x} for x, _ in data]
        return RecipeResult(metrics={"w": w, "source": self.source}, tables={"points": rows}, question="Which line?")

    def data(self, folder):
        if self.broken:
            raise DataError("facts.jsonl, line 3: no entity")
        return [[x / 4, x * x / 16] for x in range(8)]

    def fit(self, run, folder, data):
        import torch
        from lightning.pytorch import LightningModule, Trainer
        from lightning.pytorch.callbacks import Callback, ModelCheckpoint

        class Line(LightningModule):
            def __init__(self, lr):
                super().__init__()
                self.w, self.lr = torch.nn.Parameter(torch.zeros(1)), lr

            def training_step(self, batch, index):
                return ((self.w * batch[:, 0] - batch[:, 1]) ** 2).mean()

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), self.lr)

        class Marks(Callback):
            def on_train_batch_end(self, trainer, *_):
                if os.environ.get("STOP_AT") == str(trainer.global_step):
                    (folder / "stopping").touch()
                    for _ in range(600):
                        time.sleep(0.1)

        last = folder / "last.ckpt"
        callbacks = [Marks(), ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)]
        trainer = Trainer(**self.trainer_kwargs(run, max_epochs=self.epochs, accelerator="cpu", callbacks=callbacks))
        loader = torch.utils.data.DataLoader(torch.tensor(data), batch_size=2)
        module = Line(self.learning_rate)
        trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
        return module.w.item()
'''
BOMB = ", ".join(f"&l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
YAML = """\
# Which line goes through squares?
#
# Time: a second.
recipe: method/squares
epochs: 2
trainer:
  max_epochs: ${epochs}
"""


@pytest.fixture(autouse=True)
def _recipes(tmp_path, monkeypatch):
    """A folder of recipes in place of the package's own; runs go to a folder of the test."""
    monkeypatch.setattr(catalog, "recipes_dir", lambda: tmp_path / "recipes")
    atomic_write_text(tmp_path / "recipes/method/squares.py", CODE)
    atomic_write_text(tmp_path / "recipes/method/squares.yaml", YAML)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(catalog.MODULES)}
    yield
    for name in [name for name in sys.modules if name.startswith(catalog.MODULES)]:
        del sys.modules[name]
    sys.modules.update(saved)


def said(capsys, *argv, code):
    """Run a command; return what it said on standard error, which must be one line and no traceback."""
    assert main([str(argument) for argument in argv]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("lightning-interp: ")
    return err


class TestRun:
    def test_a_recipe_by_name_with_overrides(self, tmp_path, capsys):
        assert main(["run", "method/squares", "--epochs=3", "--trainer.limit_train_batches=1", "--seed", "5"]) == 0
        out, err = capsys.readouterr()
        assert "method/squares: points" in out
        assert out.splitlines()[-1] == "report: runs/method/squares/report.html"
        assert "phase fit: finished in " in err
        assert [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d (run folder|phase )", line)] == []
        written = yaml.safe_load((tmp_path / "work/runs/method/squares/config.yaml").read_text())
        assert written["recipe"] == "method/squares"
        assert written["trainer"] == {"max_epochs": 3, "limit_train_batches": 1}
        assert (written["seed"], written["epochs"]) == (5, 3)

    def test_the_written_settings_run_again_and_go_on(self, tmp_path, capsys):
        assert main(["run", "method/squares", "--epochs=1"]) == 0
        first = json.loads(Path("runs/method/squares/metrics.json").read_text())
        capsys.readouterr()
        assert main(["run", "runs/method/squares/config.yaml"]) == 0
        assert "phase fit: finished before, its result is used" in capsys.readouterr().err
        assert main(["run", "runs/method/squares/config.yaml", "--run_dir=elsewhere"]) == 0
        assert json.loads(Path("elsewhere/metrics.json").read_text()) == first

    def test_a_file_of_the_users_own_runs_in_a_folder_of_its_name(self, tmp_path, capsys):
        atomic_write_text(tmp_path / "work/sub/code.py", CODE)
        atomic_write_text(tmp_path / "work/sub/mine.yaml", "recipe: code.py\nepochs: 1\n")
        assert main(["run", "sub/mine.yaml"]) == 0
        assert "lightning-interp: sub/mine.yaml runs the code of sub/code.py\n" in capsys.readouterr().err
        written = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
        assert written["recipe"] == "../../sub/code.py"
        command = Path("runs/mine/config.yaml").read_text().splitlines()[0].partition("lightning-interp ")[2]
        assert command == "run runs/mine/config.yaml --import=sub/code.py"
        assert main(command.split()) == 0
        assert main(["run", "--import", "sub/code.py", "runs/mine/config.yaml", "--run_dir=again/deeper/here"]) == 0
        assert yaml.safe_load(Path("again/deeper/here/config.yaml").read_text())["recipe"] == "../../../sub/code.py"

    def test_smoke_takes_a_tiny_model_unless_one_is_named(self, tmp_path):
        named = atomic_write_text(tmp_path / "work/named.yaml", YAML + "model: Qwen/Qwen2.5-1.5B\n")
        for argv, folder, source in (
            (["method/squares", "--smoke=true"], "runs/method/squares-smoke", "tiny:llama"),
            ([str(named), "--smoke=true"], "runs/named-smoke", "tiny:llama"),
            ([str(named), "--smoke=true", "--model=tiny:gpt2", "--run_dir=x"], "x", "tiny:gpt2"),
            ([str(named), "--run_dir=y"], "y", "Qwen/Qwen2.5-1.5B"),
        ):
            assert main(["run", *argv, "--trainer.limit_train_batches=1"]) == 0
            assert json.loads(Path(folder, "metrics.json").read_text())["source"] == source

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--lerning_rate=1"], "has no field '--lerning_rate'. Did you mean 'learning_rate'?"),
            (["--epochs=few"], "--epochs: the value of 'epochs' does not fit: expected int, got 'few'"),
            (["--mode=ful"], "expected one of 'lora', 'full', got 'ful'"),
            (["--seed=-1"], "seed=-1: expected a number from 0"),
            (["--trainer.max_epoch=3"], "The Trainer has no argument 'max_epoch'. Did you mean 'max_epochs'?"),
            (["--trainer.precision=bf17-mixed"], "got 'bf17-mixed'. Did you mean 'bf16-mixed'?"),
            (["--smoke"], "argument --smoke: expected one argument"),
        ],
    )
    def test_a_wrong_setting_is_wrong_use_and_nothing_is_made(self, tmp_path, capsys, argv, message):
        assert message in said(capsys, "run", "method/squares", *argv, code=2)
        assert list((tmp_path / "work").iterdir()) == []

    def test_a_misspelt_key_in_yaml_is_wrong_use(self, tmp_path, capsys):
        path = atomic_write_text(tmp_path / "work/mine.yaml", "recipe: method/squares\nepocs: 3\n")
        message = said(capsys, "run", path, code=2)
        assert "mine.yaml, line 2: there is no field 'epocs'. Did you mean 'epochs'?" in message

    def test_what_does_not_exist_is_wrong_use(self, capsys):
        assert "There is no recipe 'method/square'. Did you mean" in said(capsys, "run", "method/square", code=2)
        assert "There is no recipe '../x'" in said(capsys, "run", "../x", code=2)
        assert "There is no file 'no.yaml'" in said(capsys, "run", "no.yaml", code=2)
        assert "the following arguments are required: NAME" in said(capsys, "run", code=2)
        assert "invalid choice: 'fly'" in said(capsys, "fly", code=2)

    def test_an_error_of_the_package_is_one_line_or_a_traceback_on_demand(self, capsys, monkeypatch):
        from lightning_interp.errors import DataError

        assert main(["run", "method/squares", "--broken=true"]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "lightning-interp: facts.jsonl, line 3: no entity"
        Path("file").write_text("")
        assert "Cannot write 'file/x': Not a directory" in said(
            capsys, "run", "method/squares", "--run_dir=file/x", code=1
        )
        message = said(capsys, "run", "method/squares", "--epochs=9", code=1)
        assert "broken: true there, false now" in message
        assert "epochs: 2 there, 9 now" in message
        monkeypatch.setenv("LIGHTNING_INTERP_DEBUG", "1")
        with pytest.raises(DataError):
            main(["run", "method/squares", "--broken=true"])

    def test_help_of_a_recipe(self, capsys):
        for argv in (["--help"], ["--epochs=3", "-h"]):
            assert main(["run", "method/squares", *argv]) == 0
            out = " ".join(capsys.readouterr().out.split())
            assert "Which line goes through squares? Time: a second." in out
            assert "--learning_rate LEARNING_RATE Step size. (type: float, default: 0.1)" in out
            assert "--trainer TRAINER Arguments of Lightning's Trainer" in out
            assert "default: {'max_epochs': 2}" in out


class TestForeignFiles:
    """A settings file or a run folder that somebody sent."""

    @pytest.fixture
    def foreign(self, tmp_path, monkeypatch):
        """Settings whose recipe is code that leaves the file HIT behind."""
        code = f"from pathlib import Path\nPath({str(tmp_path / 'HIT')!r}).touch()\n{CODE.lstrip()}"
        atomic_write_text(tmp_path / "sent/hit.py", code.replace("from __future__ import annotations", ""))
        monkeypatch.syspath_prepend(tmp_path / "sent")
        yield tmp_path / "sent"
        sys.modules.pop("hit", None)

    @pytest.mark.parametrize("key", ["hit.py", "../sent/hit.py", "hit.Squares", "./hit.py"])
    def test_help_runs_no_code_of_a_file(self, tmp_path, foreign, capsys, key):
        path = atomic_write_text(foreign / "a.yaml", f"# Asks why.\nrecipe: {key}\n")
        assert main(["run", str(path), "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("Asks why.\n")
        named = out.rpartition("--import=")[2].strip()
        assert not (tmp_path / "HIT").exists()
        assert main(["run", str(path), "--help", f"--import={named}"]) == 0
        assert "--learning_rate" in capsys.readouterr().out
        assert (tmp_path / "HIT").exists()

    @pytest.mark.parametrize(("name", "key"), [("a.yaml", "hit.Squares"), ("config.yaml", "hit.py")])
    def test_code_that_the_user_must_name(self, tmp_path, foreign, capsys, name, key):
        path = atomic_write_text(foreign / name, f"recipe: {key}\nepochs: 1\n")
        if name == "config.yaml":
            RunManifest.open(foreign, config={}, name="Squares").close()
        message = said(capsys, "run", path, code=2)
        assert "its recipe is code outside of this package" in message
        assert not (tmp_path / "HIT").exists()
        named = message.rpartition("--import=")[2].strip()
        assert main(["run", str(path), f"--import={named}", "--run_dir=x"]) == 0

    def test_the_settings_of_a_run_folder_go_on_in_that_folder(self, tmp_path, capsys):
        assert main(["run", "method/squares", "--epochs=1"]) == 0
        capsys.readouterr()
        Path("runs/method/squares").rename("moved")
        message = said(capsys, "run", "moved/config.yaml", code=2)
        assert "its run_dir is 'runs/method/squares', and not the run folder in which it lies" in message
        assert main(["run", "moved/config.yaml", message.split()[-1]]) == 0
        assert not Path("runs/method/squares").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: null\n", "line 2: the value of 'seed' does not fit: expected int, got null"),
            ("model: null\n", "line 2: the value of 'model' does not fit: expected str, got null"),
            ("smoke: null\n", "line 2: the value of 'smoke' does not fit: expected bool, got null"),
            ("seed: true\n", "'seed' does not fit"),
            ("seed: 1.5\n", "'seed' does not fit"),
            ('run_dir: "a\\nb"\n', "run_dir='a\\nb': it holds a line break"),
            ("model: ${oc.env:HOME}\n", "line 2: '${oc.env:HOME}' asks for more than another key's value"),
            ("model: x${a${oc.decode:b}}\n", "asks for more than another key's value"),
            ('model: "\\u0024{oc.create:x}"\n', "asks for more than another key's value"),
            ("model: !!python/object/apply:os.system ['touch HIT']\n", "line 2: 'tag:yaml.org,2002:python/object"),
            ("model: !!python/name:os.system\n", "is no plain value"),
            ("model: !mine x\n", "line 2: '!mine' is no plain value"),
            ("trainer: &a {x: *a}\n", "by references"),
            ("? [a, b]\n: 1\n", "line 2: a key is no text"),
            ("# \x1b[31m\n", "special characters are not allowed in"),
            ("model: https://me:word@host/m\n", "model holds a key, or an address with a user or a password"),
            ("trainer: {x: [{y: 'https://me:word@host/m'}]}\n", "trainer holds a key, or an address with a user"),
            ("model: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
            (
                "model: ["
                + ", ".join(f"&l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
                + "]\n",
                "more than 100000 values, by references",
            ),
            ("trainer: {callbacks: [{class_path: hit.Mark}]}\n", "'hit.Mark' is neither a class of Lightning's"),
            ("trainer: {max_epochs: {class_path: os.system, init_args: {command: touch HIT}}}\n", "does not fit"),
        ],
    )
    def test_what_a_settings_file_cannot_say(self, tmp_path, foreign, capsys, text, message):
        path = atomic_write_text(foreign / "a.yaml", f"recipe: method/squares\n{text}")
        assert message in said(capsys, "run", path, code=2)
        assert os.listdir() == []
        assert not (tmp_path / "HIT").exists()

    def test_classes_of_a_module_that_the_user_names(self, tmp_path, foreign):
        atomic_write_text(
            foreign / "mark.py",
            "from lightning.pytorch.callbacks import Callback\nclass Mark(Callback):\n"
            "    def __init__(self, name: str):\n        self.name = name\n"
            "    def on_fit_start(self, *_):\n        open(self.name, 'w').close()\n",
        )
        path = atomic_write_text(
            foreign / "a.yaml",
            "recipe: method/squares\nepochs: 1\n"
            "trainer: {callbacks: [{class_path: mark.Mark, init_args: {name: begun}}]}\n",
        )
        assert main(["run", str(path)]) == 2
        assert main(["run", str(path), "--import=mark"]) == 0
        assert Path("begun").exists()
        written = yaml.safe_load(Path("runs/a/config.yaml").read_text())
        assert written["trainer"]["callbacks"] == [{"class_path": "mark.Mark", "init_args": {"name": "begun"}}]
        assert main(["run", "runs/a/config.yaml"]) == 2
        command = Path("runs/a/config.yaml").read_text().splitlines()[0].partition("lightning-interp ")[2]
        assert command == "run runs/a/config.yaml --import=mark"
        assert main(command.split()) == 0

    def test_links_in_a_run_folder_are_refused_by_every_command(self, tmp_path, capsys):
        assert main(["run", "method/squares", "--epochs=1"]) == 0
        capsys.readouterr()
        outside = atomic_write_text(tmp_path / "outside", "as it was")
        report = Path("runs/method/squares/report.html")
        report.unlink()
        report.symlink_to(outside)
        for argv in (["run", "method/squares", "--epochs=1"], ["show", report.parent], ["report", report.parent]):
            assert "report.html' is a link to " in said(capsys, *argv, code=1)
        assert outside.read_text() == "as it was"

    def test_a_manifest_puts_no_foreign_file_into_the_report(self, tmp_path, capsys):
        assert main(["run", "method/squares", "--epochs=1"]) == 0
        capsys.readouterr()
        atomic_write_text(tmp_path / "outside.csv", "a\nsecret\n")
        manifest = Path("runs/method/squares/manifest.json")
        before = manifest.read_text()
        for wrong in ('"../../../../outside"', '"/etc/passwd"', '"a/b"', "7", "null", '["points"]'):
            atomic_write_text(manifest, before.replace('"points"', wrong))
            for command in ("show", "report"):
                message = said(capsys, command, manifest.parent, code=1)
                assert "manifest.json' is damaged: " in message

    def test_a_copy_follows_no_link(self, tmp_path, capsys):
        outside = atomic_write_text(tmp_path / "outside", "as it was")
        Path("folder").mkdir()
        Path("folder/squares.py").symlink_to(outside)
        assert "'folder/squares.py' is a link" in said(capsys, "copy", "method/squares", "folder", "--force", code=2)
        assert outside.read_text() == "as it was"


class TestInterruption:
    """In forked processes, which have Lightning imported already and take signals of their own."""

    plain: ClassVar[dict[str, bytes]] = {}  # what a run leaves that was not stopped

    def stopped(self, signum, tmp_path):
        folder = tmp_path / "work/run"
        process = multiprocessing.get_context("fork").Process(target=self.command, args=(tmp_path, "5"))
        process.start()
        try:
            for _ in range(600):
                if (folder / "phases/fit/stopping").exists():
                    break
                time.sleep(0.05)
            os.kill(process.pid, signum)
            process.join(timeout=60)
        finally:
            process.kill()
        return process.exitcode, (tmp_path / "said-5").read_text()

    @staticmethod
    def command(tmp_path, stop_at):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["STOP_AT"] = stop_at
        out = os.open(tmp_path / f"said-{stop_at}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = main(["run", "method/squares", "--run_dir", str(tmp_path / "work/run"), "--epochs=3"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @pytest.mark.parametrize(
        ("signum", "code", "word", "status"),
        [
            (signal.SIGTERM, 143, "SIGTERM", "interrupted"),
            (signal.SIGINT, 130, "Ctrl-C", "interrupted"),
            (signal.SIGKILL, -9, None, "running"),
        ],
    )
    def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not_stopped(
        self, tmp_path, capsys, monkeypatch, signum, code, word, status
    ):
        import lightning.pytorch  # noqa: F401 - before the fork

        exitcode, text = self.stopped(signum, tmp_path)
        folder = tmp_path / "work/run"
        assert exitcode == code, text
        if word:
            hint = f"lightning-interp: stopped by {word}; what is finished is kept. Go on with: lightning-interp run "
            assert text.splitlines()[-1] == f"{hint}method/squares --run_dir {folder} --epochs=3"
        state = read_manifest(folder)
        assert state["phases"]["fit"]["status"] == status
        assert state["sessions"][-1]["status"] == status
        assert main(["show", str(folder)]) == 0
        out = capsys.readouterr().out
        assert ("stopped by a kill" in out) == (signum == signal.SIGKILL)
        assert "No table yet" in out
        monkeypatch.delenv("STOP_AT", raising=False)
        assert main(["run", "method/squares", f"--run_dir={folder}", "--epochs=3"]) == 0
        assert "phase fit: goes on where it stopped" in capsys.readouterr().err
        if not self.plain:
            assert main(["run", "method/squares", "--run_dir=plain", "--epochs=3"]) == 0
            self.plain |= {name: Path("plain", name).read_bytes() for name in ("metrics.json", "tables/points.csv")}
        assert read_manifest(folder)["phases"]["fit"]["attempts"] == 2
        assert {name: (folder / name).read_bytes() for name in self.plain} == self.plain


class TestOtherCommands:
    def test_list(self, tmp_path, capsys):
        atomic_write_text(tmp_path / "recipes/a/b.py", CODE)
        atomic_write_text(tmp_path / "recipes/a/b.yaml", "recipe: a/b\n")
        assert main(["list"]) == 0
        assert capsys.readouterr().out == "a/b\nmethod/squares  Which line goes through squares?\n"

    def test_list_of_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(catalog, "recipes_dir", lambda: tmp_path / "gone")
        assert f"There are no recipes in '{tmp_path}/gone'" in said(capsys, "list", code=1)

    def test_copy_and_run_the_copy(self, tmp_path, capsys):
        assert main(["copy", "method/squares", "mine.yaml"]) == 0
        assert capsys.readouterr().out == "Edit mine.yaml, then: lightning-interp run mine.yaml\n"
        assert Path("mine.yaml").read_text() == YAML
        Path("mine.yaml").write_text(YAML.replace("epochs: 2", "epochs: 1"))
        assert "'mine.yaml' exists. Give another name, or --force" in said(
            capsys, "copy", "method/squares", "mine.yaml", code=2
        )
        assert main(["run", "mine.yaml"]) == 0
        assert yaml.safe_load(Path("runs/mine/config.yaml").read_text())["epochs"] == 1
        assert main(["copy", "method/squares", "mine.yaml", "--force"]) == 0
        assert Path("mine.yaml").read_text() == YAML

    def test_a_copy_in_a_folder_has_the_code_and_its_helpers(self, tmp_path, capsys):
        beside = tmp_path / "recipes/method"
        atomic_write_text(beside / "_common.py", "SIZE = 1\n")
        atomic_write_text(beside / "squares.py", CODE.replace("@dataclass", "from ._common import SIZE\n@dataclass", 1))
        assert main(["copy", "method/squares", "folder"]) == 0
        assert capsys.readouterr().out == "Edit folder/squares.yaml, then: lightning-interp run folder/squares.yaml\n"
        assert sorted(path.name for path in Path("folder").iterdir()) == ["_common.py", "squares.py", "squares.yaml"]
        assert Path("folder/squares.yaml").read_text() == YAML.replace("recipe: method/squares", "recipe: squares.py")
        assert main(["copy", "method/squares", "folder"]) == 0  # nothing there is another
        Path("folder/_common.py").write_text("SIZE = 2\n")
        assert "'folder/_common.py' exists" in said(capsys, "copy", "method/squares", "folder", code=2)
        assert main(["run", "folder/squares.yaml"]) == 0
        assert yaml.safe_load(Path("runs/squares/config.yaml").read_text())["recipe"].endswith("folder/squares.py")
        assert main(["copy", "method/squares", "folder", "--force"]) == 0
        assert Path("folder/_common.py").read_text() == "SIZE = 1\n"

    def test_copy_refuses(self, capsys):
        Path("file").write_text("")
        assert "'mine.txt': expected a name that ends in .yaml" in said(
            capsys, "copy", "method/squares", "mine.txt", code=2
        )
        assert "There is no recipe 'squares'. Did you mean 'method/squares'?" in said(
            capsys, "copy", "squares", "mine.yaml", code=2
        )
        Path("own.py").write_text(CODE)
        assert "'own.py' is no recipe of this package" in said(capsys, "copy", "own.py", "mine.yaml", code=2)
        assert "Cannot write 'file/mine.yaml': Not a directory" in said(
            capsys, "copy", "method/squares", "file/mine.yaml", code=1
        )

    def test_show_and_report_of_a_finished_run(self, capsys):
        assert main(["run", "method/squares", "--epochs=1"]) == 0
        table = capsys.readouterr().out.splitlines()[1:-1]
        assert main(["show", "runs/method/squares"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("method/squares in runs/method/squares: finished\n")
        assert "\n".join(table) in out  # the same table as at the end of the run
        report = Path("runs/method/squares/report.html")
        text = report.read_text()
        report.unlink()
        assert main(["report", "runs/method/squares"]) == 0
        assert capsys.readouterr().out == f"{report}\n"
        assert report.read_text() == text

    def test_show_of_a_run_that_is_at_work_or_has_failed(self, capsys):
        with RunManifest.open("work", config={}, name="demo"):
            assert main(["show", "work"]) == 0
        assert "demo in work: running" in capsys.readouterr().out
        assert main(["run", "method/squares", "--broken=true"]) == 1
        capsys.readouterr()
        assert main(["show", "runs/method/squares"]) == 0
        assert "failed (DataError: facts.jsonl, line 3: no entity)" in capsys.readouterr().out

    def test_show_lists_child_runs_with_their_state(self, capsys):
        with RunManifest.open("work", config={}, name="demo") as run:
            with run.child("cycle-0", config={}) as child:
                child.phase("fit", lambda folder: 1)
                child.child("inner", config={}).close()
            child = run.child("cycle-1", config={})
            main(["show", "work"])
            child.close("failed", "no more disk")
        assert "running" in capsys.readouterr().out.partition("cycle-1")[2]
        main(["show", "work"])
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        head, _, *table = lines[lines.index("child runs") + 1 :]
        assert head == "child status phases finished seconds message"
        begun = [line.rpartition(" of ")[0] for line in table[:3]]
        assert begun == ["cycle-0 finished 1", "cycle-0/inner finished 0", "cycle-1 failed 0"]
        assert table[2].endswith("no more disk")

    def test_no_run_folder(self, capsys):
        for command in ("show", "report"):
            assert "'nothing' is no run folder" in said(capsys, command, "nothing", code=1)

    def test_version_and_help(self, capsys):
        for argv, text in ((["--version"], "lightning-interp 0."), (["--help"], "run grafting/facts")):
            with pytest.raises(SystemExit) as caught:
                main(argv)
            assert caught.value.code == 0
            assert text in capsys.readouterr().out


def test_help_and_a_recipes_help_import_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom lightning_interp.running import catalog\nfrom pathlib import Path\n"
        "catalog.recipes_dir = lambda: Path(sys.argv[1])\nfrom lightning_interp.cli import build_parser, main\n"
        "build_parser().format_help()\n"
        "first = sorted(sys.modules)\nmain(['list'])\nmain(['run', 'method/squares', '--help'])\n"
        "heavy = ('torch', 'numpy', 'lightning', 'transformers', 'peft', 'matplotlib', 'rich', 'jinja2')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print([name for name in (*heavy, 'jsonargparse', 'yaml') if name in first])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "recipes")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_the_module_is_the_command():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_interp", "run", "no/such"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-interp: There is no recipe 'no/such'.")


def test_warnings_of_kernels_that_a_processor_lacks_are_not_shown_and_levels_come_back():
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert theirs.isEnabledFor(logging.WARNING)
    with cli._phase_lines():
        assert not theirs.isEnabledFor(logging.WARNING)
        assert theirs.isEnabledFor(logging.ERROR)
    assert theirs.isEnabledFor(logging.WARNING)
