"""The rewrite store: a folder with units and an append-only file of rewrites, found again by content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lightning_interp.core.storage.files import atomic_write_json, check_writable
from lightning_interp.core.storage.jsonl import json_lines, json_object, torn_tail, write_json_lines
from lightning_interp.core.storage.run_lock import RunLock
from lightning_interp.errors import DataError, ManifestError
from lightning_interp.generation.keyed_store import KeyedStore, KeyedWriter, check_store
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.assembly import Identical, Missing, assemble
from lightning_interp.rate.rewriting.records import Request, RewriteRecord, RewriterId, Unit, chain, check_units

__all__ = ["RewriteStore", "StoreWriter", "read_units"]

_UNITS, _REWRITERS = "units.jsonl", "rewriters.json"


class RewriteStore(KeyedStore[RewriteRecord]):
    """A folder with the units of one or more attributes (``units.jsonl``) and their rewrites (``rewrites.jsonl``).

    Rewrites are only ever appended, and found by a key of their content: source, prompt, target, draw, rewriter, its
    settings and its instruction. So nothing is asked for twice, and another instruction or another first rewrite never
    meets an old answer. Reading changes nothing; :meth:`writer` takes the folder for one process.

    Args:
        folder: A folder that :meth:`create` made.

    Raises:
        ManifestError: If there is no store in the folder.
        DataError: If a file holds a line that cannot be used; names file and line.

    Example:
        >>> import tempfile
        >>> store = RewriteStore.create(tempfile.mkdtemp(), [Unit(id="a", text="oh!", w=1)], attr="mark")
        >>> store.attributes(), len(store.units("mark"))
        (['mark'], 1)
    """

    file = "rewrites.jsonl"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder)
        check_store(path, self.file)
        if not (path / _UNITS).is_file():
            there = ", ".join(sorted(one.name for one in path.iterdir())[:8]) if path.is_dir() else ""
            raise ManifestError(
                f"{str(path)!r} is no rewrite store: it has no {_UNITS}{f' (it has {there})' if there else ''}. "
                "Give the folder that RewriteStore.create made."
            )
        self._units = read_units(path / _UNITS)
        super().__init__(path)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], units: Iterable[Unit], *, attr: str) -> Self:
        """Make a store, or add units to one; the same units again change nothing.

        Args:
            folder: Its folder; made if it is missing.
            units: The units of an attribute.
            attr: Name of the attribute.

        Returns:
            The store.

        Raises:
            DataError: If an id occurs twice, or the store has another unit under an id.
            ManifestError: If the folder cannot be written or another process works in it.
        """
        path = check_writable(folder)
        check_store(path, cls.file)
        new = check_units(units, f"Attribute {attr!r}")
        with RunLock(path):
            there = read_units(path / _UNITS) if (path / _UNITS).exists() else {}
            merged = _merged(there.get(attr, {}), new, attr, path)
            if merged != there.get(attr, {}):
                groups = {**there, attr: merged}.items()
                rows = ({"attr": name, **unit.to_dict()} for name, group in groups for unit in group.values())
                write_json_lines(path / _UNITS, rows)
        return cls(path)

    @property
    def torn(self) -> bytes:
        """What a kill left of a last line."""
        return torn_tail(self.folder / self.file)

    def attributes(self) -> list[str]:
        """Names of the attributes, in the order in which they were added."""
        return list(self._units)

    def units(self, attr: str) -> list[Unit]:
        """The units of an attribute, in the order in which they were added.

        Args:
            attr: Name of the attribute.

        Returns:
            The units, unlabelled ones too.

        Raises:
            DataError: If the store has no such attribute.
        """
        group = attr if attr in self._units else ""  # a file written by hand may name no attribute
        if group not in self._units:
            raise DataError(
                f"The store {str(self.folder)!r} has no attribute {attr!r}; it has {', '.join(self._units)}. "
                "Add its units with RewriteStore.create."
            )
        return list(self._units[group].values())

    def records(self, attr: str | None = None) -> list[RewriteRecord]:
        """The records that count: of each key the last, or the last usable one.

        Args:
            attr: Only of this attribute.

        Returns:
            The records, in the order of the file.
        """
        return [record for record in self._found.values() if attr in (None, record.attr)]

    def find(self, key: str) -> RewriteRecord | None:
        """The record of a key.

        Args:
            key: Of a request, such as :attr:`~lightning_interp.rate.rewriting.records.Request.key`.

        Returns:
            The record; None if there is none.
        """
        return self._found.get(key)

    def rewriters(self, attr: str) -> list[RewriterId]:
        """Who wrote for an attribute.

        Args:
            attr: Name of the attribute.

        Returns:
            Each rewriter, with its settings and instruction, in the order of first use.
        """
        return list(dict.fromkeys(record.by for record in self.records(attr)))

    def chain(
        self, unit: Unit, attr: str, by: RewriterId, *, draw: int = 0, passes: int = 2
    ) -> Iterator[tuple[Request, RewriteRecord | None]]:
        """A unit's passes as far as they are there; see :func:`~lightning_interp.rate.rewriting.records.chain`."""
        return chain(unit, attr, by, self.find, draw=draw, passes=passes)

    def triples(
        self,
        attr: str,
        *,
        missing: Missing = "raise",
        identical: Identical = "keep",
        rewriter: str | RewriterId | None = None,
        draws: Sequence[int] | None = None,
        passes: int = 2,
    ) -> RewriteTriples:
        """The complete units of an attribute.

        Args:
            attr: Name of the attribute.
            missing: What to do with units that lack a text: raise, or leave them out and count them.
            identical: What to do with units of which a rewrite says the same as its source.
            rewriter: Whose texts; needed only if several wrote.
            draws: Draws that a unit must have; all that there are if None.
            passes: 2, or 3 for the third rewrite too.

        Returns:
            One row a unit and draw, in the order of the units.

        Raises:
            DataError: If units are incomplete, the attribute is unknown, or ``rewriter`` names none of several.
            RecipeError: If an argument has a wrong value.
        """
        units, by = self.units(attr), self.rewriter_id(attr, rewriter)
        if draws is None:
            draws = sorted({record.draw for record in self.records(attr) if record.by == by}) or [0]
        walk = self.walk(attr, by, passes)
        return assemble(attr, units, walk, draws=draws, passes=passes, missing=missing, identical=identical)

    def walk(self, attr: str, by: RewriterId | None, passes: int) -> Callable[[Unit, int], list[RewriteRecord | None]]:
        """A function that gives a unit's records of a draw, up to the first that is missing."""

        def walk(unit: Unit, draw: int) -> list[RewriteRecord | None]:
            return [] if by is None else [record for _, record in self.chain(unit, attr, by, draw=draw, passes=passes)]

        return walk

    def rewriter_id(self, attr: str, rewriter: str | RewriterId | None = None) -> RewriterId | None:
        """Which of the rewriters of an attribute is meant.

        Args:
            attr: Name of the attribute.
            rewriter: Its name or identity; None if there is but one.

        Returns:
            Its identity; None if nobody has written yet.

        Raises:
            DataError: If there are several, or it is none of them; lists them.
        """
        there = self.rewriters(attr)
        if rewriter is None and not there:
            return None
        chosen = [by for by in there if rewriter is None or rewriter in (by, by.rewriter)]
        if len(chosen) != 1:
            raise DataError(
                f"{'No' if not chosen else len(chosen)} rewriters of attribute {attr!r} fit {rewriter!r}; the store "
                f"{str(self.folder)!r} has: {'; '.join(map(str, there)) or 'none'}. Pass rewriter= one of "
                f"store.rewriters({attr!r})."
            )
        return chosen[0]

    def writer(self) -> StoreWriter:
        """Take the store for writing, in a ``with`` block.

        Returns:
            The writer.
        """
        return StoreWriter(self)

    def _read(self, row: Mapping[str, Any], where: str) -> RewriteRecord:
        return RewriteRecord.from_dict(row, where)


