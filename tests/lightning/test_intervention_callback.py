"""When an intervention is on the model in a Lightning run, and that it always comes off."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch

from lightning_interp import ActivationCapture, FromBatch, Intervention, InterventionCallback, Site
from lightning_interp.errors import CompiledModelError, SiteError, UnsupportedStrategyError
from lightning_interp.testing import tiny_model

SITE = Site("resid_post", 1)


class Double(Intervention):
    """Doubles the activation, everywhere or at marked tokens, and writes down what happens to it."""

    def __init__(self, log=None, positions=None):
        self.log = [] if log is None else log
        self.positions = positions

    def sites(self, model_map):
        return [SITE]

    def install(self, attachment):
        self.log.append("attach")
        attachment.on_remove(lambda: self.log.append("release"))
        super().install(attachment)

    def transform(self, site, x, step):
        self.log.append("forward")
        mask = step.valid if self.positions is None else self.positions.mask(step)
        return torch.where(mask[..., None], 2 * x, x)


def body(base):
    class Module(base):
        """Two training batches and one of every other kind."""

        def __init__(self, log=None, fail=""):
            super().__init__()
            self.model, self.log_, self.fail, self.seen = tiny_model("llama"), log, fail, {}

        def run(self, stage, batch):
            if self.log_ is not None:
                self.log_.append(stage)
            output = self.model(batch["input_ids"])
            self.seen[stage] = output.logits.detach()
            if self.fail == stage:
                raise ZeroDivisionError(stage)
            return output.logits.mean()

        def training_step(self, batch, _):
            return self.run("train", batch)

        def validation_step(self, batch, _):
            self.run("validate", batch)

        def test_step(self, batch, batch_idx):
            self.run("test", batch)

        def predict_step(self, batch, _):
            self.run("predict", batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Module


Module, PlModule = body(L.LightningModule), body(pl.LightningModule)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MARK = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool()


def loader(batches=1):
    batch = {"input_ids": IDS, "mark": MARK}
    return torch.utils.data.DataLoader([batch] * batches, batch_size=None)


def trainer(folder, *callbacks, **options):
    return rig.trainer(folder, *callbacks, **{"max_epochs": 1, **options})


def hooks(module):
    tables = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(part, table)) for part in module.modules() for table in tables)


def everything(folder, when, kind=L.Trainer, module=Module):
    log = []
    ours, callback = module(log), InterventionCallback(Double(log), when=when)
    trainer(folder, callback, kind=kind, num_sanity_val_steps=1).fit(ours, loader(2), loader())
    log.append("|")
    for name in ("validate", "test", "predict"):
        options = {} if name == "predict" else {"verbose": False}
        getattr(trainer(folder, callback, kind=kind), name)(ours, loader(), **options)
        log.append("|")
    assert not callback.attached
    assert hooks(ours) == 0
    return " ".join(log)


ORDER = {
    (
        "train",
    ): "validate attach train forward train forward release validate attach release | validate | test | predict |",
    ("validate",): (
        "attach validate forward release train train attach validate forward release | "
        "attach validate forward release | test | predict |"
    ),
    ("test",): "validate train train validate | validate | attach test forward release | predict |",
    ("predict",): "validate train train validate | validate | test | attach predict forward release |",
    ("train", "validate"): (
        "attach validate forward release attach train forward train forward release attach validate forward release "
        "attach release | attach validate forward release | test | predict |"
    ),
}


@pytest.mark.parametrize("when", ORDER, ids="+".join)
def test_it_is_on_in_the_named_stages_and_no_others(tmp_path, when):
    assert everything(tmp_path, when) == ORDER[when]


def test_the_other_namespace(tmp_path):
    when = ("train", "validate")
    assert everything(tmp_path, when, pl.Trainer, PlModule) == ORDER[when]


def test_what_it_does_is_seen_in_the_step_and_nowhere_after(tmp_path):
    plain, ours = tiny_model("llama"), Module()
    with torch.no_grad():
        before = plain(IDS).logits
        with Double().attach(plain):
            doubled = plain(IDS).logits
    trainer(tmp_path, InterventionCallback(Double(), when="train")).fit(ours, loader(), loader())
    assert torch.equal(ours.seen["validate"], before)
    torch.testing.assert_close(ours.seen["train"], doubled)
    assert not torch.allclose(before, doubled, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(ours.model(IDS).logits, before)


def test_validation_in_the_middle_of_an_epoch_puts_training_aside(tmp_path):
    log = []
    callback = InterventionCallback(Double(log), when=["train"])
    run = trainer(tmp_path, callback, val_check_interval=1, num_sanity_val_steps=0)
    run.fit(Module(log), loader(2), loader())
    once = "train forward release validate attach"
    assert " ".join(log) == f"attach {once} {once} release"


@pytest.mark.parametrize("stage", ["train", "validate", "test", "predict"])
@pytest.mark.parametrize("when", [("train",), ("train", "validate", "test", "predict")], ids=["train", "all"])
def test_an_error_in_any_stage_leaves_nothing(tmp_path, stage, when):
    log, ours = [], Module(fail=stage)
    callback = InterventionCallback(Double(log), when=when)
    run = trainer(tmp_path, callback, num_sanity_val_steps=0)
    loaders = [loader(), loader()] if stage in ("train", "validate") else [loader()]
    with pytest.raises(ZeroDivisionError, match=stage):
        getattr(run, "fit" if len(loaders) == 2 else stage)(ours, *loaders)
    assert log.count("attach") == log.count("release")
    assert not callback.attached
    assert callback._suspended is None
    assert hooks(ours) == 0


def test_an_error_while_attaching_leaves_nothing(tmp_path):
    class Late(Double):
        def install(self, attachment):
            super().install(attachment)
            raise ZeroDivisionError

    ours, log = Module(), []
    callback = InterventionCallback(Late(log), when="test")
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback).test(ours, loader(), verbose=False)
    assert log == ["attach", "release"]
    assert not callback.attached
    assert hooks(ours) == 0


@pytest.mark.parametrize("stage", ["train", "validate", "test", "predict"])
def test_selectors_get_the_batch(tmp_path, stage):
    plain, ours = tiny_model("llama"), Module()
    with torch.no_grad(), Double(positions=FromBatch("mark")).attach(plain) as attachment:
        attachment.batch = {"mark": MARK}
        expected = plain(IDS).logits
    run = trainer(tmp_path, InterventionCallback(Double(positions=FromBatch("mark")), when=[stage]))
    if stage == "train":
        run.fit(ours, loader())
    else:
        getattr(run, stage)(ours, loader())
    torch.testing.assert_close(ours.seen[stage], expected)


class Everywhere(L.Callback):
    """Fails on the rank whose logits are not the doubled ones."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        plain = tiny_model("llama")
        with torch.no_grad(), Double().attach(plain):
            torch.testing.assert_close(pl_module.seen["test"], plain(batch["input_ids"]).logits)
        pl_module.log("count", 1.0, reduce_fx="sum", sync_dist=True)


