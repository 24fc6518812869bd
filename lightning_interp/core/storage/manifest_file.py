"""What is written in ``manifest.json``, how it is read back, and how two configurations are compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import json_bytes
from lightning_interp.core.storage.inside import is_inside_name
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.redaction import redacted
from lightning_interp.errors import ManifestError

__all__ = [
    "FORMAT",
    "NOT_IDENTITY",
    "ManifestText",
    "check_name",
    "check_part",
    "check_same_run",
    "config_difference",
    "message_of",
    "new_manifest",
    "now",
    "read_manifest",
    "status_of",
    "stored_run",
]

FORMAT = 2  # 1 had the results of the phases inside; it is read, and its phases are kept as they are
_READ = (1, FORMAT)
# Settings that do not decide what is computed, where a run does not say it otherwise.
NOT_IDENTITY = ("run_dir", "progress")
_TEXT, _NUMBER, _TEXT_OR_NONE = "a string", "a number", "a string or null"
_KINDS: dict[str, type | tuple[type, ...]] = {
    _TEXT: str,
    _NUMBER: (int, float),
    _TEXT_OR_NONE: (str, type(None)),
    "an object": dict,
    "a list": list,
}
_SECTIONS = {"name": _TEXT, "base": _TEXT, "sessions": "a list"}
_SECTIONS |= dict.fromkeys(("config", "phases", "outcome", "sources"), "an object")
_SESSION = {"started": _TEXT, "status": _TEXT, "message": _TEXT_OR_NONE, "seconds": _NUMBER, "versions": "an object"}
_PHASE = {"status": _TEXT, "inputs": _TEXT, "files": "an object", "seconds": _NUMBER, "attempts": _NUMBER}
_PHASE["message"] = _TEXT_OR_NONE
_STAMP = {"sha256": _TEXT, "size": _NUMBER}
_ABSENT = object()
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` (parts with ``/`` between them) if it can name a run or a phase and stays inside its folder."""
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise ManifestError(
            f"{name!r} cannot name a {what}: it could lead out of the run folder. Use letters, digits, '.', '-' "
            "and '_', beginning with a letter or digit."
        )
    return name


def check_part(name: str, what: str, others: Iterable[str] = ()) -> str:
    """Return ``name`` if it can name a phase or a child run beside those that there are."""
    if "/" in check_name(name, what):
        raise ManifestError(f"{name!r} cannot name a {what}: it holds '/'. Use '-' between its parts.")
    twin = next((other for other in others if other != name and other.lower() == name.lower()), None)
    if twin is not None:
        raise ManifestError(
            f"{what.capitalize()}s {name!r} and {twin!r} differ only in case and would share a folder on some file "
            "systems. Rename one of them."
        )
    return name


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def status_of(error: BaseException) -> str:
    """Return how a session ended that an error left."""
    return "failed" if isinstance(error, Exception) else "interrupted"


