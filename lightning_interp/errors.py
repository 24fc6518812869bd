"""The exception tree: every error this package raises on purpose derives from :class:`InterpError`.

Each message says what failed, on which object, what was expected or exists, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CompiledModelError",
    "DataError",
    "IncompatibleModelError",
    "InterpError",
    "ManifestError",
    "PositionError",
    "QuantizedModelError",
    "RecipeError",
    "SiteError",
    "UnsupportedStrategyError",
]


class InterpError(Exception):
    """Base of every error that this package raises on purpose."""


class SiteError(InterpError, LookupError):
    """A model has no such site, component or layer, or it means something else there."""


class PositionError(InterpError, ValueError):
    """Token positions could not be found, or lie outside the sequence."""


class IncompatibleModelError(InterpError, TypeError):
    """Two models (or a model and a method) do not fit together; names the first tensors that differ."""


class UnsupportedStrategyError(InterpError, RuntimeError):
    """A Lightning strategy (or a sharded model) cannot do what was asked."""


class CompiledModelError(InterpError, RuntimeError):
    """The model was compiled, so hooks that are attached now would be silently ignored."""


class QuantizedModelError(InterpError, RuntimeError):
    """A quantised model cannot do what was asked."""


class RecipeError(InterpError, ValueError):
    """A recipe, plan or configuration holds a wrong name or value."""


class ManifestError(InterpError, RuntimeError):
    """A run folder cannot be used: another configuration, a changed file, or not writable."""


class DataError(InterpError, ValueError):
    """A data file holds something that cannot be used; names the file and the line."""
