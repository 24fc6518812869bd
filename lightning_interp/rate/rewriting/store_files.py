"""Files of a rewrite store: lines are checked one by one, and a line that a kill tore is told from a broken one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.distributed import append_bytes, cut_torn_line
from lightning_interp.core.storage.files import atomic_write_bytes, json_bytes
from lightning_interp.errors import DataError
from lightning_interp.rate.rewriting.records import RewriteRecord, Unit, check_units

__all__ = ["json_lines", "json_object", "move_torn_aside", "read_records", "read_units", "winner", "write_units"]


def winner(old: RewriteRecord | None, new: RewriteRecord, where: str) -> RewriteRecord:
    """Of two records with one key the one that counts: a usable one, or else the last.

    Args:
        old: The record that is there, if any.
        new: Another record with its key.
        where: File and line of the new one, for messages.

    Returns:
        One of the two.

    Raises:
        DataError: If both can be used and their texts differ.
    """
    if old is None or not old.usable:
        return new
    if not new.usable:
        return old
    if old.result.text != new.result.text:
        raise DataError(
            f"{where}: two texts for one key ({new.key[:12]}..., unit {new.id!r}, pass {new.number}): "
            f"{old.result.text!r:.60} and {new.result.text!r:.60}. Delete one of the lines."
        )
    return new


def read_records(path: Path) -> tuple[dict[str, RewriteRecord], bytes]:
    """Read the rewrites of a store.

    Args:
        path: ``rewrites.jsonl``; a missing file is an empty one.

    Returns:
        The records that count, by key, and the bytes of a last line that was torn.

    Raises:
        DataError: If another line than the last cannot be used, or one key has two texts; names file and line.
    """
    records: dict[str, RewriteRecord] = {}
    if not path.exists():
        return records, b""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return records, line
            where = f"{path}, line {number}"
            record = RewriteRecord.from_dict(json_object(line, where), where)
            records[record.key] = winner(records.get(record.key), record, where)
    return records, b""


def move_torn_aside(path: Path, torn: bytes) -> None:
    """Move a last line that was torn to a file of its own beside ``path``.

    Args:
        path: ``rewrites.jsonl``.
        torn: The line, as :func:`read_records` gave it.
    """
    with open(path.with_suffix(".torn"), "ab", buffering=0) as aside:
        append_bytes(aside, torn + b"\n")
    cut_torn_line(path)


def read_units(path: Path) -> dict[str, dict[str, Unit]]:
    """Read the units of a store.

    Args:
        path: ``units.jsonl``.

    Returns:
        Units by attribute and id; those of a file that names no attribute are under the empty name.

    Raises:
        DataError: If a line is no unit, or units do not belong together; names file and line.
    """
    found: dict[str, list[Unit]] = {}
    for where, row in json_lines(path):
        if not {"id", "text", "w"} <= row.keys():
            raise DataError(f"{where}: the keys are {', '.join(row) or 'none'}; expected at least id, text and w.")
        fields = {name: row[name] for name in ("id", "text", "w", "prompt", "cluster") if name in row}
        try:
            found.setdefault(str(row.get("attr", "")), []).append(Unit(**fields))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return {attr: {unit.id: unit for unit in check_units(units, str(path))} for attr, units in found.items()}


def write_units(path: Path, units: Mapping[str, Mapping[str, Unit]]) -> None:
    """Write all units of a store; a reader sees the old file or the new one.

    Args:
        path: ``units.jsonl``.
        units: Units by attribute and id.
    """
    rows = [{"attr": attr, **unit.to_dict()} for attr, found in units.items() for unit in found.values()]
    atomic_write_bytes(path, b"".join(json_bytes(row) + b"\n" for row in rows))


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSONL file of objects; blank lines are skipped.

    Args:
        path: The file.

    Yields:
        File and line, for messages, and the object.

    Raises:
        DataError: If the file cannot be read or a line is no object; names file and line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{os.fspath(path)}, line {number}"
                    yield where, json_object(line, where)
    except OSError as error:
        raise DataError(
            f"{os.fspath(path)} cannot be read: {error.strerror}. Give the path of a JSONL file."
        ) from error


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        data: The text.
        where: File and line, for messages.

    Returns:
        The object.

    Raises:
        DataError: If it is none.
    """
    try:
        row = json.loads(data)
    except ValueError as error:
        raise DataError(
            f"{where}: no valid JSON ({error}), got {data[:80]!r}. Delete the line or restore the file."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {data[:80]!r}. Delete the line or restore the file.")
    return row
