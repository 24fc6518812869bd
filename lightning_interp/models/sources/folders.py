"""Folders that appear whole or not at all, and checks of the model files inside one."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_interp.core.storage.files import no_room, sync_to_disk, write_error
from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import InterpError, ManifestError

__all__ = ["atomic_folder", "check_free", "check_weight_files", "remove_stale", "short"]


@contextmanager
def atomic_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` when the block ends without an error.

    The files are forced to disk before the rename. Whoever opens ``target`` sees all of them or none, whenever
    the writer was killed; a target that is replaced stays whole until the new folder is complete.
    """
    final = Path(os.path.abspath(target))
    check_free(final, overwrite)
    temporary = _sibling(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise write_error(final, error) from error
    try:
        yield temporary
        _settle(temporary)
        check_free(final, overwrite)
        _publish(temporary, final)
    except Exception as error:
        if not isinstance(error, InterpError) and (why := no_room(error)):
            raise write_error(final, OSError(0, why)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_weight_files(folder: Path) -> None:
    """Refuse a model folder whose safetensors weights are missing, incomplete or damaged; only headers are read."""
    TensorFolder(folder).check()


def remove_stale(target: Path, *, older_than: float = 3600.0) -> None:
    """Remove temporary folders of killed writers of ``target``, if unchanged for that many seconds."""
    for path in target.parent.glob(f".{target.name[:100]}.*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                _remove(path)


def short(error: BaseException) -> str:
    """The text of an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a folder that holds files already, unless they may be replaced."""
    if overwrite or not os.path.lexists(target):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ManifestError(f"{target} exists already and is not empty. Choose another folder, or pass overwrite=True.")


def _settle(folder: Path) -> None:
    """Force a folder's files to disk, with the rights that the user's umask gives (some writers make them private)."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)
        sync_to_disk(path)
    sync_to_disk(folder)


def _publish(temporary: Path, final: Path) -> None:
    old = _sibling(final)
    try:
        replaced = os.path.lexists(final)
        if replaced:
            os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced:
                os.rename(old, final)
            raise
        sync_to_disk(final.parent)
    except OSError as error:
        raise write_error(final, error) from error
    if replaced:
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sibling(final: Path) -> Path:
    return final.with_name(f".{final.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
