"""Monitors in real Trainers: when they look, what they leave alone, what they log, and how a run is resumed."""

from __future__ import annotations

import math
import random

import lightning as L
import numpy as np
import pytest
import rig
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_interp.core.callbacks.monitor import Monitor, own_rows
from lightning_interp.core.measure.reduced import KeyedRows, Sums
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.errors import CompiledModelError, RecipeError, UnsupportedStrategyError
from lightning_interp.testing import CallbackContract

pytestmark = pytest.mark.usefixtures("two_layers")

ROWS = torch.arange(5.0)[:, None]


class Squares(KeyedRows):
    def __init__(self):
        super().__init__(1)

    def update(self, index, values):
        self.add(index, values)

    def compute(self):
        return self.table()[1][:, 0]


class Watch(Monitor):
    """Mean output over fixed rows, shared out; it draws numbers and turns modes, as a careless subclass may."""

    fails = False

    def look(self, trainer, module):
        assert not module.training
        assert torch.is_grad_enabled() == self.gradients
        torch.rand(2), random.random(), np.random.rand()  # noqa: S311
        module.train()
        module.requires_grad_(False)
        if self.fails:
            raise ZeroDivisionError
        own, metric = list(own_rows(trainer, len(ROWS))), Squares().to(module.device)
        self.shared = own
        metric.update(torch.tensor(own), module.layer(ROWS[own])[:, :1])
        return {"mean": metric.compute().mean(), "sum": float(metric.compute().sum())}


class Slope(Watch):
    gradients = True

    def look(self, trainer, module):
        assert torch.is_grad_enabled()
        assert module.layer.weight.grad is None
        module.layer(torch.ones(1, 1)).square().sum().backward()
        return {"slope": float(module.layer.weight.grad)}


