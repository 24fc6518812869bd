"""From prompts and texts to scores: one way of writing them, and batches that do not show in the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.encoding import Encoder

__all__ = ["ANY_TEXT", "EncodedText", "Prompt", "RewardEncoder", "RewardText", "Scores", "length_limit", "score_rows"]

Prompt = str | Sequence[Mapping[str, str]]
"""What a text answers: a user's message, or the turns of a conversation that end with one."""


class EncodedText(NamedTuple):
    """Token ids of a prompt with its text, and whether they were cut to the greatest length."""

    ids: list[int]
    truncated: bool


class Scores(NamedTuple):
    """Rewards of ``n`` texts.

    Attributes:
        reward: Float tensor ``[n]`` on the CPU.
        truncated: Bool tensor ``[n]``: whether a text was longer than the scorer takes, and was cut.
    """

    reward: Tensor
    truncated: Tensor


@dataclass(frozen=True, kw_only=True)
class RewardText:
    """How a reward model reads texts; None takes what its folder says, else what fits the model.

    Attributes:
        label: Which output of a model with several is the reward, by index or name.
        chat: Write texts by the tokenizer's chat template; by default if it has one.
        system_prompt: System text for prompts without one; None keeps the template's own implicit text.
        add_eos: Whether a text ends with the end token without a chat template; by default if the score head is fresh.
        max_length: Most tokens of a text; by default what the model and tokenizer can take.
        token_budget: Most tokens of one batch when texts are scored.

    Raises:
        RecipeError: If ``token_budget`` is below 1.
    """

    label: int | str | None = None
    chat: bool | None = None
    system_prompt: str | None = None
    add_eos: bool | None = None
    max_length: int | None = None
    token_budget: int = 8192

    def __post_init__(self) -> None:
        if self.token_budget < 1:
            raise RecipeError(f"A scorer cannot use token_budget={self.token_budget!r}: expected at least 1.")


ANY_TEXT = RewardText()


@dataclass(frozen=True, kw_only=True)
class RewardEncoder(Encoder):
    """Writes a prompt and a text as a reward model reads them, in training as in scoring.

    As a chat, they are a user's and an assistant's turn of the tokenizer's own template, which writes every special
    token itself. Otherwise the text follows the prompt directly (a space between them is yours to write), with the
    special tokens that the tokenizer puts around a text, and the end token if ``add_eos``.

    Attributes:
        max_length: Most tokens of a text; longer ones are cut where the tokenizer's ``truncation_side`` says.

    Raises:
        RecipeError: If ``max_length`` is below 1.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> encoder = RewardEncoder(tokenizer=byte_tokenizer(), max_length=6)
        >>> encoder.encode_texts(["2+2=", "2+"], ["four", "4"])
        [EncodedText(ids=[22, 15, 22, 33, 74, 2], truncated=True), EncodedText(ids=[22, 15, 24, 2], truncated=False)]
    """

    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise RecipeError(f"Texts cannot be cut to max_length={self.max_length!r} tokens: expected at least 1.")

    def settings(self) -> dict[str, Any]:
        """How texts are written, as plain values: what two scorers must share to be the same scorer."""
        return {name: getattr(self, name) for name in ("chat", "system_prompt", "add_eos", "max_length")}

    @property
    def pad_id(self) -> int:
        """An id for padding; what is padding is told by the mask alone."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(index for index in ids if index is not None))

    def encode_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[EncodedText]:
        """Encode texts that answer prompts.

        Args:
            prompts: One a text.
            texts: The texts.

        Returns:
            Token ids of each, in order.

        Raises:
            DataError: If their numbers differ, one is no text, or the template refuses one.
        """
        if len(prompts) != len(texts):
            raise DataError(f"There are {len(prompts)} prompts for {len(texts)} texts; expected one prompt a text.")
        pairs = zip(prompts, texts, strict=True)
        written = [self._written(prompt, text, index) for index, (prompt, text) in enumerate(pairs)]
        end = [] if self.chat else self._end("texts")
        room = None if self.max_length is None else max(1, self.max_length - len(end))
        found = []
        for text, ids in zip(written, self._ids(written), strict=True):
            if cut := room is not None and len(ids) > room:
                ids = self._ids([text], truncation=True, max_length=room)[0]
            found.append(EncodedText(ids if ids[-1:] == end else ids + end, cut))
        return found

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        options |= {"add_special_tokens": not self.chat, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
        return ids

    def _written(self, prompt: Prompt, text: Any, index: int) -> str:
        where = f"text {index}"
        if not isinstance(text, str):
            raise DataError(f"{where} is {text!r:.80}, a {type(text).__name__}; expected a string.")
        if self.chat:
            turns = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
            )
            if self.system_prompt is not None and turns[:1] and turns[0].get("role") != "system":
                turns = [{"role": "system", "content": self.system_prompt}, *turns]
            return self._render([*turns, {"role": "assistant", "content": text}], where)
        if not isinstance(prompt, str):
            raise DataError(
                f"The prompt of {where} is a {type(prompt).__name__} of turns, which only a chat template can write. "
                "Pass chat=True, or a string."
            )
        return prompt + text


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that a model and its tokenizer say they can take; None if neither says."""
    config: Any = model.config.get_text_config()
    limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    return min((int(x) for x in limits if x is not None and 0 < x < 10**9), default=None)  # tokenizers say 10**30


def score_rows(
    forward: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
    token_budget: int,
    one_length: bool = False,
) -> Tensor:
    """Score rows of token ids in batches of rows of like length.

    Equal rows are scored once, so they get the same score to the bit, however they are spread over batches.
    """
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise DataError(
            f"Text {empty[0]} has no token ({len(empty)} of {len(rows)} texts), so there is nothing to score. Leave it "
            "out, or use a chat template or an end token."
        )
    place: dict[tuple[int, ...], int] = {}
    where = [place.setdefault(tuple(row), len(place)) for row in rows]
    unique = list(place)
    scores = torch.zeros(len(unique))
    for batch in packed([len(row) for row in unique], token_budget, one_length=one_length):
        ids, mask = padded([unique[index] for index in batch], pad_id)
        found = forward(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True))
        if found.shape != (len(batch),):
            raise DataError(f"A scorer gave scores of shape {tuple(found.shape)} for {len(batch)} texts; expected one.")
        found = found.detach().cpu()
        if found.dtype == torch.float64:
            scores = scores.double()
        scores[batch] = found.to(scores.dtype)
    return scores[where]
