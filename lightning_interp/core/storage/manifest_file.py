"""What is written in ``manifest.json``, how it is read back, and how two configurations are compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_interp.errors import ManifestError

__all__ = ["FORMAT", "check_same_run", "config_difference", "new_manifest", "read_manifest", "stored_run"]

FORMAT = 1
# Fields of a configuration that do not decide what is computed.
NOT_IDENTITY = ("run_dir", "progress")
_SECTIONS: dict[str, type] = {"name": str, "config": dict, "sessions": list, "phases": dict, "outcome": dict}
_PHASE: dict[str, type] = {"status": str, "inputs": str, "files": dict, "seconds": float, "attempts": int}
_ABSENT = object()


def new_manifest(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the manifest of a run that has not begun.

    Args:
        name: The run's name.
        config: Its configuration, of plain values.

    Returns:
        The content: ``sessions`` has one entry for each time the run was started, ``phases`` one for each phase, and
        ``outcome`` what the finished run says of itself.
    """
    return {
        "format": FORMAT,
        "name": name,
        "config": dict(config),
        "sessions": [],
        "phases": {},
        "outcome": {},
    }


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the content of a run folder's manifest.

    Args:
        run_dir: The run folder.

    Returns:
        The content.

    Raises:
        ManifestError: If there is none, or it cannot be read, or it is not one that this version writes.

    Example:
        >>> read_manifest(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ManifestError: '/nowhere' is no run folder: it has no manifest.json. ...
    """
    path = run_dir / "manifest.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
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
    if state["format"] != FORMAT:
        raise ManifestError(
            f"{str(path)!r} has format {state['format']!r}, and this version reads format {FORMAT}. "
            "Use the version of lightning_interp that wrote it, or another --run_dir."
        )
    _check_types(path, state, _SECTIONS, "")
    for name, phase in state["phases"].items():
        if not isinstance(phase, dict):
            raise _broken(path, f"phases.{name} is not an object")
        _check_types(path, phase, _PHASE, f"phases.{name}.")
    return state


def config_difference(there: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return one line for each key whose value differs, with both values.

    Args:
        there: The stored configuration.
        now: The one that is asked for.
        ignored: Top-level keys that are not compared.

    Returns:
        Lines such as ``"trainer.max_epochs: 3 there, 4 now"``, in the order of the keys.

    Example:
        >>> config_difference({"lr": 1e-3, "trainer": {"devices": 1}}, {"lr": 1e-3, "trainer": {}})
        ['trainer.devices: 1 there, not set now']
    """
    old, new = dict(_leaves(there, ignored)), dict(_leaves(now, ignored))
    return [
        f"{key}: {_shown(old.get(key, _ABSENT))} there, {_shown(new.get(key, _ABSENT))} now"
        for key in dict.fromkeys((*new, *old))
        if not _equal(old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


def stored_run(
    path: Path, config: Mapping[str, Any], name: str, outputs: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the content of the manifest if the folder holds this very run, None if it holds no run.

    Args:
        path: The run folder.
        config: The configuration that is asked for.
        name: The name that is asked for.
        outputs: Files and folders that a first start must not find there.

    Returns:
        The content, or None.

    Raises:
        ManifestError: If the folder holds another run, or files that the run would overwrite.
    """
    if not (path / "manifest.json").exists():
        foreign = next((output for output in ("phases", *outputs) if (path / output).exists()), None)
        if foreign is not None:
            raise ManifestError(
                f"{str(path / foreign)!r} exists, but its folder is no run folder (no manifest.json), and the run "
                "would overwrite it. Choose another --run_dir, or move it away."
            )
        return None
    state = read_manifest(path)
    check_same_run(path, state, config, name)
    return state


def check_same_run(path: Path, state: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    """Raise if the run that is stored has another name or configuration.

    Args:
        path: The run folder.
        state: Its manifest's content.
        config: The configuration that is asked for.
        name: The name that is asked for.

    Raises:
        ManifestError: With the names, or with the keys that differ and both values of each.
    """
    if state["name"] != name:
        raise ManifestError(
            f"Run folder {str(path)!r} holds a run of {state['name']!r}, not of {name!r}. Choose another --run_dir."
        )
    different = config_difference(state["config"], config, NOT_IDENTITY)
    if different:
        raise ManifestError(
            f"Run folder {str(path)!r} holds a run with another configuration: {'; '.join(different)}. "
            "Choose another --run_dir, use the same values, or delete the folder to start again."
        )


def _leaves(config: Mapping[str, Any], ignored: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if prefix or key not in ignored:
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


def _check_types(path: Path, mapping: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    for key, expected in types.items():
        value = mapping.get(key)
        if not isinstance(value, expected) and not (expected is float and isinstance(value, int)):
            raise _broken(path, f"{where}{key} should be a {expected.__name__}")


def _broken(path: Path, reason: str) -> ManifestError:
    return ManifestError(
        f"{str(path)!r} is damaged: {reason}. Restore it from a copy, or delete the run folder to start again."
    )
