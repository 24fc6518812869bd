"""Batch files: write the requests of a run to JSONL, have them answered elsewhere, and read the answers back.

The lines are those of OpenAI's Batch API, which others read too (``python -m vllm.entrypoints.openai.run_batch``). A
run takes one batch a pass: the second pass rewrites what the first one wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_interp.core.storage.files import atomic_writer, json_bytes
from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.rewriting.chain import Request
from lightning_interp.rate.rewriting.driver import RewriteReport, RewriteRun
from lightning_interp.rate.rewriting.endpoint import parse_answer
from lightning_interp.rate.rewriting.records import RewriteResult, shown_ids

__all__ = ["export_batch", "import_batch", "read_batch_answers"]

_URL = "/v1/chat/completions"


@runtime_checkable
class _HasBody(Protocol):
    """A rewriter that can say what it would send."""

    def body(self, text: str, *, w_target: int, prompt: str = "", draw: int = 0) -> dict[str, Any]: ...


def export_batch(
    run: RewriteRun,
    path: str | os.PathLike[str],
    *,
    max_requests: int = 50_000,
    max_bytes: int = 200_000_000,
) -> list[Path]:
    """Write what a run would ask for now.

    Args:
        run: The run; its rewriter is an ``OpenAICompatibleRewriter``, which is
            not called. Its ``max_calls`` and ``max_cost`` hold for a batch, the latter by estimates.
        path: The file. If there is too much for one, the others get ``-2``, ``-3``, ... before the suffix.
        max_requests: Lines a file.
        max_bytes: Size a file; both defaults are the limits of OpenAI's Batch API.

    Returns:
        The files; none if nothing is left to ask for.

    Raises:
        RecipeError: If the rewriter cannot say what it would send, or a limit is below what one line needs.
    """
    rewriter = run.rewriter
    if not isinstance(rewriter, _HasBody):
        raise RecipeError(
            f"Rewriter {rewriter.name!r} ({type(rewriter).__name__}) makes no requests that a batch file could hold. "
            "Use an OpenAICompatibleRewriter."
        )
    lines = [_line(rewriter, request) for request in run.within_budget()]
    longest = max(map(len, lines), default=0)
    if max_requests < 1 or longest > max_bytes:
        raise RecipeError(
            f"export_batch(max_requests={max_requests}, max_bytes={max_bytes}): the longest line has {longest} bytes. "
            "Raise the limits."
        )
    files = []
    for number, part in enumerate(_parts(lines, max_requests, max_bytes), start=1):
        file = Path(path) if number == 1 else Path(path).with_name(f"{Path(path).stem}-{number}{Path(path).suffix}")
        with atomic_writer(file) as out:
            out.writelines(part)
        files.append(file)
    return files


def _line(rewriter: _HasBody, request: Request) -> bytes:
    body = rewriter.body(request.source, w_target=request.w_target, prompt=request.unit.prompt, draw=request.draw)
    return json_bytes({"custom_id": request.key, "method": "POST", "url": _URL, "body": body}) + b"\n"


def _parts(lines: list[bytes], max_requests: int, max_bytes: int) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and (len(part) == max_requests or size + len(line) > max_bytes):
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield part


def import_batch(run: RewriteRun, *paths: str | os.PathLike[str]) -> RewriteReport:
    """Read the answers to a batch into the store.

    Requests without an answer stay missing and are in the next batch; the report counts them. Answers that the store
    holds already are passed over, so a file may be read twice.

    Args:
        run: The run that the batch was written from, with the same settings.
        *paths: Files of answers, and of errors if they came apart; in any order.

    Returns:
        What was written.

    Raises:
        DataError: If a file holds a line that is no answer, one request has two answers, or an answer belongs to no
            request of this run; names file and line, or the first ids.
    """
    answers: dict[str, RewriteResult] = {}
    for path in paths:
        for key, answer in read_batch_answers(path).items():
            if key in answers and answers[key] != answer:
                raise DataError(f"{os.fspath(path)}: request {key!r} has another answer in another file. Remove one.")
            answers[key] = answer
    pending = {request.key: request for request in run.pending()}
    strange = [key for key in answers if key not in pending and run.store.find(key) is None]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(answers)} answers belong to no request of this run, such as {shown_ids(strange)}. "
            "Import them with the store, rewriter and settings that the batch was written with."
        )
    return run.keep((pending[key], answer) for key, answer in answers.items() if key in pending)


def read_batch_answers(path: str | os.PathLike[str]) -> dict[str, RewriteResult]:
    """Read a file of answers in the format of OpenAI's Batch API.

    Args:
        path: JSONL with ``custom_id`` and ``response`` or ``error`` in each line.

    Returns:
        Results by ``custom_id``.

    Raises:
        DataError: If a line is no such answer, or one id has two that differ; names file and line.
    """
    found: dict[str, RewriteResult] = {}
    for where, row in json_lines(path, own=True):
        name = row.get("custom_id")
        if not isinstance(name, str) or not ("response" in row or "error" in row):
            raise DataError(
                f"{where}: the keys are {', '.join(row) or 'none'} and custom_id is {name!r:.80}; expected custom_id "
                "and response or error. Give the file that the batch came back as."
            )
        result = _result(row)
        if found.get(name, result) != result:
            raise DataError(f"{where}: custom_id {name!r} has another answer above. Remove one of the lines.")
        found[name] = result
    return found


def _result(row: Mapping[str, Any]) -> RewriteResult:
    response, error = row.get("response"), row.get("error")
    status = response.get("status_code", 200) if isinstance(response, Mapping) else None
    body = response.get("body") if isinstance(response, Mapping) else None
    if error or status != 200 or not isinstance(body, Mapping):
        return RewriteResult(text=None, status="error", error=f"{status}: {error or body!r}"[:500])
    return parse_answer(body)
