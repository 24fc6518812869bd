"""Ranks, and JSONL files that many ranks write and a killed run continues.

Nothing here starts a process group: it reads the one that Lightning (or ``torchrun``, or SLURM) made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import atomic_writer, jsonable
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.jsonl import JsonlAppender, raw_lines
from lightning_interp.errors import DataError, ManifestError

__all__ = ["JsonlWriter", "is_rank_zero", "rank_and_world_size"]


def rank_and_world_size() -> tuple[int, int]:
    """This process's global rank and the number of processes.

    A process group that is up decides; before that, the variables of ``torchrun``, of SLURM's ``srun`` (not of an
    interactive shell), or Lightning's (where ranks of several nodes are distinct, but may have gaps until the group is
    up).
    """
    if (group := _process_group()) is not None:
        return group.get_rank(), group.get_world_size()
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", "1"))
    local, node = int(env.get("LOCAL_RANK", "0")), int(env.get("NODE_RANK", "0"))
    world = int(env.get("WORLD_SIZE", str(local + 1)))
    return node * world + local, world


def _process_group() -> Any:
    torch = sys.modules.get("torch")  # without torch there is no process group, and this stays a light import
    up = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if torch is not None and up else None


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return rank_and_world_size()[0] == 0


class JsonlWriter(AbstractContextManager["JsonlWriter"]):
    """Writes rows of JSON from many ranks, survives a kill at any byte, and ends as one ordered file.

    Each rank appends to a part file of its own beside ``path``; a row's integer ``index`` says where it belongs.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int | None = None, world_size: int | None = None) -> None:
        found_rank, found_world = rank_and_world_size()
        self.path = Path(path)
        self.rank = found_rank if rank is None else rank
        self.world_size = found_world if world_size is None else world_size
        self.part = self.path.with_name(f"{self.path.name}.rank{self.rank:05d}.part")
        self._appender = JsonlAppender(self.part)

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a batch of rows and return when they are on disk."""
        self._appender.append(_checked(row) for row in rows)

    def written(self) -> set[int]:
        """Return the indices on disk, of every rank and of earlier attempts, also with another number of ranks."""
        return {index for source in self._sources() for index, _, _ in _lines(source)}

    def merge(self, barrier: Callable[[], object] | None = None) -> Path:
        """On every rank: wait for all, then write the final file on rank zero, and remove the part files.

        Of several rows with one ``index`` the first is kept (the final file's, then the lowest rank's).
        """
        self.close()
        wait = barrier or self._group_barrier()
        wait()
        if self.rank == 0:
            sources = self._sources()
            rows: dict[int, tuple[Path, int, int]] = {}
            for source in sources:
                for index, start, length in _lines(source):
                    rows.setdefault(index, (source, start, length))
            _copy_rows(rows, self.path)
            for source in sources:
                if source != self.path:
                    source.unlink()
        wait()
        return self.path

    def close(self) -> None:
        """Close the part file; a later :meth:`write` opens it again."""
        self._appender.close()

    def _sources(self) -> list[Path]:
        prefix, suffix = f"{self.path.name}.rank", ".part"
        parts = sorted(
            part for part in self.path.parent.iterdir() if part.name.startswith(prefix) and part.name.endswith(suffix)
        )
        return [*([self.path] if self.path.exists() else []), *parts]

    def _group_barrier(self) -> Callable[[], object]:
        if (group := _process_group()) is not None:
            barrier: Callable[[], object] = group.barrier
            return barrier
        if self.world_size > 1:
            raise ManifestError(
                f"Cannot merge {str(self.path)!r} from {self.world_size} ranks: no process group is up to wait for "
                "them. Pass merge(barrier=trainer.strategy.barrier)."
            )
        return lambda: None


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    index = row.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise DataError(f"A row has index {index!r}: expected an integer that no other row has. The row: {row!r:.200}")
    plain: dict[str, Any] = jsonable(row)
    return plain


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (index, start, length) of each complete line of a part or final file."""
    start = 0
    for number, line in raw_lines(path, log=True):  # a torn line is cut off by its own rank when it comes back
        yield _index(line, path, number), start, len(line)
        start += len(line)


def _index(line: bytes, path: Path, number: int) -> int:
    try:
        index = parse_json(line, own=True)["index"]
    except (ValueError, KeyError, TypeError):
        index = None
    if type(index) is not int:
        raise DataError(
            f"{path}, line {number}: expected a JSON object with an integer 'index', got {line[:80]!r}. "
            "Delete this line (its row is made again) or restore the file."
        )
    return index


def _copy_rows(rows: Mapping[int, tuple[Path, int, int]], target: Path) -> None:
    with ExitStack() as stack:
        files = {
            source: stack.enter_context(open(source, "rb")) for source in {source for source, _, _ in rows.values()}
        }
        out = stack.enter_context(atomic_writer(target))
        for index in sorted(rows):
            source, start, length = rows[index]
            files[source].seek(start)
            out.write(files[source].read(length))
