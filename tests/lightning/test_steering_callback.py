"""Steering in a Lightning run: where it acts, what it records, what it logs, and how a direction is trained."""

from __future__ import annotations

import json
import warnings

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_interp import ActivationCapture, InterventionCallback, Last, Site
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering import (
    AddDirection,
    ProbeGate,
    ProjectOut,
    SteeringCallback,
    SteeringMeter,
    SteeringVector,
)
from lightning_interp.testing import CallbackContract, byte_tokenizer, tiny_model

SITE = Site("resid_post", 1)
STAGES = ["train", "validate", "test", "predict"]
TEXTS = ["the red fox ran", "red fox"]


def vector(k=0, size=1.0):
    return size * torch.randn(32, generator=torch.Generator().manual_seed(k))


def steering(**settings):
    return AddDirection(vector(), site=SITE, **{"strength": 2.0, **settings})


def batch():
    encoded = byte_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


class TestContract(CallbackContract):
    """In every stage, with two interventions, a gate, and all that can be logged."""

    libraries = ("lightning.pytorch",)

    def make_callback(self):
        parts = [steering(positions=ProbeGate(vector(3), above=0.0)), ProjectOut(vector(1), site="resid_post.2")]
        return SteeringCallback(parts, when=STAGES, log=["share", "shift"])


def body(base):
    class Module(base):
        def __init__(self, direction=None, lr=0.0):
            super().__init__()
            self.model, self.tokenizer, self.lr, self.seen = tiny_model("llama"), byte_tokenizer(), lr, {}
            self.model.requires_grad_(direction is None)
            if direction is not None:
                self.direction = torch.nn.Parameter(direction)

        def run(self, stage, batch):
            output = self.model(**batch, labels=batch["input_ids"])
            self.seen[stage] = output.logits.detach()
            return output.loss

        def training_step(self, batch, _):
            loss = self.run("train", batch)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, _):
            self.run("validate", batch)

        def test_step(self, batch, batch_idx):
            self.run("test", batch)

        def predict_step(self, batch, _):
            self.run("predict", batch)

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    return Module


Module, PlModule = body(L.LightningModule), body(pl.LightningModule)


def trainer(folder, *callbacks, **options):
    return rig.trainer(folder, *callbacks, **{"max_epochs": 1, **options})


def loader(batches=1):
    return torch.utils.data.DataLoader([batch() for _ in range(batches)], batch_size=None)


def expected(steer, model=None):
    model = model or tiny_model("llama")
    with torch.no_grad():
        plain = model(**batch()).logits
        with steer.attach(model):
            return plain, model(**batch()).logits


# Where it acts


@pytest.mark.parametrize(
    ("kind", "module", "when"),
    [(L.Trainer, Module, ["train"]), (pl.Trainer, PlModule, ["validate"]), (L.Trainer, Module, ["test", "predict"]),
     (pl.Trainer, PlModule, STAGES)],
)  # fmt: skip
def test_it_steers_in_its_stages_and_in_no_other(tmp_path, kind, module, when):
    ours, callback = module(), SteeringCallback(steering(), when=when)
    run = trainer(tmp_path, callback, kind=kind)
    run.fit(ours, loader(2), loader())
    run.test(ours, loader(), verbose=False)
    run.predict(ours, loader())
    plain, steered = expected(steering())
    for stage in STAGES:
        torch.testing.assert_close(ours.seen[stage], steered if stage in when else plain, msg=stage)


def test_several_act_in_their_order(tmp_path):
    ours = Module()
    parts = [steering(), ProjectOut(vector(), site=SITE)]
    trainer(tmp_path, SteeringCallback(parts, when="validate")).validate(ours, loader(), verbose=False)
    torch.testing.assert_close(ours.seen["validate"], expected(parts[1])[1])


