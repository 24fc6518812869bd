"""Files of rows, whatever their form: JSONL, a JSON list, CSV, TSV or Parquet; each row an object with its place.

The same rows in another form are the same objects: what a form cannot hold is absent, no text is turned into a number
unless its column is one of numbers, and text that is no text (half characters, another encoding) is refused in all.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.json_reading import BOM, parse_json, read_json
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError

__all__ = ["FORMS", "file_rows", "holds_a_list"]

FORMS = "JSONL, a JSON list, CSV, TSV or Parquet"


def file_rows(
    path: str | os.PathLike[str], *, expected: str = "one object a row", numbers: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    r"""Yield place and object of each row; the ending of the file's name says its form.

    Args:
        path: The file.
        expected: What a row holds, for messages.
        numbers: Columns of numbers, which CSV writes as text. An empty cell there, or in any column, is an absent key.

    Yields:
        File and line (or row), and the row.

    Raises:
        DataError: If the file cannot be read or a row is none; names file and line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.csv"
        >>> _ = file.write_text("text,w,note\nA fine film,1,\n")
        >>> [row for _, row in file_rows(file, numbers=["w"])]
        [{'text': 'A fine film', 'w': 1}]
    """
    file = Path(path)
    forms = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
    read = forms.get(file.suffix.lower())
    if read is None and file.suffix.lower() == ".json" and holds_a_list(file):
        read = _listed_rows
    if read is None:
        yield from json_lines(file, expected=expected)
        return
    try:
        yield from read(file, frozenset(numbers))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}. Expected {expected}.") from error
    except (ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no {file.suffix[1:].upper()} file ({error}). Expected {expected}.") from error


def holds_a_list(file: Path) -> bool:
    """Whether a JSON file is a list, and not an object or one object a line."""
    try:
        with open(file, "rb") as opened:
            return opened.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    except OSError:
        return False  # said by who reads it


def _listed_rows(file: Path, numbers: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(read_json(file), start=1):
        where = f"{file}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__} {row!r:.80}.")
        yield where, row


def _csv_rows(file: Path, numbers: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a cell may hold a whole text
    with open(file, encoding="utf-8-sig", newline="") as opened:
        lines = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        names = _names(next(lines, []), file)
        for number in count(1):
            cells = next(lines, None)
            if cells is None:
                return
            where = f"{file}, row {number}"
            if cells and len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} cells under {len(names)} names ({', '.join(names)}).")
            row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
            if row:
                yield where, row | {name: _number(name, row[name], where) for name in numbers & row.keys()}


def _parquet_rows(file: Path, numbers: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = count(1)
    try:
        with open(file, "rb") as opened, ParquetFile(opened) as table:
            _names(table.schema_arrow.names, file)
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield f"{file}, row {next(number)}", _without_none(row)
    except ArrowException as error:
        raise ValueError(error) from error


def _names(names: list[str], file: Path) -> list[str]:
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(f"{file}: the names of its columns are {names!r:.200}; expected some, each there once.")
    return names


def _number(name: str, cell: str, where: str) -> float:
    try:
        value = parse_json(cell)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {name!r} is {cell!r:.80}; expected a number.")
    return value


def _without_none(value: Any) -> Any:
    """A value of Parquet without the keys that a row lacks, which that form fills with None."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
