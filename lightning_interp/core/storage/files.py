"""Crash-safe writing of files, JSON of plain values, and names for content.

Whoever reads a file written here sees the old content or the new one, never a part, even if the writer is killed.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightning_interp.core.storage.faults import die_here
from lightning_interp.errors import DataError, ManifestError

__all__ = [
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "atomic_writer",
    "canonical_json",
    "check_writable",
    "digest",
    "json_bytes",
    "jsonable",
    "no_room",
    "sha256_file",
    "sweep",
    "sync_to_disk",
    "write_error",
]

_TEMPORARY = re.compile(r"\..+[.-]\d+-[0-9a-f]{4,8}\.tmp")  # what is written, before it has its name


_NO_ROOM = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends without an error, and vanishes otherwise.

    Missing folders are made. A ``path`` that is a symbolic link keeps being one: its target is replaced.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # os.open and not tempfile: the file gets the rights that the user's umask gives to any other file.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        die_here("write")
        os.replace(temporary, target)
        sync_to_disk(target.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(target)):
            raise  # the block's own trouble with some other file
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to ``path`` so that a reader sees all of it or the old file."""
    with atomic_writer(path) as file:
        file.write(data)
    return Path(path)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` in UTF-8 to ``path`` so that a reader sees all of it or the old file."""
    return atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def atomic_write_json(path: str | os.PathLike[str], obj: Any, *, nan_as_null: bool = False) -> Path:
    """Write ``obj`` as indented JSON so that a reader sees all of it or the old file."""
    return atomic_write_bytes(path, json_bytes(jsonable(obj, nan_as_null=nan_as_null), indent=2) + b"\n")


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make ``folder`` if it is missing and make sure that files can be written into it."""
    probe = Path(folder) / f".writable-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(folder, error) from error
    return Path(folder)


def sweep(folder: Path, *, deep: bool = False) -> None:
    """Delete what kills in the middle of writes left in a folder, and if ``deep`` below it."""
    found = folder.rglob(".*.tmp") if deep else folder.glob(".*.tmp")
    for path in sorted(found) if not folder.is_symlink() else ():
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def jsonable(obj: Any, *, nan_as_null: bool = False, where: str = "") -> Any:
    """Return ``obj`` made of dicts, lists, strings, numbers, booleans and None only.

    ``where`` is its key path for errors. Tuples and sets become lists (sets sorted), paths strings, dataclasses dicts,
    enums their value, and NumPy or torch scalars and arrays Python numbers and lists.
    """
    if isinstance(obj, enum.Enum):
        obj = obj.value
    if obj is None or type(obj) in (str, bool, int):
        return obj
    if isinstance(obj, float):
        return None if nan_as_null and not math.isfinite(obj) else float(obj)
    if isinstance(obj, Mapping):
        return {
            _key(key, where): jsonable(value, nan_as_null=nan_as_null, where=f"{where}.{key}" if where else str(key))
            for key, value in obj.items()
        }
    if isinstance(obj, list | tuple):
        return [jsonable(value, nan_as_null=nan_as_null, where=f"{where}[{index}]") for index, value in enumerate(obj)]
    plain = _unwrap(obj, where)
    return jsonable(plain, nan_as_null=nan_as_null, where=where)


def json_bytes(obj: Any, *, indent: int | None = None) -> bytes:
    """JSON of a plain object in UTF-8, with readable letters; lone surrogates are escaped, so that it reads back."""
    try:
        return json.dumps(obj, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(obj, indent=indent, ensure_ascii=True).encode()


def canonical_json(obj: Any) -> str:
    """Return the one JSON text of ``obj``: sorted keys, no spaces, ASCII, and whole floats as integers."""
    return json.dumps(_whole(jsonable(obj)), sort_keys=True, separators=(",", ":"))


def digest(obj: Any) -> str:
    """Return the SHA-256 of ``obj``'s canonical JSON in hexadecimal."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def write_error(path: str | os.PathLike[str], error: OSError) -> ManifestError:
    """Return the error that says why ``path`` could not be written."""
    file_in_the_way = isinstance(error, FileExistsError)  # what making a folder says
    reason = "Not a directory" if file_in_the_way else error.strerror or str(error)
    return ManifestError(
        f"Cannot write {str(path)!r}: {reason}. Choose another folder (--run_dir), "
        "or free space and rights on this one."
    )


def no_room(error: BaseException | None) -> str | None:
    """What an error says of a disk that takes no more, whichever library has met it; None if it is about another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return _NO_ROOM[error.errno]
        if isinstance(error, Exception) and not isinstance(error, OSError):  # of libraries that keep the text alone
            said = next((text for text in _NO_ROOM.values() if text in str(error)), None)
            if said is not None:
                return said
        error = error.__cause__ or error.__context__
    return None


def sync_to_disk(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; file systems that cannot sync a folder are left alone."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    raise DataError(
        f"Cannot write the key {key!r} of {where or 'the object'} as JSON: "
        f"expected a string or a number, got {type(key).__name__}. Use a string as the key."
    )


def _unwrap(obj: Any, where: str) -> Any:
    """Return the nearest plainer thing that stands for ``obj``."""
    if isinstance(obj, str):
        return str.__str__(obj)
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, AbstractSet):
        return sorted(obj, key=lambda value: (type(value).__name__, value))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if callable(getattr(obj, "tolist", None)):  # NumPy scalars and arrays, torch tensors
        return obj.tolist()
    raise DataError(
        f"Cannot write {where or 'the object'} as JSON: {type(obj).__module__}.{type(obj).__qualname__} has no "
        "JSON form. Give numbers, strings, lists and dicts, or write it to a file of its own."
    )


def _whole(obj: Any) -> Any:
    if isinstance(obj, float) and obj.is_integer() and abs(obj) < 2**53:
        return int(obj)
    if isinstance(obj, dict):
        return {key: _whole(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_whole(value) for value in obj]
    return obj
