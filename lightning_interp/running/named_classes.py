"""What settings may name: plain values, and classes of Lightning or of modules that the user allows.

A settings file is data that somebody may have sent. A name in it imports nothing but what this module lets through.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from types import UnionType
from typing import Any

from lightning_interp.errors import RecipeError

__all__ = ["Plain", "check_paths", "classes_of", "dataclasses_in", "hints_of", "plain_hint", "takes_none"]

# Where Lightning defines the classes of objects that its Trainer takes.
_PARTS = ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
LIGHTNING = tuple(f"lightning.{side}.{part}" for side in ("pytorch", "fabric") for part in _PARTS)


class Plain:
    """The type of a field that takes anything, as the reader of settings sees it: values, and never an object."""


@contextmanager
def classes_of(imports: Sequence[str] = ()) -> Iterator[None]:
    """Inside, names in settings are imported from Lightning's classes and from ``imports`` alone."""
    from jsonargparse import _common, set_parsing_settings
    from jsonargparse.typing import register_type

    register_type(Plain, serializer=_as_it_is, deserializer=_loaded, type_check=_is_loaded)
    before = dict(_common.parsing_settings)  # the settings are the whole process's; there is no public way to read them
    try:
        set_parsing_settings(
            instantiate_subclass_spec_in_any=False,
            import_path_denylist=["*"],
            import_path_allowlist=[*LIGHTNING, *imports],
        )
        yield
    finally:
        _common.parsing_settings.update(before)


def plain_hint(hint: Any) -> Any:
    """Return a type with :class:`Plain` in each place of ``Any`` and ``object``."""
    if hint is Any or hint is object:
        return Plain
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    changed = tuple(plain_hint(part) for part in parts)
    if origin in (None, type, typing.Literal, typing.Annotated) or changed == parts:
        return hint
    return typing.Union[changed] if origin in (typing.Union, UnionType) else origin[changed]  # noqa: UP007 - of a tuple


def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields; nothing of another class, or where a type exists for checkers alone."""
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def dataclasses_in(cls: Any) -> list[str]:
    """Return the import paths of the dataclasses that are types of fields, and of theirs."""
    found, waiting = set[str](), [cls]
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            path = f"{hint.__module__}.{hint.__qualname__}"
            if path not in found and all(part.isidentifier() for part in path.split(".")):
                found.add(path)
                waiting += hints_of(hint).values()
    return sorted(found)


def takes_none(hint: Any) -> bool:
    """Return whether None is a value of a type."""
    return hint in (None, type(None), Any, object, Plain) or (
        typing.get_origin(hint) in (typing.Union, UnionType) and any(map(takes_none, typing.get_args(hint)))
    )


def check_paths(trainer: Any, named: Sequence[str], place: str) -> None:
    """Refuse a path or an address, of the Trainer or in the arguments of an object, that leads elsewhere.

    What the user ``named`` on the command line is let be.
    """
    for text in _texts(trainer, False):
        elsewhere = os.path.isabs(text) or text.startswith("~") or ".." in PurePath(text).parts or "://" in text
        if elsewhere and not any(text in argument for argument in named):
            raise RecipeError(
                f"{place}: the Trainer is to use {text!r}, which a settings file cannot decide. Look at it, and give "
                "that argument on the command line, such as --trainer.callbacks=..."
            )


def _texts(value: Any, inside: bool) -> Iterator[str]:
    """Texts in a value that are arguments of an object, or the Trainer's own folder."""
    if isinstance(value, str) and inside:
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, inside or key in ("init_args", "dict_kwargs", "default_root_dir"))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, inside)


def _loaded(text: Any) -> Any:
    """Read a text as jsonargparse does for a field that takes anything."""
    import yaml
    from jsonargparse import get_loader

    try:
        value = get_loader("yaml")(text) if text.strip() else text
    except yaml.YAMLError:
        return text
    return text if isinstance(value, str) else value


def _as_it_is(value: Any) -> Any:
    return value


def _is_loaded(value: Any, kind: type) -> bool:
    return not isinstance(value, str)
