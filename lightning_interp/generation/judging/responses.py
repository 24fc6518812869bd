"""Responses to questions: what was found of each, how coherent they are beside a base's, and all as one summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.core.measure.statistics import Estimate, nested_interval
from lightning_interp.core.storage.files import jsonable
from lightning_interp.generation.judging.coherence import (
    PARTS,
    coherence_proxy,
    fluency,
    non_repetition,
    share_below,
    surface,
    termination,
)
from lightning_interp.generation.judging.likelihoods import continuation_logps
from lightning_interp.generation.judging.verdicts import JudgeResult, count_statuses
from lightning_interp.generation.text_quality import distinct_n

__all__ = ["BaseReference", "Response", "measure_parts", "parts_of", "read_relevance", "read_surprise", "summary_of"]

_SURFACE = ("tokens", "characters", "nonalpha", "zlib_ratio", "emoji")
_RESAMPLES = 1000


@dataclass(frozen=True)
class BaseReference:
    """What the untouched model's own responses were like, which those of others are measured against.

    Args:
        surprise: Mean negative log-probability a token of each response under the model that wrote it.
        ended: Share of responses that ended by themselves.
        relevance: Cosine of each response and its question; empty without vectors.
    """

    surprise: Sequence[float]
    ended: float
    relevance: Sequence[float] = ()

    @classmethod
    def of(cls, rows: Sequence[Response]) -> BaseReference:
        """The reference that responses of the untouched model make.

        Args:
            rows: The responses, with what was read of them.
        """
        known = {name: [getattr(row, name) for row in rows] for name in ("surprise", "relevance")}
        kept = {name: [value for value in values if not math.isnan(value)] for name, values in known.items()}
        return cls(kept["surprise"], _ended(rows), kept["relevance"])


@dataclass(kw_only=True)
class Response:
    """One response: what was asked, what was written, and what was found of it.

    Args:
        question: Number of the question.
        sample: Number of the response to it.
        prompt: The question or opening.
        text: What was written, or the opening with it of a document; None if nothing could be.
        token_ids: What was written.
        end_id: The end token, if it ended by itself.
        truncated: Whether the limit of tokens cut it.
        prompt_ids: What the model read.
        result: The judge's.
        surprise: Mean negative log-probability a token under the base model; NaN if not known.
        relevance: Cosine with its question; NaN if not known.
        parts: Parts of its coherence; that of termination belongs to all responses together.
    """

    question: int
    sample: int
    prompt: str
    text: str | None
    token_ids: tuple[int, ...] = ()
    end_id: int | None = None
    truncated: bool = False
    prompt_ids: Sequence[int] = ()
    result: JudgeResult = field(default_factory=lambda: JudgeResult(None, "error"))
    surprise: float = math.nan
    relevance: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def coherence(self) -> float:
        """Mean of the parts that are known; NaN of an empty response."""
        return coherence_proxy(self.parts) if self.token_ids else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data of a line of ``eval_responses.jsonl``."""
        kept = ("question", "sample", "prompt", "text", "token_ids", "end_id", "truncated", "surprise", "relevance")
        row = {name: getattr(self, name) for name in kept} | asdict(self.result)
        found: dict[str, Any] = jsonable(
            row | {"parts": self.parts, "coherence": self.coherence, **self.surface()}, nan_as_null=True
        )
        return found

    def surface(self) -> dict[str, float]:
        """Plain numbers of what was written."""
        return {"tokens": float(len(self.token_ids)), **surface(self.text or "")}


def read_surprise(rows: Sequence[Response], base: Any) -> None:
    """Read the surprise of responses under a model, in place.

    Args:
        rows: The responses.
        base: The model.
    """
    kept = [row for row in rows if row.token_ids]
    total = continuation_logps(base, [row.prompt_ids for row in kept], [row.token_ids for row in kept])
    for row, logp in zip(kept, total.tolist(), strict=True):
        row.surprise = -logp / len(row.token_ids)


def read_relevance(rows: Sequence[Response], vectors: Callable[[Sequence[str]], Tensor]) -> None:
    """Compare responses with what they answer, in place: the cosine of their vectors.

    Args:
        rows: The responses.
        vectors: Gives texts ``[n, d]``, such as :class:`~lightning_interp.generation.judging.text_vectors.TextVectors`.
    """
    kept = [row for row in rows if (row.text or "").strip()]
    if kept:
        asked = list(dict.fromkeys(row.prompt for row in kept))
        place, known = {prompt: i for i, prompt in enumerate(asked)}, F.normalize(vectors(asked).double(), dim=-1)
        said = F.normalize(vectors([row.text or "" for row in kept]).double(), dim=-1)
        for row, vector in zip(kept, said, strict=True):
            row.relevance = float(vector @ known[place[row.prompt]])


