"""Rewrites by batch files; a run takes one batch a pass: the second pass rewrites what the first one wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.batch_files import read_answers, write_bodies
from lightning_interp.rate.rewriting.chat_rewriters import as_result
from lightning_interp.rate.rewriting.driver import RewriteReport, RewriteRun
from lightning_interp.rate.rewriting.records import shown_ids

__all__ = ["export_batch", "import_batch"]


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
    asks = run.rewriter
    if not isinstance(asks, _HasBody):
        raise RecipeError(
            f"Rewriter {asks.name!r} ({type(asks).__name__}) makes no requests that a batch file could hold. "
            "Use an OpenAICompatibleRewriter."
        )
    bodies = [
        (one.key, asks.body(one.source, w_target=one.w_target, prompt=one.unit.prompt, draw=one.draw))
        for one in run.within_budget()
    ]
    return write_bodies(bodies, path, max_requests=max_requests, max_bytes=max_bytes)


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
    answers = read_answers(*paths)
    pending = {request.key: request for request in run.pending()}
    strange = [key for key in answers if key not in pending and run.store.find(key) is None]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(answers)} answers belong to no request of this run, such as {shown_ids(strange)}. "
            "Import them with the store, rewriter and settings that the batch was written with."
        )
    return run.keep((pending[key], as_result(answer)) for key, answer in answers.items() if key in pending)
