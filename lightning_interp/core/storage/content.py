"""Files and folders by content: what is in them, and whether it is still the same.

A *stamp* of a file is its size, its time of change and the SHA-256 of its content. A file whose size and time of
change are those of its stamp is trusted without being read, so that a run that goes on does not read all that it
wrote. Who changes a file and sets its time back is not noticed; delete the phase's folder then. Where only the time
differs, as after copying a run folder, the content decides. A file that was changed within two seconds of being
hashed gets a stamp without a time, so that a later change within one tick of the disk's clock is noticed as well.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import sha256_file

__all__ = [
    "RESULT",
    "checked_stamp",
    "checkpoint_fault",
    "current_stamp",
    "delete_folder",
    "drop_damaged_checkpoints",
    "fingerprint",
    "hash_folder",
    "known_sha256",
    "sha_of",
    "stamp_file",
]

RESULT = "result.json"  # in the folder of a finished phase: what the phase returned
# Checkpoints serve resuming and may go when a phase is finished; event files are TensorBoard's.
NOT_HASHED = ("*.ckpt", "events.out.tfevents.*", ".*.tmp")
_ZIP = b"PK\x03\x04"
_LARGE = 2**20  # bytes: smaller files are read again rather than remembered
_TICK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system


def stamp_file(path: Path) -> dict[str, Any]:
    """Hash a file and return its stamp; ``mtime_ns`` is None if the last change is too near to be trusted."""
    before = path.stat()
    sha = sha256_file(path)
    settled = time.time_ns() - before.st_mtime_ns > _TICK
    return {"sha256": sha, "size": before.st_size, "mtime_ns": before.st_mtime_ns if settled else None}


def current_stamp(path: Path, stamp: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the stamp of a file, reading the file only if it does not look as it did at its last stamp."""
    if stamp is not None:
        now = path.stat()
        if (now.st_size, now.st_mtime_ns) == (stamp["size"], stamp["mtime_ns"]):
            return dict(stamp)
    return stamp_file(path)


def checked_stamp(path: Path, stamp: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """The stamp of a file with the time that it has now; None if it has changed (one of another size is not read)."""
    if isinstance(stamp, str):
        found = stamp_file(path)
    elif path.stat().st_size != stamp["size"]:
        return None
    else:
        found = current_stamp(path, stamp)
    return found if found["sha256"] == sha_of(stamp) else None


def sha_of(stamp: str | Mapping[str, Any]) -> str:
    """Return the SHA-256 in a stamp."""
    return stamp if isinstance(stamp, str) else str(stamp["sha256"])


def hash_folder(folder: Path, of: Callable[[Path], Any] = sha256_file) -> dict[str, Any]:
    """Return the SHA-256 (or what ``of`` gives) of each file below a folder but phases' results and ``NOT_HASHED``."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and not _is_result(path))
    return {
        name.as_posix(): of(folder / name)
        for name in files
        if not any(fnmatch.fnmatch(part, pattern) for part in name.parts for pattern in NOT_HASHED)
    }


def fingerprint(inputs: Any, sha256: Callable[[Path], str] = sha256_file) -> Any:
    """Replace each path in dicts and lists by the hash of its file or the hashes of its folder, or by text."""
    if isinstance(inputs, Path):
        if inputs.is_dir():
            return hash_folder(inputs, sha256)
        return sha256(inputs) if inputs.is_file() else str(inputs)
    if isinstance(inputs, Mapping):
        return {key: fingerprint(value, sha256) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [fingerprint(value, sha256) for value in inputs]
    return inputs


def delete_folder(folder: Path) -> None:
    """Delete a folder and all in it; of a link to somewhere else, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def checkpoint_fault(path: Path) -> str | None:
    """Why a checkpoint of torch cannot be read as it was written; None if it can, or is a file of another kind.

    One is a zip file whose parts have checksums (all of it is read, and nothing unpickled), or a folder of shards,
    whose table of contents is written last.
    """
    if path.is_dir():
        cut = any(path.glob("*.distcp")) and not (path / ".metadata").is_file()
        return "it lacks its table of contents, .metadata" if cut else None
    try:
        with open(path, "rb") as file:
            begins = file.read(len(_ZIP))
        if not _ZIP.startswith(begins):
            return None
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"{error}" or type(error).__name__
    return f"its part {damaged!r} is damaged" if damaged else None


def drop_damaged_checkpoints(folder: Path) -> dict[Path, str]:
    """Delete the checkpoints below a folder that cannot be read, and say why: no training can go on from them."""
    found = {path: checkpoint_fault(path) for path in sorted(folder.rglob("*.ckpt")) if path.exists()}
    faults = {path: fault for path, fault in found.items() if fault is not None}
    for path in faults:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return faults


def _is_result(path: Path) -> bool:
    """Whether a file is what the manifest stored of a phase, in this run or another."""
    if path.name != RESULT or len(path.parents) < 3 or path.parents[1].name != "phases":
        return False
    return (path.parents[2] / "manifest.json").exists()


def known_sha256(path: Path, run_dir: Path, state: dict[str, Any]) -> str:
    """The SHA-256 of a file, trusting the stamps in a manifest: of its phases, and of large files under ``sources``."""
    place, phases = Path(os.path.abspath(path)), Path(os.path.abspath(run_dir)) / "phases"
    if place.is_relative_to(phases):
        name, *parts = place.relative_to(phases).parts
        known = state["phases"].get(name, {}).get("files", {}).get("/".join(parts))
        return sha_of(current_stamp(path, None if isinstance(known, str) else known))
    stamp = current_stamp(path, state.get("sources", {}).get(str(place)))
    if stamp["size"] >= _LARGE:
        state.setdefault("sources", {})[str(place)] = stamp
    return sha_of(stamp)