class StoreWriter(KeyedWriter[RewriteRecord]):
    """Appends records, and writes down whose they are."""

    def describe(self, by: RewriterId, *, params: Mapping[str, Any], instruction: str) -> None:
        """Write down what a rewriter's digests stand for, in ``rewriters.json``."""
        path = self.folder / _REWRITERS
        there = json_object(path.read_bytes(), str(path), own=True) if path.exists() else {}
        name = "/".join(by)
        if name not in there:
            there[name] = {**by._asdict(), "params": params, "instruction": instruction}
            atomic_write_json(path, dict(sorted(there.items())))


def read_units(path: Path) -> dict[str, dict[str, Unit]]:
    """Read units by attribute and id; those of a file that names no attribute are under the empty name."""
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


def _merged(there: Mapping[str, Unit], new: Sequence[Unit], attr: str, folder: Path) -> dict[str, Unit]:
    for unit in new:
        old = there.get(unit.id, unit)
        if old != unit:
            raise DataError(
                f"The store {str(folder)!r} has another unit {unit.id!r} of attribute {attr!r}: {old.text!r:.60} with "
                f"w={old.w}, not {unit.text!r:.60} with w={unit.w}. Give the new one another id, or use another folder."
            )
    merged = {**there, **{unit.id: unit for unit in new}}
    check_units(merged.values(), f"Attribute {attr!r}")
    return merged
