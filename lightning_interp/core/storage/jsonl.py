r"""Files of lines: one reader of JSONL, one of plain text, and one writer that only appends.

A line ends at ``\n`` alone: a text may hold other line separators (U+2028, U+0085, a form feed) as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import atomic_writer, json_bytes, write_error
from lightning_interp.core.storage.inside import open_own
from lightning_interp.core.storage.json_reading import BOM, parse_json
from lightning_interp.errors import DataError

__all__ = ["JsonlAppender", "json_lines", "json_object", "raw_lines", "text_lines", "torn_tail", "write_json_lines"]


def json_lines(
    path: str | os.PathLike[str], *, expected: str = "one JSON object a line", own: bool = False, log: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and object of each line that is not blank; a torn last line of a ``log`` does not count."""
    for number, line in raw_lines(path, expected=expected, log=log):
        if line.removeprefix(BOM).strip():
            where = f"{os.fspath(path)}, line {number}"
            yield where, json_object(line, where, expected=expected, own=own)


def json_object(data: bytes, where: str, *, expected: str = "a JSON object", own: bool = False) -> dict[str, Any]:
    """Read one JSON object."""
    try:
        row = parse_json(data, own=own)
    except ValueError as error:
        raise DataError(f"{where}: no valid JSON ({error}), got {data[:80]!r}. Expected {expected}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__} {row!r:.80}. Expected {expected}.")
    return row


def text_lines(path: str | os.PathLike[str], *, expected: str = "one text a line") -> Iterator[tuple[str, str]]:
    """Yield file and line (for messages) and the text, without its end, of each line in UTF-8 that is not blank."""
    for number, line in raw_lines(path, expected=expected):
        where = f"{os.fspath(path)}, line {number}"
        try:
            text = line.removeprefix(BOM if number == 1 else b"").decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not in UTF-8 ({error.reason}). Expected {expected}.") from error
        if text.strip():
            yield where, text


def raw_lines(
    path: str | os.PathLike[str], *, expected: str = "a file of lines", log: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield the number (from 1) and the bytes, with their end, of each line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not log or line.endswith(b"\n"):
                    yield number, line
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{os.fspath(path)} cannot be read: {why}. Expected {expected}.") from error


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a whole JSONL file; a reader sees the old file or the new one."""
    with atomic_writer(path) as out:
        out.writelines(json_bytes(row) + b"\n" for row in rows)
    return Path(path)


class JsonlAppender(AbstractContextManager["JsonlAppender"]):
    """Appends rows to a JSONL file, after cutting off what a kill left behind its last line end.

    One process at a time may append to a file: lock its folder, or give each rank a file of its own.
    """

    def __init__(self, path: str | os.PathLike[str], *, torn: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if tail := torn_tail(self.path):
                if torn is not None:
                    with _appended(Path(torn)) as aside:
                        _append(aside, tail + b"\n")
                with _appended(self.path) as file:
                    file.truncate(self.path.stat().st_size - len(tail))
        except OSError as error:
            raise write_error(self.path, error) from error

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a batch of rows and return when they are on disk; if that fails, nothing is written."""
        data = b"".join(json_bytes(row) + b"\n" for row in rows)
        if not data:
            return
        try:
            if self._file is None:
                self._file = _appended(self.path)
            _append(self._file, data)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Close the file; a later :meth:`append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def torn_tail(path: str | os.PathLike[str]) -> bytes:
    """Return what a kill left behind the last line end of a file; nothing of a file that is not there."""
    if not os.path.exists(path):
        return b""
    with open(path, "rb") as file:
        position, tail = file.seek(0, os.SEEK_END), b""
        while position > 0 and b"\n" not in tail:
            step = min(65536, position)
            position -= step
            file.seek(position)
            tail = file.read(step) + tail
        return tail[tail.rfind(b"\n") + 1 :]


def _appended(path: Path) -> FileIO:
    return FileIO(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def _append(file: FileIO, data: bytes) -> None:
    """Append all of ``data`` and force it to disk, or leave the file as it was (a full disk takes a part)."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(size)
        raise
