"""A folder of texts found again by what was asked and of whom, and the run that fills it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import atomic_write_json, check_writable, digest, jsonable
from lightning_interp.core.storage.jsonl import JsonlAppender, json_lines, json_object
from lightning_interp.core.storage.run_lock import RunLock
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.requests import Completion, TextGenerator, TextRequest, ask, completion_key
from lightning_interp.generation.work import Budget, Prices, Tally, WorkQueue, WorkReport, work_through

__all__ = ["CompletionStore", "Pending", "write_all"]

FORMAT = 1
_FILE, _WRITERS = "completions.jsonl", "writers.json"
_COUNTS = ("status", "error", "tokens_in", "tokens_out")


@dataclass(frozen=True)
class Pending:
    """A request of one writer, under the key by which its text is found again."""

    key: str
    request: TextRequest


class CompletionStore:
    """Texts in append-only files, a line each, with what was asked for.

    A text is found by a key of the writer's identity and the request, so nothing is written twice, and nobody's text is
    taken for another's. ``completions.jsonl`` lies in the folder itself, or in one folder a process
    (``shard-00003/``); ``writers.json`` beside it says what the digests of writers stand for.

    Args:
        folder: The folder; a missing one is an empty store.

    Raises:
        DataError: If a line cannot be used, or one key has two texts; names file and line.

    Example:
        >>> import tempfile
        >>> from lightning_interp.generation.replay import FunctionGenerator
        >>> shout, store = FunctionGenerator(lambda r: r.text.upper(), name="up"), CompletionStore(tempfile.mkdtemp())
        >>> requests = [TextRequest(prompt="oh"), TextRequest(prompt="no")]
        >>> write_all(shout, requests, store).calls, write_all(shout, requests, store).calls
        (2, 0)
        >>> [one.text for one in store.completions(shout, requests)]
        ['OH', 'NO']
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.reload()

    def reload(self) -> None:
        """Read the files anew, if another process has written some."""
        self._found: dict[str, tuple[TextRequest, Completion]] = {}
        for path in sorted([*self.folder.glob(_FILE), *self.folder.glob(f"shard-*/{_FILE}")]):
            for where, row in json_lines(path, own=True, log=True):
                self._add(*_read(row, where), where)

    def __len__(self) -> int:
        return len(self._found)

    def find(self, key: str) -> Completion | None:
        """The completion of a key, if there is one.

        Args:
            key: From :func:`~lightning_interp.generation.requests.completion_key`.
        """
        found = self._found.get(key)
        return None if found is None else found[1]

    def rows(self) -> Iterator[tuple[str, TextRequest, Completion]]:
        """All texts: the digest of who wrote, what was asked for, and what came back."""
        for key, (request, completion) in self._found.items():
            yield key.partition("/")[0], request, completion

    def writers(self) -> dict[str, dict[str, Any]]:
        """Who wrote: identities by their digests."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted([*self.folder.glob(_WRITERS), *self.folder.glob(f"shard-*/{_WRITERS}")]):
            found |= json_object(path.read_bytes(), str(path))
        return found

    def completions(self, generator: TextGenerator, requests: Sequence[TextRequest]) -> list[Completion]:
        """What a writer wrote for some requests.

        Args:
            generator: Who wrote.
            requests: What was asked for.

        Returns:
            Completions in their order.

        Raises:
            DataError: If one is missing.
        """
        writer = digest(generator.identity())
        found = [self.find(completion_key(writer, request)) for request in requests]
        missing = [request for request, one in zip(requests, found, strict=True) if one is None]
        if missing:
            raise DataError(
                f"The store {str(self.folder)!r} lacks {len(missing)} of {len(requests)} texts of this writer, such as "
                f"that for {missing[0].to_dict()!r:.120}. Write them with write_all first."
            )
        return [one for one in found if one is not None]

    def pending(self, generator: TextGenerator, requests: Sequence[TextRequest]) -> list[Pending]:
        """What is still to be asked of a writer: requests without an answer or whose answer failed, equal ones once.

        Args:
            generator: Who is to write.
            requests: What is asked for.

        Returns:
            Short prompts first, so that those of like length go together.
        """
        writer = digest(generator.identity())
        found: dict[str, Pending] = {}
        for request in requests:
            key = completion_key(writer, request)
            if self._open(key):
                found.setdefault(key, Pending(key, request))
        return sorted(found.values(), key=lambda one: len(one.request.text or one.request.prompt or ""))

    @contextmanager
    def writer(
        self, identity: Mapping[str, Any], *, shard: int | None = None
    ) -> Iterator[Callable[[Sequence[Pending], Sequence[Completion]], None]]:
        """Take the store, or one shard of it, for writing.

        Args:
            identity: Of who writes.
            shard: Number of this process, if several write.

        Yields:
            A function that appends answers and returns when they are on disk.

        Raises:
            ManifestError: If the folder cannot be written or another process works in it.
            DataError: If the store has another text for the key of one; nothing is written then.
        """
        folder = check_writable(self.folder if shard is None else self.folder / f"shard-{shard:05d}")
        with RunLock(folder), JsonlAppender(folder / _FILE, torn=folder / "completions.torn") as log:
            self.reload()
            writer = digest(identity)
            if writer not in self.writers():
                there = folder / _WRITERS
                known = json_object(there.read_bytes(), str(there)) if there.exists() else {}
                atomic_write_json(there, known | {writer: jsonable(identity)})

            def append(asked: Sequence[Pending], answers: Sequence[Completion]) -> None:
                for one, answer in zip(asked, answers, strict=True):
                    self._wins(one.key, answer, str(folder / _FILE))
                log.append(_row(writer, one.request, answer) for one, answer in zip(asked, answers, strict=True))
                for one, answer in zip(asked, answers, strict=True):
                    self._add(one.key, one.request, answer, str(folder / _FILE))

            yield append

    def _open(self, key: str) -> bool:
        found = self.find(key)
        return found is None or found.failed

    def _add(self, key: str, request: TextRequest, new: Completion, where: str) -> None:
        if self._wins(key, new, where):
            self._found[key] = (request, new)

    def _wins(self, key: str, new: Completion, where: str) -> bool:
        """Whether an answer is the one to keep: of two with one key one that did not fail, or else the last."""
        old = self.find(key)
        if old is None or old.failed:
            return True
        if not new.failed and (old.text, old.status) != (new.text, new.status):
            raise DataError(
                f"{where}: two texts for one key ({key[:8]}...): {old.text!r:.60} and {new.text!r:.60}. Delete one of "
                "the lines, or give the writer another name if it is another writer."
            )
        return False


def write_all(
    generator: TextGenerator,
    requests: Sequence[TextRequest],
    store: CompletionStore,
    *,
    progress: Callable[[int], object] | None = None,
    prices: Prices | None = None,
    max_calls: int | None = None,
    max_cost: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    give_up_after: int | None = 20,
    share: tuple[int, int] | None = None,
) -> WorkReport:
    """Ask for everything that a store lacks; answers are on disk before more is asked.

    A run that was killed goes on where it was: start it again. Texts that failed are asked for again in the next run.

    Args:
        generator: Who writes.
        requests: What is asked for.
        store: Where it is kept.
        progress: Called with the number of answers that were just kept.
        prices: What tokens cost.
        max_calls: Texts to ask for at most.
        max_cost: What the run may cost, by estimates beforehand; needs prices.
        stop: Asked before each batch; True ends the run.
        give_up_after: End the run after so many failures in a row; None never.
        share: Rank and number of processes, if several fill the store together: each writes a shard of its own, and
            asks for its part of ``requests``.

    Returns:
        What was done.

    Raises:
        ManifestError: If another process works on the store, or it cannot be written.
        RecipeError: If there is a ``max_cost`` without prices.
    """
    if max_cost is not None and prices is None:
        raise RecipeError(f"max_cost={max_cost} needs to know what tokens cost. Pass prices=Prices(read, written).")
    mine = requests if share is None else requests[share[0] :: share[1]]
    estimate = getattr(generator, "estimate_tokens", None) or (lambda request: (0, 0))
    budget = Budget[Pending](
        max_calls=max_calls, max_cost=max_cost, prices=prices, estimate=lambda one: estimate(one.request)
    )
    tally = Tally(WorkReport(), give_up_after)
    with store.writer(generator.identity(), shard=None if share is None else share[0]) as append:
        queue = WorkQueue(
            store.pending(generator, mine),
            lambda one, answered: None if one.key in answered or not store._open(one.key) else one,
            budget,
            size=int(getattr(generator, "batch_size", 1)),
        )

        def take() -> list[Pending]:
            queue.stopped = queue.stopped or ("asked" if stop() else "errors" if tally.hopeless else None)
            return queue.take()

        def keep(asked: list[Pending], answers: Sequence[Completion]) -> None:
            append(asked, answers)
            queue.answered(asked, answers)
            tally.add(answers)
            if progress is not None:
                progress(len(asked))

        work_through(
            take,
            lambda asked: ask(generator, [one.request for one in asked]),
            keep,
            concurrency=int(getattr(generator, "concurrency", 1)),
            stop=getattr(generator, "stop", None),
        )
    report = tally.report
    report.stopped, report.missing = queue.stopped, len(store.pending(generator, mine))
    report.cost = None if prices is None else budget.spent
    if report.stopped == "errors":
        warnings.warn(
            f"The run ended after {give_up_after} failures in a row, the last of them {report.last_error!r}. "
            f"{report.calls} texts were asked for; start it again to go on.",
            stacklevel=2,
        )
    return report


def _row(writer: str, request: TextRequest, answer: Completion) -> dict[str, Any]:
    counts = {name: getattr(answer, name) for name in _COUNTS}
    what = {"writer": writer, "digest": request.digest, "request": jsonable(request.to_dict())}
    return {"v": FORMAT, **what, "text": answer.text, "token_ids": list(answer.token_ids), **counts}


def _read(row: Mapping[str, Any], where: str) -> tuple[str, TextRequest, Completion]:
    try:
        if row["v"] != FORMAT:
            raise DataError(f"version {row['v']!r:.40}; expected a text of version {FORMAT}")
        request, key = TextRequest.from_dict(row["request"]), f"{row['writer']}/{row['digest']}"
        ids, counts = tuple(row["token_ids"]), {name: row[name] for name in _COUNTS}
        return key, request, Completion(text=row["text"], token_ids=ids, request=row["digest"], **counts)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {type(error).__name__}: {error}. Delete the line, and its text is written again, or restore it."
        ) from error
