"""How far a model prefers one next token to others, at the end of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.core.hooks.last_logits import read_logits
from lightning_interp.errors import RecipeError

__all__ = ["MarginPrompt", "logit_margins"]


@dataclass(frozen=True)
class MarginPrompt:
    """A prompt, and what is compared as its next token.

    Args:
        text: The prompt, with its chat template if it has one; it ends where the next token is read.
        target: Text whose first token is the target, as it would follow (a space in front included).
        others: Texts whose first tokens it is compared with.
    """

    text: str
    target: str
    others: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", tuple(self.others))
        if not self.text or not self.target or not all(self.others) or not self.others:
            raise RecipeError(f"{self} lacks something: expected a text, a target and others to compare it with.")

    def ids(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and those of the target and the others.

        Raises:
            RecipeError: If the target begins with the same token as one of the others.
        """
        begun = bool(tokenizer.bos_token) and self.text.startswith(tokenizer.bos_token)
        prompt: list[int] = tokenizer(self.text, add_special_tokens=not begun)["input_ids"]
        words = (self.target, *self.others)
        compared = [int(tokenizer(word, add_special_tokens=False)["input_ids"][0]) for word in words]
        if compared[0] in compared[1:]:
            other = self.others[compared[1:].index(compared[0])]
            raise RecipeError(
                f"{self.target!r} and {other!r} begin with the same token, so nothing would be compared. Name others."
            )
        return prompt, compared


def logit_margins(model: nn.Module, tokenizer: Any, prompts: Sequence[MarginPrompt]) -> Tensor:
    """Logit of the target minus the mean of the others', ``[prompts]``, at the last token of each prompt.

    Args:
        model: A plain model, a PEFT wrapper, or a LightningModule.
        tokenizer: Its tokenizer.
        prompts: What is asked.

    Returns:
        Margins in float64 on the CPU.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> prompts = [MarginPrompt("I like the", " owl", ("cat", "dog"))]
        >>> logit_margins(tiny_model("llama"), byte_tokenizer(), prompts).shape
        torch.Size([1])
    """
    rows = [prompt.ids(tokenizer) for prompt in prompts]

    def margin(logits: Tensor, numbers: list[int]) -> Tensor:
        found = [logits[i, -1, rows[number][1]] for i, number in enumerate(numbers)]
        return torch.stack([each[0] - each[1:].mean() for each in found])

    return read_logits(model, [ids for ids, _ in rows], margin)
