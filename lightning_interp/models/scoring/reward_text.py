"""From prompts and texts to scores: one way of writing them, and batches that do not show in the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.core.storage.json_reading import half_character
from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models.data.encoding import Encoder

__all__ = [
    "ANY_TEXT",
    "EncodedText",
    "Label",
    "Prompt",
    "RewardEncoder",
    "RewardText",
    "Scores",
    "length_limit",
    "score_rows",
]

Prompt = str | Sequence[Mapping[str, str]]
"""What a text answers: a user's message, or the turns of a conversation that end with one."""


Label = int | str | Sequence[float] | Mapping[str, float]
"""Which output is the reward: its index or name; or a weight for each output, or for some of them by name."""


class EncodedText(NamedTuple):
    """Token ids of a prompt with its text, whether they were cut, and their token types where these are not all 0."""

    ids: list[int]
    truncated: bool
    types: Sequence[int] = ()


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
        label: Which output of a model with several is the reward, by index or name; or weights of the outputs, in
            their order or by name.
        chat: Write texts by the tokenizer's chat template; by default if it has one.
        system_prompt: System text for prompts without one; None keeps the template's own implicit text.
        add_eos: Whether a text ends with the end token without a chat template; by default if the score head is fresh,
            or what the trainer that left the folder does.
        pair: Prompt and text are a tokenizer's two segments, with its separator and token types between them, as
            encoders are trained; by default of those that say so.
        ends_before: A token that is taken off the end of texts, for a model that reads its score before it; by default
            the end token of a foreign model's folder, if that also pads: transformers' classes look behind no padding.
        eos_in_text: The end token stands in the text, before what the tokenizer puts behind it: one that ends texts
            itself ends them twice then, as in TRL's training; by default of such a folder of TRL.
        max_length: Most tokens of a text; by default what the model and tokenizer can take.
        token_budget: Most tokens of one batch when texts are scored.
        batch_size: Most texts of one batch. A score does not depend on the texts scored with it in float32; in a
            shorter type by rounding, but with 1.

    Raises:
        RecipeError: If ``token_budget`` or ``batch_size`` is below 1.
    """

    label: Label | None = None
    chat: bool | None = None
    system_prompt: str | None = None
    add_eos: bool | None = None
    pair: bool | None = None
    ends_before: int | None = None
    eos_in_text: bool | None = None
    max_length: int | None = None
    token_budget: int = 8192
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("token_budget", self.token_budget), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise RecipeError(f"A scorer cannot use {name}={value!r}: expected at least 1.")


ANY_TEXT = RewardText()


@dataclass(frozen=True, kw_only=True)
class RewardEncoder(Encoder):
    """Writes a prompt and a text as a reward model reads them, in training as in scoring.

    As a chat, they are a user's and an assistant's turn of the tokenizer's own template, which writes every special
    token itself. Otherwise the text follows the prompt directly (a space between them is yours to write), with the
    special tokens that the tokenizer puts around a text, and the end token if ``add_eos``; or the two are the
    tokenizer's segments, if ``pair``.

    Attributes:
        max_length: Most tokens of a text; longer ones are cut where the tokenizer's ``truncation_side`` says.
        pair: Whether prompt and text are two segments; None if nobody knows, and then only an empty prompt is taken.
        ends_before: A token that is taken off the end of texts.
        eos_in_text: Whether the end token stands before what the tokenizer itself puts behind a text.

    Raises:
        RecipeError: If ``max_length`` is below 1, or ``pair`` is asked for beside ``chat``.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> encoder = RewardEncoder(tokenizer=byte_tokenizer(), max_length=6)
        >>> [text[:2] for text in encoder.encode_texts(["2+2=", "2+"], ["four", "4"])]
        [([22, 15, 22, 33, 74, 2], True), ([22, 15, 24, 2], False)]
    """

    max_length: int | None = None
    pair: bool | None = False
    ends_before: int | None = None
    eos_in_text: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and self.pair:
            raise RecipeError("chat=True and pair=True: a text is written in one way or the other. Leave one out.")
        if self.max_length is not None and self.max_length < 1:
            raise RecipeError(f"Texts cannot be cut to max_length={self.max_length!r} tokens: expected at least 1.")

    def settings(self) -> dict[str, Any]:
        """How texts are written, as plain values: what two scorers must share to be the same scorer."""
        found = {name: getattr(self, name) for name in ("chat", "system_prompt", "add_eos", "max_length")}
        more = {"pair": self.pair or None, "ends_before": self.ends_before, "eos_in_text": self.eos_in_text or None}
        return found | {name: value for name, value in more.items() if value is not None}

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
        if self.pair is None and any(prompts):
            raise IncompatibleModelError(
                f"{self._name()} writes a prompt and its answer as one text or as two segments (with its separator "
                "between them), and nothing says which of the two the model was trained on. Say so: pair=True (two "
                "segments), or pair=False (the answer follows the prompt in one text); texts alone need no prompt."
            )
        pairs = zip(prompts, texts, strict=True)
        written = [self._written(prompt, text, index) for index, (prompt, text) in enumerate(pairs)]
        end = [] if self.chat else self._end("texts")
        room = None if self.max_length is None else max(1, self.max_length - len(end))
        found = []
        for text, (ids, types) in zip(written, self._ids(written), strict=True):
            if cut := room is not None and len(ids) > room:
                ids, types = self._ids([text], truncation=True, max_length=room)[0]
            at = len(ids) - (self._after if self.eos_in_text else 0)
            if end and ids[:at][-1:] != end:
                ids, types = [*ids[:at], *end, *ids[at:]], [*types[:at], *types[at - 1 :][:1], *types[at:]]
            while len(ids) > 1 and ids[-1] == self.ends_before:
                ids, types = ids[:-1], types[:-1]
            found.append(EncodedText(ids, cut, types if any(types) else ()))
        return found

    def _ids(self, written: Sequence[tuple[str, ...]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """Token ids and token types (none if the tokenizer has none)."""
        if not written:
            return []
        options |= {"add_special_tokens": not self.chat, "return_attention_mask": False, "verbose": False}
        found = self.tokenizer(*(list(part) for part in zip(*written, strict=True)), **options)
        return list(zip(found["input_ids"], found.get("token_type_ids") or [[] for _ in written], strict=True))

    def _written(self, prompt: Prompt, text: Any, index: int) -> tuple[str, ...]:
        """The text, or its two segments."""
        where = f"text {index}"
        if not isinstance(text, str):
            raise DataError(f"{where} is {text!r:.80}, a {type(text).__name__}; expected a string.")
        if half_character(text) or (isinstance(prompt, str) and half_character(prompt)):
            raise DataError(f"{where}, or its prompt, holds half of a character (a lone surrogate). Write it whole.")
        if self.chat:
            turns = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
            )
            if self.system_prompt is not None and turns[:1] and turns[0].get("role") != "system":
                turns = [{"role": "system", "content": self.system_prompt}, *turns]
            return (self._render([*turns, {"role": "assistant", "content": text}], where),)
        if not isinstance(prompt, str):
            raise DataError(
                f"The prompt of {where} is a {type(prompt).__name__} of turns, which only a chat template can write. "
                "Pass chat=True, or a string."
            )
        return (prompt, text) if self.pair else (prompt + text,)


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that a model and its tokenizer say they can take; None if neither says."""
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for part in model.modules():  # RoBERTa and its like begin to count behind the padding token
        if isinstance(part, nn.Embedding) and part.num_embeddings == positions and part.padding_idx is not None:
            positions -= part.padding_idx + 1
            break
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    return min((int(x) for x in limits if x is not None and 0 < x < 10**9), default=None)  # tokenizers say 10**30


