"""Hooks of this package: inert in copies of a module, and aside while somebody looks at the bare model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Hook", "suspended"]


class Hook:
    """A hook that belongs to one attachment: a copied or unpickled module carries an inert one."""

    __slots__ = ("fired", "function")

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function
        self.fired = False
        """Whether it ran since this was last set to False."""

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        self.fired = True
        return None if self.function is None else self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


@contextmanager
def suspended(*models: nn.Module) -> Iterator[None]:
    """Let every hook of ours that is on these models do nothing; one that is put on inside of the block acts."""
    tables = (t for model in models for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks))
    found = {id(hook): hook for table in tables for hook in table.values() if isinstance(hook, Hook)}
    acting = [(hook, hook.function) for hook in found.values()]
    for hook, _ in acting:
        hook.function = None
    try:
        yield
    finally:
        for hook, function in acting:
            hook.function = function
