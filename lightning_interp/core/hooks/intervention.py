"""Interventions: what is done to activations, and the handle that always takes it off again."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_interp.core.hooks.cache_notes import CacheNotes
from lightning_interp.core.hooks.checks import check_hookable
from lightning_interp.core.hooks.generate_calls import GenerateCalls
from lightning_interp.core.hooks.passes import OneThread, PassWatch
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.kv_cache import cache_in
from lightning_interp.core.tokens.pass_arguments import argument_reader, step_reader
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError, UnsupportedStrategyError

__all__ = ["Attachment", "Compose", "Hook", "Intervention", "join_output", "split_output"]

_PASSES = 32
"""Forward passes with gradients that an attachment remembers, for gradient checkpointing to replay."""


class Attachment(AbstractContextManager["Attachment"]):
    """Everything one intervention put on a model. Leaving the ``with`` block, or :meth:`remove`, takes it all off.

    Args:
        model_map: The decoder that is hooked.
        tokenizer: For selectors that read text.

    Attributes:
        batch: The user's batch for ``FromBatch``; set it before a forward pass (the Lightning callback does). Its entry
            ``prompt_lengths`` says what ``prompt_lengths`` says, for that batch.
        prompt_lengths: Real tokens of each row's prompt ``[B]``, for passes over prompt and answer together. A
            generation needs none: ``generate`` says what its prompt is, and in a loop of your own the first pass is it.
    """

    def __init__(self, model_map: ModelMap, tokenizer: Any = None) -> None:
        self.model_map = model_map
        self._tokenizer = tokenizer
        self.batch: Mapping[str, Any] | None = None
        self.prompt_lengths: torch.Tensor | None = None
        self._notes = CacheNotes(model_map)
        self._kept: int | torch.Tensor | None = None
        self._handles: list[Any] = []
        self._on_remove: list[Callable[[], None]] = []
        self._on_installed: list[Callable[[], None]] = []
        self._step: StepContext | None = None
        self._graph_task = -1
        self._passes: deque[tuple[int, StepContext]] = deque(maxlen=_PASSES)
        self._read = step_reader(model_map.backbone)
        self._watch, self._threads = PassWatch(model_map), OneThread()
        try:
            self.add(model_map.backbone.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
            self.add(model_map.backbone.register_forward_hook(Hook(self._end), always_call=True))
            self._calls = GenerateCalls([m for m in model_map.outer if not hasattr(type(m), "active_peft_config")])
            self.add(self._calls)
        except BaseException:
            self.remove()
            raise

    @property
    def active(self) -> bool:
        """True until :meth:`remove`."""
        return bool(self._handles)

    @property
    def step(self) -> StepContext:
        """The forward pass that is running, or that gradient checkpointing replays.

        Raises:
            PositionError: If a hooked module is called outside of its decoder's forward pass.
            UnsupportedStrategyError: If gradient checkpointing replays a pass that is too long ago.
        """
        if self._step is None:
            raise PositionError(
                f"A hooked module ran outside of {type(self.model_map.backbone).__name__}.forward, so its positions "
                "are not known. Call the whole model."
            )
        node = torch._C._current_autograd_node()
        if node is None or torch._C._current_graph_task_id() == self._graph_task:
            return self._step
        return self._replayed(node._sequence_nr())

    def _replayed(self, number: int) -> StepContext:
        """The pass that made the autograd node of this number, whose block is being recomputed."""
        found = next((step for start, step in reversed(self._passes) if start <= number), None)
        if found is None:
            raise UnsupportedStrategyError(
                f"Gradient checkpointing replays a forward pass of {type(self.model_map.backbone).__name__} that is "
                f"more than {_PASSES} passes ago, or was made before attaching. Call backward earlier, or turn "
                "gradient checkpointing off."
            )
        return found

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or the one that lies beside the model; None without either."""
        if self._tokenizer is None and (name := getattr(self.model_map.model, "name_or_path", "")):
            from transformers import AutoTokenizer

            with suppress(OSError, ValueError):
                self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return self._tokenizer

    def add(self, handle: Any) -> None:
        """Own a hook handle (anything with ``remove()``)."""
        self._handles.append(handle)

    def expect(self, hook: Hook, path: str) -> None:
        """Refuse a pass of the whole model that never calls the module at ``path``, which has this hook."""
        if self._watch.add(hook, path):
            self.add(self.model_map.model.register_forward_hook(Hook(lambda *_: self._watch.check(outside=True))))

    def on_remove(self, action: Callable[[], None]) -> None:
        """Run ``action`` once when the attachment is removed."""
        self._on_remove.append(action)

    def on_installed(self, check: Callable[[], None]) -> None:
        """Run ``check`` once when everything that is attached together is installed; what it raises undoes all."""
        self._on_installed.append(check)

    def installed(self) -> None:
        """Run what :meth:`on_installed` was given."""
        while self._on_installed:
            self._on_installed.pop()()

    def remove(self) -> None:
        """Take everything off. Safe to call again."""
        while self._handles:
            self._handles.pop().remove()
        while self._on_remove:
            self._on_remove.pop()()
        self._step = None
        self._passes.clear()

    def watch_head(self) -> None:
        """Note which columns the head is asked for, so that masks fit what it sees."""
        if "logits_to_keep" in inspect.signature(self.model_map.model.forward).parameters:
            argument = argument_reader(self.model_map.model)

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._kept = argument("logits_to_keep", args, kwargs)

            self.add(self.model_map.model.register_forward_pre_hook(Hook(note), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._read(args, kwargs)
        step.generation = self._calls.of_this_pass()
        self._threads.enter(step)
        self._watch.begin((step.length == 1, module.training))
        step.find_tokenizer, step.batch, step.kept = (lambda: self.tokenizer), self.batch, self._kept
        step.known_prompt_lengths = self.prompt_lengths
        if self.prompt_lengths is None and self.batch is not None:
            step.known_prompt_lengths = self.batch.get("prompt_lengths")
        self._notes.read(step, cache_in(args, kwargs))
        if not module.training:
            self._notes.read_text(step)
        self._step, self._graph_task = step, torch._C._current_graph_task_id()
        replays = any(getattr(block, "gradient_checkpointing", False) for block in self.model_map.blocks)
        if replays and torch.is_grad_enabled():
            self._passes.append((torch._C._autograd._get_sequence_nr(), step))

    def _end(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._threads.running = False
        if output is not None:  # else the pass failed
            self._notes.made(output)
            self._watch.check()


class Intervention(ABC):
    """A change of activations, in plain PyTorch.

    Subclasses name their sites and give a pure ``transform``; how it gets onto a model and off again is done here,
    once.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> class Zero(Intervention):
        ...     def sites(self, model_map):
        ...         return [Site("mlp_out", 0)]
        ...
        ...     def transform(self, site, x, step):
        ...         return torch.zeros_like(x)
        >>> model, ids = tiny_model("llama"), torch.arange(5)[None]
        >>> plain = model(ids).logits
        >>> with Zero().attach(model):
        ...     changed = model(ids).logits
        >>> torch.equal(plain, changed), torch.equal(plain, model(ids).logits)
        (False, True)
    """

    reads_weights: bool = False
    """True for interventions that use weight values, which sharded strategies do not hold."""

    @abstractmethod
    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """Where this intervention acts.

        Args:
            model_map: The model that it is attached to.

        Returns:
            Sites, each at most once.
        """

    @abstractmethod
    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The new activation at a site.

        Args:
            site: Which of :meth:`sites`.
            x: Activation ``[B, T, d]``; must not be changed in place.
            step: The tokens of this pass.

        Returns:
            A tensor of the same shape and dtype; ``x`` itself for no change.
        """

    def attach(self, model: nn.Module | ModelMap, *, tokenizer: Any = None, target: str | None = None) -> Attachment:
        """Put the intervention on a model; all of it, or nothing and an error.

        Args:
            model: A plain model, a PEFT wrapper, a LightningModule, or a ready :class:`ModelMap`.
            tokenizer: For selectors that read text (``Substring``, ``ChatTemplate``).
            target: Dotted path of the Hugging Face model, where there are several.

        Returns:
            The attachment, also a context manager.

        Raises:
            CompiledModelError: If the model was compiled, so hooks would be ignored.
            SiteError: If the model lacks a site.
        """
        model_map = model if isinstance(model, ModelMap) else ModelMap.build(model, target=target)
        check_hookable(model_map.model if isinstance(model, ModelMap) else model)
        self.check(model_map)
        attachment = Attachment(model_map, tokenizer)
        try:
            self.install(attachment)
            attachment.installed()
        except BaseException:
            attachment.remove()
            raise
        return attachment

    def check(self, model_map: ModelMap) -> None:
        """Refuse a model before anything is hooked. The default asks for every site.

        Args:
            model_map: The model.

        Raises:
            SiteError: If a site is missing.
        """
        for site in self.sites(model_map):
            model_map.module(site)

    def install(self, attachment: Attachment) -> None:
        """Register the hooks; the default puts :meth:`transform` on every site.

        Args:
            attachment: Owns the handles.
        """
        for site in self.sites(attachment.model_map):
            hook_site(attachment, site, partial(self.transform, site))


class Compose(Intervention):
    """Several interventions, in this order at every site they share.

    Args:
        *interventions: At least one.

    Example:
        >>> from lightning_interp import ActivationCapture
        >>> Compose(ActivationCapture([Site("resid_post", 0)]), ActivationCapture([Site("logits")])).reads_weights
        False
    """

    def __init__(self, *interventions: Intervention) -> None:
        if not interventions:
            raise RecipeError("Compose() got no interventions; expected at least one.")
        self.interventions = interventions
        self._acting: dict[Site, list[Intervention]] = {}
        self.reads_weights = any(i.reads_weights for i in interventions)

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """Every site of every part, each once."""
        self._acting = {}
        for part in self.interventions:
            for site in part.sites(model_map):
                self._acting.setdefault(site, []).append(part)
        return list(self._acting)

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Apply each part that acts on the site (as the last call of :meth:`sites` told), in order."""
        for part in self._acting.get(site, ()):
            x = part.transform(site, x, step)
        return x

    def check(self, model_map: ModelMap) -> None:
        """Refuse what any part refuses."""
        for part in self.interventions:
            part.check(model_map)

    def install(self, attachment: Attachment) -> None:
        """Install the parts in order."""
        for part in self.interventions:
            part.install(attachment)


def hook_site(
    attachment: Attachment, site: Site, function: Callable[[torch.Tensor, StepContext], torch.Tensor]
) -> None:
    """Put ``function(x, step) -> x`` (same shape and dtype) on one site; ``x`` itself leaves the pass untouched."""
    point = attachment.model_map.module(site)
    if site.kind in ("unembed_in", "logits"):
        attachment.watch_head()

    def changed(given: torch.Tensor) -> torch.Tensor:
        x = _by_row(given, attachment.step)
        new = function(x, attachment.step)
        if new is x:
            return given
        if new.shape != x.shape or new.dtype != x.dtype:
            raise IncompatibleModelError(
                f"The new activation at {site} is {new.dtype} {list(new.shape)}, but {point.path} of "
                f"{type(attachment.model_map.model).__name__} has {x.dtype} {list(x.shape)} there. Keep the shape, and "
                "move what you add or multiply with .to(x)."
            )
        return new.reshape(given.shape)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        x, put = first_input(args, kwargs)
        new = changed(x)
        return None if new is x else put(new)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        x, rest = split_output(output)
        new = changed(x)
        return None if new is x else join_output(new, rest)

    hook = Hook(before if point.is_input else after)
    if point.is_input:
        attachment.add(point.module.register_forward_pre_hook(hook, with_kwargs=True))
    else:
        attachment.add(point.module.register_forward_hook(hook))
    attachment.expect(hook, point.path)


def _by_row(x: torch.Tensor, step: StepContext) -> torch.Tensor:
    """``[B, T, d]``, also where a family runs a sub-layer on ``[B*T, d]``."""
    flat = x.dim() == 2 and x.shape[0] == step.batch_size * step.length
    return x.reshape(step.batch_size, step.length, -1) if flat else x


def first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The main input of a module and how to put another in its place."""
    if args:
        return args[0], lambda new: ((new, *args[1:]), kwargs)
    name = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
    return kwargs[name], lambda new: (args, {**kwargs, name: new})


def split_output(output: Any) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
    """The activation in a module's output, and what came with it (None if the output is the tensor itself)."""
    if isinstance(output, torch.Tensor):
        return output, None
    return output[0], tuple(output[1:])


def join_output(x: torch.Tensor, rest: tuple[Any, ...] | None) -> Any:
    """Undo :func:`split_output` with a new activation."""
    return x if rest is None else (x, *rest)
