"""Writers that are no model: any Python function, and answers that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_interp.core.storage.files import digest
from lightning_interp.errors import DataError
from lightning_interp.generation.completion_store import CompletionStore
from lightning_interp.generation.requests import Completion, TextRequest, completion_key
from lightning_interp.generation.work import called

__all__ = ["FunctionGenerator", "ReplayGenerator"]


class FunctionGenerator:
    """A Python function as a writer.

    An error that it raises belongs to its request: it is kept as a failure, and asked for again in the next run.

    Args:
        function: Takes a request; returns a text or a :class:`~lightning_interp.generation.requests.Completion`.
        name: What to call it; part of the key, so change it when the function changes.
        params: Its settings, as plain values.
        concurrency: How many threads may call it at the same time.

    Example:
        >>> shout = FunctionGenerator(lambda request: request.text.upper(), name="shout")
        >>> shout.generate([TextRequest.chat("oh")])[0].text
        'OH'
    """

    def __init__(
        self,
        function: Callable[[TextRequest], str | Completion],
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        concurrency: int = 1,
    ) -> None:
        self.name, self.params, self.concurrency, self._function = name, dict(params or {}), concurrency, function

    def identity(self) -> dict[str, Any]:
        """Its name and settings."""
        return {"kind": "function", "name": self.name, "params": self.params}

    def generate(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Call the function for each request.

        Raises:
            RecipeError: If it returns anything but a text or a completion.
        """
        return [
            called(partial(self._function, one), repr(self.name), one.text, Completion, "failed", request=one.digest)
            for one in requests
        ]


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
        self._answers = answers
        if isinstance(answers, CompletionStore):
            there = answers.writers()
            if writer is None and len(there) == 1:
                writer = next(iter(there))
            if writer not in there:
                raise DataError(
                    f"{writer!r} is no writer of the store {str(answers.folder)!r}; it has "
                    f"{', '.join(there) or 'none'}. Pass writer= one of store.writers()."
                )
            self._identity = there[writer]
        else:
            self._identity = {"kind": "table", "answers": digest(dict(answers))}
        self._writer = writer or ""

    def identity(self) -> dict[str, Any]:
        """That of who wrote the store, so that what it answers is found again under the same keys."""
        return self._identity

    def generate(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """Look each request up.

        Raises:
            DataError: If there is no answer to one.
        """
        return [self._one(request) for request in requests]

    def _one(self, request: TextRequest) -> Completion:
        if isinstance(self._answers, CompletionStore):
            found = self._answers.find(completion_key(self._writer, request))
        else:
            text = self._answers.get(request.text)
            found = None if text is None else Completion(text=text, request=request.digest)
        if found is None:
            raise DataError(
                f"There is no answer to {request.to_dict()!r:.120} to replay. Replay only what was asked, or ask first."
            )
        return found
