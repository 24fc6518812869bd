"""Phases in the manifest: their entries, what they depend on, and their results, each in a file of its own.

Manifests of format 1 hashed all earlier results for each phase. Their phases are still recognised: while a run has
such phases, the text that was hashed then is kept beside the chain, each result turned into text only once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.content import RESULT, checked_stamp, sha_of
from lightning_interp.core.storage.files import atomic_write_bytes, canonical_json, digest, json_bytes
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.manifest_file import now
from lightning_interp.errors import ManifestError

__all__ = [
    "Lineage",
    "Token",
    "begun_entry",
    "is_old_entry",
    "phase_result",
    "refresh_stamps",
    "result_digest",
    "write_result",
]


def is_old_entry(entry: Mapping[str, Any]) -> bool:
    """Whether a phase's entry was written in format 1, with its result inside."""
    return "result_file" not in entry


@dataclass(frozen=True)
class Token:
    """The digest of what a phase depends on, and the one that format 1 wrote (empty without phases of that format)."""

    now: str
    old: str = ""

    def fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether a stored phase was run with these very inputs."""
        return bool(entry["inputs"] == (self.old if is_old_entry(entry) else self.now))


class Lineage:
    """The phases that were called so far, in order; ``digest`` grows by a small hash a phase, whatever the results."""

    def __init__(self, base: str = "", *, old: bool = False) -> None:
        self.digest = base
        self._old: list[str] | None = [] if old else None

    def token(self, name: str, inputs: Any) -> Token:
        """Return the token of a phase that is called now."""
        if inputs is not None:
            given = digest([name, ["given", inputs]])  # as in format 1
            return Token(given, given)
        now = digest([name, ["after", self.digest]])
        if self._old is None:
            return Token(now)
        text = f"[{canonical_json(name)},[{','.join(self._old)}]]"
        return Token(now, hashlib.sha256(text.encode()).hexdigest())

    def add_phase(self, name: str, token: Token, *, result_digest: str, files: Mapping[str, Any], result: Any) -> None:
        """Add a finished phase."""
        hashes = {file: sha_of(stamp) for file, stamp in files.items()}
        self.digest = digest([self.digest, "phase", name, token.now, result_digest, hashes])
        if self._old is not None:
            self._old.append(canonical_json([name, token.old, result, hashes]))

    def add_child(self, name: str, child: str) -> None:
        """Add a child run."""
        self.digest = digest([self.digest, "child", name, child])
        if self._old is not None:
            self._old.append(canonical_json(["child", name, child]))


def begun_entry(token: Token, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the manifest says of a phase that begins, or goes on."""
    earlier = earlier or {"seconds": 0.0, "attempts": 0}
    return {
        "status": "running",
        "inputs": token.now,
        "started": now(),
        "seconds": earlier["seconds"],
        "attempts": earlier["attempts"] + 1,
        "message": None,
        "result_file": None,
        "files": {},
    }


def write_result(folder: Path, name: str, result: Any) -> dict[str, Any]:
    """Write what a phase returned into its folder."""
    path = folder / RESULT
    if path.exists():
        raise ManifestError(
            f"Phase {name!r} wrote {RESULT!r} into its folder {str(folder)!r}: that name is taken by what the phase "
            "returns. Write the file under another name."
        )
    data = json_bytes(result)
    atomic_write_bytes(path, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "digest": digest(result)}


def phase_result(run_dir: Path, name: str, entry: Mapping[str, Any]) -> Any:
    """Return what a phase returned, wherever its result lies; None if the phase is not finished."""
    if is_old_entry(entry):  # format 1 has it in the manifest
        return copy.deepcopy(entry.get("result"))
    stored = entry["result_file"]
    if stored is None:
        return None
    folder = run_dir / "phases" / name
    path = folder / RESULT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _changed(path, folder, name, "is missing") from error
    if len(data) != stored["size"] or hashlib.sha256(data).hexdigest() != stored["sha256"]:
        raise _changed(path, folder, name, "has changed")
    try:
        return parse_json(data, own=True)
    except ValueError as error:
        raise _changed(path, folder, name, f"is no valid JSON ({error}) and has changed") from error


def result_digest(entry: Mapping[str, Any]) -> str:
    """Return the digest of a finished phase's result."""
    return digest(entry["result"]) if is_old_entry(entry) else str(entry["result_file"]["digest"])


def refresh_stamps(folder: Path, name: str, stamps: dict[str, Any]) -> bool:
    """Check the files of a finished phase, and note the times that they have now; True if a time is new."""
    renewed = {}
    for file, stamp in stamps.items():
        path = folder / file
        if not path.is_file():
            raise _changed(path, folder, name, "is missing")
        found = checked_stamp(path, stamp)
        if found is None:
            raise _changed(path, folder, name, "has changed")
        if found != stamp:
            renewed[file] = found
    stamps.update(renewed)
    return bool(renewed)


def _changed(path: Path, folder: Path, name: str, state: str) -> ManifestError:
    return ManifestError(
        f"File {str(path)!r} of the finished phase {name!r} {state} since it was written. "
        f"Restore it, or delete the folder {str(folder)!r} to compute the phase again."
    )
