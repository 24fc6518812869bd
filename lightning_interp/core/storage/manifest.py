"""The memory of a run: its configuration, and which phases are finished with which files. A kill loses none of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from lightning_interp.core.storage.content import (
    RESULT,
    delete_folder,
    fingerprint,
    hash_folder,
    known_sha256,
    stamp_file,
)
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.files import atomic_write_bytes, check_writable, digest, jsonable, no_room, sweep
from lightning_interp.core.storage.inside import check_inside
from lightning_interp.core.storage.manifest_file import (
    FORMAT,
    NOT_IDENTITY,
    ManifestText,
    check_name,
    check_part,
    message_of,
    new_manifest,
    now,
    status_of,
    stored_run,
)
from lightning_interp.core.storage.phase_results import (
    Lineage,
    Token,
    begun_entry,
    is_old_entry,
    phase_result,
    refresh_stamps,
    result_digest,
    write_result,
)
from lightning_interp.core.storage.run_lock import CHILDREN, ChildPlace, RunLock, check_parents_free, child_names
from lightning_interp.errors import InterpError, ManifestError

__all__ = ["RunManifest", "check_name"]

log = logging.getLogger(__name__)


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
        >>> for _ in range(2):
        ...     with RunManifest.open(folder, config={"seed": 0}, name="demo") as run:
        ...         run.phase("count", lambda folder: print("counting") or 3)
        counting
        3
        3
        >>> RunManifest.open(folder, config={"seed": 1}, name="demo")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ManifestError: ... seed: 0 there, 1 now. ...
    """

    def __init__(
        self,
        path: Path,
        state: dict[str, Any],
        lock: RunLock | None = None,
        *,
        place: ChildPlace | None = None,
        not_identity: Collection[str] = NOT_IDENTITY,
    ) -> None:
        self.path = path
        self.current: str | None = None
        self._state = state
        self._lock = lock
        self._place = place
        self._not_identity = not_identity
        self._began = time.monotonic()
        self._called: dict[str, str] = {}
        self._text = ManifestText()
        self._child: tuple[str, RunManifest] | None = None
        self._child_openings: dict[str, int] = {}
        base = state.get("base", "") if place is None else place.base
        self._lineage = Lineage(base, old=any(map(is_old_entry, state["phases"].values())))

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        name: str,
        versions: Mapping[str, str] | None = None,
        outputs: Collection[str] = (),
        not_identity: Collection[str] = NOT_IDENTITY,
    ) -> RunManifest:
        """Make the run folder, or open it again to go on.

        Args:
            run_dir: The run folder.
            config: The run's configuration.
            name: The run's name.
            versions: Versions of the packages that matter, kept with each start of the run.
            outputs: Files and folders that the run writes: they must not lie there before its first start.
            not_identity: Keys that may differ when the run goes on, as ``"trainer.devices"``; with all below them.

        Returns:
            The open manifest.

        Raises:
            ManifestError: If the folder cannot be written, belongs to another run or configuration, holds foreign
                files, is in use or damaged, or is a child run whose parent is open. Nothing has been changed then.
            DataError: If the configuration holds a value without a JSON form.
        """
        path, plain = Path(run_dir), jsonable(config, where="config")
        check_parents_free(path)
        return cls._opened(path, plain, name, versions or {}, outputs, not_identity)

    @classmethod
    def _opened(
        cls,
        path: Path,
        config: dict[str, Any],
        name: str,
        versions: Mapping[str, str],
        outputs: Collection[str],
        not_identity: Collection[str],
        place: ChildPlace | None = None,
    ) -> RunManifest:
        check_name(name, "run")
        if not is_rank_zero():
            from lightning_interp.core.storage.manifest_follower import FollowerManifest

            return FollowerManifest.join(path, config, name, not_identity, place)
        check_inside(path, own=True)
        known = stored_run(path, config, name, outputs, not_identity)
        check_writable(path)
        lock = RunLock(path)
        try:
            known = stored_run(path, config, name, outputs, not_identity)  # again: another process may have been here
            sweep(path)
            for output in outputs:
                sweep(path / output, deep=True)
            state = new_manifest(name, config) if known is None else known | {"config": config}
            manifest = RunManifest(path, state, lock, place=place, not_identity=not_identity)
            manifest._begin_session(jsonable(versions, where="versions"))
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
            self.close(status_of(error), message_of(error))

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """What is known of each phase, by name: ``status``, ``seconds``, ``files``, ``message``, ... but no results."""
        phases: dict[str, dict[str, Any]] = self._state["phases"]
        return phases

    def folder(self, name: str) -> Path:
        """Return the folder of a phase; no two phases share one.

        Args:
            name: The phase's name.

        Raises:
            ManifestError: If the name cannot be one.
        """
        return self.path / "phases" / check_part(name, "phase")

    def phase(self, name: str, fn: Callable[[Path], Any], *, inputs: Any = None, every_rank: bool = False) -> Any:
        """Run a phase once, and remember its result.

        A finished phase is not run again: its stored result comes back, after its files were checked. An unfinished
        one is called again with its folder as it was left, so that ``fn`` can go on from a checkpoint of its own.
        Changed inputs run it again in an emptied folder. Deleting the folder of a phase means: compute it again.

        Args:
            name: The phase's name, unique in the run.
            fn: Gets the phase's folder, writes its files there, and returns a result of plain values.
            inputs: What the result depends on besides the configuration; paths stand for the content of their file or
                folder. None means all phases called before this one; ``{}`` means nothing.
            every_rank: Call ``fn`` on every rank (a Trainer is inside); else the others wait for rank zero.

        Returns:
            The result as JSON gives it back (tuples are lists), the same on every call and on every rank.

        Raises:
            ManifestError: If recorded files are missing or changed, or the name is used twice or inside a phase.
                Also if the disk is full while ``fn`` writes, whatever ``fn`` raised then.
            DataError: If the result has no JSON form.
        """
        token = self._token(name, inputs)
        self._check_call(name, token)
        entry = self._finished_entry(name, token)
        result = self._run(name, fn, token) if entry is None else phase_result(self.path, name, entry)
        self._add_to_lineage(name, token, result)
        return result

    def child(
        self,
        key: str,
        *,
        config: Mapping[str, Any],
        name: str | None = None,
        inputs: Any = None,
        outputs: Collection[str] = (),
        not_identity: Collection[str] | None = None,
    ) -> RunManifest:
        """Open a run inside this run: one cycle, one setting of a sweep, one section.

        It is a run of its own in ``<run>/children/<key>/``, beside the phases and not inside one, so that no phase
        hashes or deletes it: with its own phases, lock and configuration. It is used as a context manager, can have
        children itself, and can be opened alone with :meth:`open` while this run is not open. One is open at a time,
        and no phase of this run is called meanwhile. What follows in this run depends on the child's phases.

        Args:
            key: Names the child in this run: letters, digits, dot, dash and underscore.
            config: The child's configuration.
            name: The child's name; that of this run with the key behind it if None.
            inputs: What its phases depend on besides its configuration, as for :meth:`phase`.
            outputs: Files and folders that the child writes, as for :meth:`open`.
            not_identity: Keys that may differ when the child goes on, as for :meth:`open`; those of this run if None.

        Returns:
            The child's open manifest.

        Raises:
            ManifestError: If it cannot be opened, as :meth:`open` says; or inside a phase, or beside another child.
            DataError: If the configuration holds a value without a JSON form.

        Example:
            >>> import tempfile
            >>> folder = Path(tempfile.mkdtemp()) / "run"
            >>> with RunManifest.open(folder, config={}, name="demo") as run, run.child("cycle-0", config={}) as cycle:
            ...     cycle.phase("fit", lambda folder: 10)
            10
        """
        path = self.path / CHILDREN / check_part(key, "child run", child_names(self.path))
        self._check_free(f"Child run {key!r} was opened")
        base = self._lineage.digest if inputs is None else digest(["given", fingerprint(inputs, self._sha256)])
        self._child_openings[key] = self._child_openings.get(key, 0) + 1
        free = self._not_identity if not_identity is None else not_identity
        place = ChildPlace(self, key, digest(["child", base]), self._child_openings[key], outputs, free)
        name = f"{self._state['name']}/{key}" if name is None else name
        child = self._open_child(path, jsonable(config, where="config"), name, place)
        self._child = (key, child)
        return child

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
            self._close_child(status, message)
            seconds = round(time.monotonic() - self._began, 3)
            self._state["sessions"][-1].update(status=status, message=message, seconds=seconds)
            self._save()
        finally:
            self._lock.release()
            self._lock = None
            self._leave_parent(status)

    def _begin_session(self, versions: Mapping[str, str]) -> None:
        session: dict[str, Any] = {"started": now(), "status": "running", "message": None, "seconds": 0.0}
        session["versions"] = dict(versions)
        if self._place is not None:
            session["parent"] = self._place.mark()
            self._state["base"] = self._place.base
        self._state["format"] = FORMAT
        self._state["sessions"].append(session)
        self._save()

    def _open_child(self, path: Path, config: dict[str, Any], name: str, place: ChildPlace) -> RunManifest:
        versions = self._state["sessions"][-1].get("versions", {})
        return self._opened(path, config, name, versions, place.outputs, place.not_identity, place)

    def _close_child(self, status: str, message: str | None) -> None:
        """End a child that was left open: as this run ends, but never as finished."""
        if self._child is not None:
            ended = "interrupted" if status == "finished" else status
            with suppress(ManifestError):  # this run says it itself if the disk is full
                self._child[1].close(ended, message or "The run that it belongs to was closed.")

    def _leave_parent(self, status: str) -> None:
        if self._place is not None:
            parent = self._place.parent
            parent._child = None
            parent._lineage.add_child(self._place.key, self._lineage.digest if status == "finished" else "unfinished")

    def _save(self) -> None:
        atomic_write_bytes(self.path / "manifest.json", self._text.of(self._state))

    def _sha256(self, path: Path) -> str:
        return known_sha256(path, self.path, self._state)

    def _token(self, name: str, inputs: Any) -> Token:
        """Return the digest of what a phase depends on."""
        self.folder(name)  # refuses a name that cannot be one
        return self._lineage.token(name, None if inputs is None else fingerprint(inputs, self._sha256))

    def _add_to_lineage(self, name: str, token: Token, result: Any) -> None:
        entry = self.phases[name]
        self._lineage.add_phase(name, token, result_digest=result_digest(entry), files=entry["files"], result=result)

    def _check_free(self, what: str) -> None:
        if self.current is not None:
            raise ManifestError(f"{what} inside phase {self.current!r}. Call it after that one has returned.")
        if self._child is not None:
            raise ManifestError(
                f"{what} while the child run {self._child[0]!r} is open. Close that one first (use it in a 'with')."
            )

    def _check_call(self, name: str, token: Token) -> None:
        self._check_free(f"Phase {name!r} was called")
        check_part(name, "phase", self.phases)
        if self._called.setdefault(name, token.now) != token.now:
            raise ManifestError(
                f"Phase {name!r} was called twice in one run with different inputs. Give each call a name of its own, "
                "such as a number at the end."
            )

    def _finished_entry(self, name: str, token: Token) -> dict[str, Any] | None:
        entry, folder = self.phases.get(name), self.folder(name)
        if entry is None or entry["status"] != "finished" or not token.fits(entry) or not folder.is_dir():
            return None
        if refresh_stamps(folder, name, entry["files"]):
            self._text.changed(name)  # written at the next save, so that the files need not be read again then
        log.info("phase %s: finished before, its result is used", name)
        return entry

    def _run(self, name: str, fn: Callable[[Path], Any], token: Token) -> Any:
        folder, entry = self.folder(name), self.phases.get(name)
        if entry is None or not token.fits(entry) or entry["status"] == "finished":
            entry = None
            delete_folder(folder)
        sweep(folder, deep=True)
        entry = begun_entry(token, entry)
        self.phases[name] = entry
        self._text.changed(name)
        self._save()  # before the folder is made: to followers, "running" with a folder means that it may be used
        check_writable(folder)
        (folder / RESULT).unlink(missing_ok=True)  # of an attempt that was killed before the manifest knew of it
        log.info("phase %s: %s", name, "begins" if entry["attempts"] == 1 else "goes on where it stopped")
        began, self.current = time.monotonic(), name
        try:
            result = jsonable(fn(folder), where=f"the result of phase {name!r}")
            files = hash_folder(folder, stamp_file)
            entry.update(result_file=write_result(folder, name, result), files=files, status="finished")
        except BaseException as error:
            entry.update(status=status_of(error), message=message_of(error))
            if isinstance(error, Exception) and not isinstance(error, InterpError) and (why := no_room(error)):
                raise ManifestError(
                    f"Phase {name!r} could not write all its files below {str(folder)!r}: {why}. Free space, then "
                    "start the same command again: what is finished is kept."
                ) from error
            raise
        finally:
            self.current = None
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 3)
            # Of a phase that failed, the error on its way out matters more.
            with nullcontext() if entry["status"] == "finished" else suppress(ManifestError):
                self._save()
        log.info("phase %s: finished in %.1f s", name, entry["seconds"])
        return result
