"""Packages whose names are imported when they are first asked for; each name is listed once, in the package's stub."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["names_of_stub"]


def names_of_stub(
    package: str, file: str, *more: str
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__all__``, ``__getattr__`` and ``__dir__`` for the names that the ``.pyi`` file beside it lists.

    Type checkers read the stub, and so does this function: a line ``from module import name as name`` a name. The
    package is told by its ``__name__`` and ``__file__``, and defines ``more`` itself.
    """
    # Without pathlib and re, which cost more than all the rest.
    with open(file.removesuffix(".py") + ".pyi", encoding="utf-8") as stub:
        words = [line.split() for line in stub if line.startswith("from ")]
    homes = {line[3]: line[1] for line in words if line[4:] == ["as", line[3]]}
    names = sorted({*homes, *more})

    def getattr_of_package(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; its names are {', '.join(names)}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return names, getattr_of_package, dir_of_package
