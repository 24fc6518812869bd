"""What every callback owes to a Lightning run that somebody else set up, as tests that a project can reuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.errors import InterpError
from lightning_interp.models.sources.tiny import byte_tokenizer, tiny_model
from lightning_interp.testing.snapshot import Snapshot, snapshot, without

__all__ = ["CallbackContract"]

_STAGES = ("train", "validate", "test", "predict")
_ENTRIES = {"train": "fit", "validate": "validate", "test": "test", "predict": "predict"}


class CallbackContract:
    """Tests that every callback of this package, or built on it, must pass.

    Subclass it in a test module under a name that pytest collects, and say how to make the callback. Every test runs a
    tiny model for two training batches and one batch of the other stages.

    Attributes:
        libraries: Packages whose Trainer runs them.
        alters_training: Whether trained weights may differ from those without it; by default if it acts in ``train``.
        texts: What the batches say; the module's ``tokenizer`` is the byte tokenizer.
        folder: An empty folder for this test.

    Example:
        >>> from lightning_interp import ActivationCapture, InterventionCallback, Site
        >>> class TestReading(CallbackContract):
        ...     def make_callback(self):
        ...         return InterventionCallback(ActivationCapture([Site("logits")]), when=["validate"])
        >>> TestReading().test_pickles_and_copies()
    """

    libraries: ClassVar[Sequence[str]] = ("lightning.pytorch", "pytorch_lightning")
    alters_training: ClassVar[bool | None] = None
    texts: ClassVar[Sequence[str]] = ("the red fox ran", "red fox")
    folder: Path = Path()

    def make_callback(self) -> Any:
        """A new callback, as a user would make it."""
        raise NotImplementedError(f"{type(self).__name__} must define make_callback(self) -> Callback.")

    def make_module(self, library: str) -> Any:
        """The LightningModule of a run: a tiny language model that is trained, watched at every step."""
        return _watched_module(import_module(library), byte_tokenizer())

    def make_batch(self) -> dict[str, Any]:
        """One batch; override it to add what selectors read from there."""
        encoded = byte_tokenizer()(list(self.texts), return_tensors="pt", padding=True)
        return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test that starts a Trainer with every library."""
        if "library" in metafunc.fixturenames:
            metafunc.parametrize("library", self.libraries)

    @pytest.fixture(autouse=True)
    def _use_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    # Hooks come and go

    @pytest.mark.parametrize("stage", _STAGES)
    def test_nothing_is_left_after_a_run(self, library: str, stage: str) -> None:
        """No hook, mode, weight or key differs after fit, validate, test or predict; training moves weights only."""
        module = self.make_module(library)
        before = snapshot(module.model)
        self._run(library, module, stage, self.make_callback())
        after = snapshot(module.model)
        moves = ("random", "weights") if stage == "train" else ("random",)  # a DataLoader draws a seed
        before, after = (without(state, *moves) for state in (before, after))
        assert after == before, f"{_ENTRIES[stage]} left a trace: {_differences(before, after)}"
        assert not module.complaints, module.complaints[:3]

    def test_is_attached_in_its_stages_only(self, library: str) -> None:
        """A callback with ``when`` hooks the model in these stages, and in no other, validation in fit included."""
        callback = self.make_callback()
        when = getattr(callback, "when", None)
        if when is None:
            pytest.skip(f"{type(callback).__name__} names no stages")
        module = self.make_module(library)
        for stage in _STAGES:
            module.hooked.clear()
            self._run(library, module, stage, callback)
            during = {"train", "validate"} if stage == "train" else {stage}
            expected = {name: name in when for name in during}
            assert module.hooked == expected, f"in {_ENTRIES[stage]}: hooks {module.hooked}, expected {expected}"

    @pytest.mark.parametrize("stage", _STAGES)
    def test_nothing_is_left_after_an_exception(self, library: str, stage: str) -> None:
        """Lightning calls no teardown after an exception: the hooks are gone all the same, and it can run again."""
        module, callback = self.make_module(library), self.make_callback()
        hooks = snapshot(module.model)["hooks"]
        for error in (_StopError, KeyboardInterrupt):
            module.fail = (stage, error)
            with pytest.raises((_StopError, KeyboardInterrupt, SystemExit)):
                self._run(library, module, stage, callback)
            assert snapshot(module.model)["hooks"] == hooks, f"hooks were left after {error.__name__} in {stage}"
        module.fail = None
        self._run(library, module, stage, callback)
        assert snapshot(module.model)["hooks"] == hooks, "hooks were left by the run after an exception"

    def test_training_is_untouched(self, library: str) -> None:
        """Weights and random state after fit are those without the callback, to the bit."""
        callback = self.make_callback()
        alters = self.alters_training
        if "train" in getattr(callback, "when", ()) if alters is None else alters:
            pytest.skip(f"{type(callback).__name__} may alter training")
        found = []
        for callbacks in ((), (callback,)):
            module = self.make_module(library)
            with seeded_rng(0):
                self._run(library, module, "train", *callbacks)
                state = snapshot(module.model)
            found.append({name: state[name] for name in ("weights", "random")})
        assert found[0] == found[1], f"training differs: {_differences(*found)}"

    # State

    def test_state_survives_a_checkpoint(self, library: str) -> None:
        """State is plain enough for ``weights_only=True``, and a new callback goes on from it."""
        module, callback = self.make_module(library), self.make_callback()
        trainer = self._run(library, module, "train", callback)
        state = callback.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        assert _plain(loaded) == _plain(state), "state_dict() changes in a checkpoint"

        path = self.folder / "contract.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        assert set(saved["state_dict"]) == set(module.state_dict()), "the checkpoint holds other keys"
        again = self.make_callback()
        again.load_state_dict(loaded)
        assert _plain(again.state_dict()) == _plain(state), "load_state_dict() does not restore state_dict()"
        self._run(library, self.make_module(library), "train", self.make_callback(), ckpt_path=path, max_epochs=2)

    def test_two_in_one_trainer_work_or_say_why_not(self, library: str) -> None:
        """A second one is used beside the first, or refused by name; no hook is left either way."""
        module, pair = self.make_module(library), [self.make_callback(), self.make_callback()]
        hooks = snapshot(module.model)["hooks"]
        try:
            for stage in _STAGES:
                self._run(library, module, stage, *pair)
        except InterpError:
            pass  # the package's own errors say what is in the way
        except RuntimeError as error:
            assert type(pair[0]).__name__ in str(error), f"a second callback fails without its name: {error}"  # noqa: PT017
        assert snapshot(module.model)["hooks"] == hooks, "two callbacks left hooks"

    def test_pickles_and_copies(self) -> None:
        """Launchers that spawn pickle callbacks, and tuners copy them."""
        callback = self.make_callback()
        for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):  # noqa: S301
            assert type(twin) is type(callback)
            assert _plain(twin.state_dict()) == _plain(callback.state_dict())
            assert twin.state_key == callback.state_key

    def test_pickled_after_a_run_it_runs_again(self, library: str) -> None:
        """What a run leaves in the callback does not keep it from travelling."""
        module, callback = self.make_module(library), self.make_callback()
        self._run(library, module, "train", callback)
        for bound in ("log", "log_dict"):  # Lightning binds the module's to every callback
            callback.__dict__.pop(bound, None)
        twin = pickle.loads(pickle.dumps(callback))  # noqa: S301
        self._run(library, module, "validate", twin)
        assert not module.complaints, module.complaints[:3]

    # Helpers

    def make_trainer(self, library: str, callbacks: Sequence[Any], **settings: Any) -> Any:
        """A Trainer for two training batches and one batch of the other stages."""
        ours: dict[str, Any] = {"default_root_dir": self.folder, "callbacks": list(callbacks), "logger": False}
        ours |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 1}
        ours |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return import_module(library).Trainer(**ours | settings)

    def _run(
        self, library: str, module: Any, stage: str, *callbacks: Any, ckpt_path: Any = None, **settings: Any
    ) -> Any:
        trainer = self.make_trainer(library, callbacks, **settings)
        if stage == "train":
            trainer.fit(module, self._loader(2), self._loader(1), ckpt_path=ckpt_path)
        else:
            getattr(trainer, _ENTRIES[stage])(module, self._loader(1))
        return trainer

    def _loader(self, batches: int) -> Any:
        made: Any = [self.make_batch() for _ in range(batches)]
        return torch.utils.data.DataLoader[Any](made, batch_size=None)


