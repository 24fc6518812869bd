"""Folders that somebody else may have prepared: nothing is read, written or deleted through a link out of one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lightning_interp.core.storage.files import write_error
from lightning_interp.errors import ManifestError

__all__ = ["check_inside", "is_inside_name", "open_own"]

# What lies in a run folder; whatever else is there is none of ours.
RUN_PARTS: tuple[str, ...] = (".lock", "manifest.json", "config.yaml", "metrics.json", "report.html")
RUN_PARTS += ("phases", "children", "tables", "figures", "tensorboard")


def check_inside(folder: str | os.PathLike[str], names: Iterable[str] = RUN_PARTS, *, own: bool = False) -> None:
    """Refuse a folder where one of ``names``, or what lies in it, leads out, or is neither a file nor a folder.

    Inside the folder of a phase, links to what lies in the same run are let be: libraries make such (Lightning's
    ``save_last="link"``). The folder itself may be a link, as the user names it. ``own`` refuses files with a second
    name too (hard links): libraries write some files where they are.
    """
    root = Path(os.path.realpath(folder))
    waiting = [root / name for name in names]
    while waiting:
        path = waiting.pop()
        try:
            mode = path.lstat().st_mode
        except OSError:  # not there, or not to be seen by us
            continue
        if stat.S_ISLNK(mode):
            if not (_in_phase(path.relative_to(root)) and Path(os.path.realpath(path)).is_relative_to(root)):
                raise ManifestError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, and what is written there would not stay in "
                    f"{str(folder)!r}. Delete the link, or put what it points to in its place."
                )
        elif stat.S_ISDIR(mode):
            try:
                waiting += path.iterdir()
            except OSError as error:
                raise write_error(path, error) from error
        elif own and stat.S_ISREG(mode) and path.lstat().st_nlink > 1:
            raise shared_error(path)
        elif not stat.S_ISREG(mode):
            raise ManifestError(f"{str(path)!r} is neither a file nor a folder. Delete it.")


def open_own(path: Path, flags: int) -> int:
    """Open a file that is written in its place: never through a link, and no file that has another name as well.

    Raises:
        ManifestError: If it is a link, shared, or no file.
        OSError: If it cannot be opened.
    """
    if path.is_symlink():
        raise ManifestError(f"{str(path)!r} is a link and would be written to. Delete it.")
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise shared_error(path)


def shared_error(path: Path) -> ManifestError:
    """The error of a file that would be written where it is, and so under its other names as well."""
    return ManifestError(
        f"{str(path)!r} is no file of its own: another name leads to it as well (a hard link), and what is written "
        "there would be changed under both. Put a copy in its place, or delete it."
    )


def is_inside_name(name: str) -> bool:
    """Whether a relative path, as a manifest names a file, stays in its folder."""
    return bool(name) and not name.startswith("/") and ".." not in PurePosixPath(name).parts


def _in_phase(path: Path) -> bool:
    """Whether a path, from the run folder, lies inside the folder of a phase of the run or of a run inside it."""
    parts = path.parts
    while parts[:1] == ("children",):
        parts = parts[2:]
    return len(parts) > 2 and parts[0] == "phases"
