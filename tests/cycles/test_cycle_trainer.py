"""What a user gives as arguments of the Trainer: callbacks, loggers, and what a chain cannot use."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from chains import SEED, chain, contents, fitting, lines, of, writing
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_interp.cycles import FitDPO
from lightning_interp.errors import ManifestError, RecipeError

CPU = {"accelerator": "cpu"}


def fast(folder, **trainer):
    """Two cycles, three epochs each, without evaluations."""
    phases = [writing(slices=3), fitting(epochs=3)]
    return chain(folder, cycles=2, first=[fitting(data=SEED, n=4, epochs=3)], phases=phases, trainer=CPU | trainer)


def stopping():
    return EarlyStopping("train/loss", patience=1, min_delta=1.0, check_on_train_epoch_end=True)


def test_a_callback_keeps_nothing_from_one_cycle_to_the_next(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    told = fast(whole, callbacks=[stopping()]).run()
    fast(parts, callbacks=[stopping()]).run(until=1)
    assert fast(parts, callbacks=[stopping()]).run()["cycles"][1]["digest"] == told["cycles"][1]["digest"]
    assert contents(parts) == contents(whole)


def test_callbacks_and_a_logger_of_the_user(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path / "own", monitor="train/loss", every_n_train_steps=1, save_top_k=-1)
    callbacks = [LearningRateMonitor(), saving]
    told = fast(tmp_path / "chain", logger=CSVLogger(tmp_path, version=0), callbacks=callbacks).run()
    assert [one["counts"]["fit-sft"]["steps"] for one in told["cycles"]] == [6, 6]
    assert len(list((tmp_path / "own").iterdir())) == 12
    assert "lr-AdamW" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert of(told, "adapter") == of(fast(tmp_path / "plain").run(), "adapter")


@pytest.mark.parametrize("callbacks", [None, LearningRateMonitor()])
def test_no_callbacks_and_one_alone(callbacks, tmp_path):
    told = fast(tmp_path / "chain", callbacks=callbacks, logger=CSVLogger(tmp_path)).run(until=1)
    assert told["cycles"][0]["counts"]["fit-sft"]["steps"] == 6


def test_what_only_shows_may_change_and_what_decides_may_not(tmp_path):
    fast(tmp_path / "chain", logger=False).run(until=1)
    shown = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 3, "enable_model_summary": True}
    assert len(fast(tmp_path / "chain", **shown).run()["cycles"]) == 2
    with pytest.raises(ManifestError, match=r"trainer\.accumulate_grad_batches: not set there, 2 now"):
        fast(tmp_path / "chain", accumulate_grad_batches=2).run()


def test_gradients_may_add_up_over_batches(tmp_path):
    told = fast(tmp_path / "chain", accumulate_grad_batches=2).run()
    assert [one["counts"]["fit-sft"]["steps"] for one in told["cycles"]] == [3, 3]


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"accelerate": "cpu"}, "names 'accelerate', which is no argument of Lightning's Trainer"),
        ({"max_epochs": 3}, "sets max_epochs=3; use epochs of the phase"),
        ({"gradient_clip_val": 1.0}, r"sets gradient_clip_val=1\.0; use clip of the phase"),
        ({"enable_checkpointing": False}, "sets enable_checkpointing=False"),
    ],
)
def test_arguments_that_it_cannot_use(trainer, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        fast(tmp_path / "chain", **trainer)


def test_a_trainer_itself(tmp_path):
    with pytest.raises(RecipeError, match=r"trainer is <lightning.*Trainer.*expected arguments of Trainer by name"):
        chain(tmp_path / "chain", trainer=Trainer(accelerator="cpu", logger=False))


def test_a_callback_that_cannot_be_copied_needs_a_function(tmp_path):
    class Locked(Callback):
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(RecipeError, match=r"trainer has a Locked, of which .* Give trainer as a function"):
        fast(tmp_path / "chain", callbacks=[Locked()])


def test_a_rate_may_be_sought_before_pairs_are_learned(tmp_path):
    fit = FitDPO(batch_size=2)
    told = chain(
        tmp_path / "chain",
        cycles=2,
        init="continual",
        first=[replace(fit, data=SEED, n=4)],
        phases=[writing(), fit],
        trainer=lambda: CPU | {"callbacks": [LearningRateFinder(num_training_steps=4)]},
    ).run()
    for one in told["cycles"]:
        first = lines(f"{one['folder']}/phases/fit-dpo/metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-5)
