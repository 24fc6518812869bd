"""What leaves a rewrite store: tables, with the same bytes for the same rewrites, and batch files to be answered.

A run takes one batch a pass: the second pass rewrites what the first one wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.storage.files import atomic_writer, canonical_json
from lightning_interp.core.storage.jsonl import write_json_lines
from lightning_interp.errors import RecipeError
from lightning_interp.generation.batch_files import answers_to, write_bodies
from lightning_interp.rate.estimators.triples import STAGES, RewriteTriples
from lightning_interp.rate.rewriting.assembly import UNLABELLED, texts_of
from lightning_interp.rate.rewriting.driver import RewriteReport, RewriteRun
from lightning_interp.rate.rewriting.records import RewriterId, as_result
from lightning_interp.rate.rewriting.store import RewriteStore

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["export_batch", "export_records", "export_units", "import_batch", "to_dataset", "unit_rows"]

# When an answer came and for whom it was asked first: that may differ between two runs with the same rewrites.
_CIRCUMSTANCES = ("t", "id", "pass")


def export_records(store: RewriteStore, path: str | os.PathLike[str], *, attr: str | None = None) -> Path:
    """Write the records that count to JSONL, ordered by key and without the circumstances under which they came.

    Stores with the same rewrites give the same bytes, whatever interruptions, threads or errors they came through.

    Args:
        store: The store.
        path: The file.
        attr: Only of this attribute.

    Returns:
        ``path``.
    """
    with atomic_writer(path) as out:
        for record in sorted(store.records(attr), key=lambda record: (record.attr, record.key)):
            content = {name: value for name, value in record.to_dict().items() if name not in _CIRCUMSTANCES}
            out.write(canonical_json({"key": record.key, **content}).encode() + b"\n")
    return Path(path)


def unit_rows(
    store: RewriteStore, attr: str, *, rewriter: str | RewriterId | None = None, draws: int = 1, passes: int = 2
) -> Iterator[dict[str, Any]]:
    """Every unit with its texts, complete or not, a row a unit and draw.

    Keys are ``id, attr, draw, w, cluster, prompt``, a text for each stage (None where it is missing or cannot be used)
    and ``status``: ``"ok"``, ``"unlabelled"``, or what is missing, such as ``"rewrite2_refused"``.
    """
    units, walk = store.units(attr), store.walk(attr, store.rewriter_id(attr, rewriter), passes)
    for unit in units:
        for draw in range(draws):
            texts, lacking = texts_of(unit, [] if unit.w is None else walk(unit, draw), passes)
            row = {"id": unit.id, "attr": attr, "draw": draw, "w": unit.w, "cluster": unit.cluster}
            row |= {"prompt": unit.prompt, **dict(zip_longest(STAGES[: passes + 1], texts))}
            yield {**row, "status": UNLABELLED if unit.w is None else lacking or "ok"}


def export_units(store: RewriteStore, path: str | os.PathLike[str], *, attr: str, **options: Any) -> Path:
    """Write :func:`unit_rows` to JSONL.

    Args:
        store: The store.
        path: The file.
        attr: Name of the attribute.
        **options: ``rewriter``, ``draws`` and ``passes`` of :func:`unit_rows`.

    Returns:
        ``path``.

    Raises:
        DataError: If the store has no such attribute or rewriter.
    """
    return write_json_lines(path, unit_rows(store, attr, **options))


def to_dataset(source: RewriteStore | RewriteTriples, *, attr: str | None = None, **options: Any) -> Dataset:
    """Make an Arrow table of a store's units, or of complete units; ``save_to_disk`` writes it.

    Args:
        source: A store, or its triples.
        attr: Name of the attribute of a store.
        **options: ``rewriter``, ``draws`` and ``passes`` of :func:`unit_rows`, for a store.

    Returns:
        A ``datasets.Dataset`` with a column a key of :func:`unit_rows` (complete units have no ``status``).

    Raises:
        DataError: If the store has no such attribute or rewriter.
    """
    from datasets import Dataset, Features, Value

    rows = list(source.rows()) if isinstance(source, RewriteTriples) else list(unit_rows(source, attr or "", **options))
    names = list(rows[0]) if rows else ["id"]
    kinds = {name: Value("int64" if name in ("draw", "w") else "string") for name in names}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=Features(kinds))


def export_batch(
    run: RewriteRun, path: str | os.PathLike[str], *, max_requests: int = 50_000, max_bytes: int = 200_000_000
) -> list[Path]:
    """Write what a run would ask for now.

    Args:
        run: The run of an ``OpenAICompatibleRewriter``; its ``max_calls`` and ``max_cost`` (by estimates) hold.
        path: The file. If there is too much for one, the others get ``-2``, ``-3``, ... before the suffix.
        max_requests: Lines a file.
        max_bytes: Size a file; both defaults are the limits of OpenAI's Batch API.

    Returns:
        The files; none if nothing is left to ask for.

    Raises:
        RecipeError: If the rewriter cannot say what it would send, or a limit is below what one line needs.
    """
    body = getattr(run.rewriter, "body", None)
    if body is None:
        raise RecipeError(
            f"Rewriter {run.rewriter.name!r} ({type(run.rewriter).__name__}) makes no requests that a batch file could "
            "hold. Use an OpenAICompatibleRewriter."
        )
    bodies = [
        (one.key, body(one.source, w_target=one.w_target, prompt=one.unit.prompt, draw=one.draw))
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
        DataError: If a line is no answer, one request has two answers, or an answer belongs to none of this run.
    """
    pending = {request.key: request for request in run.pending()}
    answers = answers_to({*pending, *(record.key for record in run.store.records())}, *paths)
    return run.keep((pending[key], as_result(answer)) for key, answer in answers.items() if key in pending)
