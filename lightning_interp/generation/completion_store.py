"""A folder of texts found again by what was asked and of whom, and the run that fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_interp.core.storage.files import atomic_write_json, digest, jsonable
from lightning_interp.core.storage.jsonl import json_object
from lightning_interp.errors import DataError
from lightning_interp.generation.keyed_store import KeyedStore, KeyedWriter
from lightning_interp.generation.requests import Completion, TextGenerator, TextRequest, ask, completion_key
from lightning_interp.generation.work import Budget, Prices, WorkQueue, WorkReport, work_through

__all__ = ["CompletionStore", "Pending", "ReplayGenerator", "write_all"]

FORMAT = 1
_WRITERS = "writers.json"
_COUNTS = ("status", "error", "tokens_in", "tokens_out")


@dataclass(frozen=True)
class Pending:
    """A request of one writer, under the key by which its text is found again."""

    key: str
    request: TextRequest


@dataclass(frozen=True)
class _Written(Pending):
    completion: Completion
    title = "a text"

    @property
    def told(self) -> tuple[str | None, str] | None:
        return None if self.completion.failed else (self.completion.text, self.completion.status)

    def to_dict(self) -> dict[str, Any]:
        one, request = self.completion, self.request
        counts = {name: getattr(one, name) for name in _COUNTS}
        what = {"writer": self.key.partition("/")[0], "digest": request.digest, "request": jsonable(request.to_dict())}
        end = {} if one.end_id is None else {"end_id": one.end_id}  # lines of before it was kept have none
        return {"v": FORMAT, **what, "text": one.text, "token_ids": list(one.token_ids), **end, **counts}


class CompletionStore(KeyedStore[_Written]):
    """Texts in append-only files, a line each, with what was asked for.

    A text is found by a key of the writer's identity and the request, so nothing is written twice. The folder, or one
    folder a process (``shard-00003/``), holds ``completions.jsonl``, and ``writers.json``, which says who wrote.

    Args:
        folder: The folder; a missing one is an empty store.

    Raises:
        DataError: If a line cannot be used, or one key has two texts; names file and line.

    Example:
        >>> import tempfile
        >>> from lightning_interp.generation.requests import FunctionGenerator
        >>> shout, store = FunctionGenerator(lambda r: r.text.upper(), name="up"), CompletionStore(tempfile.mkdtemp())
        >>> write_all(shout, [TextRequest(prompt="oh")], store).calls
        1
        >>> store.completions(shout, [TextRequest(prompt="oh")])[0].text
        'OH'
    """

    file = "completions.jsonl"

    def __len__(self) -> int:
        return len(self._found)

    def find(self, key: str) -> Completion | None:
        """The completion of a key, if there is one.

        Args:
            key: From :func:`~lightning_interp.generation.requests.completion_key`.
        """
        found = self._found.get(key)
        return None if found is None else found.completion

    def rows(self) -> Iterator[tuple[str, TextRequest, Completion]]:
        """All texts: the digest of who wrote, what was asked for, and what came back."""
        for key, one in self._found.items():
            yield key.partition("/")[0], one.request, one.completion

    def writers(self) -> dict[str, dict[str, Any]]:
        """Who wrote: identities by their digests."""
        found: dict[str, dict[str, Any]] = {}
        for path in self.files(_WRITERS):
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
        found = [one for request in requests if (one := self.find(completion_key(writer, request)))]
        if len(found) < len(requests):
            first = next(one for one in requests if self.find(completion_key(writer, one)) is None)
            raise DataError(
                f"The store {str(self.folder)!r} lacks {len(requests) - len(found)} of {len(requests)} texts of this "
                f"writer, such as that for {first.to_dict()!r:.120}. Write them with write_all first."
            )
        return found

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
            found.setdefault(key, Pending(key, request))
        lacking = [one for one in found.values() if self.lacks(one.key)]
        return sorted(lacking, key=lambda one: len(one.request.text or one.request.prompt or ""))

    def lacks(self, key: str) -> bool:
        """Whether there is no answer, or it failed."""
        found = self.find(key)
        return found is None or found.failed

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
        with KeyedWriter(self, shard=shard) as files:
            writer, there = digest(identity), files.folder / _WRITERS
            if writer not in self.writers():
                known = json_object(there.read_bytes(), str(there)) if there.exists() else {}
                atomic_write_json(there, known | {writer: jsonable(identity)})

            def append(asked: Sequence[Pending], answers: Sequence[Completion]) -> None:
                pairs = zip(asked, answers, strict=True)
                files.append([_Written(one.key, one.request, answer) for one, answer in pairs])

            yield append

    def _read(self, row: Mapping[str, Any], where: str) -> _Written:
        try:
            if row["v"] != FORMAT:
                raise DataError(f"version {row['v']!r:.40}; expected a text of version {FORMAT}")
            request, key = TextRequest.from_dict(row["request"]), f"{row['writer']}/{row['digest']}"
            counts = {"end_id": row.get("end_id"), **{name: row[name] for name in _COUNTS}}
            ids = tuple(row["token_ids"])
            return _Written(key, request, Completion(text=row["text"], token_ids=ids, request=row["digest"], **counts))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: {type(error).__name__}: {error}. Delete the line, and its text is written again, or restore "
                "it."
            ) from error


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
        share: Rank and number of processes that fill the store together: each asks for its part, in its own shard.

    Returns:
        What was done.

    Raises:
        ManifestError: If another process works on the store, or it cannot be written.
        RecipeError: If there is a ``max_cost`` without prices.
    """
    estimate = getattr(generator, "estimate_tokens", lambda request: (0, 0))
    budget = Budget[Pending](max_calls, max_cost, prices, lambda one: estimate(one.request))
    (rank, ranks), shard = share or (0, 1), None if share is None else share[0]
    mine, report = requests[rank::ranks], WorkReport()
    with store.writer(generator.identity(), shard=shard) as append:
        queue = WorkQueue(
            store.pending(generator, mine),
            lambda one, answered: one if one.key not in answered and store.lacks(one.key) else None,
            budget,
            report,
            give_up_after=give_up_after,
            stop=stop,
        )
        work_through(queue, generator, lambda asked: ask(generator, [one.request for one in asked]), append, progress)
    queue.finish(len(store.pending(generator, mine)))
    return report


