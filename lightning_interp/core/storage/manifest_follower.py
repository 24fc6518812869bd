"""The manifest on ranks other than zero: it writes nothing, and waits for what rank zero writes.

Lightning's ``ddp`` launcher runs the whole script again for each further rank. Such a rank takes results of finished
phases from the disk, calls the phases that hold a Trainer in step with rank zero, and waits through the others.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import check_same_run, read_manifest
from lightning_interp.errors import ManifestError

__all__ = ["FollowerManifest"]

PATIENCE_SECONDS = 600.0  # for rank zero to open the folder; its phases may take as long as they like
POLL_SECONDS = 0.2


class FollowerManifest(RunManifest):
    """What a rank other than zero sees of the run; made by :meth:`RunManifest.open` on such ranks."""

    @classmethod
    def join(cls, path: Path, config: Mapping[str, Any], name: str) -> FollowerManifest:
        """Wait until there is a manifest in the run folder, and follow it.

        Args:
            path: The run folder, on a disk that all ranks see.
            config: The run's configuration, of plain values.
            name: The run's name.

        Returns:
            The follower's manifest.

        Raises:
            ManifestError: If rank zero does not open it in time, or the folder belongs to another run or configuration.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            if (path / "manifest.json").exists():
                state = read_manifest(path)
                check_same_run(path, state, config, name)
                return cls(path, state)
            if time.monotonic() > deadline:
                raise _not_opened(path)
            time.sleep(POLL_SECONDS)

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        super().__init__(path, state)
        self._parent = os.getppid()
        # Where ranks start together, an earlier session may still be the last one written.
        ended = state["sessions"] and state["sessions"][-1]["status"] != "running"
        self._earlier = len(state["sessions"]) if ended else len(state["sessions"]) - 1

    def phase(self, name: str, fn: Callable[[Path], Any], *, inputs: Any = None, every_rank: bool = False) -> Any:
        """Return rank zero's result of a phase, after taking part in it if it runs on every rank.

        Args:
            name: The phase's name.
            fn: Called only with ``every_rank``, in step with rank zero.
            inputs: As on rank zero.
            every_rank: As on rank zero.

        Returns:
            Rank zero's result.

        Raises:
            ManifestError: If rank zero ended before the phase was finished.
        """
        token, folder = self._token(name, inputs), self.folder(name)
        self._check_call(name, token)
        taken_part = not every_rank
        while True:
            # The folder is looked at first: rank zero writes "running" before it makes the folder of a phase that it
            # runs again, so a folder that exists and an entry that says "finished" belong together.
            exists = folder.is_dir()
            self._state = read_manifest(self.path)
            entry = self.phases.get(name)
            if exists and entry is not None and entry["inputs"] == token:
                if entry["status"] == "finished":
                    self._lineage.append([name, entry["inputs"], entry["result"], entry["files"]])
                    return copy.deepcopy(entry["result"])
                if entry["status"] == "running" and not taken_part:
                    self._take_part(name, fn, folder)
                    taken_part = True
                    continue
            self._check_rank_zero(name)
            time.sleep(POLL_SECONDS)

    def record_outcome(self, outcome: Mapping[str, Any]) -> None:
        """Do nothing: rank zero stores it."""

    def close(self, status: str = "finished", message: str | None = None) -> None:
        """Do nothing: rank zero ends the session."""

    def _take_part(self, name: str, fn: Callable[[Path], Any], folder: Path) -> None:
        self.current = name
        try:
            fn(folder)
        finally:
            self.current = None

    def _check_rank_zero(self, name: str) -> None:
        status = self._state["sessions"][-1]["status"]
        if len(self._state["sessions"]) <= self._earlier:
            if time.monotonic() > self._began + PATIENCE_SECONDS:
                raise _not_opened(self.path)
        elif status != "running" or os.getppid() != self._parent:
            ended = "is gone" if status == "running" else f"ended ({status})"
            raise ManifestError(
                f"Rank zero {ended} before phase {name!r} was finished in {str(self.path)!r}. "
                "Start the same command again to go on."
            )


def _not_opened(path: Path) -> ManifestError:
    return ManifestError(
        f"Rank zero has not opened the run folder {str(path)!r} within {PATIENCE_SECONDS:.0f} s. "
        "All ranks must see this folder on one disk: give a shared --run_dir."
    )
