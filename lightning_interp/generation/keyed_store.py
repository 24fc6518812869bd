"""Answers found again by their keys, in append-only files that a killed run goes on with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from lightning_interp.core.storage.files import check_writable
from lightning_interp.core.storage.inside import check_inside
from lightning_interp.core.storage.jsonl import JsonlAppender, json_lines
from lightning_interp.core.storage.run_lock import RunLock
from lightning_interp.errors import DataError, ManifestError

__all__ = ["KeyedStore", "KeyedWriter", "check_store"]


Item = TypeVar("Item", bound=Any)

_ASIDE = ("writers.json", "rewriters.json", "units.jsonl")  # what stores keep beside their lines


class KeyedStore(Generic[Item]):
    """Items by their keys, in a file of the folder itself or of one folder a process (``shard-00003/``).

    An item has its ``key``; text and status as ``told``, None of one that another replaces; a ``title`` for messages;
    and ``to_dict`` for its line.
    """

    file: str

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.reload()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a store; takes and refuses what the class does."""
        return cls(folder)

    def reload(self) -> None:
        """Read the files anew, if another process has written some."""
        check_store(self.folder, self.file)
        self._found: dict[str, Item] = {}
        for path in self.files(self.file):
            for where, row in json_lines(path, own=True, log=True):
                self._found |= self.merged([self._read(row, where)], where)

    def files(self, name: str) -> list[Path]:
        """The files of a name, of all processes."""
        return sorted([*self.folder.glob(name), *self.folder.glob(f"shard-*/{name}")])

    def merged(self, items: Sequence[Item], where: str) -> dict[str, Item]:
        """Of each key the item that counts, the old one or the new: a usable one, or else the last."""
        fresh: dict[str, Item] = {}
        for new in items:
            key = new.key
            old = fresh.get(key) or self._found.get(key)
            was, told = old and old.told, new.told
            if was and told and was != told:
                raise DataError(
                    f"{where}: two texts for one key ({key[:12]}..., {new.title}): {was[0]!r:.60} and {told[0]!r:.60}. "
                    "Delete one of the lines, or give the writer another name if it is another writer."
                )
            fresh[key] = old if old and was and not told else new
        return fresh

    def _read(self, row: Mapping[str, Any], where: str) -> Item:
        raise NotImplementedError


def check_store(folder: Path, file: str) -> None:
    """Refuse a store in which a link leads elsewhere."""
    shards = [path.name for path in folder.glob("shard-*")]
    check_inside(folder, [".lock", file, Path(file).with_suffix(".torn").name, *_ASIDE, *shards])


class KeyedWriter(Generic[Item]):
    """Appends items; each call returns when they are on disk.

    The folder is locked while the block runs. A last line that a kill tore apart is moved to a file ``.torn``, so its
    answer is missing and is asked for again.
    """

    def __init__(self, store: KeyedStore[Item], *, shard: int | None = None) -> None:
        self.store = store
        self.folder = store.folder if shard is None else store.folder / f"shard-{shard:05d}"
        self._appender: JsonlAppender | None = None

    def __enter__(self) -> Self:
        path = check_writable(self.folder) / self.store.file
        with ExitStack() as opening:
            opening.enter_context(RunLock(self.folder))
            self.store.reload()
            self._appender = opening.enter_context(JsonlAppender(path, torn=path.with_suffix(".torn")))
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._appender = None
        self._opened.close()

    def append(self, items: Sequence[Item]) -> None:
        """Append items and return when they are on disk; nothing is written if one has another text for a key."""
        if self._appender is None:
            raise ManifestError(
                f"The writer of {str(self.folder)!r} is closed. Use it inside `with store.writer() as writer:`."
            )
        fresh = self.store.merged(items, str(self._appender.path))
        self._appender.append(item.to_dict() for item in items)
        self.store._found |= fresh
