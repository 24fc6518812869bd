"""Entries of phases in the manifest, and their results: each in a file of its own, so that the manifest stays small."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.content import RESULT, checked_stamp
from lightning_interp.core.storage.files import atomic_write_bytes, digest, json_bytes
from lightning_interp.core.storage.lineage import Token, is_old_entry
from lightning_interp.core.storage.run_words import now
from lightning_interp.errors import ManifestError

__all__ = ["begun_entry", "phase_result", "refresh_stamps", "result_digest", "write_result"]


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
    return json.loads(data)


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
