"""Files of a rewrite store: units and records, each line checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_interp.core.storage.jsonl import json_lines, torn_tail, write_json_lines
from lightning_interp.errors import DataError
from lightning_interp.rate.rewriting.records import RewriteRecord, Unit, check_units

__all__ = ["read_records", "read_units", "winner", "write_units"]


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
    for where, row in json_lines(path, own=True, log=True):
        record = RewriteRecord.from_dict(row, where)
        records[record.key] = winner(records.get(record.key), record, where)
    return records, torn_tail(path)


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
    for where, row in json_lines(path, own=True):
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
    write_json_lines(
        path, ({"attr": attr, **unit.to_dict()} for attr, found in units.items() for unit in found.values())
    )