def score_rows(
    forward: Callable[..., Tensor],
    rows: Sequence[EncodedText | Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
    token_budget: int,
    one_length: bool = False,
    batch_size: int | None = None,
) -> Tensor:
    """Score rows of token ids in batches of rows of like length; ``forward`` gets token types where rows have some.

    Equal rows are scored once, so they get the same score to the bit, however they are spread over batches.
    """
    texts = [row if isinstance(row, EncodedText) else EncodedText(list(row), False) for row in rows]
    if empty := [index for index, row in enumerate(texts) if not row.ids]:
        raise DataError(
            f"Text {empty[0]} has no token ({len(empty)} of {len(rows)} texts), so there is nothing to score. Leave it "
            "out, or use a chat template or an end token."
        )
    place: dict[tuple[Sequence[int], ...], int] = {}
    where = [place.setdefault((tuple(row.ids), tuple(row.types)), len(place)) for row in texts]
    unique = list(place)
    scores = torch.zeros(len(unique))
    for together in packed([len(ids) for ids, _ in unique], token_budget, one_length=one_length):
        size = batch_size or len(together)
        for batch in (together[start : start + size] for start in range(0, len(together), size)):
            ids, mask = padded([unique[index][0] for index in batch], pad_id)
            types = [unique[index][1] or (0,) * len(unique[index][0]) for index in batch]
            given = (ids, mask, padded(types)[0]) if any(map(any, types)) else (ids, mask)
            found = forward(*(one.to(device, non_blocking=True) for one in given))
            if found.shape != (len(batch),):
                raise DataError(
                    f"A scorer gave scores of shape {tuple(found.shape)} for {len(batch)} texts; expected one."
                )
            found = found.detach().cpu()
            if found.dtype == torch.float64:
                scores = scores.double()
            scores[batch] = found.to(scores.dtype)
    return scores[where]
