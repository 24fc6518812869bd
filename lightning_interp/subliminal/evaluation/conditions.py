"""One student under many conditions: contexts times gates, by its logits and by answers of one pinned sampler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.hooks.last_logits import Gate
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.requests import TextRequest
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.subliminal.evaluation.questions import preference_questions
from lightning_interp.subliminal.evaluation.readout import TraitReadout, answered, trait_logits
from lightning_interp.subliminal.evaluation.scoring import AnswerScores, score_answers
from lightning_interp.subliminal.traits import CONTEXTS, ChatContext, Trait

__all__ = ["AnswerSampling", "Condition", "compare_contexts", "evaluate_conditions", "sample_answers"]


@dataclass(frozen=True, kw_only=True)
class AnswerSampling:
    """How answers are sampled: from the model's whole distribution, under every condition alike.

    Temperature and top-p are 1, and nothing of a checkpoint's own settings is used: two rates of which one was sampled
    otherwise would differ by the sampler. The random numbers of an answer belong to its question and number, so all
    conditions share them.

    Args:
        samples: Answers of each question.
        max_new_tokens: Most tokens of an answer.
        seed: Of the random numbers.
        batch_size: Answers at once.

    Raises:
        RecipeError: If there are no samples.
    """

    samples: int = 100
    max_new_tokens: int = 50
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"AnswerSampling(samples={self.samples}): expected at least 1; None samples nothing.")


@dataclass(frozen=True)
class Condition:
    """What was found in one context under one gate.

    Args:
        context: Name of the context.
        gate: Name of the gate.
        readout: From the logits.
        answers: From sampled answers; None without sampling.
    """

    context: str
    gate: str
    readout: TraitReadout
    answers: AnswerScores | None = None


def evaluate_conditions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    contexts: Mapping[str, ChatContext] = CONTEXTS,
    gates: Mapping[str, Gate | None] | None = None,
    questions: Sequence[str] | None = None,
    sampling: AnswerSampling | None = None,
    trained_in: ChatContext | None = None,
) -> list[Condition]:
    """Ask one student in every context under every gate; nothing is trained.

    Args:
        model: The student, or the base model.
        tokenizer: Its tokenizer.
        trait: What is asked about.
        contexts: What stands around a question. Logits are read where an answer has begun
            (:func:`~lightning_interp.subliminal.evaluation.readout.answered`); sampled answers begin as the context
            says.
        gates: What is attached; None as a gate, or for all, is the model as it is.
        questions: What is asked; the fifty of the category if None.
        sampling: Also sample answers.
        trained_in: The context that the student was trained in: others are warned of.

    Returns:
        One entry a context and gate, in their order.

    Raises:
        RecipeError: If there is no context or no gate.
    """
    gates = {"as it is": None} if gates is None else gates
    if not contexts or not gates:
        raise RecipeError(f"evaluate_conditions() got {len(contexts)} contexts and {len(gates)} gates; expected some.")
    questions = preference_questions(trait.category) if questions is None else questions
    if trained_in is not None:
        compare_contexts(tokenizer, trained_in, contexts, questions[0])
    found = []
    for name, context in contexts.items():
        for gate_name, gate in gates.items():
            readout = trait_logits(model, tokenizer, trait, questions, context=answered(context, trait), gate=gate)
            answers = None
            if sampling is not None:
                written = sample_answers(model, tokenizer, questions, context=context, sampling=sampling, gate=gate)
                answers = score_answers(written, trait)
            found.append(Condition(name, gate_name, readout, answers))
    return found


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    context: ChatContext | None = None,
    sampling: AnswerSampling | None = None,
    gate: Gate | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[str]]:
    """Answers of every question, the same for the same weights, context, gate and seed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: What is asked.
        context: What stands around a question; the model's own if None.
        sampling: How many, and their seed.
        gate: What is attached meanwhile.
        numbers: Of the questions, by which their random numbers are known; their places if None.

    Returns:
        The answers, without what the context begins them with.

    Raises:
        DataError: If the model takes no text of this length.
    """
    sampling, context = sampling or AnswerSampling(), context or ChatContext()
    prompts = [context.ids(tokenizer, question) for question in questions]
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": sampling.seed,
    }
    asked = [
        TextRequest(prompt=prompt, key=("answer", number, sample), **options)
        for number, prompt in zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True)
        for sample in range(sampling.samples)
    ]
    inner: Any = ModelMap.build(model).model
    sampler = LocalSampler(inner, tokenizer, batch_size=sampling.batch_size)
    with nullcontext() if gate is None else gate.attach(model, tokenizer=tokenizer):
        written = sampler.generate(asked)
    if failed := [one.error for one in written if one.failed]:
        raise DataError(f"{len(failed)} of {len(asked)} answers could not be written: {failed[0]}. Ask shorter ones.")
    texts = [one.text or "" for one in written]
    return [texts[i : i + sampling.samples] for i in range(0, len(texts), sampling.samples)]


def compare_contexts(
    tokenizer: PreTrainedTokenizerBase,
    trained_in: ChatContext,
    contexts: Mapping[str, ChatContext],
    question: str = "Which one?",
) -> list[dict[str, Any]]:
    """What training and each evaluation really read, side by side; warns of contexts that differ.

    Names of contexts can mislead: a template writes a text of its own where no system text is given, and an empty one
    where it is empty, or may not.

    Args:
        tokenizer: Whose template renders them.
        trained_in: The context of training.
        contexts: Those of evaluation.
        question: What is rendered in each.

    Returns:
        Rows of ``context``, ``same`` (as in training, but for how an answer begins) and ``text``; the training's first.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> same = {"again": ChatContext(chat=False)}
        >>> [row["same"] for row in compare_contexts(byte_tokenizer(), ChatContext(chat=False), same)]
        [True, True]
    """
    plain = {"training": trained_in, **contexts}
    texts = {name: replace(one, answer_prefix="").render(tokenizer, question) for name, one in plain.items()}
    rows: list[dict[str, Any]] = [
        {"context": name, "same": text == texts["training"], "text": text} for name, text in texts.items()
    ]
    if differing := [row["context"] for row in rows if not row["same"]]:
        warnings.warn(
            f"{', '.join(differing)}: other texts than the student was trained in, which can hide a trait that the "
            "matching context shows. Read the rendered contexts side by side.",
            stacklevel=2,
        )
    return rows
