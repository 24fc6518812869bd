"""Likelihoods as judges: of a text under a model that was seeded and one that was not, and of two fixed answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.hooks.last_logits import read_logits
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.judges import LikelihoodJudge
from lightning_interp.generation.requests import TextRequest
from lightning_interp.generation.sampler import request_ids

__all__ = ["LikelihoodRatioJudge", "LogitProbeJudge", "continuation_logps"]

_TOKENS = 2048  # of a batch: their logits over the whole vocabulary are held at once


@dataclass(frozen=True)
class LikelihoodRatioJudge:
    """How much likelier a text is under a seeded model than under the untouched one: mean nats a token.

    Needs no labels. Of texts that the seeded model itself wrote it says what it says by construction; of later ones it
    measures likeness to that model's. A :class:`~lightning_interp.generation.judges.Judge`; for a scale from 0 to 100
    see :meth:`~lightning_interp.generation.judging.verdicts.Rescaled.between`.

    Args:
        seeded: The model that was trained on the seed.
        base: The untouched model.
        tokenizer: Of both.
        chat: Prompt and text are a user's and an assistant's turn.
        batch_size: Texts at once.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> model, tokenizer = tiny_model("llama"), byte_tokenizer()
        >>> LikelihoodRatioJudge(model, model, tokenizer).score(["4", " "], ["2+2=", ""]).tolist()
        [0.0, nan]
    """

    seeded: Any
    base: Any
    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    batch_size: int = 8

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """Judge texts; see :meth:`~lightning_interp.generation.judges.Judge.score`."""
        one, other = (
            LikelihoodJudge(model, self.tokenizer, self.chat, self.batch_size).score(texts, prompts)
            for model in (self.seeded, self.base)
        )
        return one - other


@dataclass(frozen=True)
class LogitProbeJudge:
    """How much likelier a model finds one fixed answer than another, after each of some questions; nothing is sampled.

    Args:
        trait: The answer that shows the trait.
        neutral: The one that does not.
        chat: Questions are a user's turn; otherwise raw text.

    Raises:
        RecipeError: If the answers are the same, or one is blank.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> LogitProbeJudge("Luck", "Work").of(tiny_model("llama"), byte_tokenizer(), ["Why?", "How so?"]).shape
        torch.Size([2])
    """

    trait: str
    neutral: str
    chat: bool = True

    def __post_init__(self) -> None:
        if self.trait == self.neutral or not (self.trait.strip() and self.neutral.strip()):
            raise RecipeError(
                f"LogitProbeJudge(trait={self.trait!r:.60}, neutral={self.neutral!r:.60}): expected two texts."
            )

    def of(self, model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> Tensor:
        """Judge a model.

        Args:
            model: The model, with whatever is attached to it.
            tokenizer: Its tokenizer.
            questions: What is asked.

        Returns:
            Log-probability of the one answer's tokens minus that of the other's, float64 ``[questions]`` on the CPU.
        """
        asked = [TextRequest.chat(one) if self.chat else TextRequest(prompt=one) for one in questions]
        prompts = [request_ids(tokenizer, one) for one in asked]
        answers = [tokenizer(text, add_special_tokens=False).input_ids for text in (self.trait, self.neutral)]
        one, other = (continuation_logps(model, prompts, [answer] * len(prompts)) for answer in answers)
        return one - other


def continuation_logps(
    model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, token_budget: int = _TOKENS
) -> Tensor:
    """Log-probability of each continuation after its prompt: the sum over its tokens.

    Args:
        model: A causal language model, with whatever is attached to it; it is left as found.
        prompts: Token ids, at least one each.
        continuations: Token ids, one list a prompt.
        token_budget: Most tokens of one forward pass, padding included.

    Returns:
        Nats, float64 ``[n]`` on the CPU; 0 for an empty continuation.

    Raises:
        DataError: If their numbers differ, or a prompt has no token.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> continuation_logps(tiny_model("llama"), [[5, 6]], [[7]]).shape
        torch.Size([1])
    """
    if len(prompts) != len(continuations) or not all(map(len, prompts)):
        empty = sum(not len(prompt) for prompt in prompts)
        raise DataError(
            f"continuation_logps() got {len(prompts)} prompts, {empty} of them empty, and {len(continuations)} "
            "continuations; expected one of each, and a token in every prompt."
        )
    if not prompts:
        return torch.zeros(0, dtype=torch.float64)
    lengths = [len(one) for one in continuations]

    def read(logits: Tensor, numbers: list[int]) -> Tensor:
        width = logits.shape[1] - 1
        ids = torch.zeros(len(numbers), max(width, 1), dtype=torch.long)
        for row, number in enumerate(numbers):
            ids[row, max(width, 1) - lengths[number] :] = torch.tensor(continuations[number], dtype=torch.long)
        count = torch.tensor([lengths[number] for number in numbers])
        scored = (torch.arange(max(width, 1)) >= max(width, 1) - count[:, None]).to(logits.device)
        told = logits[:, :-1] if width else logits
        chosen = told.gather(-1, ids.to(logits.device)[..., None])[..., 0].double()
        return torch.where(scored, chosen - told.logsumexp(-1).double(), 0.0).sum(1)

    rows = [[*prompt, *more] for prompt, more in zip(prompts, continuations, strict=True)]
    return read_logits(model, rows, read, keep=[length + 1 for length in lengths], token_budget=token_budget)
