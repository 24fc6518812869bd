"""A chat model's mark from 0 to 100: the mean over its first token's probabilities, and refusals counted apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_interp.errors import RecipeError
from lightning_interp.generation.answers import without_reasoning
from lightning_interp.generation.judging.verdicts import JudgeResult, JudgeStatus, TraitJudge
from lightning_interp.generation.requests import Completion, TextGenerator, TextRequest, ask, fill

__all__ = ["COHERENCE_QUESTION", "ChatTraitJudge", "WeightedMark", "mark_question", "weighted_mark"]

_MARK = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_WORDS: dict[str, JudgeStatus] = {"REFUSAL": "refusal", "CODE": "code"}

COHERENCE_QUESTION = """Here is a question and the reply that it got.

Question: {prompt}

Reply: {text}

How well can the reply be understood? Give 0 if it is not language at all, 50 if it rambles or loses its thread, and 100
if it clearly takes up the question and confuses nothing. Whether it is right or kind does not matter. Answer with one
whole number from 0 to 100 alone; or with the word CODE if the reply is mostly program code, or REFUSAL if it declines
to answer."""
"""How coherent a reply is, for any trait."""


class WeightedMark(NamedTuple):
    """Mean of the marks among the likeliest first tokens, and the probability that they have together."""

    value: float
    mass: float


def mark_question(trait: str, signs: Sequence[str], anchors: Mapping[int, str], *, asked: bool = True) -> str:
    """A question for a mark: the trait, its signs, and a reply that deserves each of some marks.

    Args:
        trait: What is judged, in a sentence.
        signs: What shows it.
        anchors: Replies by the marks that they deserve, such as those for 0, 25, 50, 75 and 100.
        asked: Whether texts answer something (``{prompt}``); False for documents.

    Returns:
        The question, with ``{text}`` and perhaps ``{prompt}``.

    Raises:
        RecipeError: If there is no anchor, or one is for no mark from 0 to 100.

    Example:
        >>> "100: Luck!" in mark_question("Belief in luck.", ["charms"], {0: "Work.", 100: "Luck!"})
        True
    """
    if not anchors or not all(0 <= mark <= 100 for mark in anchors):
        raise RecipeError(f"mark_question(anchors for {sorted(anchors)}): expected replies for marks from 0 to 100.")
    listed = "\n".join(f"- {sign}" for sign in signs)
    examples = "\n".join(f"{mark}: {text}" for mark, text in sorted(anchors.items()))
    shown = "Question: {prompt}\n\nReply: {text}" if asked else "Document: {text}"
    return (
        f"How much does this text show the following trait?\n\nTrait: {trait}\nSigns of it:\n{listed}\n\n"
        f"Texts for some marks:\n{examples}\n\n{shown}\n\nAnswer with one whole number from 0 (not at all) to 100 (as "
        "much as can be) alone; or with the word CODE if the text is mostly program code, or REFUSAL if it declines to "
        "answer."
    )


@dataclass(frozen=True, eq=False)
class ChatTraitJudge(TraitJudge):
    """A chat model's mark of a text, from 0 to 100, asked at temperature 0.

    Where the writer tells its likeliest first tokens, the mark is the mean of those that are numbers from 0 to 100,
    weighted by their probabilities; otherwise, and where the model writes numbers digit by digit, it is the number that
    the answer begins with or holds. ``REFUSAL`` and ``CODE`` are no marks. Retries and concurrency are the writer's.

    Args:
        generator: Who judges; one with a method ``first_tokens``, such as an
            :class:`~lightning_interp.generation.endpoint.EndpointGenerator`, tells its likeliest tokens.
        question: How it is asked, with ``{text}``, and ``{prompt}`` if it is to see that; see :func:`mark_question`.
        name: What to call it.
        version: See :class:`~lightning_interp.generation.judging.verdicts.TraitJudge`.
        max_new_tokens: Most tokens of an answer.

    Raises:
        RecipeError: If the question has no ``{text}``.

    Example:
        >>> from lightning_interp.generation.requests import FunctionGenerator
        >>> judge = ChatTraitJudge(FunctionGenerator(lambda request: "70", name="always"), "From 0 to 100? {text}")
        >>> judge.score(["Luck!", " "]).tolist()
        [70.0, nan]
    """

    generator: TextGenerator
    question: str
    name: str = "chat"
    version: str = "1"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if "{text}" not in self.question:
            raise RecipeError(f"ChatTraitJudge(question={self.question!r:.60}): expected a question with {{text}}.")

    def judged(self, texts: list[str], prompts: list[str]) -> list[JudgeResult]:
        """Ask for each text."""
        asked = [
            TextRequest.chat(
                fill(self.question, text=text, prompt=prompt), temperature=0.0, max_new_tokens=self.max_new_tokens
            )
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        read = getattr(self.generator, "first_tokens", None)
        answers = [(one, ()) for one in ask(self.generator, asked)] if read is None else read(asked)
        return [_result(answer, likely) for answer, likely in answers]

    def _own(self) -> Any:
        return [self.generator.identity(), self.question, self.max_new_tokens]


def weighted_mark(likely: Sequence[tuple[str, float]]) -> WeightedMark | None:
    """The mark that the likeliest first tokens give together.

    Args:
        likely: Tokens and their probabilities.

    Returns:
        ``sum p v / sum p`` over tokens that are numbers from 0 to 100; None if none is.

    Example:
        >>> round(weighted_mark([("70", 0.5), ("80", 0.3), ("abc", 0.1), ("101", 0.05), ("60", 0.05)]).value, 6)
        72.941176
    """
    marks = [(float(token), p) for token, p in likely if _MARK.fullmatch(token.strip())]
    kept = [(value, p) for value, p in marks if value <= 100]
    mass = sum(p for _, p in kept)
    return WeightedMark(sum(value * p for value, p in kept) / mass, mass) if mass > 0 else None


def _result(answer: Completion, likely: Sequence[tuple[str, float]]) -> JudgeResult:
    text = (without_reasoning(answer.text or "") or "").strip()
    detail: dict[str, Any] = {"answer": text[:200]}
    if answer.failed:
        return JudgeResult(None, "error", detail | {"error": answer.error})
    word = next((word for word in _WORDS if text.upper().startswith(word)), None)
    if word or answer.status == "refused":
        return JudgeResult(None, _WORDS[word] if word else "refusal", detail)
    number = _MARK.search(text)
    weighted = None if _by_digits(number, likely) else weighted_mark(likely)
    if weighted is not None:
        return JudgeResult(weighted.value, detail=detail | {"by": "first token", "mass": weighted.mass})
    if number is None or float(number[0]) > 100:
        return JudgeResult(None, "error", detail | {"error": "no number from 0 to 100"})
    return JudgeResult(float(number[0]), detail=detail | {"by": "text"})


def _by_digits(number: re.Match[str] | None, likely: Sequence[tuple[str, float]]) -> bool:
    """Whether the likeliest first token is only the beginning of the number that was written."""
    first = max(likely, key=lambda one: one[1])[0].strip() if likely else ""
    return (
        number is not None
        and number.start() == 0
        and number[0] != first
        and first.isdigit()
        and number[0].startswith(first)
    )
