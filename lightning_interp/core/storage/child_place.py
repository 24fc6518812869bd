"""Where a child run hangs in its parent, and the rules that keep both consistent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_interp.core.storage.run_lock import is_in_use
from lightning_interp.errors import ManifestError

__all__ = ["CHILDREN", "ChildPlace", "check_parents_free", "child_folders", "child_names"]

CHILDREN = "children"


class Parent(Protocol):
    """The run that a child lies in, as far as its place needs to know it."""

    _state: dict[str, Any]
    _child: Any
    _lineage: Any


@dataclass(frozen=True)
class ChildPlace:
    """A child that its parent opens, the ``opening``-th time in a session; ``base`` digests what it depends on."""

    parent: Parent
    key: str
    base: str
    opening: int

    def mark(self) -> dict[str, int]:
        """Return what the child's session says of its parent's, so that other ranks know a session of today."""
        return {"session": len(self.parent._state["sessions"]), "opening": self.opening}


def check_parents_free(run_dir: Path) -> None:
    """Refuse to open a child run alone while a run that it belongs to is open."""
    path = Path(os.path.abspath(run_dir))
    while path.parent.name == CHILDREN:
        path = path.parent.parent
        if (path / "manifest.json").exists() and is_in_use(path):
            raise ManifestError(
                f"Run folder {str(run_dir)!r} is a child of the run in {str(path)!r}, which is in use. Open it with "
                "child() of that run, or wait until that run has ended."
            )


def child_folders(run_dir: Path) -> dict[str, Path]:
    """Return the folders of a run's children that have begun."""
    folders = {name: run_dir / CHILDREN / name for name in child_names(run_dir)}
    return {name: folder for name, folder in folders.items() if (folder / "manifest.json").exists()}


def child_names(run_dir: Path) -> list[str]:
    """Return the names of a run's children."""
    folder = run_dir / CHILDREN
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
