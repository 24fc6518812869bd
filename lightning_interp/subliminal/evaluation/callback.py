"""Watch, while somebody's model trains, whether it takes over a trait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.core.callbacks.intervention_callback import tokenizer_of
from lightning_interp.core.callbacks.monitor import Monitor, own_rows
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import RecipeError
from lightning_interp.subliminal.evaluation.conditions import AnswerSampling, sample_answers
from lightning_interp.subliminal.evaluation.metrics import TraitAnswers, TraitLogits
from lightning_interp.subliminal.evaluation.questions import preference_questions
from lightning_interp.subliminal.evaluation.readout import answered, trait_logits
from lightning_interp.subliminal.traits import ChatContext, Trait

__all__ = ["TraitEvaluatorCallback"]

MEASURES = ("margin", "share", "logp", "rank", "percentile")


class TraitEvaluatorCallback(Monitor):
    """Every so often ask about a trait, and log ``<name>/margin`` and whatever else is asked for.

    Each process asks its share of the questions. The weights that a run ends with are those that it would have ended
    with without this; see :class:`~lightning_interp.core.callbacks.monitor.Monitor`.

    Args:
        trait: What is asked about.
        questions: What is asked; the fifty of the category if None.
        context: What stands around a question; the model's own if None. Logits are read where an answer has begun.
        measures: What is logged, of ``margin``, ``share``, ``logp``, ``rank`` and ``percentile``: means over questions,
            of the rank the median. The history holds all.
        sampling: Also sample answers, and log ``rate``, ``substring``, ``frac_nonalpha`` and ``frac_other``.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        every, at_start, at_end, name: See ``Monitor``.

    Attributes:
        history: One entry a look: ``{"epoch": ..., "step": ..., "margin": ...}``. Saved in checkpoints.

    Raises:
        RecipeError: If a measure is unknown, or there is no question.

    Example:
        >>> TraitEvaluatorCallback(Trait(target="owl"), every=10, name="owl").history
        []
    """

    def __init__(
        self,
        trait: Trait,
        questions: Sequence[str] | None = None,
        *,
        context: ChatContext | None = None,
        measures: Sequence[str] = ("margin",),
        sampling: AnswerSampling | None = None,
        tokenizer: Any = None,
        target: str | None = None,
        every: int | str = "epoch",
        at_start: bool = True,
        at_end: bool = True,
        name: str = "trait",
    ) -> None:
        super().__init__(every=every, at_start=at_start, at_end=at_end, name=name)
        if unknown := [measure for measure in measures if measure not in MEASURES]:
            raise RecipeError(
                f"TraitEvaluatorCallback(measures={list(measures)!r}) knows no {unknown[0]!r}; expected some of "
                f"{', '.join(MEASURES)}."
            )
        self.questions = preference_questions(trait.category) if questions is None else list(questions)
        if not self.questions:
            raise RecipeError("TraitEvaluatorCallback(questions=[]): expected at least one question.")
        self.trait, self.context = trait, context or ChatContext()
        self.measures, self.sampling = tuple(measures), sampling
        self.tokenizer, self.target = tokenizer, target
        self._reader: Any = None

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """Find the tokenizer.

        Raises:
            RecipeError: If there is none.
        """
        self._reader = tokenizer_of(self, module, getattr(trainer, "datamodule", None))
        if self._reader is None:
            raise RecipeError(
                f"TraitEvaluatorCallback({self.prefix!r}) found no tokenizer. Pass "
                "TraitEvaluatorCallback(tokenizer=...)."
            )

    def logged(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """The measures that were asked for, and all that was sampled."""
        return {key: value for key, value in found.items() if key in self.measures or key not in MEASURES}

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """Means over all questions."""
        numbers = own_rows(trainer, len(self.questions))
        mine = [self.questions[number] for number in numbers]
        model = ModelMap.build(module, target=self.target).model
        logits, answers = TraitLogits(self.trait).to(module.device), TraitAnswers(self.trait).to(module.device)
        if mine:
            context = answered(self.context, self.trait)
            logits.update(numbers, trait_logits(model, self._reader, self.trait, mine, context=context))
        found = logits.compute()
        if self.sampling is None:
            return found
        if mine:
            options: dict[str, Any] = {"context": self.context, "sampling": self.sampling, "numbers": numbers}
            answers.update(numbers, sample_answers(model, self._reader, mine, **options))
        return found | answers.compute()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}
