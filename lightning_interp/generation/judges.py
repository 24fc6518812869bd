"""Judges: one number a text, from words, a classifier, an embedding, a likelihood, or a chat model's mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.answers import without_reasoning
from lightning_interp.generation.judging.text_vectors import TextVectors
from lightning_interp.generation.labellers import words_of
from lightning_interp.generation.requests import TextGenerator, TextRequest, ask, fill
from lightning_interp.generation.text_quality import perplexity
from lightning_interp.models.data.encoding import Encoder
from lightning_interp.models.data.rows import Row
from lightning_interp.models.scoring.text_scorer import TextScorer

__all__ = ["ChatJudge", "ClassifierJudge", "EmbeddingJudge", "Judge", "LikelihoodJudge", "Marks", "WordShare"]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Judge(Protocol):
    """Gives each text a number."""

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """Judge texts.

        Args:
            texts: The texts.
            prompts: What each of them answers; nothing if None.

        Returns:
            Float64 ``[n]`` on the CPU; NaN where a text cannot be judged, such as a blank one.
        """
        ...


class _Judge:
    _score: Callable[[list[str], list[str]], Tensor]

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """See :meth:`Judge.score`."""
        return _where_written(texts, prompts, self._score)


def _where_written(
    texts: Sequence[str], prompts: Sequence[str] | None, score: Callable[[list[str], list[str]], Tensor]
) -> Tensor:
    """Scores of texts that are not blank, and NaN for the others."""
    asked = [""] * len(texts) if prompts is None else list(prompts)
    if len(asked) != len(texts):
        raise DataError(f"There are {len(asked)} prompts for {len(texts)} texts; expected one prompt a text.")
    kept = [i for i, text in enumerate(texts) if text.strip()]
    found = torch.full((len(texts),), torch.nan, dtype=torch.float64)
    if kept:
        found[kept] = score([texts[i] for i in kept], [asked[i] for i in kept]).double().cpu()
    return found


@dataclass(frozen=True)
class WordShare(_Judge):
    """Share of a text's words that are in a list; whole words, in any case.

    Args:
        words: The list.

    Example:
        >>> WordShare({"good"}).score(["Good, goodness!", ""]).tolist()
        [0.5, nan]
    """

    words: Collection[str]

    def _score(self, texts: list[str], prompts: list[str]) -> Tensor:
        listed, found = {word.lower() for word in self.words}, [words_of(text) for text in texts]
        shares = [sum(one in listed for one in words) / len(words) if words else torch.nan for words in found]
        return torch.tensor(shares, dtype=torch.float64)


@dataclass(frozen=True)
class ClassifierJudge(_Judge):
    """Probability of a class, by a sequence classifier.

    Args:
        scorer: The classifier, and which ``label`` of it; a model with one output gives its sigmoid.

    Raises:
        RecipeError: If the scorer's ``label`` is weights of several outputs.

    Example:
        >>> from lightning_interp.models.scoring.score_head import scoring_model
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> scorer = TextScorer(scoring_model(tiny_model("llama"), seed=0), byte_tokenizer(), max_length=64)
        >>> 0 < float(ClassifierJudge(scorer).score(["A film."])) < 1
        True
    """

    scorer: TextScorer

    def __post_init__(self) -> None:
        if not isinstance(self.scorer.label, int):
            raise RecipeError(
                f"ClassifierJudge gives the probability of one class, and label={self.scorer.label!r:.60} weighs "
                "several. Choose one by index or name."
            )

    def _score(self, texts: list[str], prompts: list[str]) -> Tensor:
        def probability(output: Any, rows: int) -> Tensor:
            logits: Tensor = output.logits.double().reshape(rows, -1)
            return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)[:, self.scorer.label]

        return self.scorer.read(self.scorer.encoder.encode_texts(prompts, texts), probability)


class EmbeddingJudge(_Judge):
    """Cosine of a text and some reference texts: mean last hidden states over tokens, then over the references.

    Args:
        model: A model of transformers, decoder or encoder.
        tokenizer: Its tokenizer.
        references: Texts that a text should be like.
        token_budget: Most tokens of one batch.

    Raises:
        DataError: If there is no reference text.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> judge = EmbeddingJudge(tiny_model("llama"), byte_tokenizer(), ["A film."])
        >>> round(float(judge.score(["A film."])), 6)
        1.0
    """

    def __init__(self, model: Any, tokenizer: Any, references: Sequence[str], *, token_budget: int = 8192) -> None:
        self.vectors = TextVectors(model, tokenizer, token_budget=token_budget)
        written = [text for text in references if text.strip()]
        if not written:
            raise DataError("EmbeddingJudge got no reference text; expected at least one.")
        self._reference = F.normalize(self.vectors(written), dim=-1).mean(0)

    def _score(self, texts: list[str], prompts: list[str]) -> Tensor:
        return F.cosine_similarity(self.vectors(texts), self._reference, dim=-1)


@dataclass(frozen=True)
class LikelihoodJudge(_Judge):
    """Mean log-probability of a text's tokens after its prompt, in nats a token.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        chat: Prompt and text are a user's and an assistant's turn.
        batch_size: Texts at once.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> judge = LikelihoodJudge(tiny_model("llama"), byte_tokenizer())
        >>> float(judge.score(["4"], ["2+2="])) < 0
        True
    """

    model: Any
    tokenizer: Any
    chat: bool = False
    batch_size: int = 8

    def _score(self, texts: list[str], prompts: list[str]) -> Tensor:
        encoder = Encoder(tokenizer=self.tokenizer, chat=self.chat, add_eos=False)
        device = next(self.model.parameters()).device
        pairs = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
        rows = [encoder.encode(Row(f"texts[{i}]", "prompt", pair)) for i, pair in enumerate(pairs)]
        found = torch.zeros(len(rows), dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        with undisturbed(self.model):
            for part in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
                ids, mask = (x.to(device) for x in padded([rows[i].ids for i in part], 0))
                scored = padded([rows[i].scored for i in part], 0)[0].to(device).bool()
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                found[part] = -perplexity(logits, ids, scored).double().log().cpu()
        return found


class Marks(NamedTuple):
    """Marks of texts, float64 ``[n]`` with NaN for none; how many got no number for a mark, and how many no answer."""

    score: Tensor
    refused: int
    failed: int


@dataclass(frozen=True)
class ChatJudge:
    """A chat model's mark of a text.

    Where the writer tells the probabilities of its first token, the mark is their mean over the digits, which is
    finer than one number and needs no sampling; otherwise it is the number that is written at temperature 0.

    Args:
        generator: Who judges.
        question: How it is asked, with ``{text}``, and ``{prompt}`` if it is to see that; it asks for a number.
        lowest, highest: Least and greatest mark; at most 9, so that a mark is one token.
        least_mass: Least probability of all digits together; with less, the text counts as refused.

    Raises:
        RecipeError: If the question has no ``{text}``, or the marks are no digits.

    Example:
        >>> from lightning_interp.generation.requests import FunctionGenerator
        >>> five = FunctionGenerator(lambda request: "I give it a 5.", name="five")
        >>> ChatJudge(five, "From 0 to 9, how kind is this? {text}").marks(["Oh", ""])
        Marks(score=tensor([5., nan], dtype=torch.float64), refused=0, failed=0)
    """

    generator: TextGenerator
    question: str
    lowest: int = 0
    highest: int = 9
    least_mass: float = 0.5

    def __post_init__(self) -> None:
        if "{text}" not in self.question or not 0 <= self.lowest < self.highest <= 9:
            raise RecipeError(
                f"ChatJudge(question={self.question!r:.60}, lowest={self.lowest}, highest={self.highest}): expected a "
                "question with {text}, and marks from 0 to 9."
            )

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """See :meth:`Judge.score`."""
        return self.marks(texts, prompts).score

    def marks(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Marks:
        """Marks of texts, with refusals and failures counted apart.

        Args:
            texts: The texts.
            prompts: What each of them answers; nothing if None.
        """
        counts = {"refused": 0, "failed": 0}
        marks = _where_written(texts, prompts, lambda texts, prompts: self._marks(texts, prompts, counts))
        return Marks(marks, **counts)

    def _marks(self, texts: list[str], prompts: list[str], counts: dict[str, int]) -> Tensor:
        asked = [
            TextRequest.chat(fill(self.question, text=text, prompt=prompt), temperature=0.0, max_new_tokens=16)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        read = getattr(self.generator, "next_token_probs", None)
        values = torch.arange(self.lowest, self.highest + 1, dtype=torch.float64)
        probs = None if read is None else read(asked, [str(int(value)) for value in values])
        if probs is None or bool(probs.isnan().all()):  # nobody tells probabilities
            return self._numbers(asked, counts)
        mass = probs.sum(-1)
        counts["failed"] += int(mass.isnan().sum())
        counts["refused"] += int((mass < self.least_mass).sum())
        return torch.where(mass >= self.least_mass, probs @ values / mass, torch.nan)

    def _numbers(self, asked: list[TextRequest], counts: dict[str, int]) -> Tensor:
        answers = ask(self.generator, asked)
        texts = [without_reasoning(one.text or "") if one.status != "refused" else None for one in answers]
        found = [_NUMBER.search(text or "") for text in texts]
        marks = torch.tensor([float(number[0]) if number else torch.nan for number in found], dtype=torch.float64)
        fits = (marks >= self.lowest) & (marks <= self.highest)
        failed = torch.tensor([one.failed for one in answers])
        counts["failed"] += int(failed.sum())
        counts["refused"] += int((~fits & ~failed).sum())
        return marks.where(fits, torch.nan)