class ReplayGenerator:
    """Answers from a store or a table, and never from anywhere else.

    Args:
        answers: A store; or texts by what was asked (see :attr:`TextRequest.text`).
        writer: Digest of whose texts a store is to give; needed only if several wrote.

    Raises:
        DataError: If a store has no texts, or those of several writers and ``writer`` names none of them.

    Example:
        >>> ReplayGenerator({"2+2=": "4"}).generate([TextRequest(prompt="2+2=")])[0].text
        '4'
    """

    batch_size = 1024

    def __init__(self, answers: CompletionStore | Mapping[str, str], *, writer: str | None = None) -> None:
        self._find: Callable[[TextRequest], Completion | None]
        if isinstance(answers, CompletionStore):
            there = answers.writers()
            name = next(iter(there)) if writer is None and len(there) == 1 else writer
            if name not in there:
                raise DataError(
                    f"{writer!r} is no writer of the store {str(answers.folder)!r}; it has "
                    f"{', '.join(there) or 'none'}. Pass writer= one of store.writers()."
                )
            self._identity = there[name]
            self._find = lambda request: answers.find(completion_key(name, request))
        else:
            self._identity = {"kind": "table", "answers": digest(dict(answers))}
            self._find = lambda request: (
                Completion(text=answers[request.text], request=request.digest) if request.text in answers else None
            )

    def identity(self) -> dict[str, Any]:
        """That of who wrote the store, so that what it answers is found again under the same keys."""
        return self._identity

    def generate(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Look each request up.

        Raises:
            DataError: If there is no answer to one.
        """
        found = [one for request in requests if (one := self._find(request))]
        if len(found) < len(requests):
            lacking = next(request for request in requests if self._find(request) is None)
            raise DataError(
                f"There is no answer to {lacking.to_dict()!r:.120} to replay. Replay only what was asked, or ask first."
            )
        return found
