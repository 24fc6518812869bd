"""The contract on callbacks of this package, and that it sees what is wrong."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch

from lightning_interp.core.callbacks.capture_callback import CaptureCallback
from lightning_interp.core.callbacks.intervention_callback import InterventionCallback
from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import FromBatch, Last, Substring
from lightning_interp.grafting import GraftCallback, GraftPrompt
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import tiny_pair
from lightning_interp.testing.contract_lightning import CallbackContract

pytestmark = pytest.mark.usefixtures("two_layers")


class Shift(Intervention):
    """x + 1 at chosen tokens."""

    def __init__(self, positions):
        self.positions = positions

    def sites(self, model_map):
        return (Site("resid_post", 1),)

    def transform(self, site, x, step):
        return torch.where(self.positions.mask(step)[..., None], x + 1, x)


class TestInterventionCallback(CallbackContract):
    libraries = ("lightning.pytorch",)

    def make_callback(self):
        return InterventionCallback(Shift(Substring("fox")))


class TestInterventionCallbackInTraining(CallbackContract):
    libraries = ("lightning.pytorch",)

    def make_callback(self):
        return InterventionCallback(Shift(FromBatch("chosen")), when=["train", "test"], name="shift")

    def make_batch(self):
        batch = super().make_batch()
        return {**batch, "chosen": batch["input_ids"] > 100}


class TestGraftInACallback(CallbackContract):
    libraries = ("pytorch_lightning",)

    def make_callback(self):
        graft = Graft(tiny_pair("llama")[1], GraftPlan.at(Last(), components="BLOCK"))
        return InterventionCallback(graft, when=["validate"])


class TestCaptureCallback(CallbackContract):
    libraries = ("lightning.pytorch",)

    def make_callback(self):
        return CaptureCallback([Site("resid_post", 1)], self.folder / "captures", when=["validate", "predict"])


class TestGraftCallback(CallbackContract):
    libraries = ("pytorch_lightning",)

    def make_callback(self):
        prompts = [GraftPrompt("the red fox", " ran", {"FE": "red"})]
        plans = {"last": GraftPlan.at(Last(), components="BLOCK")}
        return GraftCallback(prompts, reference=tiny_pair("llama")[1], plans=plans)


def test_both_libraries_are_tried_and_by_a_class_that_names_none():
    classes = CallbackContract.__subclasses__()
    assert CallbackContract.libraries == ("lightning.pytorch", "pytorch_lightning")
    assert {name for kind in classes for name in vars(kind).get("libraries", ())} == set(CallbackContract.libraries)


# The contract must see what is wrong. Each of these breaks one promise, and the test named beside it must fail.


class ForgetsExceptions(InterventionCallback):
    def on_exception(self, trainer, pl_module, exception):
        pass


class AttachesInSetup(InterventionCallback):
    def setup(self, trainer, pl_module, stage):
        self._enter(self.when[0], trainer, pl_module)


class NeverReleases(InterventionCallback):
    def release(self):
        self._attachment = None


class KeepsNumpy(InterventionCallback):
    def state_dict(self):
        return {"mean": torch.zeros(2).numpy()}


class Forgets(InterventionCallback):
    count = 0

    def on_train_batch_end(self, *_):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}


class AlwaysOn(InterventionCallback):
    def on_test_start(self, trainer, pl_module):
        self._enter(self.when[0], trainer, pl_module)


class Trains(InterventionCallback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.model.train()
        torch.rand(1)


class Freezes(InterventionCallback):
    def on_validation_start(self, trainer, pl_module):
        super().on_validation_start(trainer, pl_module)
        pl_module.model.lm_head.requires_grad_(False)


class HoldsALambda(InterventionCallback):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.function = lambda x: x


class KeepsTheModule(InterventionCallback):
    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self.handle = open(__file__)  # noqa: SIM115


@pytest.mark.parametrize(
    ("kind", "test", "arguments"),
    [
        (ForgetsExceptions, "test_nothing_is_left_after_an_exception", ["validate"]),
        (NeverReleases, "test_nothing_is_left_after_a_run", ["validate"]),
        (NeverReleases, "test_nothing_is_left_after_a_run", ["train"]),
        (AttachesInSetup, "test_nothing_is_left_after_a_run", ["train"]),
        (AlwaysOn, "test_is_attached_in_its_stages_only", []),
        (NeverReleases, "test_two_in_one_trainer_work_or_say_why_not", []),
        (KeepsNumpy, "test_state_survives_a_checkpoint", []),
        (Forgets, "test_state_survives_a_checkpoint", []),
        (Trains, "test_training_is_untouched", []),
        (Trains, "test_nothing_is_left_after_a_run", ["train"]),
        (Freezes, "test_nothing_is_left_after_a_run", ["validate"]),
        (HoldsALambda, "test_pickles_and_copies", None),
        (KeepsTheModule, "test_pickled_after_a_run_it_runs_again", []),
    ],
)
def test_the_contract_sees_a_broken_promise(kind, test, arguments, tmp_path):
    class Broken(CallbackContract):
        def make_callback(self):
            return kind(ActivationCapture([Site("resid_post", 1)]), when=["validate"])

    broken = Broken()
    broken.folder = tmp_path
    given = [] if arguments is None else ["lightning.pytorch", *arguments]
    with pytest.raises(Exception) as caught:  # noqa: PT011  what it fails with depends on the promise
        getattr(broken, test)(*given)
    assert not isinstance(caught.value, pytest.skip.Exception)


def test_make_callback_is_asked_for():
    with pytest.raises(NotImplementedError, match="CallbackContract must define make_callback"):
        CallbackContract().test_pickles_and_copies()


def test_callbacks_without_stages_are_not_asked_for_them(tmp_path):
    class Silent(CallbackContract):
        def make_callback(self):
            return L.Callback()

    silent = Silent()
    silent.folder = tmp_path
    with pytest.raises(pytest.skip.Exception, match="Callback names no stages"):
        silent.test_is_attached_in_its_stages_only("lightning.pytorch")
    silent.test_training_is_untouched("lightning.pytorch")
    assert copy.deepcopy(silent).alters_training is None
