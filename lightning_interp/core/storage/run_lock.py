"""One live process per run folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from lightning_interp.core.storage.files import write_error
from lightning_interp.errors import ManifestError

__all__ = ["RunLock", "is_in_use"]

# Record locks do not stop a second opening inside the same process, so that is kept here: path -> process id.
_HELD: dict[Path, int] = {}


class RunLock(AbstractContextManager["RunLock"]):
    """A lock on an existing run folder that the operating system releases when its process ends, however it ends.

    POSIX record locks: forked children (loader workers, ranks) do not inherit them, so none outlives a killed run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = (run_dir / ".lock").resolve()
        if _HELD.get(self._path) == os.getpid():
            raise ManifestError(
                f"Run folder {str(run_dir)!r} is in use by this process. Close the manifest that holds it first."
            )
        try:
            self._file: IO[str] | None = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as held
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
    path = (run_dir / ".lock").resolve()
    if _HELD.get(path) == os.getpid():
        return True
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
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
