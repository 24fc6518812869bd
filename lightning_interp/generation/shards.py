"""Texts in files of a fixed number of rows each: a file is written as a whole, so a killed run ends in the same bytes.

In a batch a model's rounding depends on what lies beside a row. What is generated together is therefore settled by the
order of the requests and the size of a shard alone, and a shard that a kill interrupted is made again from its start.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_interp.core.storage.files import atomic_write_json, digest, jsonable
from lightning_interp.core.storage.inside import check_inside
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.core.storage.jsonl import json_object, raw_lines, write_json_lines
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation.requests import Completion, TextGenerator, TextRequest, ask, check_sampling
from lightning_interp.generation.sampler import request_ids
from lightning_interp.generation.work import WorkReport

__all__ = ["ShardRow", "read_shards", "write_shards"]

PLAN = "shards.json"
FORMAT = 1
_KEPT = ("text", "status", "error", "tokens_in", "tokens_out", "end_id")


@dataclass(frozen=True)
class ShardRow:
    """A text of a folder of shards.

    Args:
        row_id: Its name.
        request: What was asked for.
        completion: What was written: text, token ids, end token, status.
        writer: Digest of the identity of who wrote it.
        prompt_ids: Token ids of what was read; None if it was written without a tokenizer.

    Example:
        >>> request = TextRequest(prompt="oh")
        >>> ShardRow("r00000", request, Completion(text="OH", request=request.digest), "5e1f").truncated
        False
    """

    row_id: str
    request: TextRequest
    completion: Completion
    writer: str
    prompt_ids: tuple[int, ...] | None = None

    @property
    def truncated(self) -> bool:
        """Whether a limit cut it off, so that it has no end token."""
        return self.completion.status == "truncated"

    def to_dict(self) -> dict[str, Any]:
        """Plain data of a line; the file adds the digest of it."""
        one, prompt = self.completion, {} if self.prompt_ids is None else {"prompt_ids": list(self.prompt_ids)}
        return {
            "row_id": self.row_id,
            "writer": self.writer,
            "digest": self.request.digest,
            "request": jsonable(self.request.to_dict()),
            **prompt,
            "token_ids": list(one.token_ids),
            **{name: getattr(one, name) for name in _KEPT},
            "truncated": self.truncated,
        }


def write_shards(
    generator: TextGenerator,
    requests: Sequence[TextRequest] | Mapping[str, TextRequest],
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    share: tuple[int, int] | None = None,
    keep_failed: bool = False,
    progress: Callable[[int], object] | None = None,
) -> WorkReport:
    """Ask for every request and keep the texts as ``folder/shard_00000.jsonl`` and so on, a line a request.

    A writer is asked for a whole shard at once, and the file is there when all of it is. Start a run that was killed
    again: shards that are there are checked and kept, the others made. Made twice, by a local model with the same batch
    size on the same machine, they have the same bytes. Where answers cost money, ask with
    :func:`~lightning_interp.generation.completion_store.write_all`, which has budgets and keeps each answer, and write
    shards with a :class:`~lightning_interp.generation.completion_store.ReplayGenerator` of its store.

    Args:
        generator: Who writes.
        requests: What is asked for, in the order of the rows; a mapping names them, else they are ``r00000`` and so on.
        folder: Where the files are; others than these requests, shard size and writer are refused.
        shard_size: Rows of a file; the last one may have fewer.
        tokenizer: Writes ``prompt_ids``, what a local model reads, into each row.
        share: Rank and number of processes that fill the folder together, each its shards.
        keep_failed: Keep rows without an answer (a prompt that is too long, say), and do not end the run at one.
        progress: Called with the rows of each shard when it is on disk.

    Returns:
        What was done in this run; ``stopped`` is ``"errors"`` after a shard with failed rows, which is not kept, and
        ``missing`` counts the rows of this share that are not there.

    Raises:
        RecipeError: If the shard size or the share means nothing.
        DataError: If a finished shard was changed; names file and line.
        ManifestError: If the folder holds something else, or cannot be written.

    Example:
        >>> import tempfile
        >>> from lightning_interp.generation.requests import FunctionGenerator
        >>> shout, folder = FunctionGenerator(lambda r: r.text.upper(), name="up"), tempfile.mkdtemp()
        >>> asked = [TextRequest(prompt=text) for text in ("oh", "ah", "eh")]
        >>> [write_shards(shout, asked, folder, shard_size=2).calls for _ in range(2)]
        [3, 0]
        >>> [(row.row_id, row.completion.text) for row in read_shards(folder)]
        [('r00000', 'OH'), ('r00001', 'AH'), ('r00002', 'EH')]
    """
    (rank, ranks), report = share or (0, 1), WorkReport()
    check_sampling(shard_size=shard_size)
    if not 0 <= rank < ranks:
        raise RecipeError(f"write_shards(share={share!r}): expected a rank from 0 and below the number of processes.")
    named = requests if isinstance(requests, Mapping) else {f"r{i:05d}": one for i, one in enumerate(requests)}
    plan, root = _plan(generator, named, shard_size, tokenizer is not None), Path(folder)
    _agree(root, plan)
    read = [None if tokenizer is None else tuple(request_ids(tokenizer, one)) for one in named.values()]
    rows = [ShardRow(*pair, _NONE, plan["writer"], ids) for pair, ids in zip(named.items(), read, strict=True)]
    mine = [(path, rows[span]) for path, span in _files(root, plan)[rank::ranks]]
    todo = [(path, asked) for path, asked in mine if not _finished(path, asked)]
    report.missing = sum(len(asked) for _, asked in todo)
    for path, asked in todo:
        answers = ask(generator, [one.request for one in asked])
        report.add(answers)
        if not keep_failed and any(one.failed for one in answers):
            report.stopped = "errors"
            warnings.warn(
                f"The run ended at {str(path)!r}, where an answer failed ({report.last_error!r}). Start it again to go "
                "on from that shard, or keep such rows with keep_failed=True.",
                stacklevel=2,
            )
            break
        _clear(path)
        pairs = zip(asked, answers, strict=True)
        write_json_lines(path, (_sealed(replace(one, completion=answer).to_dict()) for one, answer in pairs))
        report.missing -= len(asked)
        if progress is not None:
            progress(len(asked))
    return report


def read_shards(folder: str | os.PathLike[str]) -> list[ShardRow]:
    """The texts of a folder that is complete, each checked.

    Args:
        folder: What :func:`write_shards` filled.

    Returns:
        Rows in the order of the requests.

    Raises:
        DataError: If a line was torn, changed or exchanged, or a shard is missing; names file and line.
        ManifestError: If a link leads out of the folder.

    Example:
        >>> import tempfile
        >>> from lightning_interp.generation.requests import FunctionGenerator
        >>> folder, asked = tempfile.mkdtemp(), {"first": TextRequest(prompt="oh")}
        >>> _ = write_shards(FunctionGenerator(lambda r: r.text.upper(), name="up"), asked, folder)
        >>> [(row.row_id, row.completion.text) for row in read_shards(folder)]
        [('first', 'OH')]
    """
    root = Path(folder)
    plan, rows = _read_plan(root), list[ShardRow]()
    for path, span in _files(root, plan):
        rows += _read(path, span.stop - span.start, plan["writer"])
    if _order({row.row_id: row.request for row in rows}) != plan["requests"]:
        raise DataError(f"The rows of {str(root)!r} are not those for which its {PLAN} was written. {_AGAIN}")
    return rows


_NONE = Completion(text=None, status="failed")
_AGAIN = "Delete the file, and the shard is made again, or restore it."


def _plan(generator: TextGenerator, named: Mapping[str, TextRequest], size: int, prompt_ids: bool) -> dict[str, Any]:
    identity = jsonable(generator.identity())
    shape = {"v": FORMAT, "shard_size": size, "rows": len(named), "prompt_ids": prompt_ids}
    return _sealed({**shape, "requests": _order(named), "identity": identity, "writer": digest(identity)})


def _order(named: Mapping[str, TextRequest]) -> str:
    return digest([[name, one.digest] for name, one in named.items()])


def _sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the digest of all else in it."""
    return {**row, "sha256": digest(row)}