def test_every_process_has_it(tmp_path):
    rows = [{"input_ids": IDS + i, "mark": MARK} for i in range(4)]
    callbacks = [InterventionCallback(Double(), when=["test"]), Everywhere()]
    run = trainer(tmp_path, *callbacks, devices=2, strategy="ddp_fork")
    run.test(Module(), torch.utils.data.DataLoader(rows, batch_size=None), verbose=False)
    assert float(run.callback_metrics["count"]) == 4.0


def test_a_compiled_module_is_refused(tmp_path):
    with pytest.raises(CompiledModelError, match="is compiled"):
        trainer(tmp_path, InterventionCallback(Double(), when=["test"])).test(
            torch.compile(Module(), backend="eager"), loader(), verbose=False
        )
    trainer(tmp_path, InterventionCallback(Double(), when=["train"])).test(Module(), loader(), verbose=False)


def test_one_of_two_models_is_named(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.model)

    ours = Two()
    trainer(tmp_path, InterventionCallback(Double(), when="test", target="model")).test(ours, loader(), verbose=False)
    first = ours.seen["test"]
    trainer(tmp_path, InterventionCallback(Double(), when="test", target="teacher")).test(ours, loader(), verbose=False)
    assert not torch.allclose(first, ours.seen["test"], atol=1e-3)
    with pytest.raises(SiteError, match=r"(?s)model.*teacher"):
        trainer(tmp_path, InterventionCallback(Double(), when="test")).test(ours, loader(), verbose=False)


def holder(name):
    return type("T", (), {"strategy": type(name, (), {})()})()


def test_sharded_weights_are_refused_to_those_that_read_them():
    reader = Double()
    reader.reads_weights = True
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):
        with pytest.raises(UnsupportedStrategyError, match=rf"InterventionCallback\(Double\) does not support {name}"):
            InterventionCallback(Double()).setup(holder(name), Module(), "fit")
    InterventionCallback(Double()).setup(holder("ModelParallelStrategy"), Module(), "fit")
    InterventionCallback(reader).setup(holder("DDPStrategy"), Module(), "fit")
    with pytest.raises(UnsupportedStrategyError, match="uses weight values, which ModelParallelStrategy"):
        InterventionCallback(reader).setup(holder("ModelParallelStrategy"), Module(), "fit")


@pytest.mark.parametrize("when", [(), ("eval",), "fit"])
def test_unknown_stages(when):
    with pytest.raises(ValueError, match="expected some of train, validate, test, predict"):
        InterventionCallback(Double(), when=when)


def test_names_tell_callbacks_apart_and_copies_are_not_attached(tmp_path):
    capture = ActivationCapture([SITE])
    a, b = (InterventionCallback(capture, name=name) for name in ("a", "b"))
    assert len({a.state_key, b.state_key, InterventionCallback(capture).state_key}) == 3
    trainer(tmp_path, InterventionCallback(Double()), InterventionCallback(Double()))

    class Copy(L.Callback):
        def on_test_batch_start(self, *_):
            assert callback.attached
            copies.append(copy.deepcopy(callback))

    callback, copies = InterventionCallback(Double(), when="test"), []
    trainer(tmp_path, callback, Copy()).test(Module(), loader(), verbose=False)
    assert not copies[0].attached