def test_it_is_the_plain_callback_and_a_record(tmp_path):
    ours, theirs = Module(), Module()
    trainer(tmp_path, SteeringCallback(steering())).validate(ours, loader(), verbose=False)
    trainer(tmp_path, InterventionCallback(steering())).validate(theirs, loader(), verbose=False)
    assert torch.equal(ours.seen["validate"], theirs.seen["validate"])


def test_bf16_mixed_keeps_the_direction_unrounded(tmp_path):
    ours, seen = Module(), ActivationCapture([SITE])
    before = ActivationCapture([SITE])
    around = [
        InterventionCallback(before, name="before"),
        SteeringCallback(steering()),
        InterventionCallback(seen, name="after"),
    ]
    trainer(tmp_path, *around, precision="bf16-mixed").validate(ours, loader(), verbose=False)
    x, new = before.activations[SITE].float(), seen.activations[SITE]
    valid = batch()["attention_mask"].bool()
    torch.testing.assert_close(new[valid].float(), (x + 2 * vector()).to(new.dtype)[valid].float())


def test_a_direction_is_trained_as_a_parameter_of_the_users_module(tmp_path):
    ours = Module(direction=0.1 * vector(), lr=0.1)
    weights = {name: p.clone() for name, p in ours.model.named_parameters()}
    start = ours.direction.detach().clone()
    callback = SteeringCallback(AddDirection(ours.direction, site=SITE), when=["train"])
    losses = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            losses.append(float(trainer.callback_metrics["loss"]))

    run = trainer(tmp_path, callback, Watch(), max_epochs=12)
    run.fit(ours, loader(2))
    assert losses[-1] < losses[0] - 0.2
    assert not torch.equal(ours.direction.detach(), start)
    assert all(torch.equal(p, weights[name]) for name, p in ours.model.named_parameters())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["direction"], ours.direction.detach())
    again = Module(direction=vector(5), lr=0.1)
    more = SteeringCallback(AddDirection(again.direction, site=SITE), when=["train"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, more, max_epochs=13).fit(again, loader(2), ckpt_path=tmp_path / "last.ckpt")
    assert not [w for w in seen if "another steering" in str(w.message)]  # it is being trained, so it differs


# What it records


def test_the_description_goes_into_checkpoints_and_comes_back(tmp_path):
    callback = SteeringCallback(steering(positions=Last()), log=["share"])
    run = trainer(tmp_path, callback)
    run.fit(Module(), loader(2), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["describe"] == callback.describe()
    assert saved["describe"][0]["positions"] == {"kind": "Last", "n": 1}
    assert saved["measured"] == callback.measured
    other = SteeringCallback(steering(strength=3.0))
    with pytest.warns(UserWarning, match=r"another steering than SteeringCallback\(name='steering'\)"):
        other.load_state_dict(saved)
    assert other.measured == callback.measured


def test_loggers_are_told_once_and_nothing_else(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    callback = SteeringCallback(steering(), name="kindness")
    run = trainer(tmp_path, callback, logger=loggers, log_every_n_steps=1, max_epochs=2)
    run.fit(Module(), loader(2), loader())
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert events.Tags()["tensors"] == ["kindness/text_summary"]
    text = events.Tensors("kindness/text_summary")
    assert len(text) == 1
    assert json.loads(text[0].tensor_proto.string_val[0].decode().strip("`json\n ")) == callback.describe()
    assert set(events.Tags()["scalars"]) == {"loss", "epoch"}
    assert "kindness" in (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()


# What it logs


def test_share_and_shift_by_hand(tmp_path):
    callback = SteeringCallback(steering(positions=Last()), when=STAGES, log=["share", "shift"], name="kind")
    run, ours = trainer(tmp_path, callback), Module()
    run.fit(ours, loader(3), loader(2))
    x = ActivationCapture([SITE])
    with x.attach(tiny_model("llama")) as attached, torch.no_grad():
        attached.model_map.model(**batch())
    last = x.activations[SITE][:, -1]
    share = 2 / int(batch()["attention_mask"].sum())
    shift = float((2 * vector().norm() / last.norm(dim=-1)).mean())
    for stage in ("train", "validate"):
        assert callback.measured[stage] == {"share": pytest.approx(share), "shift": pytest.approx(shift, rel=1e-5)}
        for measure, value in (("share", share), ("shift", shift)):
            assert float(run.callback_metrics[f"kind/{stage}/{measure}"]) == pytest.approx(value, rel=1e-5)
    (logged,) = run.test(ours, loader(), verbose=False)
    assert logged["kind/test/share"] == pytest.approx(share)
    run.predict(ours, loader())
    assert callback.measured["predict"]["share"] == pytest.approx(share)


def test_all_of_several_interventions_are_measured(tmp_path):
    shares = []
    for parts in ([steering()], [steering(positions=Last())], [steering(), steering(positions=Last())]):
        callback = SteeringCallback(parts, when="validate", log=["share"])
        trainer(tmp_path, callback).validate(Module(), loader(), verbose=False)
        shares.append(callback.measured["validate"]["share"])
    assert shares[0] != shares[1]
    assert shares[2] == pytest.approx((shares[0] + shares[1]) / 2)


def test_a_gate_that_never_opens_measures_nothing(tmp_path):
    callback = SteeringCallback(steering(positions=ProbeGate(vector(), above=1e9)), log=["share", "shift"])
    trainer(tmp_path, callback).validate(Module(), loader(), verbose=False)
    assert callback.measured["validate"] == {"share": 0.0, "shift": 0.0}


def test_only_what_is_asked_for_is_logged(tmp_path):
    run = trainer(tmp_path, SteeringCallback(steering()))
    run.fit(Module(), loader(2), loader())
    assert set(run.callback_metrics) == {"loss"}
    callback = SteeringCallback(steering(), log=["shift"])
    run = trainer(tmp_path, callback)
    run.validate(Module(), loader(), verbose=False)
    assert set(run.callback_metrics) == {"steering/validate/shift"}


class Uneven(torch.utils.data.Dataset):
    """The second process gets longer texts, so its share differs."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {
            "input_ids": torch.arange(5, 8 + 4 * (index % 2)),
            "attention_mask": torch.ones(3 + 4 * (index % 2)).long(),
        }


def test_two_processes_log_the_sums_of_both(tmp_path):
    callback = SteeringCallback(steering(positions=Last()), log=["share"])
    run = trainer(tmp_path, callback, devices=2, strategy="ddp_fork")
    (logged,) = run.validate(Module(), torch.utils.data.DataLoader(Uneven(), batch_size=1), verbose=False)
    assert logged["steering/validate/share"] == pytest.approx(4 / (3 + 7 + 3 + 7))


def test_gradient_checkpointing_counts_a_token_once():
    model, meter = tiny_model("llama").train(), SteeringMeter()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    steer = steering(positions=Last())
    steer.observe = meter.update
    with steer.attach(model):
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert meter.compute()["share"] == pytest.approx(2 / int(batch()["attention_mask"].sum()))


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SteeringCallback([]), "got nothing; expected AddDirection"),
        (lambda: SteeringCallback([ActivationCapture([SITE])]), "got ActivationCapture"),
        (lambda: SteeringCallback(steering(), log=["norm"]), "'norm' is unknown; expected share, shift"),
        (lambda: SteeringCallback(steering(), when=["fit"]), r"when=\('fit',\)"),
    ],
)
def test_wrong_settings_are_refused_when_made(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_vector_of_another_model_stops_the_run_before_a_step(tmp_path):
    ours = Module()
    callback = SteeringCallback(AddDirection(SteeringVector({SITE: vector()}, fingerprint="ab" * 32)))
    with pytest.raises(IncompatibleModelError, match="abababababab"):
        trainer(tmp_path, callback).validate(ours, loader(), verbose=False)
    assert not ours.seen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.model.modules())
