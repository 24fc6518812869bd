"""The same questions, asked of every model of a chain with the same random numbers: its trait, and is it coherent?"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.storage.files import atomic_write_json, digest, jsonable
from lightning_interp.core.storage.jsonl import write_json_lines
from lightning_interp.errors import RecipeError
from lightning_interp.generation.judging.responses import (
    BaseReference,
    Response,
    measure_parts,
    read_relevance,
    read_surprise,
    summary_of,
)
from lightning_interp.generation.judging.verdicts import JudgeResult, TraitJudge, judge_settings
from lightning_interp.generation.requests import TextRequest
from lightning_interp.generation.sampler import LocalSampler, request_ids
from lightning_interp.models.sources.adapters import has_adapter, without_adapters

__all__ = ["TraitEvaluation", "base_of"]

# By the model: what was found of its base, by a digest of how it was asked.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, BaseReference]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TraitEvaluation:
    """Asks a model a few questions several times, and judges and measures what it says.

    The random numbers of a response belong to its question and number, so every model is asked with the same ones: one
    that has not changed scores exactly the same, and differences of two models are paired.

    Args:
        questions: What is asked; or how documents open. None of it may be a prompt of the training.
        judge: Of the trait.
        samples: Responses to each question.
        temperature: Of sampling.
        max_new_tokens: Most tokens of a response.
        documents: Questions are openings of raw text, and an opening with what follows is judged.
        system_prompt: System text of questions; None keeps what the chat template does without one.
        vectors: Gives texts ``[n, d]``, for the relevance of a response to its question, such as
            :class:`~lightning_interp.generation.judging.text_vectors.TextVectors` of a sentence encoder.
        batch_size: Responses at once.

    Raises:
        RecipeError: If there is no question, one is there twice, or there are no samples.

    Example:
        >>> from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> judge = LexiconJudge({"words": Facet(words=["luck"])})
        >>> model = tiny_model("llama")
        >>> found = TraitEvaluation(["Why?", "How?"], judge, samples=2, max_new_tokens=4)(
        ...     model, byte_tokenizer(), base=model
        ... )
        >>> found["scores"], found["status_counts"]["ok"]
        ([[0.0, 0.0], [0.0, 0.0]], 4)
    """

    questions: Sequence[str]
    judge: TraitJudge
    samples: int = 20
    temperature: float = 0.7
    max_new_tokens: int = 400
    documents: bool = False
    system_prompt: str | None = None
    vectors: Callable[[Sequence[str]], Tensor] | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.questions or len(set(self.questions)) < len(self.questions) or self.samples < 1:
            raise RecipeError(
                f"TraitEvaluation(samples={self.samples}) got {len(self.questions)} questions, "
                f"{len(set(self.questions))} of them different; expected different ones and at least 1 sample."
            )

    @property
    def prompts(self) -> list[str]:
        """What is asked, which nothing may be trained on."""
        return list(self.questions)

    def identity(self) -> dict[str, Any]:
        """What decides, beside the models, what is found, as plain values."""
        names = ("samples", "temperature", "max_new_tokens", "documents", "system_prompt", "batch_size")
        vectors = None if self.vectors is None else judge_settings(self.vectors)
        settings = {name: getattr(self, name) for name in names}
        return settings | {"questions": self.prompts, "judge": self.judge.identity(), "vectors": vectors}

    def __call__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | os.PathLike[str] | None = None,
        seed: int = 0,
        base: Any = None,
        reference: BaseReference | Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            folder: Gets ``eval_responses.jsonl`` and ``eval.json``.
            seed: Of the responses.
            base: The untouched model; if None, the model without its adapter, and nothing is measured under a base if
                it has none.
            reference: What was found of the base, as under ``reference`` of its evaluation; if None, the base is asked
                too, once a process.

        Returns:
            The :func:`~lightning_interp.generation.judging.responses.summary_of` the responses, with ``judge``,
            ``settings`` and ``reference``, as plain values.

        Raises:
            DataError: If a question cannot be asked of the model.
        """
        rows = self.responses(model, tokenizer, seed=seed)
        self.judged(rows)
        with base_of(model, base) as untouched:
            self.read(rows, untouched)
        if reference is None:
            own = base is model  # the base itself: what it says is what others are measured against
            found = BaseReference.of(rows) if own else self.reference(model, tokenizer, seed=seed, base=base)
        else:
            found = reference if isinstance(reference, BaseReference) else BaseReference(**reference)
        measure_parts(rows, found)
        named = self.identity()
        about = {"judge": named.pop("judge"), "settings": named, "seed": seed}
        plain: dict[str, Any] = jsonable(
            summary_of(rows) | about | {"reference": None if found is None else asdict(found)}, nan_as_null=True
        )
        if folder is not None:
            write_json_lines(Path(folder) / "eval_responses.jsonl", (row.to_dict() for row in rows))
            atomic_write_json(Path(folder) / "eval.json", plain)
        return plain

    def responses(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, only: Sequence[int] | None = None
    ) -> list[Response]:
        """Ask a model, without judging.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            seed: Of the responses.
            only: Numbers of responses (``question * samples + sample``); all if None.

        Returns:
            Responses in their order.
        """
        places = [divmod(number, self.samples) for number in (only if only is not None else range(self.size))]
        asked = [self._request(question, sample, seed) for question, sample in places]
        written = LocalSampler(model, tokenizer, batch_size=self.batch_size).generate(asked)
        found = []
        for (question, sample), request, one in zip(places, asked, written, strict=True):
            opening = self.questions[question]
            text = f"{opening}{one.text}" if self.documents and (one.text or "").strip() else one.text
            found.append(
                Response(
                    question=question, sample=sample, prompt=opening, text=text, token_ids=one.token_ids,
                    end_id=one.end_id, truncated=one.status == "truncated", prompt_ids=request_ids(tokenizer, request),
                    result=JudgeResult(None, "error", {"error": one.error}),
                )
            )  # fmt: skip
        return found

    @property
    def size(self) -> int:
        """How many responses there are."""
        return len(self.questions) * self.samples

    def judged(self, rows: Sequence[Response]) -> None:
        """Judge responses in place; one that could not be written stays an error.

        Args:
            rows: The responses.
        """
        kept = [row for row in rows if row.text is not None]
        texts, prompts = [row.text or "" for row in kept], [row.prompt for row in kept]
        for row, result in zip(kept, self.judge.results(texts, None if self.documents else prompts), strict=True):
            row.result = result

    def reference(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, base: Any = None
    ) -> BaseReference | None:
        """Ask the untouched model; once a process for each model and seed.

        Args:
            model: The model, whose base is it without its adapter.
            tokenizer: Its tokenizer.
            seed: Of the responses.
            base: The untouched model instead.

        Returns:
            What was found; None if there is neither.
        """
        with base_of(model, base) as untouched:
            if untouched is None:
                return None
            known = _known.setdefault(untouched, {})
            key = digest([{**self.identity(), "judge": None}, seed])
            if key not in known:
                rows = self.responses(untouched, tokenizer, seed=seed)
                self.read(rows, untouched)
                known[key] = BaseReference.of(rows)
            return known[key]

    def read(self, rows: Sequence[Response], base: Any) -> None:
        """Read what coherence is measured by, in place.

        Args:
            rows: The responses.
            base: The untouched model; without one, no surprise is read.
        """
        if base is not None:
            read_surprise(rows, base)
        if self.vectors is not None and not self.documents:
            read_relevance(rows, self.vectors)

    def _request(self, question: int, sample: int, seed: int) -> TextRequest:
        how: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens, "seed": seed}
        how["key"] = ("eval_sample", question, sample)
        text = self.questions[question]
        if self.documents:
            return TextRequest(prompt=text, **how)
        return TextRequest.chat(text, system=self.system_prompt, **how)


@contextmanager
def base_of(model: Any, base: Any = None) -> Iterator[Any]:
    """The untouched model for a block: the one given, or the same one without its adapter; None if it has none.

    Args:
        model: The model.
        base: The untouched one.
    """
    if base is not None or not has_adapter(model):
        yield base
        return
    with without_adapters(model):
        yield model
