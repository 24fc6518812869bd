"""What every scorer of texts promises, and the scorer that a reward model is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.fingerprint import weights_digest
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.scoring import reward_text
from lightning_interp.models.scoring.input_contract import Left, Reading, reading_of, settle_text
from lightning_interp.models.scoring.reward_sources import in_memory, load_reward_model
from lightning_interp.models.scoring.reward_text import ANY_TEXT, EncodedText, Prompt, RewardEncoder, RewardText, Scores
from lightning_interp.models.scoring.score_head import DecoderWithScore, needs_score_head, own_code, scoring_model
from lightning_interp.models.training.optimisation import no_more, plain, settings_of

__all__ = ["Scorer", "ScoresTexts", "TextScorer", "read_scores"]


class Scorer(ABC):
    """Gives rewards of texts.

    A reward depends on its prompt and text alone; whoever is asked is left as found (modes, random states, gradients).

    Attributes:
        name: What to call it in tables and files.
    """

    name: str

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Rewards of texts, and which of them were cut.

        Args:
            prompts: What each text answers.
            texts: The texts.

        Returns:
            Rewards and flags, each of shape ``[n]``.
        """

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """Rewards of texts.

        Args:
            prompts: What each text answers.
            texts: The texts.

        Returns:
            Float tensor of shape ``[n]``.
        """
        return self.scores(prompts, texts).reward

    def reading(self, prompt: Prompt, text: str) -> list[Reading]:
        """How a text is read, with one as the example: rows of ``of``, ``is`` and ``because``; none if that is plain.

        Args:
            prompt: What the text answers.
            text: The text.
        """
        return []

    def identity(self) -> dict[str, Any]:
        """What makes it the scorer that it is, as plain values: rewards of two identities are never mixed."""
        return {"name": self.name}


