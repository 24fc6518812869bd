"""The memory of a run: its configuration, and which phases are finished with which files. A kill loses none of it."""

from __future__ import annotations

import copy
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lightning_interp.core.storage.content import delete_folder, fingerprint, hash_folder
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.files import atomic_write_json, check_writable, digest, jsonable, sha256_file
from lightning_interp.core.storage.manifest_file import new_manifest, stored_run
from lightning_interp.core.storage.run_lock import RunLock
from lightning_interp.errors import ManifestError

__all__ = ["RunManifest", "check_name"]

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can name a run or a phase and stays inside its folder.

    Args:
        name: Parts of letters, digits, dot, dash and underscore, with ``/`` between them.
        what: What it names, for the message.

    Returns:
        ``name``.

    Raises:
        ManifestError: If it could leave its folder, or holds other characters.

    Example:
        >>> check_name("grafting/facts", "run")
        'grafting/facts'
    """
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise ManifestError(
            f"{name!r} cannot name a {what}: it could lead out of the run folder. Use letters, digits, '.', '-' "
            "and '_', beginning with a letter or digit."
        )
    return name


class RunManifest:
    """What is known of the run in one folder. Made by :meth:`open`, and used as a context manager.

    While it is open no other process can use the folder. On ranks other than zero :meth:`open` gives a manifest that
    writes nothing and follows what rank zero writes.

    Attributes:
        path: The run folder.
        current: The name of the phase that runs now, or None.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> def count(folder: Path) -> int:
        ...     print("counting")
        ...     return 3
        >>> with RunManifest.open(folder, config={"seed": 0}, name="demo") as run:
        ...     run.phase("count", count)
        counting
        3
        >>> with RunManifest.open(folder, config={"seed": 0}, name="demo") as run:
        ...     run.phase("count", count)
        3
        >>> RunManifest.open(folder, config={"seed": 1}, name="demo")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ManifestError: ... seed: 0 there, 1 now. ...
    """

    def __init__(self, path: Path, state: dict[str, Any], lock: RunLock | None = None) -> None:
        self.path = path
        self.current: str | None = None
        self._state = state
        self._lock = lock
        self._began = time.monotonic()
        self._called: dict[str, str] = {}
        self._lineage: list[Any] = []

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        name: str,
        versions: Mapping[str, str] | None = None,
        outputs: Collection[str] = (),
    ) -> RunManifest:
        """Make the run folder, or open it again to go on.

        Args:
            run_dir: The run folder.
            config: The run's configuration; ``run_dir`` and ``progress`` in it are not compared.
            name: The run's name.
            versions: Versions of the packages that matter, kept with each start of the run.
            outputs: Files and folders that the run writes: they must not lie there before its first start.

        Returns:
            The open manifest.

        Raises:
            ManifestError: If the folder cannot be written, belongs to another run or configuration, holds files of
                somebody else, is in use, or its manifest is damaged. Nothing has been changed then.
            DataError: If the configuration holds a value without a JSON form.
        """
        path, config = Path(run_dir), jsonable(config, where="config")
        check_name(name, "run")
        if not is_rank_zero():
            from lightning_interp.core.storage.manifest_follower import FollowerManifest

            return FollowerManifest.join(path, config, name)
        known = stored_run(path, config, name, outputs)
        check_writable(path)
        lock = RunLock(path)
        try:
            known = stored_run(path, config, name, outputs)  # again: another process may have been here
            for torn in path.glob(".*.tmp"):
                torn.unlink(missing_ok=True)  # left by a kill in the middle of a write
            manifest = cls(path, known or new_manifest(name, config), lock)
            manifest._begin_session(versions or {})
        except BaseException:
            lock.release()
            raise
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        with suppress(ManifestError):  # the error on its way out matters more
            self.close(_status(error), _message(error))

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """What is known of each phase, by name: ``status``, ``seconds``, ``result``, ``files``, ``message``, ..."""
        phases: dict[str, dict[str, Any]] = self._state["phases"]
        return phases

    def folder(self, name: str) -> Path:
        """Return the folder of a phase; no two phases share one.

        Args:
            name: The phase's name.

        Raises:
            ManifestError: If the name cannot be one.
        """
        if "/" in check_name(name, "phase"):
            raise ManifestError(f"{name!r} cannot name a phase: it holds '/'. Use '-' between its parts.")
        return self.path / "phases" / name

    def phase(self, name: str, fn: Callable[[Path], Any], *, inputs: Any = None, every_rank: bool = False) -> Any:
        """Run a phase once, and remember its result.

        A finished phase is not run again: its stored result comes back, after its files were checked. An unfinished
        one is called again with its folder as it was left, so that ``fn`` can go on from a checkpoint of its own.
        Changed inputs run it again in an emptied folder. Deleting the folder of a phase means: compute it again.

        Args:
            name: The phase's name, unique in the run.
            fn: Gets the phase's folder, writes its files there, and returns a result of plain values.
            inputs: What the result depends on besides the run's configuration, usually results of earlier phases.
                Paths stand for the content of their file or folder. None means all phases called before this one;
                ``{}`` means nothing.
            every_rank: Call ``fn`` on every rank (a phase with a Trainer inside); otherwise on rank zero only, while
                the others wait.

        Returns:
            The result as JSON gives it back (tuples are lists), the same on every call and on every rank.

        Raises:
            ManifestError: If recorded files are missing or changed, or the name is used twice or inside a phase.
            DataError: If the result has no JSON form.
        """
        token = self._token(name, inputs)
        self._check_call(name, token)
        entry = self._finished_entry(name, token) or self._run(name, fn, token)
        self._lineage.append([name, entry["inputs"], entry["result"], entry["files"]])
        return copy.deepcopy(entry["result"])

    def record_outcome(self, outcome: Mapping[str, Any]) -> None:
        """Store what the finished run says of itself.

        Args:
            outcome: Plain values.

        Raises:
            DataError: If a value has no JSON form.
            ManifestError: If the folder cannot be written.
        """
        self._state["outcome"] = jsonable(outcome, where="outcome")
        self._save()

    def close(self, status: str = "finished", message: str | None = None) -> None:
        """End this session and give the folder free; a second call does nothing.

        Args:
            status: How it ended: ``finished``, ``interrupted`` or ``failed``.
            message: Why, if it did not finish.

        Raises:
            ManifestError: If the folder cannot be written any more.
        """
        if self._lock is None:
            return
        try:
            seconds = round(time.monotonic() - self._began, 3)
            self._state["sessions"][-1].update(status=status, message=message, seconds=seconds)
            self._save()
        finally:
            self._lock.release()
            self._lock = None

    def _begin_session(self, versions: Mapping[str, str]) -> None:
        session = {"started": _now(), "status": "running", "message": None, "seconds": 0.0}
        self._state["sessions"].append(session | {"versions": dict(versions)})
        self._save()

    def _save(self) -> None:
        atomic_write_json(self.path / "manifest.json", self._state)

    def _token(self, name: str, inputs: Any) -> str:
        """Return the digest of what a phase depends on."""
        self.folder(name)  # refuses a name that cannot be one
        return digest([name, self._lineage if inputs is None else ["given", fingerprint(inputs)]])

    def _check_call(self, name: str, token: str) -> None:
        if self.current is not None:
            raise ManifestError(
                f"Phase {name!r} was called inside phase {self.current!r}. Call it after that one has returned."
            )
        twin = next((other for other in self.phases if other != name and other.lower() == name.lower()), None)
        if twin is not None:
            raise ManifestError(
                f"Phases {name!r} and {twin!r} differ only in case and would share a folder on some file systems. "
                "Rename one of them."
            )
        if self._called.setdefault(name, token) != token:
            raise ManifestError(
                f"Phase {name!r} was called twice in one run with different inputs. Give each call a name of its own, "
                "such as a number at the end."
            )

    def _finished_entry(self, name: str, token: str) -> dict[str, Any] | None:
        entry, folder = self.phases.get(name), self.folder(name)
        if entry is None or entry["status"] != "finished" or entry["inputs"] != token or not folder.is_dir():
            return None
        for file, expected in entry["files"].items():
            path = folder / file
            if not path.is_file() or sha256_file(path) != expected:
                state = "has changed" if path.is_file() else "is missing"
                raise ManifestError(
                    f"File {str(path)!r} of the finished phase {name!r} {state} since it was written. "
                    f"Restore it, or delete the folder {str(folder)!r} to compute the phase again."
                )
        log.info("phase %s: finished before, its result is used", name)
        return entry

    def _run(self, name: str, fn: Callable[[Path], Any], token: str) -> dict[str, Any]:
        folder, entry = self.folder(name), self.phases.get(name)
        if entry is None or entry["inputs"] != token or entry["status"] == "finished":
            entry = {"seconds": 0.0, "attempts": 0}
            delete_folder(folder)
        entry = {
            "status": "running",
            "inputs": token,
            "started": _now(),
            "seconds": entry["seconds"],
            "attempts": entry["attempts"] + 1,
            "message": None,
            "result": None,
            "files": {},
        }
        self.phases[name] = entry
        self._save()  # before the folder is made: to followers, "running" with a folder means that it may be used
        check_writable(folder)
        log.info("phase %s: %s", name, "begins" if entry["attempts"] == 1 else "goes on where it stopped")
        began, self.current = time.monotonic(), name
        try:
            result = jsonable(fn(folder), where=f"the result of phase {name!r}")
            entry.update(status="finished", result=result, files=hash_folder(folder))
        except BaseException as error:
            entry.update(status=_status(error), message=_message(error))
            raise
        finally:
            self.current = None
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 3)
            self._save_after(entry)
        log.info("phase %s: finished in %.1f s", name, entry["seconds"])
        return entry

    def _save_after(self, entry: Mapping[str, Any]) -> None:
        if entry["status"] == "finished":
            self._save()
        else:
            with suppress(ManifestError):  # the error on its way out matters more
                self._save()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _status(error: BaseException) -> str:
    return "failed" if isinstance(error, Exception) else "interrupted"


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return "KeyboardInterrupt"  # Lightning turns Ctrl-C inside a Trainer into an exit
    if isinstance(error, SystemExit) and error.code == 143:
        return "SIGTERM"
    return f"{type(error).__name__}: {error}".rstrip(": ")