def measure_parts(rows: Sequence[Response], reference: BaseReference | None) -> None:
    """Measure the parts of the coherence of responses, in place; see :func:`parts_of`.

    Args:
        rows: The responses, with what was read of them.
        reference: What they are measured against; without it only repetition is known.
    """
    columns = (
        _column(values)
        for values in (
            (row.surprise for row in rows),
            (row.relevance for row in rows),
            (non_repetition(row.token_ids) for row in rows),
            (float(row.end_id is not None) for row in rows),
        )
    )
    parts = parts_of(*columns, reference=reference)
    for i, row in enumerate(rows):
        row.parts = {name: float(column[i]) for name, column in parts.items()}


def parts_of(
    surprise: Tensor, relevance: Tensor, repetition: Tensor, ended: Tensor, *, reference: BaseReference | None
) -> dict[str, Tensor]:
    """Parts of the coherence of responses that belong together; what nothing is known of is NaN.

    Termination belongs to all of them together, so each has the same.

    Args:
        surprise: Under the base model, ``[n]``, NaN where it is not known.
        relevance: Cosine with the question, likewise.
        repetition: :func:`~lightning_interp.generation.judging.coherence.non_repetition`.
        ended: 1 for a response that ended by itself.
        reference: What they are measured against; without it only repetition is known.

    Returns:
        By names of :data:`~lightning_interp.generation.judging.coherence.PARTS`, float64 ``[n]`` from 0 to 100 each.
    """
    parts = {name: torch.full_like(repetition, torch.nan) for name in PARTS}
    parts["non_repetition"] = repetition
    if reference is not None and len(repetition):
        parts["termination"] = torch.full_like(repetition, termination(float(ended.mean()), reference.ended))
        if reference.surprise:
            parts["fluency"] = fluency(surprise, _column(reference.surprise))
        if reference.relevance:
            parts["relevance"] = 100 * share_below(relevance, _column(reference.relevance))
    return parts


def summary_of(rows: Sequence[Response]) -> dict[str, Any]:
    """What an evaluation found, as plain values; no response without a score counts as 0.

    Args:
        rows: The responses, as many to each question.

    Returns:
        ``score`` with an interval that draws questions, then responses; ``score_if_missing``: what it would be with 0
        and with 100 for every response without a score; ``scores``, ``coherence`` and ``statuses`` by question;
        ``status_counts``; ``coherence_proxy`` and the mean of each of its ``parts``; ``perplexity`` under the base
        (mean over responses); ``distinct_2`` of the tokens of all responses together; the share that ``ended`` by
        themselves; means of ``tokens``, ``characters``, ``nonalpha``, ``zlib_ratio`` and ``emoji``; means of the
        judge's ``facets``, where it has some. None where nothing is known.
    """
    scores = [math.nan if row.result.score is None else row.result.score for row in rows]
    named = [row.result.detail.get("facets", {}) for row in rows]
    missing = [[worst if math.isnan(score) else score for score in scores] for worst in (0.0, 100.0)]
    coherence = [row.coherence for row in rows]
    columns = [row.surface() for row in rows]
    found = {
        "responses": len(rows),
        "score": _estimate(scores, rows).to_dict(),
        "score_if_missing": [_mean(column) for column in missing],
        "status_counts": count_statuses([row.result for row in rows]),
        "scores": _by_question(scores, rows),
        "statuses": _by_question([row.result.status for row in rows], rows),
        "coherence": _by_question(coherence, rows),
        "coherence_proxy": _estimate(coherence, rows).to_dict(),
        "parts": {name: _mean([row.parts.get(name, math.nan) for row in rows]) for name in PARTS},
        "perplexity": _mean([_exp(row.surprise) for row in rows]),
        "distinct_2": distinct_n([row.token_ids for row in rows], 2),
        "ended": _ended(rows) if rows else math.nan,
        **{name: _mean([column[name] for column in columns]) for name in _SURFACE},
        "facets": {name: 100 * _mean([one.get(name, math.nan) for one in named]) for one in named for name in one},
    }
    plain: dict[str, Any] = jsonable(found, nan_as_null=True)
    return plain


def _estimate(values: Sequence[float], rows: Sequence[Response]) -> Estimate:
    """Mean of the values that are known, with an interval that draws questions, then responses."""
    kept = [i for i, value in enumerate(values) if not math.isnan(value)]
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, 0, 0.95, "nested bootstrap")
    return nested_interval([values[i] for i in kept], [rows[i].question for i in kept], resamples=_RESAMPLES)


def _by_question(values: Sequence[Any], rows: Sequence[Response]) -> list[list[Any]]:
    found: dict[int, list[Any]] = {}
    for value, row in zip(values, rows, strict=True):
        found.setdefault(row.question, []).append(value)
    return list(found.values())


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if not math.isnan(value) else math.nan


def _ended(rows: Sequence[Response]) -> float:
    return sum(row.end_id is not None for row in rows) / max(1, len(rows))


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
