"""Batch files: write requests to JSONL, have them answered elsewhere, and read the answers back.

The lines are those of OpenAI's Batch API, which others read too (``python -m vllm.entrypoints.openai.run_batch``).
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import atomic_writer, json_bytes
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.core.storage.redaction import redacted
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.completion_store import CompletionStore
from lightning_interp.generation.endpoint import EndpointGenerator, parse_answer
from lightning_interp.generation.requests import Completion, TextRequest

__all__ = ["answers_to", "export_requests", "import_completions", "read_answers", "write_bodies"]

_URLS = {True: "/v1/chat/completions", False: "/v1/completions"}


def export_requests(
    generator: EndpointGenerator,
    requests: Sequence[TextRequest],
    store: CompletionStore,
    path: str | os.PathLike[str],
    **limits: int,
) -> list[Path]:
    """Write what a store lacks of an endpoint's texts; nothing is called.

    Args:
        generator: The endpoint.
        requests: What is asked for.
        store: Where the answers will be kept.
        path: As for :func:`write_bodies`.
        **limits: As for :func:`write_bodies`.

    Returns:
        The files; none if nothing is lacking.

    Raises:
        RecipeError: If a limit is below what one line needs.
    """
    pending = store.pending(generator, requests)
    return write_bodies([(one.request.digest, generator.body(one.request)) for one in pending], path, **limits)


def import_completions(
    generator: EndpointGenerator,
    requests: Sequence[TextRequest],
    store: CompletionStore,
    *paths: str | os.PathLike[str],
) -> int:
    """Read the answers to batch files into a store; answers that it holds already are passed over.

    Args:
        generator: The endpoint.
        requests: What was asked for.
        store: The store.
        *paths: Files of answers, and of errors if they came apart; in any order.

    Returns:
        How many texts were added.

    Raises:
        DataError: If a line is no answer, one request has two answers, or an answer belongs to no request.
    """
    answers = answers_to({request.digest for request in requests}, *paths)
    with store.writer(generator.identity()) as append:
        found = [one for one in store.pending(generator, requests) if one.request.digest in answers]
        append(found, [replace(answers[one.request.digest], request=one.request.digest) for one in found])
    return len(found)


def write_bodies(
    bodies: Iterable[tuple[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    max_requests: int = 50_000,
    max_bytes: int = 200_000_000,
) -> list[Path]:
    """Write requests by their names to a batch file, as :func:`export_requests` does; none without requests."""
    lines = [
        json_bytes({"custom_id": name, "method": "POST", "url": _URLS["messages" in body], "body": body}) + b"\n"
        for name, body in bodies
    ]
    longest = max(map(len, lines), default=0)
    if max_requests < 1 or longest > max_bytes:
        raise RecipeError(
            f"A batch file cannot be written with max_requests={max_requests}, max_bytes={max_bytes}: the longest line "
            f"has {longest} bytes. Raise the limits."
        )
    parts: list[list[bytes]] = []
    room = 0
    for line in lines:
        if len(line) > room or len(parts[-1]) == max_requests:
            parts, room = [*parts, []], max_bytes
        parts[-1].append(line)
        room -= len(line)
    first = Path(path)
    files = [first if i == 1 else first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        with atomic_writer(file) as out:
            out.writelines(part)
    return files


def answers_to(names: Container[str], *paths: str | os.PathLike[str]) -> dict[str, Completion]:
    """Read answers, and refuse those that belong to none of the requests."""
    answers = read_answers(*paths)
    strange = sorted(name for name in answers if name not in names)
    if strange:
        raise DataError(
            f"{len(strange)} of {len(answers)} answers belong to none of the requests, such as {strange[0]!r}. Import "
            "them with the requests, store and settings that the batch was written with."
        )
    return answers


def read_answers(*paths: str | os.PathLike[str]) -> dict[str, Completion]:
    """Read answers by ``custom_id``; a line has ``response`` or ``error`` too, and one id no two that differ."""
    found: dict[str, Completion] = {}
    for path in paths:
        here: set[str] = set()
        for where, row in json_lines(path, expected="the file that the batch came back as"):
            name = row.get("custom_id")
            if not isinstance(name, str) or not ("response" in row or "error" in row):
                raise DataError(
                    f"{where}: the keys are {', '.join(row) or 'none'} and custom_id is {name!r:.80}; expected "
                    "custom_id and response or error. Give the file that the batch came back as."
                )
            answer = _answer(redacted(row))
            if found.get(name, answer) != answer:
                place = "above" if name in here else "in another file"
                raise DataError(f"{where}: custom_id {name!r} has another answer {place}. Remove one of the lines.")
            found[name] = answer
            here.add(name)
    return found


def _answer(row: Mapping[str, Any]) -> Completion:
    response, error = row.get("response"), row.get("error")
    status = response.get("status_code", 200) if isinstance(response, Mapping) else None
    body = response.get("body") if isinstance(response, Mapping) else None
    if error or status != 200 or not isinstance(body, Mapping):
        return Completion(text=None, status="failed", error=f"{status}: {error or body!r}"[:500])
    return parse_answer(body)
