"""A recipe under Lightning's own launcher, which starts the whole command again for the second rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest_file import read_manifest

ROOT = Path(__file__).parents[1]

CODE = '''
import os
from dataclasses import dataclass
from lightning_interp.recipe import Recipe, RecipeResult


@dataclass(kw_only=True)
class Line(Recipe):
    """Trains one number on two ranks."""

    def study(self, run):
        data = run.phase("data", lambda folder: {"by": os.getpid(), "pairs": [[x / 4, x * x / 16] for x in range(8)]})
        first = run.phase("fit", lambda folder: self.fit(run, data["pairs"]), every_rank=True)
        by = run.phase("between", lambda folder: os.getpid())
        second = run.phase("fit-again", lambda folder: self.fit(run, data["pairs"]), every_rank=True)
        return RecipeResult(
            metrics={"pids": [data["by"], by], "w": [first["w"], second["w"]], "world": first["world"]},
            tables={"numbers": [{"w": first["w"]}]},
        )

    def fit(self, run, pairs):
        import torch
        from lightning.pytorch import LightningModule, Trainer

        class Number(LightningModule):
            def __init__(self):
                super().__init__()
                self.w = torch.nn.Parameter(torch.zeros(1))

            def training_step(self, batch, index):
                return ((self.w * batch[:, 0] - batch[:, 1]) ** 2).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        trainer = Trainer(**self.trainer_kwargs(run, max_epochs=2, enable_checkpointing=False))
        module = Number()
        trainer.fit(module, torch.utils.data.DataLoader(torch.tensor(pairs), batch_size=2))
        return {"w": module.w.item(), "world": trainer.world_size}
'''


def test_two_ranks_make_one_run(tmp_path):
    recipe = atomic_write_text(tmp_path / "line.py", CODE)
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--run_dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_interp", "run", str(recipe), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["world"] == 2
    assert len(set(metrics["pids"])) == 1  # rank zero alone did what was to be done once
    assert metrics["w"][0] == metrics["w"][1] != 0
    state = read_manifest(tmp_path / "run")
    assert [phase["status"] for phase in state["phases"].values()] == ["finished"] * 4
    assert [session["status"] for session in state["sessions"]] == ["finished"]
    assert done.stdout.count("report: run/report.html") == 1
    assert done.stderr.count("phase between: finished in") == 1
