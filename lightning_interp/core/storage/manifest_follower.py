"""The manifest on ranks other than zero: it writes nothing, and waits for what rank zero writes.

Lightning's ``ddp`` launcher runs the whole script again for each further rank. Such a rank takes results of finished
phases from the disk, calls the phases that hold a Trainer in step with rank zero, and waits through the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import NOT_IDENTITY, check_same_run, read_manifest
from lightning_interp.core.storage.phase_results import Token, phase_result
from lightning_interp.core.storage.run_lock import ChildPlace
from lightning_interp.errors import ManifestError

__all__ = ["FollowerManifest"]

PATIENCE_SECONDS = 600.0  # for rank zero to open the folder; its phases may take as long as they like
POLL_SECONDS = 0.2
LATE_SECONDS = 90.0  # longer than a network disk remembers that a file was not there


class FollowerManifest(RunManifest):
    """What a rank other than zero sees of the run; made by :meth:`RunManifest.open` on such ranks."""

    @classmethod
    def join(
        cls,
        path: Path,
        config: Mapping[str, Any],
        name: str,
        not_identity: Collection[str] = NOT_IDENTITY,
        place: ChildPlace | None = None,
    ) -> FollowerManifest:
        """Wait until there is a manifest in the run folder, and follow it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            if (path / "manifest.json").exists():
                state = read_manifest(path)
                check_same_run(path, state, config, name, not_identity)
                return cls(path, state, place=place, not_identity=not_identity)
            if place is not None:  # rank zero may work as long as it likes before it opens a child
                _following(place).check_rank_zero(f"child run {place.key!r} was opened")
            elif time.monotonic() > deadline:
                raise _not_opened(path)
            time.sleep(POLL_SECONDS)

    def __init__(
        self,
        path: Path,
        state: dict[str, Any],
        *,
        place: ChildPlace | None = None,
        not_identity: Collection[str] = NOT_IDENTITY,
    ) -> None:
        super().__init__(path, state, place=place, not_identity=not_identity)
        self._parent: int = os.getppid() if place is None else _following(place)._parent
        self._closed = False
        # Where ranks start together, an earlier session may still be the last one written.
        ended = state["sessions"] and state["sessions"][-1]["status"] != "running"
        self._earlier = len(state["sessions"]) if ended else len(state["sessions"]) - 1

    def phase(self, name: str, fn: Callable[[Path], Any], *, inputs: Any = None, every_rank: bool = False) -> Any:
        """Return rank zero's result of a phase, after taking part in it if it runs on every rank."""
        token, folder = self._token(name, inputs), self.folder(name)
        self._check_call(name, token)
        taken_part = not every_rank
        while True:
            # The folder is looked at first: rank zero writes "running" before it makes the folder of a phase that it
            # runs again, so a folder that exists and an entry that says "finished" belong together.
            exists = folder.is_dir()
            self._state = read_manifest(self.path)
            entry = self.phases.get(name)
            if exists and entry is not None and token.fits(entry):
                if entry["status"] == "finished":
                    return self._result(name, token)
                if entry["status"] == "running" and not taken_part:
                    self._take_part(name, fn, folder)
                    taken_part = True
                    continue
            self._check_session(f"phase {name!r} was finished")
            time.sleep(POLL_SECONDS)

    def record_outcome(self, outcome: Mapping[str, Any]) -> None:
        """Do nothing: rank zero stores it."""

    def close(self, status: str = "finished", message: str | None = None) -> None:
        """Say to the parent, if this is a child run, that it has ended; rank zero ends the session."""
        if not self._closed:
            self._closed = True
            self._close_child(status, message)
            self._leave_parent(status)

    def check_rank_zero(self, what: str) -> None:
        """Raise if rank zero does not work in this run any more."""
        self._state = read_manifest(self.path)
        self._check_session(what)

    def _open_child(self, path: Path, config: dict[str, Any], name: str, place: ChildPlace) -> RunManifest:
        return FollowerManifest.join(path, config, name, place.not_identity, place)

    def _result(self, name: str, token: Token) -> Any:
        """Return rank zero's result; its file may come to other machines after the manifest that names it."""
        deadline = time.monotonic() + LATE_SECONDS
        while True:
            try:
                result = phase_result(self.path, name, self.phases[name])
            except ManifestError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                self._add_to_lineage(name, token, result)
                return result

    def _take_part(self, name: str, fn: Callable[[Path], Any], folder: Path) -> None:
        self.current = name
        try:
            fn(folder)
        finally:
            self.current = None

    def _session(self) -> dict[str, Any] | None:
        """Return rank zero's session, or None if it has not begun; it may have ended."""
        sessions = self._state["sessions"]
        if self._place is None:
            return sessions[-1] if len(sessions) > self._earlier else None
        parent = _following(self._place)
        if not sessions or parent._session() is None:
            return None
        mark = sessions[-1].get("parent") or {"session": 0, "opening": 0}
        begun = (mark["session"], mark["opening"]) >= (len(parent._state["sessions"]), self._place.opening)
        return sessions[-1] if begun else None

    def _check_session(self, what: str) -> None:
        session = self._session()
        if session is None:
            if self._place is not None:
                _following(self._place).check_rank_zero(what)
            elif time.monotonic() > self._began + PATIENCE_SECONDS:
                raise _not_opened(self.path)
        elif session["status"] != "running" or os.getppid() != self._parent:
            ended = "is gone" if session["status"] == "running" else f"ended ({session['status']})"
            raise ManifestError(
                f"Rank zero {ended} before {what} in {str(self.path)!r}. Start the same command again to go on."
            )


def _following(place: ChildPlace) -> FollowerManifest:
    assert isinstance(place.parent, FollowerManifest)  # noqa: S101 - a follower's child is made by a follower
    return place.parent


def _not_opened(path: Path) -> ManifestError:
    return ManifestError(
        f"Rank zero has not opened the run folder {str(path)!r} within {PATIENCE_SECONDS:.0f} s. "
        "All ranks must see this folder on one disk: give a shared --run_dir."
    )
