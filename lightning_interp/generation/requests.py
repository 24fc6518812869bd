"""What a writer is asked for, and what it gives back: the same two types for a model, an endpoint and a function."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.json_reading import half_character
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.work import called, one_each

__all__ = [
    "HALF",
    "Completion",
    "FunctionGenerator",
    "Status",
    "TextGenerator",
    "TextRequest",
    "ask",
    "check_sampling",
    "completion_key",
    "estimate_tokens",
    "fill",
    "tokens_of_characters",
]

Status = Literal["complete", "truncated", "refused", "failed"]
HALF = "holds half of a character"
_MESSAGE_TOKENS = 8  # what a chat message costs beside its text
_CHARACTERS_A_TOKEN = 4  # of English text, roughly


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One text to be written: an answer to a conversation, or what follows a raw text.

    Args:
        messages: Turns with ``role`` and ``content`` for the chat template; a system turn ``""`` asks for an empty one.
        prompt: Raw text, or token ids that are used as they are; instead of ``messages``.
        max_new_tokens: Tokens it may have; as many as fit if None.
        temperature: 0 takes the most likely token.
        top_p: Sample from the most likely tokens that have this share of the probability together.
        stop: The text ends before the first of these.
        seed: Root seed.
        key: Names the random numbers: one seed and key draw the same ones; the content of the request, if empty.

    Raises:
        RecipeError: If there are both or neither of ``messages`` and ``prompt``, or a value is wrong.

    Example:
        >>> one = TextRequest.chat("Hi", key=("draw", 0))
        >>> one.row_seed == TextRequest.chat("Ho", key=("draw", 0)).row_seed != TextRequest.chat("Hi").row_seed
        True
        >>> one.digest == TextRequest(messages=[{"role": "user", "content": "Hi"}], key=("draw", 0)).digest
        True
    """

    messages: Sequence[Mapping[str, str]] = ()
    prompt: str | Sequence[int] | None = None
    max_new_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    key: Sequence[str | int] = ()

    def __post_init__(self) -> None:
        for name in ("messages", "stop", "key"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.prompt is not None and not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", tuple(int(one) for one in self.prompt))
        if bool(self.messages) == (self.prompt is not None):
            raise RecipeError(
                f"TextRequest(messages={self.messages!r:.60}, prompt={self.prompt!r:.60}): give one of the two."
            )
        for turn in self.messages:
            if not (isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
                raise RecipeError(f"TextRequest: the message {turn!r:.80} has no text for 'role' and 'content'.")
        if not all(isinstance(one, str) and one for one in self.stop):
            raise RecipeError(f"TextRequest(stop={self.stop!r}): expected texts of at least one character.")
        check_sampling(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)

    @classmethod
    def chat(cls, text: str, *, system: str | None = None, **more: Any) -> Self:
        """Ask a chat model one thing.

        Args:
            text: The user's message.
            system: System text; None keeps the template's own implicit one.
            **more: Other arguments of the class.
        """
        turns = [] if system is None else [{"role": "system", "content": system}]
        return cls(messages=[*turns, {"role": "user", "content": text}], **more)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read back what :meth:`to_dict` gave."""
        return cls(**row)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what differs from the defaults."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that is asked for."""
        return digest(self.to_dict())

    @cached_property
    def row_seed(self) -> int:
        """Seed of this request's own random numbers."""
        return derived_seed(self.seed, *(self.key or ("text", digest([self.messages, self.prompt]))))

    @property
    def text(self) -> str:
        """All that is to be read, as one text; empty for token ids."""
        prompt = self.prompt if isinstance(self.prompt, str) else ""
        return "\n".join(turn["content"] for turn in self.messages) or prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was written.

    Args:
        text: The text; None if there is none.
        status: ``"complete"``; ``"truncated"`` by a limit, as a text with half a character is; ``"refused"`` by model
            or filter; ``"failed"``: no answer.
        token_ids: What a local model wrote, up to its end token: of a text that a stop text ended, that too.
        error: Why it is not complete.
        tokens_in, tokens_out: Tokens read and written, if known.
        request: Digest of the request.
        end_id: The end token that a local model wrote behind ``token_ids``; None if it wrote none, or was cut off.

    Raises:
        DataError: If the status is unknown, a complete one has no text, or a truncated one an end token.
    """

    text: str | None
    status: Status = "complete"
    token_ids: tuple[int, ...] = ()
    error: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    request: str = ""
    end_id: int | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise DataError(f"A text has the status {self.status!r}; expected one of {', '.join(get_args(Status))}.")
        if not isinstance(self.text, str if self.status == "complete" else str | None):
            raise DataError(f"A text with the status {self.status!r} is {self.text!r:.60}; expected a string.")
        if self.status == "truncated" and self.end_id is not None:
            raise DataError(f"A text with the status 'truncated' has the end token {self.end_id!r}; expected none.")
        if self.status == "complete" and half_character(self.text or ""):
            for name, value in {"status": "truncated", "error": HALF, "end_id": None}.items():
                object.__setattr__(self, name, value)

    @property
    def failed(self) -> bool:
        """Whether there was no answer."""
        return self.status == "failed"


@runtime_checkable
class TextGenerator(Protocol):
    """Anything that writes texts.

    It may also have ``batch_size`` and ``concurrency`` (requests at once, and calls at the same time from several
    threads; 1 if it does not say), and ``stop()``, called when a run breaks off.
    """

    def generate(self, requests: Sequence[TextRequest]) -> Sequence[Completion]:
        """Write one text a request, in their order; a text must not depend on what else is asked."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides, beside the request, what is written: plain values, the same for the same writer."""
        ...


class FunctionGenerator:
    """A Python function as a writer.

    An error that it raises belongs to its request: it is kept as a failure, and asked for again in the next run.

    Args:
        function: Takes a request; returns a text or a :class:`Completion`.
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


def ask(generator: TextGenerator, requests: Sequence[TextRequest]) -> list[Completion]:
    """Ask a writer for one completion a request."""
    return one_each(type(generator).__name__, generator.generate(requests), len(requests), Completion)


def completion_key(writer: str, request: TextRequest) -> str:
    """By which a text is found again: the digests of the writer's identity and of what was asked for."""
    return f"{writer}/{request.digest}"


def fill(template: str, **places: str) -> str:
    """Put texts in their places, such as ``{text}``; braces in the texts stay as they are."""
    return re.sub(rf"\{{({'|'.join(places)})\}}", lambda match: places[match[1]], template)


def estimate_tokens(request: TextRequest) -> tuple[int, int]:
    """Tokens that a request would read and write, roughly; written as many as are read, or as are allowed."""
    prompt = request.prompt or ""
    read = tokens_of_characters(prompt) if isinstance(prompt, str) else len(prompt)
    read += sum(tokens_of_characters(turn["content"]) + _MESSAGE_TOKENS for turn in request.messages)
    return read, read if request.max_new_tokens is None else min(read, request.max_new_tokens)


def tokens_of_characters(text: str) -> int:
    """How many tokens a text has, roughly: a quarter of its characters."""
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def check_sampling(*, temperature: float = 0.0, top_p: float = 1.0, **counts: int | None) -> None:
    """Refuse settings of sampling that mean nothing; counts are at least 1, or None."""
    if not temperature >= 0:
        raise RecipeError(f"temperature={temperature!r}; expected at least 0.")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p={top_p!r}; expected a share above 0 and at most 1.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value!r}; expected at least 1.")