class ScoresTexts:
    """A module that scores texts in evaluation mode, whatever mode it is in, and is left as found."""

    @property
    def scorer(self) -> Scorer:
        """The module as it is now, as a scorer of texts; it goes on changing as the module is trained."""
        raise NotImplementedError

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """Rewards of texts."""
        return self.scores(prompts, texts).reward

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Rewards of texts, and which of them were cut; otherwise as :meth:`score`."""
        return self.scorer.scores(prompts, texts)


class TextScorer(Scorer):
    """Scores texts with a reward model, or another sequence classifier, in evaluation mode.

    Rows are batched by length, so that little is padding, and equal texts are scored once. In float32 a score does not
    depend on the texts scored with it; in bfloat16 it does by rounding (1 or 2 % of a standard deviation), but with
    ``batch_size=1``. How texts are written is told by :meth:`reading`.

    Args:
        model: A sequence classifier, used and not copied; a language model is refused, for it has no score head.
        tokenizer: Writes the texts.
        text: How texts are written and which output is the reward: settings, or some of them as a dict.
        name: What to call it; the model's source if None.
        **flat: Fields of :class:`RewardText` under their own names.

    Raises:
        IncompatibleModelError: If the model cannot score a text, or has no such ``label``.
        RecipeError: If an argument has a wrong value.

    Example:
        >>> from lightning_interp.models.scoring.score_head import scoring_model
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> scorer = TextScorer(scoring_model(tiny_model("llama"), seed=0), byte_tokenizer(), max_length=64)
        >>> scorer.scores(["2+2=", "2+2="], ["4", "five" * 20]).truncated.tolist()
        [False, True]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text: RewardText | Mapping[str, Any] = ANY_TEXT,
        name: str | None = None,
        **flat: Any,
    ) -> None:
        asked = plain(settings_of(ANY_TEXT, text, flat))
        no_more(self, flat)
        self._settle(model, tokenizer, asked, in_memory(model), name=name)

    def _settle(
        self, model: Any, tokenizer: Any, asked: dict[str, Any], left: Left, *, name: str | None, named: bool = False
    ) -> None:
        source = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        if needs_score_head(model):
            raise no_head(type(model).__name__, source)
        self.model, self.name = scoring_model(model, seed=0), name or source
        self.token_budget, self.batch_size = asked.pop("token_budget"), asked.pop("batch_size")
        written, self.why = settle_text(asked, left, self.model, tokenizer, fresh=False, named=named)
        self.label = written.pop("label")
        self.encoder = RewardEncoder(tokenizer=tokenizer, **written)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load a reward model as a scorer.

        Args:
            source: A folder or Hugging Face id; see :func:`load_reward_model`.
            device: Where it goes; left where it is loaded if None.
            name: What to call it; its label in tables if None.
            **settings: Of :func:`load_reward_model` (``dtype``, ``quantization``, ``revision``, ``trust_remote_code``),
                and further arguments of the class; what the folder says is taken where they are None.

        Returns:
            The scorer.

        Raises:
            IncompatibleModelError: If the source is a language model without a score head, or its texts may have been
                written in two ways and the arguments do not say in which.
        """
        asked = plain(settings_of(ANY_TEXT, settings.pop("text", ANY_TEXT), settings))
        loaded = load_reward_model(source, **settings)
        if loaded.fresh:
            raise no_head(type(loaded.model.base_model).__name__, os.fspath(source))
        model = loaded.model if device is None else loaded.model.to(device)
        scorer = cls.__new__(cls)
        scorer._settle(model, loaded.tokenizer, asked, loaded.left, name=name or loaded.label, named=True)
        return scorer

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Rewards of texts, and which of them were cut.

        Args:
            prompts: What each text answers.
            texts: The texts.

        Returns:
            Float32 rewards and flags, each of shape ``[n]``, on the CPU.

        Raises:
            DataError: If a text has no token or cannot be written.
        """
        encoded = self.encoder.encode_texts(prompts, texts)
        reward = self.read(encoded, lambda output, rows: scores_of(self.model, output, self.label, rows))
        return Scores(reward, torch.tensor([text.truncated for text in encoded], dtype=torch.bool))

    def read(self, encoded: Sequence[EncodedText], read: Callable[[Any, int], Tensor]) -> Tensor:
        """One number a text, ``[n]`` on the CPU, that ``read`` takes from the model's output and number of rows."""

        def forward(ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
            return read(run_classifier(self.model, ids, mask, types), len(ids))

        with undisturbed(self.model):
            return reward_text.score_rows(
                forward,
                encoded,
                pad_id=self.encoder.pad_id,
                device=next(self.model.parameters()).device,
                token_budget=self.token_budget,
                one_length=not isinstance(self.model, DecoderWithScore),
                batch_size=self.batch_size,
            )

    def reading(self, prompt: Prompt, text: str) -> list[Reading]:
        """How a text is read, with one as the example; see :meth:`Scorer.reading`."""
        return reading_of(self.encoder, self.label, self.why, prompt, text)

    def identity(self) -> dict[str, Any]:
        """Name, output, weights as they are now, and how texts are written."""
        weights = weights_digest(self.model)
        return {"name": self.name, "label": self.label, "weights": weights, **self.encoder.settings()}


def run_classifier(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None = None
) -> Any:
    """What a classifier gives for a batch of token ids, with their token types if it takes some."""
    options: dict[str, Any] = {"use_cache": False} if isinstance(model, DecoderWithScore) else {}
    if types is not None and not options and "token_type_ids" in signature(model.forward).parameters:
        options["token_type_ids"] = types
    return model(input_ids=input_ids, attention_mask=attention_mask, **options)


def scores_of(model: PreTrainedModel, output: Any, label: Any, rows: int) -> Tensor:
    """The rewards ``[rows]`` in a classifier's output: one of its outputs, or their weighted sum."""
    # Some models that bring their own code say what their score is; an output that is asked for is another matter.
    score: Tensor | None = getattr(output, "score", None) if label == 0 else None
    if score is None:
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2 or (own_code(model) and label == 0 and logits.shape[1] > 1):
            shape = None if logits is None else tuple(logits.shape)
            raise IncompatibleModelError(
                f"{type(model).__name__} gives no score of its own, and logits of shape {shape}: its reward cannot be "
                "told. Choose with label= (a name, or weights of the outputs), or score with a function of prompts and "
                "texts."
            )
        weights = label if isinstance(label, list) else None
        score = logits[:, label] if weights is None else logits.float() @ logits.new_tensor(weights).float()
    return score.reshape(rows).float()


def read_scores(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, label: Any, types: Tensor | None = None
) -> Tensor:
    """Rewards of a batch of token ids."""
    return scores_of(model, run_classifier(model, input_ids, attention_mask, types), label, len(input_ids))


def no_head(kind: str, source: str) -> IncompatibleModelError:
    """The error that a model has no trained score head."""
    return IncompatibleModelError(
        f"{kind} of {source!r} is a language model without a score head, so its scores would be random. Train one with "
        "RewardModel, or name a sequence classifier."
    )
