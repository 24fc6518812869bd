"""Who calls ``generate``, and with which prompt: a model that is attached to tells it to its attachments."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import nn

from lightning_interp.core.hooks.passes import other_thread
from lightning_interp.core.tokens.generation import Generation, read_generation
from lightning_interp.errors import CompiledModelError, PositionError

__all__ = ["GenerateCalls", "MethodHook"]


class GenerateCalls:
    """While an attachment lives, ``generate`` of these models tells it the prompt; continuous batching is refused.

    A pass alone does not tell a chunk of a prompt from candidates for new tokens, or a text that is read anew in each
    pass from a longer prompt.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._current: Generation | None = None
        self._caller: nn.Module | None = None
        self._thread, self._lock = threading.current_thread(), threading.Lock()
        kinds: dict[str, Callable[..., Any]] = {
            "generate": self._generate,
            "init_continuous_batching": _refuse,
            "get_compiled_call": _refuse_compiled,
        }
        self._methods = [MethodHook(m, name, do) for name, do in kinds.items() for m in models if hasattr(m, name)]

    def of_this_pass(self) -> Generation | None:
        """What is known of the call that a pass which begins now belongs to; None outside of one."""
        self._check_thread()
        return self._current

    def _check_thread(self) -> None:
        if self._current is not None and self._thread is not threading.current_thread():
            raise other_thread("generates")

    def remove(self) -> None:
        """Give the models their methods back."""
        while self._methods:
            self._methods.pop().remove()

    def _generate(self, model: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_thread()
        before = self._caller, self._current
        drafts = getattr(kwargs.get("generation_config"), "is_assistant", False)
        if drafts and before[0] is model and before[1] is not None and not before[1].doubt:
            return function(*args, **kwargs)  # for itself: the prompt is that of the outer call
        told = read_generation(function, getattr(model, "generation_config", None), args, kwargs)
        with self._lock:
            self._check_thread()
            self._caller, self._current, self._thread = model, told, threading.current_thread()
        try:
            return function(*args, **kwargs)
        finally:
            self._caller, self._current = before


def _refuse(model: nn.Module, *_: Any) -> Any:
    raise PositionError(
        f"{type(model).__name__} has something attached, but continuous batching packs the tokens of several requests "
        "into one row, so that which token is whose is not known. Call generate with a padded batch."
    )


def _refuse_compiled(model: nn.Module, *_: Any) -> Any:
    raise CompiledModelError(
        f"{type(model).__name__} has something attached, which the passes that generate compiles for a static cache "
        "may never see. Generate with a dynamic cache."
    )


class MethodHook:
    """A method of one model with something around it; a copied or unpickled model has the method as it was."""

    def __init__(self, model: nn.Module, name: str, do: Callable[..., Any]) -> None:
        self.function: Callable[..., Any] = getattr(model, name)
        functools.update_wrapper(self, self.function, updated=())
        self.model, self.name, self.do, self.active = model, name, do, True
        self.own: Any = model.__dict__.get(name)
        model.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if self.active:
            return self.do(self.model, self.function, args, kwargs)
        return self.function(*args, **kwargs)

    def remove(self) -> None:
        """Give the model its method back. Safe to call again."""
        self.active = False
        below: Any = self
        if self.model.__dict__.get(self.name) is self:  # else somebody has put something around it, and calls it
            while isinstance(below, MethodHook) and not below.active:
                below = below.own
            if below is None:
                del self.model.__dict__[self.name]
            else:
                self.model.__dict__[self.name] = below

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        model = memo.get(id(self.model))
        return self.function if model is None else MethodType(getattr(type(model), self.name), model)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, self.name)
