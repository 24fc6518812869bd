"""Folders by content: what is in them, and whether it is still the same."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import sha256_file

__all__ = ["delete_folder", "fingerprint", "hash_folder"]

# Checkpoints serve resuming and may go when a phase is finished; event files are TensorBoard's.
NOT_HASHED = ("*.ckpt", "events.out.tfevents.*", ".*.tmp")


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below ``folder``, leaving out checkpoints, event files and temporary files.

    Args:
        folder: The folder.

    Returns:
        Hexadecimal digits by relative path.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("a"), (folder / "last.ckpt").write_text("big")
        >>> list(hash_folder(folder))
        ['a.txt']
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    relative = ((path, path.relative_to(folder)) for path in files)
    return {
        name.as_posix(): sha256_file(path)
        for path, name in relative
        if not any(fnmatch.fnmatch(part, pattern) for part in name.parts for pattern in NOT_HASHED)
    }


def fingerprint(inputs: Any) -> Any:
    """Replace each path in ``inputs`` by the hash of its file or the hashes of its folder.

    Args:
        inputs: Dicts and lists of anything, with :class:`~pathlib.Path` in them.

    Returns:
        The same shape; a path to nothing becomes a string.
    """
    if isinstance(inputs, Path):
        if inputs.is_dir():
            return hash_folder(inputs)
        return sha256_file(inputs) if inputs.is_file() else str(inputs)
    if isinstance(inputs, Mapping):
        return {key: fingerprint(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [fingerprint(value) for value in inputs]
    return inputs


def delete_folder(folder: Path) -> None:
    """Delete a folder and all in it; one that is a link to somewhere else is emptied and kept.

    Args:
        folder: The folder; a missing one is fine.
    """
    if folder.is_symlink():
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