def _unsealed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """An object whose digest fits."""
    if row.pop("sha256", None) != digest(row):
        raise DataError(f"{where}: it was torn or changed, since its sha256 is another. {_AGAIN}")
    return row


def _read_plan(root: Path) -> dict[str, Any]:
    check_inside(root, [PLAN])
    plan = read_json(root / PLAN, expected="the plan of a folder that write_shards filled", own=True)
    return _unsealed(plan if isinstance(plan, dict) else {}, str(root / PLAN))


def _agree(root: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan, or refuse a folder of another one."""
    check_inside(root, [PLAN])
    if not (root / PLAN).exists():
        _clear(root / PLAN)
        atomic_write_json(root / PLAN, plan)
        return
    there = _read_plan(root)
    for name, new in plan.items():
        old = there.get(name, new if name == "sha256" else None)
        if old != new:
            old, new = (_part(*pair) for pair in ((old, new), (new, old)))
            raise ManifestError(
                f"The folder {str(root)!r} holds texts of another run: its {name!r} is {old!r:.200}, and this one's is "
                f"{new!r:.200}. Choose another folder, or delete that one."
            )


def _clear(path: Path) -> None:
    """Delete what a kill in the middle of writing a file left behind."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _part(one: Any, other: Any) -> Any:
    """What of an identity differs."""
    dicts = isinstance(one, dict) and isinstance(other, dict)
    return {name: value for name, value in one.items() if other.get(name) != value} if dicts else one


def _files(root: Path, plan: Mapping[str, Any]) -> list[tuple[Path, slice]]:
    """File and rows of each shard."""
    size, count = plan["shard_size"], plan["rows"]
    spans = [slice(at, min(at + size, count)) for at in range(0, count, size)]
    return [(root / f"shard_{i:05d}.jsonl", span) for i, span in enumerate(spans)]


def _finished(path: Path, asked: Sequence[ShardRow]) -> bool:
    """Whether a shard is there; one that is not what was asked for is refused."""
    check_inside(path.parent, [path.name])
    if not path.exists():
        return False
    for number, (found, row) in enumerate(zip(_read(path, len(asked), asked[0].writer), asked, strict=True), start=1):
        if replace(found, completion=_NONE) != row:
            raise DataError(f"{path}, line {number}: the row {found.row_id!r} is not what was asked for. {_AGAIN}")
    return True


def _read(path: Path, count: int, writer: str) -> list[ShardRow]:
    check_inside(path.parent, [path.name])
    rows = list[ShardRow]()
    for number, line in raw_lines(path, expected=f"a shard of {count} rows; write_shards makes what is missing"):
        where = f"{path}, line {number}"
        found = json_object(line, where, expected="a row; delete the file, and the shard is made again", own=True)
        row = _row(_unsealed(found, where))
        if row.writer != writer:
            raise DataError(f"{where}: {row.row_id!r} is of another writer ({row.writer[:12]}...). {_AGAIN}")
        rows.append(row)
    if len(rows) != count:
        raise DataError(f"{path}, line {len(rows)}: the shard ends there; expected {count} rows. {_AGAIN}")
    return rows


def _row(row: Mapping[str, Any]) -> ShardRow:
    kept = {name: row[name] for name in _KEPT}
    found = Completion(token_ids=tuple(row["token_ids"]), request=row["digest"], **kept)
    prompt, request = row.get("prompt_ids"), TextRequest.from_dict(row["request"])
    return ShardRow(row["row_id"], request, found, row["writer"], None if prompt is None else tuple(prompt))