class Module(L.LightningModule):
    """Dropout and the order of rows draw from the global random state."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.frozen = nn.Linear(1, 1), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        with torch.no_grad():
            self.layer.weight.fill_(1.0), self.layer.bias.fill_(0.5)

    def training_step(self, batch, batch_idx):
        return self.layer(self.dropout(batch)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen = batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(8.0)[:, None], batch_size=2, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(ROWS, batch_size=5)


def trainer(folder, *callbacks, **options):
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    return rig.trainer(folder, *callbacks, **{"max_epochs": 2, "enable_checkpointing": saves, **options})


def looks(callback):
    return [(int(entry["epoch"]), int(entry["step"])) for entry in callback.history]


class Norms(Monitor):
    def look(self, trainer, module):
        return {"norm": float(sum(p.norm() for p in module.parameters()))}


class TestContract(CallbackContract):
    libraries = ("pytorch_lightning",)

    def make_callback(self):
        return Norms(every=1, at_start=True, at_end=True, name="norm")


# When it looks; four steps make an epoch


WHEN = [
    ({}, [(1, 4), (2, 8)]),
    ({"every": "2 epochs", "at_start": True}, [(0, 0), (2, 8)]),
    ({"every": 3}, [(0, 3), (1, 6)]),
    ({"every": "3 steps", "at_end": True}, [(0, 3), (1, 6), (2, 8)]),
    ({"every": "validation"}, [(0, 2), (0, 4), (1, 6), (1, 8)]),
    ({"every": "2 validations", "at_start": True, "at_end": True}, [(0, 0), (0, 2), (1, 6), (2, 8)]),
    ({"every": "epoch", "at_end": True}, [(1, 4), (2, 8)]),
]


def test_each_looks_when_it_was_asked_to(tmp_path):
    callbacks = [Watch(**settings, name=f"look {i}") for i, (settings, _) in enumerate(WHEN)]
    trainer(tmp_path, *callbacks, val_check_interval=2, num_sanity_val_steps=2).fit(Module())
    for callback, (settings, expected) in zip(callbacks, WHEN, strict=True):
        assert looks(callback) == expected, settings


def test_validate_looks_once(tmp_path):
    callbacks = [Watch(every=every, name=str(every)) for every in ("epoch", 5, "validation")]
    metrics = trainer(tmp_path, *callbacks).validate(Module(), verbose=False)[0]
    for callback in callbacks:
        assert looks(callback) == [(0, 0)]
        assert metrics[f"{callback.name}/mean"] == pytest.approx(2.5)


def test_steps_are_those_of_the_optimiser(tmp_path):
    callback = Watch(every=1)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(Module())
    assert [step for _, step in looks(callback)] == [1, 2, 3, 4]


# What it leaves alone


@pytest.mark.parametrize("kind", [Watch, Slope])
def test_training_is_the_same_to_the_bit_with_and_without(tmp_path, kind):
    ends = []
    for callbacks in ([], [kind(every=1, at_start=True, at_end=True), kind(every="validation", name="two")]):
        L.seed_everything(5, verbose=False)
        module = Module()
        trainer(tmp_path, *callbacks).fit(module)
        assert (module.training, module.dropout.training, module.frozen.training) == (True, True, False)
        assert all(p.requires_grad for p in module.parameters())
        weights = [p.detach().clone() for p in module.parameters()]
        ends.append((weights, torch.get_rng_state(), random.getstate(), np.random.rand()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2:] == ends[1][2:]


def test_interventions_of_the_run_see_nothing_of_a_look(tmp_path):
    module, seen = Module(), []
    module.layer.register_forward_hook(Hook(lambda _, args, out: seen.append(len(args[0])) or out + 1))
    watch = Watch(every=1, at_start=True)
    trainer(tmp_path, watch, max_epochs=1).fit(module)
    assert len(watch.history) == 5
    assert seen == [2, 2, 2, 2]  # a look reads five rows


@pytest.mark.parametrize("every", [1, "validation"])
def test_a_look_that_fails_ends_the_run_and_leaves_the_model_as_it_was(tmp_path, every):
    callback, module = Watch(every=every), Module()
    callback.fails = True
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback, num_sanity_val_steps=0).fit(module)
    assert (module.dropout.training, module.frozen.training) == (every != "validation", False)
    assert all(p.requires_grad for p in module.parameters())
    assert callback.history == []


def test_gradients_of_the_run_are_there_again(tmp_path):
    class Kept(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(pl_module.layer.weight.grad is not None)

    found, callback, module = [], Slope(every=1), Module()
    module.optimizer_zero_grad = lambda *_: None
    trainer(tmp_path, callback, Kept(), max_epochs=1).fit(module)
    assert found == [False, True, True, True]
    assert all(entry["slope"] != 0 for entry in callback.history)
    assert trainer(tmp_path, Slope()).validate(Module(), verbose=False)[0]["Slope/slope"] == pytest.approx(3.0)


# What it logs


def test_every_look_reaches_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [Watch(every=3, at_start=True, at_end=True, name="w"), Watch(name="e")]
    run = trainer(tmp_path, *callbacks, logger=logger, log_every_n_steps=50)
    run.fit(Module())
    rows = np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    steps, values = rows["step"], rows["w/mean"]
    assert steps[~np.isnan(values)].tolist() == [0, 3, 6, 8]
    assert values[~np.isnan(values)] == pytest.approx([entry["mean"] for entry in callbacks[0].history], rel=1e-5)
    assert float(run.callback_metrics["e/mean"]) == pytest.approx(callbacks[1].history[-1]["mean"])


def test_two_of_a_kind_need_names_of_their_own(tmp_path):
    class Other(Watch):
        pass

    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, Watch(), Watch(every=2))
    with pytest.raises(RecipeError, match=r"Watch and Other both log as 'same/...'. Give one of them another name="):
        trainer(tmp_path, Watch(name="same"), Other(name="same")).fit(Module())


@pytest.mark.parametrize(("precision", "mixed"), [("run", True), ("float32", False)])
def test_precision(tmp_path, precision, mixed):
    class Autocast(Monitor):
        def look(self, trainer, module):
            return {"on": torch.is_autocast_enabled("cpu")}

    callback = Autocast(precision=precision)
    trainer(tmp_path, callback, precision="bf16-mixed", max_epochs=1).fit(Module())
    assert callback.history[0]["on"] == mixed


# Two processes


class Says(L.Callback):
    """Writes down on every rank what was seen, which outlives a forked process."""

    def __init__(self, folder, watched):
        self.folder, self.watched = folder, watched

    def on_train_end(self, trainer, pl_module):
        text = f"{self.watched.shared} {self.watched.history}"
        (self.folder / f"rank{trainer.global_rank}").write_text(text)


def test_two_processes_share_the_rows_and_hold_the_same_numbers(tmp_path):
    found = []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        callback = Watch(every=1, at_start=True)
        run = trainer(tmp_path, callback, Says(tmp_path, callback), max_epochs=1, limit_train_batches=1, **options)
        module = Module()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        run.fit(module)
        found.append(float(run.callback_metrics["Watch/mean"]))
    assert found[1] == pytest.approx(found[0])
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert (first[:9], second[:6]) == ("[0, 2, 4]", "[1, 3]")
    assert first[10:] == second[7:]


# Resume


@pytest.mark.parametrize(
    ("when", "often"),
    [
        ("step", (1, 3, "epoch", "validation")),
        ("epoch", (3, "2 epochs", "validation")),
        ("validation", ("epoch", "3 validations")),
    ],
)
def test_a_resumed_run_has_the_looks_of_one_that_was_not_stopped(tmp_path, when, often):
    settings = {"every_n_train_steps": 1} if when == "step" else {"save_on_train_epoch_end": when == "epoch"}

    def run(**options):
        callbacks = [Watch(every=every, at_start=True, name=str(every)) for every in often]
        keep = ModelCheckpoint(tmp_path / str(options), filename="{step}", save_top_k=-1, **settings)
        trainer(tmp_path, *callbacks, keep, max_epochs=3, val_check_interval=2).fit(Module(), **options)
        return {callback.name: looks(callback) for callback in callbacks}

    whole = run()
    for step in {"step": [3, 4, 7], "epoch": [4, 8], "validation": [2, 4, 10]}[when]:
        again = run(ckpt_path=tmp_path / "{}" / f"step={step}.ckpt")
        if (when, step) == ("step", 4):  # Lightning itself leaves out the validation that was due there
            del again["validation"]
        assert again.items() <= whole.items(), step


def test_a_look_that_was_due_when_a_run_was_stopped_is_made_up_for(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        trainer(tmp_path, Stop(), Watch(every=2)).fit(Module())
    again = Watch(every=2)
    trainer(tmp_path, again).fit(Module(), ckpt_path=tmp_path / "stopped.ckpt")
    assert [step for _, step in looks(again)] == [2, 4, 6, 8]


def test_state_of_a_version_that_kept_less():
    callback = Watch()
    callback.load_state_dict({"history": [{"epoch": 0.0, "step": 0.0}], "validations": 2})
    assert looks(callback) == [(0, 0)]
    callback.load_state_dict({"history": []})
    assert callback.history == []


# What it refuses


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every": 0}, r"Watch\(every=0\): expected 'epoch'"),
        ({"every": "2 weeks"}, "every='2 weeks'"),
        ({"every": "0 epochs"}, "every='0 epochs'"),
        ({"precision": "float64"}, r"Watch\(precision='float64'\): expected 'run' or 'float32'"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(RecipeError, match=match):
        Watch(**settings)


def test_what_cannot_work_is_refused_before_training(tmp_path):
    class Hooked(Watch):
        hooks = True

    compiled, holder = Module(), type("T", (), {"strategy": None})()
    compiled._compiler_ctx = {"compiler": "dynamo"}  # as torch.compile leaves it
    with pytest.raises(CompiledModelError, match="is compiled"):
        Hooked().setup(holder, compiled, "fit")
    Watch().setup(holder, compiled, "fit")  # calls alone may be compiled
    callback = Watch(precision="float32", name="w")
    with pytest.raises(RecipeError, match=r"'w', precision='float32'\) cannot look at weights .* in bf16-true"):
        trainer(tmp_path, callback, precision="bf16-true").fit(Module())
    holder = type("T", (), {"strategy": type("DeepSpeedStrategy", (), {})()})()
    with pytest.raises(UnsupportedStrategyError, match="Watch does not support DeepSpeedStrategy"):
        Watch().setup(holder, Module(), "fit")


def test_with_sharded_weights_every_process_looks_at_every_row():
    holder = type("T", (), {"strategy": type("ModelParallelStrategy", (), {})(), "global_rank": 1, "world_size": 2})()
    assert list(own_rows(holder, 3)) == [0, 1, 2]


# Its metrics


class Total(Sums):
    def __init__(self):
        super().__init__("total")

    def update(self, x):
        self.add(x.sum()[None])

    def compute(self):
        return self.totals()[0]


def test_metrics_start_from_nothing():
    metric, rows = Total(), Squares()
    assert metric.compute() == 0.0
    rows.update(torch.zeros(0), torch.zeros(0, 1))
    assert rows.compute().tolist() == []
    with torch.inference_mode():
        metric.update(torch.ones(2))
        metric.reset()
        metric.update(torch.ones(2))
    metric.update(torch.ones(1))
    assert metric.compute() == 3.0
    metric.reset()
    assert metric.compute() == 0.0


def test_a_row_counts_once_and_the_first_stays():
    rows = Squares()
    rows.update(torch.tensor([3, 1]), torch.tensor([[9.0], [math.pi]]))
    rows.update(torch.tensor([3]), torch.tensor([[8.0]]))
    keys, values = rows.table()
    assert keys.tolist() == [[1], [3]]
    assert values.tolist() == [[math.pi], [9.0]] or values[:, 0].tolist() == pytest.approx([math.pi, 9.0], rel=1e-6)
