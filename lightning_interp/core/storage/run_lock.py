"""One live process per run folder, and where child runs lie in their parents."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from lightning_interp.core.storage.files import write_error
from lightning_interp.core.storage.inside import open_own
from lightning_interp.errors import ManifestError

__all__ = ["CHILDREN", "ChildPlace", "RunLock", "check_parents_free", "child_folders", "child_names", "is_in_use"]

CHILDREN = "children"

# Record locks do not stop a second opening inside the same process, so that is kept here: path -> process id.
_HELD: dict[Path, int] = {}


class RunLock(AbstractContextManager["RunLock"]):
    """A lock on an existing run folder that the operating system releases when its process ends, however it ends.

    POSIX record locks: forked children (loader workers, ranks) do not inherit them, so none outlives a killed run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir.resolve() / ".lock"
        if _HELD.get(self._path) == os.getpid():
            raise ManifestError(
                f"Run folder {str(run_dir)!r} is in use by this process. Close the manifest that holds it first."
            )
        try:
            self._file: IO[str] | None = os.fdopen(open_own(self._path, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8")
        except OSError as error:
            raise write_error(self._path, error) from error
        try:
            _take(self._file)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ManifestError(
                f"Run folder {str(run_dir)!r} is in use by {holder}. Wait for it, stop it, or choose another --run_dir."
            ) from error
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        _HELD[self._path] = os.getpid()

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _HELD.pop(self._path, None)


def is_in_use(run_dir: Path) -> bool:
    """Return whether a live process of this machine works in a run folder."""
    path = run_dir.resolve() / ".lock"
    if _HELD.get(path) == os.getpid():
        return True
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, ManifestError):  # nothing that a run of ours holds
        return False
    except OSError:
        return True
    return False


def _take(file: IO[str]) -> None:
    """Lock a file; once more after a moment, because :func:`is_in_use` holds the lock while it looks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        time.sleep(0.05)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Parent(Protocol):
    """The run that a child lies in, as far as its place needs to know it."""

    _state: dict[str, Any]
    _child: Any
    _lineage: Any


@dataclass(frozen=True)
class ChildPlace:
    """A child that its parent opens, the ``opening``-th time in a session; ``base`` digests what it depends on.

    ``outputs`` and ``not_identity`` are those of the child, as ``RunManifest.open`` takes them.
    """

    parent: Parent
    key: str
    base: str
    opening: int
    outputs: Collection[str] = ()
    not_identity: Collection[str] = ()

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