def message_of(error: BaseException) -> str:
    """Return what the manifest says of an error."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return "KeyboardInterrupt"  # Lightning turns Ctrl-C inside a Trainer into an exit
    if isinstance(error, SystemExit) and error.code == 143:
        return "SIGTERM"
    return str(redacted(f"{type(error).__name__}: {error}".rstrip(": ")))


def new_manifest(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the manifest of a run that has not begun."""
    return {"format": FORMAT, "name": name, "config": dict(config), "sessions": [], "phases": {}, "outcome": {}}


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the content of a run folder's manifest."""
    path = run_dir / "manifest.json"
    try:
        state = parse_json(path.read_bytes(), own=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(
            f"{str(run_dir)!r} is no run folder: it has no manifest.json. Give the folder that a run was written to."
        ) from error
    except OSError as error:
        raise ManifestError(f"Cannot read {str(path)!r}: {error.strerror}. Free the rights on it.") from error
    except ValueError as error:
        raise _broken(path, str(error)) from error
    if not isinstance(state, dict) or "format" not in state:
        raise _broken(path, "it is not a manifest of this package")
    if state["format"] not in _READ:
        raise ManifestError(
            f"{str(path)!r} has format {state['format']!r:.40}, and this version reads the formats "
            f"{' and '.join(map(str, _READ))}. Use the version of lightning_interp that wrote it, or another --run_dir."
        )
    _check_content(path, state)
    return state


class ManifestText:
    """The text of a manifest, of which only what has changed is made anew: a run may have thousands of phases."""

    def __init__(self) -> None:
        self._finished: dict[str, str] = {}

    def changed(self, name: str) -> None:
        """Say that a phase's entry has changed."""
        self._finished.pop(name, None)

    def of(self, state: Mapping[str, Any]) -> bytes:
        """Return the text."""
        sections = [f"{_text(key)}: {self._section(key, value)}" for key, value in state.items()]
        return ("{\n  " + ",\n  ".join(sections) + "\n}\n").encode()

    def _section(self, key: str, value: Any) -> str:
        if key != "phases" or not value:
            return _indented(_text(value))
        phases = [f"{_text(name)}: {self._phase(name, entry)}" for name, entry in value.items()]
        return "{\n    " + ",\n    ".join(phases) + "\n  }"

    def _phase(self, name: str, entry: Mapping[str, Any]) -> str:
        known = self._finished.get(name)
        if known is None:
            known = _indented(_indented(_text(entry)))
            if entry["status"] == "finished":
                self._finished[name] = known
        return known


def config_difference(there: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return one line for each key whose value differs, with both values."""
    old, new = dict(_leaves(there, ignored)), dict(_leaves(now, ignored))
    return [
        f"{key}: {_shown(old.get(key, _ABSENT))} there, {_shown(new.get(key, _ABSENT))} now"
        for key in dict.fromkeys((*new, *old))
        if not _equal(old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


def stored_run(
    path: Path,
    config: Mapping[str, Any],
    name: str,
    outputs: Collection[str] = (),
    not_identity: Collection[str] = NOT_IDENTITY,
) -> dict[str, Any] | None:
    """Return the content of the manifest if the folder holds this very run, None if it holds no run."""
    if not (path / "manifest.json").exists():
        foreign = next((output for output in ("phases", "children", *outputs) if (path / output).exists()), None)
        if foreign is not None:
            raise ManifestError(
                f"{str(path / foreign)!r} exists, but its folder is no run folder (no manifest.json), and the run "
                "would overwrite it. Choose another --run_dir, or move it away."
            )
        return None
    state = read_manifest(path)
    check_same_run(path, state, config, name, not_identity)
    return state


def check_same_run(
    path: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    name: str,
    not_identity: Collection[str] = NOT_IDENTITY,
) -> None:
    """Raise if the run that is stored has another name or configuration."""
    if state["name"] != name:
        raise ManifestError(
            f"Run folder {str(path)!r} holds a run of {state['name']!r}, not of {name!r}. Choose another --run_dir."
        )
    different = config_difference(state["config"], config, not_identity)
    if different:
        raise ManifestError(
            f"Run folder {str(path)!r} holds a run with another configuration: {'; '.join(different)}. "
            "Choose another --run_dir, use the same values, or delete the folder to start again."
        )


def _leaves(config: Mapping[str, Any], ignored: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if f"{prefix}{key}" not in ignored:
            if isinstance(value, Mapping) and value:
                yield from _leaves(value, ignored, f"{prefix}{key}.")
            elif value != {}:
                yield f"{prefix}{key}", value


def _equal(old: Any, new: Any) -> bool:
    # True == 1 in Python, but devices=True and devices=1 are two settings; NaN equals itself here.
    return isinstance(old, bool) == isinstance(new, bool) and (old == new or repr(old) == repr(new))


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(value: Any) -> str:
    return json_bytes(value, indent=2).decode()


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")  # no string in JSON holds a line end of its own


def _check_content(path: Path, state: Mapping[str, Any]) -> None:
    state = {"sources": {}, "base": ""} | dict(state)
    _check(path, state, _SECTIONS, "")
    for index, session in enumerate(state["sessions"]):
        optional = {"seconds": 0.0, "versions": {}} | session if isinstance(session, dict) else session
        _check(path, optional, _SESSION, f"sessions[{index}]")
        if "parent" in session:
            _check(path, session["parent"], {"session": _NUMBER, "opening": _NUMBER}, f"sessions[{index}].parent")
    for name, phase in state["phases"].items():
        where = f"phases.{name}"
        _check(path, phase, _PHASE, where)
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise _broken(path, f"{name!r:.60} cannot name a phase")
        for file, stamp in phase["files"].items():
            if not is_inside_name(file):
                raise _broken(path, f"{where}.files names {file!r:.60}, outside of the phase's folder")
            _check_stamp(path, stamp, f"{where}.files.{file}")
        if "result_file" in phase and phase["status"] == "finished":
            _check(path, phase["result_file"], {**_STAMP, "digest": _TEXT}, f"{where}.result_file")
    for file, stamp in state["sources"].items():
        _check_stamp(path, stamp, f"sources.{file}")


def _check_stamp(path: Path, stamp: Any, where: str) -> None:
    if not isinstance(stamp, str):  # format 1 kept the SHA-256 alone
        _check(path, stamp, _STAMP, where)
        if "mtime_ns" not in stamp:
            raise _broken(path, f"{where} has no mtime_ns")


def _check(path: Path, mapping: Any, kinds: Mapping[str, str], where: str) -> None:
    if not isinstance(mapping, dict):
        raise _broken(path, f"{where} is not an object")
    for key, kind in kinds.items():
        value = mapping.get(key)
        if not isinstance(value, _KINDS[kind]) or (kind == _NUMBER and not _is_number(value)):
            raise _broken(path, f"{f'{where}.' if where else ''}{key} should be {kind}")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _broken(path: Path, reason: str) -> ManifestError:
    return ManifestError(
        f"{str(path)!r} is damaged: {reason}. Restore it from a copy, or delete the run folder to start again."
    )
