"""Where a child run hangs in its parent, and the rules that keep both consistent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_interp.core.storage.run_lock import is_in_use
from lightning_interp.core.storage.run_words import check_name
from lightning_interp.errors import ManifestError

__all__ = ["CHILDREN", "ChildPlace", "check_child_name", "check_parents_free", "child_folders"]

CHILDREN = "children"


class Parent(Protocol):
    """The run that a child lies in, as far as its place needs to know it."""

    _state: dict[str, Any]
    _child: Any
    _lineage: Any


@dataclass(frozen=True)
class ChildPlace:
    """A child that its parent opens: ``base`` is a digest of what its phases depend on in the parent.

    ``opening`` counts how often the parent has opened it in its running session, this time included.
    """

    parent: Parent
    key: str
    base: str
    opening: int

    def mark(self) -> dict[str, int]:
        """Return what the child's session says of its parent's, so that other ranks know a session of today."""
        return {"session": len(self.parent._state["sessions"]), "opening": self.opening}


def check_child_name(run_dir: Path, key: str) -> str:
    """Return ``key`` if it can name a child of a run."""
    if "/" in check_name(key, "child run"):
        raise ManifestError(f"{key!r} cannot name a child run: it holds '/'. Use '-' between its parts.")
    twin = next((name for name in _names(run_dir) if name != key and name.lower() == key.lower()), None)
    if twin is not None:
        raise ManifestError(
            f"Child runs {key!r} and {twin!r} differ only in case and would share a folder on some file systems. "
            "Rename one of them."
        )
    return key


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
    folders = {name: run_dir / CHILDREN / name for name in _names(run_dir)}
    return {name: folder for name, folder in folders.items() if (folder / "manifest.json").exists()}


def _names(run_dir: Path) -> list[str]:
    folder = run_dir / CHILDREN
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
