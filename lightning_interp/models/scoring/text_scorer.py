"""What every scorer of texts promises, and the scorer that a reward model is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.fingerprint import weights_digest
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.scoring import reward_text
from lightning_interp.models.scoring.reward_sources import load_reward_model
from lightning_interp.models.scoring.reward_text import ANY_TEXT, Prompt, RewardEncoder, RewardText, Scores
from lightning_interp.models.scoring.score_head import DecoderWithScore, label_index, needs_score_head, scoring_model
from lightning_interp.models.training.optimisation import no_more, plain, settings_of

__all__ = ["Scorer", "ScoresTexts", "TextScorer", "read_scores", "settle_text"]


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

    Rows are batched by length, so that little is padding, and equal texts are scored once.

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
        source = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        if needs_score_head(model):
            raise no_head(type(model).__name__, source)
        self.model = scoring_model(model, seed=0)
        self.token_budget, self.name = asked.pop("token_budget"), name or source
        written = settle_text(asked, {}, self.model, tokenizer, fresh=False)
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
            IncompatibleModelError: If the source is a language model without a score head.
        """
        asked = plain(settings_of(ANY_TEXT, settings.pop("text", ANY_TEXT), settings))
        loaded = load_reward_model(source, **settings)
        if loaded.fresh:
            raise no_head(type(loaded.model.base_model).__name__, os.fspath(source))
        known = {**loaded.text, **{key: value for key, value in asked.items() if value is not None}}
        model = loaded.model if device is None else loaded.model.to(device)
        return cls(model, loaded.tokenizer, text=known, name=name or loaded.label)

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
        with undisturbed(self.model):
            reward = reward_text.score_rows(
                lambda ids, mask: read_scores(self.model, ids, mask, self.label),
                [text.ids for text in encoded],
                pad_id=self.encoder.pad_id,
                device=next(self.model.parameters()).device,
                token_budget=self.token_budget,
                one_length=not isinstance(self.model, DecoderWithScore),
            )
        return Scores(reward, torch.tensor([text.truncated for text in encoded], dtype=torch.bool))

    def identity(self) -> dict[str, Any]:
        """Name, output, weights as they are now, and how texts are written."""
        weights = weights_digest(self.model)
        return {"name": self.name, "label": self.label, "weights": weights, **self.encoder.settings()}


def read_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, label: int) -> Tensor:
    """Rewards of a batch of token ids."""
    options = {"use_cache": False} if isinstance(model, DecoderWithScore) else {}
    output = model(input_ids=input_ids, attention_mask=attention_mask, **options)
    score: Tensor | None = getattr(output, "score", None)  # some models that bring their own code
    if score is None:
        score = output.logits[:, label]
    return score.reshape(len(input_ids)).float()


def settle_text(
    given: Mapping[str, Any], saved: Mapping[str, Any], model: Any, tokenizer: Any, *, fresh: bool
) -> dict[str, Any]:
    """Settle how texts are written: as given, else as the model's folder says, else by what fits the model."""
    text = {name: saved.get(name) if value is None else value for name, value in given.items()}
    if tokenizer is not None:
        defaults = {
            "chat": bool(tokenizer.chat_template),
            "add_eos": fresh and tokenizer.eos_token_id is not None,
            "max_length": reward_text.length_limit(model, tokenizer),
        }
        text |= {name: value for name, value in defaults.items() if text[name] is None}
    return {**text, "label": label_index(model, text["label"])}


def no_head(kind: str, source: str) -> IncompatibleModelError:
    """The error that a model has no trained score head."""
    return IncompatibleModelError(
        f"{kind} of {source!r} is a language model without a score head, so its scores would be random. Train one with "
        "RewardModel, or name a sequence classifier."
    )
