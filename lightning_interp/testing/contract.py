"""What every intervention owes to the model it is attached to, as tests that a project can reuse."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_interp.core.hooks.intervention import Attachment, Compose, Intervention
from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import CompiledModelError
from lightning_interp.models.sources.pretrained import checkpoint_blocks
from lightning_interp.models.sources.tiny import FAMILIES, byte_tokenizer, tiny_model
from lightning_interp.testing.snapshot import snapshot, without

__all__ = ["InterventionContract"]

Batch = dict[str, torch.Tensor]

_REGISTER = ("register_forward_hook", "register_forward_pre_hook")


class _Affine(Intervention):
    """A second intervention that does not commute with additions, to test composition."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        return (self.site,)

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        return 1.5 * x + 0.25


class InterventionContract:
    """Tests that every :class:`~lightning_interp.core.hooks.intervention.Intervention` must pass.

    Subclass it in a test module under a name that pytest collects, and say how to make the intervention.

    Attributes:
        families: Tiny models on which every test runs.
        texts: Prompts of the test batch, of different lengths, so that padding matters.
        changes_output: Whether :meth:`make` gives something that changes the logits (a capture does not).
        cache_consistent: Whether decoding with a cache must equal one pass; not with positions such as ``Last()``.

    Example:
        >>> from lightning_interp import ActivationCapture
        >>> class TestCapture(InterventionContract):
        ...     changes_output = False
        ...
        ...     def make(self, model):
        ...         return ActivationCapture([Site("resid_post", 1)])
        >>> TestCapture().test_attach_and_remove_leave_no_trace("llama")
    """

    families: ClassVar[Sequence[str]] = FAMILIES
    texts: ClassVar[Sequence[str]] = ("red fox", "a red fox ran", "one red fox")
    changes_output: ClassVar[bool] = True
    cache_consistent: ClassVar[bool] = True

    def make(self, model: nn.Module) -> Intervention:
        """An intervention that acts on this model."""
        raise NotImplementedError(f"{type(self).__name__} must define make(self, model) -> Intervention.")

    def make_identity(self, model: nn.Module) -> Intervention | None:
        """The same at strength 0 or with an empty choice, if there is such a thing."""
        return None

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model of one test; a fresh one each time."""
        return copy.deepcopy(_pristine(family, dtype=dtype))

    def attach(self, intervention: Intervention, model: nn.Module) -> Attachment:
        """Put it on; override to pass more than a tokenizer."""
        return intervention.attach(model, tokenizer=_tokenizer())

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test on every family."""
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", self.families)

    # What it does to the numbers

    def test_identity_is_bit_identical(self, family: str) -> None:
        """Strength 0 (or an empty choice) gives the very same bits."""
        model = self.model(family)
        identity = self.make_identity(model)
        if identity is None:
            pytest.skip(f"{type(self).__name__} has no identity")
        batch = _batch(model, self.texts)
        plain = _logits(model, batch)
        with self.attach(identity, model):
            assert torch.equal(_logits(model, batch), plain), "the identity changed the logits"

    def test_acts_while_attached_and_not_after(self, family: str) -> None:
        """Logits change (or not, for a reader) while attached, and are the plain model's again afterwards."""
        model, intervention, batch = self._case(family)
        plain, changed = _logits(model, batch), self._run(model, batch, intervention)
        assert torch.equal(plain, changed) is not self.changes_output, "see changes_output"
        assert torch.equal(_logits(model, batch), plain), "the model still acts differently after remove()"

    def test_left_padding_changes_nothing(self, family: str) -> None:
        """Real tokens of a left-padded batch get the logits that they get alone."""
        model, intervention, batch = self._case(family)
        with self.attach(intervention, model):
            together = _logits(model, batch)
            for row, text in enumerate(self.texts):
                alone = _logits(model, _batch(model, [text]))
                _close(together[row : row + 1, -alone.shape[1] :], alone, f"row {row} of the padded batch")

    def test_cached_decoding_equals_one_pass(self, family: str) -> None:
        """A prompt and then one token at a time gives the logits of one pass over all of it."""
        self._needs_cache_consistency()
        model = self.model(family)
        batch = _batch(model, [f"{text}..." for text in self.texts])
        real = batch["attention_mask"].bool()
        with self.attach(self.make(model), model):
            whole = _logits(model, batch)
            steps = _decode(model, batch, prompt=real.shape[1] - 3)
        _close(steps[real], whole[real], "cached decoding")

    def test_generation_with_and_without_cache_agree(self, family: str) -> None:
        """Greedy generation gives the same tokens with a cache and without."""
        self._needs_cache_consistency()
        model, intervention, batch = self._case(family)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with self.attach(intervention, model):
            cached, fresh = (model.generate(**ids, **settings, use_cache=use) for use in (True, False))
        assert torch.equal(cached, fresh), f"with a cache {cached.tolist()}, without {fresh.tolist()}"

    def test_runs_without_grad_and_in_inference_mode(self, family: str) -> None:
        """The grad mode does not change the numbers."""
        model, intervention, batch = self._case(family)
        with self.attach(intervention, model):
            plain = model(**batch).logits.detach()
            with torch.no_grad():
                _close(model(**batch).logits, plain, "under no_grad")
            with torch.inference_mode():
                _close(model(**batch).logits, plain, "under inference_mode")

    def test_bfloat16_stays_bfloat16(self, family: str) -> None:
        """A bf16 model runs, and every hidden state and the logits keep the type."""
        model = self.model(family, torch.bfloat16)
        with self.attach(self.make(model), model), torch.no_grad():
            output = model(**_batch(model, self.texts), output_hidden_states=True)
        found = {x.dtype for x in (output.logits, *output.hidden_states)}
        assert found == {torch.bfloat16}, f"a bf16 model gave {found}"
        assert bool(torch.isfinite(output.logits).all()), "a bf16 model gave infinities"

    def test_gradient_checkpointing_changes_nothing(self, family: str) -> None:
        """Loss and gradients are those without checkpointing, also for several passes before one backward."""
        model = self.model(family).train()
        batches = [_batch(model, self.texts), _batch(model, self.texts[1:])]
        plain = self._train_step(model, batches)
        checkpoint_blocks(model)
        replayed = self._train_step(model, batches)
        assert plain.keys() == replayed.keys(), "other parameters got gradients"
        for name, value in plain.items():
            _close(replayed[name], value, f"with gradient checkpointing, {name}")

    # What it leaves behind

    def test_attach_and_remove_leave_no_trace(self, family: str) -> None:
        """While attached only hooks differ; after remove(), called twice, nothing does."""
        model = self.model(family)
        intervention = self.make(model)
        before = snapshot(model)
        attachment = self.attach(intervention, model)
        _logits(model, _batch(model, self.texts))
        assert without(snapshot(model), "hooks") == without(before, "hooks"), "something besides hooks changed"
        for _ in range(2):
            attachment.remove()
            assert not attachment.active, "still active after remove()"
            assert snapshot(model) == before, "remove() left a trace"

    def test_attach_is_all_or_nothing(self, family: str) -> None:
        """If any one hook cannot be registered, none stays."""
        model = self.model(family)
        intervention = self.make(model)
        before = snapshot(model)
        with _counted_registrations() as count:
            self.attach(intervention, model).remove()
        for at in sorted({0, 1, count() // 2, count() - 1}):
            with _counted_registrations(fail_at=at), pytest.raises(_BoomError):
                self.attach(intervention, model)
            assert snapshot(model) == before, f"hooks were left when registration {at} failed"

    def test_exception_in_a_forward_pass_leaves_nothing(self, family: str) -> None:
        """Leaving the with block by an exception takes everything off."""
        model, intervention, batch = self._case(family)
        plain, blocks = _logits(model, batch), ModelMap.build(model).blocks
        before = snapshot(model)
        handle = blocks[-1].register_forward_hook(_boom)
        with pytest.raises(_BoomError), self.attach(intervention, model):
            model(**batch)
        handle.remove()
        assert snapshot(model) == before, "an exception left a trace"
        assert torch.equal(_logits(model, batch), plain), "an exception left the model changed"
        self._run(model, batch, intervention)  # and it can be attached again

    def test_copies_made_while_attached_are_plain(self, family: str) -> None:
        """A deep copy and an unpickled model act like the plain model, now and after remove()."""
        model, intervention, batch = self._case(family)
        plain = _logits(model, batch)
        with self.attach(intervention, model):
            copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}  # noqa: S301
            changed = _logits(model, batch)
            for how, twin in copies.items():
                assert torch.equal(_logits(twin, batch), plain), f"a {how} made while attached is still hooked"
        for how, twin in copies.items():
            assert torch.equal(_logits(twin, batch), plain), f"a {how} changed when the original was released"
            assert torch.equal(self._run(twin, batch, self.make(twin)), changed), f"a {how} cannot be attached to"

    # What it lives with

    def test_works_on_a_peft_model(self, family: str) -> None:
        """Adapters in the model do not get in the way, and stay."""
        from peft import LoraConfig, inject_adapter_in_model

        model = self.model(family)
        with seeded_rng(0):
            config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            model = inject_adapter_in_model(config, model).eval()
        intervention, batch = self.make(model), _batch(model, self.texts)
        before, plain = snapshot(model), _logits(model, batch)
        changed = self._run(model, batch, intervention)
        assert torch.equal(plain, changed) is not self.changes_output, "see changes_output"
        assert snapshot(model) == before, "something was left on the adapted model"

    def test_works_inside_another_module(self, family: str) -> None:
        """Attaching to a module that holds the model is attaching to the model."""
        model, intervention, batch = self._case(family)
        holder = nn.ModuleDict({"inner": nn.ModuleDict({"policy": model})})
        direct = self._run(model, batch, intervention)
        with self.attach(intervention, holder):
            assert torch.equal(_logits(model, batch), direct), "attached through a holder it acts differently"

    def test_refuses_compiled_models(self, family: str) -> None:
        """Hooks on a compiled model would be ignored, so there must be an error, and no trace."""
        model = self.model(family)
        intervention: Intervention = self.make(model)
        wrapper: Any = torch.compile(model, backend="eager")  # its default imports torch._inductor, for seconds
        for compiled in (wrapper, model):
            if compiled is model:
                model.compile(backend="eager")
            before = snapshot(model)
            with pytest.raises(CompiledModelError, match="is compiled"):
                self.attach(intervention, compiled)
            assert snapshot(model) == before, "a refused compiled model left a trace"

    def test_two_attachments_compose_in_order(self, family: str) -> None:
        """The one attached first acts first; removing it leaves the other as if it had been alone."""
        model, intervention, batch = self._case(family)
        other = _Affine(self._shared_site(intervention, model))
        alone = {part: self._run(model, batch, part) for part in (intervention, other)}
        for parts in ((intervention, other), (other, intervention)):
            expected = self._run(model, batch, Compose(*parts))
            with self.attach(parts[0], model) as first, self.attach(parts[1], model):
                assert torch.equal(_logits(model, batch), expected), "two attachments differ from Compose"
                first.remove()
                assert torch.equal(_logits(model, batch), alone[parts[1]]), "the second did not survive the first"

    # Helpers

    def _case(self, family: str) -> tuple[Any, Intervention, Batch]:
        model = self.model(family)
        return model, self.make(model), _batch(model, self.texts)

    def _run(self, model: nn.Module, batch: Batch, intervention: Intervention) -> torch.Tensor:
        with self.attach(intervention, model):
            return _logits(model, batch)

    def _train_step(self, model: Any, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with self.attach(self.make(model), model):
            losses = [model(**b, labels=b["input_ids"], use_cache=False).loss * (i + 1) for i, b in enumerate(batches)]
            _logits(model, _batch(model, self.texts[-1:]))  # as a reference's pass, between forward and backward
            torch.autograd.backward(torch.stack(losses).sum())
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": torch.stack(losses).detach(), **grads}

    def _shared_site(self, intervention: Intervention, model: nn.Module) -> Site:
        sites = intervention.sites(ModelMap.build(model))
        return next((s for s in sites if s.kind.startswith("resid")), Site("resid_post", 1))

    def _needs_cache_consistency(self) -> None:
        if not self.cache_consistent:
            pytest.skip(f"{type(self).__name__} follows the growing sequence")


_pristine, _tokenizer = cache(tiny_model), cache(byte_tokenizer)


class _BoomError(Exception):
    pass


def _boom(*_: Any) -> None:
    raise _BoomError


@contextmanager
def _counted_registrations(fail_at: int | None = None) -> Iterator[Callable[[], int]]:
    """Count the hooks that are registered, and refuse one of them."""
    done: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(nn.Module, name)

        def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(done) == fail_at:
                raise _BoomError
            done.append(name)
            return original(self, *args, **kwargs)

        return register

    with ExitStack() as stack:
        for name in _REGISTER:
            stack.enter_context(mock.patch.object(nn.Module, name, wrap(name)))
        yield lambda: len(done)


def _batch(model: nn.Module, texts: Sequence[str]) -> Batch:
    """A left-padded batch, with the position ids that ``generate`` would make, where the model takes them."""
    encoded = _tokenizer()(list(texts), return_tensors="pt", padding=True)
    batch: Batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def _decode(model: nn.Module, batch: Batch, *, prompt: int) -> torch.Tensor:
    """Logits of a prompt, then of one token at a time with a cache."""
    length, cache, logits = batch["input_ids"].shape[1], None, []
    ends = [prompt, *range(prompt + 1, length + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        step = {name: values[:, start:end] for name, values in batch.items()}
        step["attention_mask"] = batch["attention_mask"][:, :end]
        with torch.no_grad():
            output = model(**step, **cache_argument(model, cache), use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=1e-5, msg=lambda text: f"{what}: {text}")
