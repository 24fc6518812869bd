"""The KV cache of a forward pass, under whatever name a version of transformers gives it.

Up to transformers 5.23 a decoder's ``forward`` takes ``past_key_values``; from 5.24 on it takes ``cache``, and the old
name warns. What a cache is tells more than what it is called: it knows how many tokens it holds.
"""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

__all__ = ["cache_argument", "cache_in", "cache_of", "installed_versions"]

_NAMES = ("cache", "past_key_values")


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
    """The cache among the arguments of a call, by what it is; None without one."""
    return next((value for value in (*kwargs.values(), *args) if hasattr(value, "get_seq_length")), None)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword (``cache``, or the older ``past_key_values``) that a model's ``forward`` takes it by."""
    base = getattr(model, "get_base_model", None)
    accepted = inspect.signature((base() if base is not None else model).forward).parameters
    return {next((name for name in _NAMES if name in accepted), _NAMES[-1]): cache}


def cache_of(output: Any) -> Any | None:
    """The cache that a model's output carries; None without one."""
    # Asked for by the names that it has: asking a new output for an older name logs a deprecation, ``in`` included.
    has = set(output.keys()) if hasattr(output, "keys") else set(_NAMES)
    return next((cache for name in _NAMES if name in has and (cache := getattr(output, name, None)) is not None), None)


def installed_versions() -> str:
    """Versions of torch, transformers and peft, for messages about what an installation does unexpectedly."""
    found = []
    for package in ("torch", "transformers", "peft"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)
