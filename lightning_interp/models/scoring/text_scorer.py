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
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.models.scoring.reward_files import TEXT_SETTINGS
from lightning_interp.models.scoring.reward_sources import load_reward_model
from lightning_interp.models.scoring.reward_text import Prompt, RewardEncoder, Scores, length_limit, score_rows
from lightning_interp.models.scoring.score_head import DecoderWithScore, label_index, needs_score_head, scoring_model
from lightning_interp.models.sources.pretrained import Quantization

__all__ = ["Scorer", "ScoresTexts", "TextScorer", "read_scores", "settle_text"]


class Scorer(ABC):
    """Gives rewards of texts.

    A reward depends on its prompt and text alone, not on the texts that are scored with it nor on the order; whoever
    is asked is left as found (modes, random states, gradients).

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
        label: Which output of a model with several is the reward, by index or name.
        chat: Write texts by the tokenizer's chat template; None does so if it has one.
        system_prompt: System text for prompts without one; None keeps the template's own implicit text.
        add_eos: Whether a text ends with the end token without a chat template.
        max_length: Most tokens of a text; longer ones are cut and flagged. None takes what the model can take.
        token_budget: Most tokens of one batch.
        name: What to call it; the model's source if None.

    Raises:
        IncompatibleModelError: If the model cannot score a text, or has no such ``label``.
        RecipeError: If an argument has a wrong value.

    Example:
        >>> from lightning_interp.models.scoring.score_head import scoring_model
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> scorer = TextScorer(scoring_model(tiny_model("llama"), seed=0), byte_tokenizer(), max_length=64)
        >>> reward, truncated = scorer.scores(["2+2=", "2+2="], ["4", "five" * 20])
        >>> reward.shape, truncated.tolist()
        (torch.Size([2]), [False, True])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: int | str | None = None,
        chat: bool | None = None,
        system_prompt: str | None = None,
        add_eos: bool | None = None,
        max_length: int | None = None,
        token_budget: int = 8192,
        name: str | None = None,
    ) -> None:
        if token_budget < 1:
            raise RecipeError(f"A scorer cannot use token_budget={token_budget!r}: expected at least 1.")
        source = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        if needs_score_head(model):
            raise no_head(type(model).__name__, source)
        self.model = scoring_model(model, seed=0)
        given = (chat, system_prompt, add_eos, max_length, label)
        text = settle_text(dict(zip(TEXT_SETTINGS, given, strict=True)), {}, self.model, tokenizer, fresh=False)
        self.label = text.pop("label")
        self.encoder = RewardEncoder(tokenizer=tokenizer, **text)
        self.token_budget, self.name = token_budget, name or source

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = torch.float32,
        quantization: Quantization | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: torch.device | str | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load a reward model as a scorer.

        Args:
            source: A folder or Hugging Face id; see :func:`load_reward_model`.
            dtype: Type of the weights.
            quantization: Quantise the linear maps with bitsandbytes.
            revision: Branch, tag or commit of a Hugging Face id.
            trust_remote_code: Run Python code that comes with the model.
            device: Where it goes; left where it is loaded if None.
            name: What to call it; its label in tables if None.
            **settings: Further arguments of the class; what the folder says is taken where they are None.

        Returns:
            The scorer.

        Raises:
            IncompatibleModelError: If the source is a language model without a score head.
        """
        loaded = load_reward_model(
            source,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if loaded.fresh:
            raise no_head(type(loaded.model.base_model).__name__, os.fspath(source))
        known = {**loaded.text, **{key: value for key, value in settings.items() if value is not None}}
        model = loaded.model if device is None else loaded.model.to(device)
        return cls(model, loaded.tokenizer, name=name or loaded.label, **known)

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
            reward = score_rows(
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
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    fresh: bool,
) -> dict[str, Any]:
    """Settle how texts are written: as given, else as the model's folder says, else by what fits the model."""
    text = {name: saved.get(name) if value is None else value for name, value in given.items()}
    if tokenizer is not None:
        defaults = {
            "chat": bool(tokenizer.chat_template),
            "add_eos": fresh and tokenizer.eos_token_id is not None,
            "max_length": length_limit(model, tokenizer),
        }
        text |= {name: value for name, value in defaults.items() if text[name] is None}
    return {**text, "label": label_index(model, text["label"])}


def no_head(kind: str, source: str) -> IncompatibleModelError:
    """The error that a model has no trained score head."""
    return IncompatibleModelError(
        f"{kind} of {source!r} is a language model without a score head, so its scores would be random. Train one with "
        "RewardModel, or name a sequence classifier."
    )
