"""Texts as vectors: mean last hidden states of a decoder or a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.fingerprint import weights_digest
from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.errors import DataError
from lightning_interp.models.scoring.reward_text import RewardEncoder, length_limit

__all__ = ["TextVectors"]


class TextVectors:
    """Mean last hidden state over the tokens of a text, special tokens included.

    Args:
        model: A model of transformers, decoder or encoder; a PEFT wrapper with its adapter as it is.
        tokenizer: Its tokenizer.
        token_budget: Most tokens of one batch.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> TextVectors(tiny_model("llama"), byte_tokenizer())(["A film.", "Oh"]).shape
        torch.Size([2, 32])
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, token_budget: int = 8192) -> None:
        self.model, self.token_budget = model, token_budget
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = inner.base_model
        longest = length_limit(inner, tokenizer)
        self._encoder = RewardEncoder(tokenizer=tokenizer, chat=False, add_eos=False, max_length=longest)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Read texts; what is longer than the model takes is cut.

        Args:
            texts: The texts.

        Returns:
            Float64 ``[n, d]`` on the CPU.

        Raises:
            DataError: If there is no text, or one without a token.
        """
        rows = [one.ids for one in self._encoder.encode_texts([""] * len(texts), texts)]
        if not all(rows) or not rows:
            raise DataError(
                f"TextVectors got {len(rows)} texts, {sum(not row for row in rows)} of them without a token."
            )
        found: dict[int, Tensor] = {}
        device = next(self.model.parameters()).device
        with undisturbed(self.model):
            for batch in packed([len(row) for row in rows], self.token_budget):
                ids, mask = (x.to(device) for x in padded([rows[i] for i in batch], self._encoder.pad_id))
                states = self._decoder(input_ids=ids, attention_mask=mask).last_hidden_state.double()
                means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                found |= zip(batch, means.cpu(), strict=True)
        return torch.stack([found[i] for i in range(len(rows))])

    def identity(self) -> dict[str, Any]:
        """A digest of the weights, as plain values."""
        return {"kind": "TextVectors", "weights": weights_digest(self.model)}