class _StopError(Exception):
    pass


def _watched_module(library: Any, tokenizer: Any) -> Any:
    """A LightningModule that writes down, in every step, whether its model is hooked and otherwise as it was."""

    class Watched(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model("llama")
            self.tokenizer = tokenizer
            self.fail: tuple[str, type[BaseException]] | None = None
            self.hooked: dict[str, bool] = {}
            self.complaints: list[str] = []
            self._as_made = _shape_of(self.model)

        training_step = _step("train")
        validation_step = _step("validate")
        test_step = _step("test")
        predict_step = _step("predict")

        def configure_optimizers(self) -> Any:
            if _is_hooked(self.model):
                self.complaints.append("hooks were put on before the run began; attach in on_*_start, never in setup")
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Watched()


def _step(stage: str) -> Callable[[Any, dict[str, Any], int], Any]:
    def step(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        output = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"])
        self.hooked[stage] = self.hooked.get(stage, False) or _is_hooked(self.model)
        if _shape_of(self.model) != self._as_made:
            self.complaints.append(f"in {stage}, keys, requires_grad or mode of the model changed")
        if self.fail is not None and self.fail[0] == stage:
            raise self.fail[1]
        return output.loss

    return step


def _is_hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _shape_of(model: nn.Module) -> tuple[Any, ...]:
    modes = {module.training for module in model.modules()}
    return tuple(model.state_dict()), [p.requires_grad for p in model.parameters()], modes


def _differences(one: Snapshot, other: Snapshot) -> list[str]:
    names = [name for name in one if one[name] != other[name]]
    inside = [
        k for name in names if isinstance(one[name], dict) for k in one[name] if one[name][k] != other[name].get(k)
    ]
    return [*names, *inside[:3]]


def _plain(state: Any) -> Any:
    """Values that ``==`` can compare, types included."""
    if isinstance(state, torch.Tensor):
        return ("tensor", state.dtype, state.tolist())
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return (type(state).__name__, [_plain(value) for value in state])
    return (type(state).__name__, repr(state) if isinstance(state, float) else state)
