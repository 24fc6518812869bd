"""Dual steering in a Lightning run: its stages, what it logs, training through it, and two processes."""

from __future__ import annotations

import lightning as L
import pytest
import rig
import torch

from lightning_interp import All
from lightning_interp.errors import RecipeError
from lightning_interp.steering import AddDirection, DualSteering, DualSteeringCallback
from lightning_interp.steering.softmax.dual_intervention import DUAL_MEASURES, DualMeter
from lightning_interp.testing import CallbackContract, tiny_model


def steering(**settings):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return DualSteering(direction, **{"kl_budget": 0.2, "alpha": 0.5, **settings})


class TestContract(CallbackContract):
    libraries = ("lightning.pytorch",)

    def make_callback(self):
        return DualSteeringCallback(steering(method="euclidean"))


class Module(L.LightningModule):
    def __init__(self, lr=0.0):
        super().__init__()
        self.model, self.lr = tiny_model("llama"), lr

    def run(self, batch):
        return self.model(batch, labels=batch).loss

    def training_step(self, batch, batch_idx):
        return self.run(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.run(batch))

    def test_step(self, batch, batch_idx):
        self.run(batch)

    def predict_step(self, batch, batch_idx):
        return self.run(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(rows=6, batch_size=2):
    ids = torch.randint(5, 200, (rows, 7), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=batch_size)


def trainer(folder, callback, **options):
    return rig.trainer(folder, callback, **{"max_epochs": 1, **options})


def test_it_logs_what_it_did(tmp_path):
    callback = DualSteeringCallback(steering(), when=["validate", "test", "predict"])
    it = trainer(tmp_path, callback)
    it.fit(Module(), loader(), loader())
    logged = it.callback_metrics
    assert {f"dual_steering/validate/{name}" for name in DUAL_MEASURES} <= set(logged)
    assert float(logged["dual_steering/validate/kl"]) == pytest.approx(0.2, rel=0.01)
    assert callback.measured["validate"]["tokens"] == 6
    it = trainer(tmp_path, callback)
    it.test(Module(), loader(), verbose=False)
    it = trainer(tmp_path, callback)
    it.predict(Module(), loader(), return_predictions=False)
    assert callback.measured["predict"]["tokens"] == callback.measured["test"]["tokens"] == 6
    fresh = DualSteeringCallback(steering())
    fresh.load_state_dict(callback.state_dict())
    assert fresh.measured == callback.measured


def test_training_through_it_changes_what_is_learned(tmp_path):
    ends = []
    for when in (["validate"], ["train", "validate"]):
        module = Module(lr=0.1)
        callback = DualSteeringCallback(steering(positions=All(), kl_budget=0.5), when=when)
        trainer(tmp_path, callback).fit(module, loader(), loader())
        ends.append(module.model.model.layers[0].mlp.down_proj.weight.detach().clone())
        assert all(p.isfinite().all() for p in module.parameters())
    assert not torch.equal(*ends)
    assert callback.measured["train"]["tokens"] == 6 * 7


class Shared(L.Callback):
    """Every process checks that it holds the means of all."""

    def __init__(self, watched, expected):
        self.watched, self.expected = watched, expected

    def on_validation_end(self, it, module):
        if not it.sanity_checking:
            found = self.watched.measured["validate"]
            assert found["tokens"] == self.expected["tokens"]
            assert found["kl"] == pytest.approx(self.expected["kl"], rel=1e-3)
            assert found["probe_change"] == pytest.approx(self.expected["probe_change"], rel=1e-3)


def test_two_processes_hold_the_means_of_both(tmp_path):
    one = DualSteeringCallback(steering(), when=["validate"])
    trainer(tmp_path, one).validate(Module(), loader(4), verbose=False)
    both = DualSteeringCallback(steering(), when=["validate"])
    it = trainer(tmp_path, both, devices=2, strategy="ddp_fork")
    it.callbacks.append(Shared(both, one.measured["validate"]))
    it.validate(Module(), loader(4, 1), verbose=False)


def test_what_it_cannot_carry():
    with pytest.raises(RecipeError, match="got AddDirection; expected DualSteering"):
        DualSteeringCallback(AddDirection(torch.ones(32), site="resid_post.0"))


def test_a_meter_forgets():
    meter = DualMeter()
    assert meter.compute() == {"tokens": 0, **dict.fromkeys(DUAL_MEASURES, 0.0)}
