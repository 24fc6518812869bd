"""From a row of text to token ids and labels, with exact boundaries between prompt and completion.

A prompt gets exactly the ids that it has alone: those that a model sees when it is asked. Where the ids of prompt and
completion together begin with the prompt's ids, they are used as they are. Where a token would straddle the boundary
(a prompt that ends in the middle of a word), the parts are tokenised one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import DataError
from lightning_interp.models.data.rows import Row

__all__ = ["EncodedRow", "Encoder"]


class EncodedRow(NamedTuple):
    """Token ids of a row."""

    ids: list[int]
    scored: list[bool]  # whether each token is part of the loss
    split: bool  # whether the parts were tokenised one by one because a token would straddle their boundary


class _Part(NamedTuple):
    text: str
    scored: bool


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns rows into token ids and labels.

    Conversations go through the tokenizer's own chat template. Only the assistant's turns are scored: what the model
    would write after the template's generation prompt, with the token that ends the turn.

    Attributes:
        tokenizer: The tokenizer.
        chat: Whether prompt and completion become a user's and an assistant's turn.
        system_prompt: System text of conversations without one; None keeps the template's own, ``""`` has an empty one.
        add_eos: Whether texts and completions end with the end token (conversations end as the template says).
        vocabulary: Number of tokens that the model has, of which the ids of a row are some; the tokenizer's if None.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    system_prompt: str | None = None
    add_eos: bool = True
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.chat:
            self._needs_template("chat=True")
        if self.system_prompt is not None:
            self._needs_template(f"system_prompt={self.system_prompt!r}")

    def encode(self, row: Row) -> EncodedRow:
        """Encode one row; a DataError names its file and line."""
        content = row.content
        if row.form == "messages":
            return self._conversation(content["messages"], row.where)
        if row.form == "ids":
            return self._as_given(row)
        if row.form == "prompt" and self.chat:
            roles = {"user": content["prompt"], "assistant": content["completion"]}
            return self._conversation([{"role": role, "content": text} for role, text in roles.items()], row.where)
        if row.form == "prompt":
            parts = [_Part(content["prompt"], False), _Part(content["completion"], True)]
        else:
            parts = [_Part(content["text"], True)]
        ids, scored, split = self._join(parts)
        begin, end = self._begin, self._end(row.where)
        if end and ids[-1:] == end:
            end = []
        scored_begin = [row.form == "text"] * len(begin)
        return EncodedRow(begin + ids + end, scored_begin + scored + [True] * len(end), split)

    def _as_given(self, row: Row) -> EncodedRow:
        """Ids of a row that has them already: none is put before, between or behind them."""
        prompt, completion = row.content["prompt_ids"], row.content["completion_ids"]
        known, largest = self.vocabulary or len(self.tokenizer), max(prompt + completion)
        if largest >= known:
            raise DataError(
                f"{row.where}: the token id {largest} is none of the {known} known ones (0 to {known - 1}). Was the "
                "row written with another tokenizer?"
            )
        return EncodedRow(prompt + completion, [False] * len(prompt) + [True] * len(completion), False)

    def _join(self, parts: Sequence[_Part]) -> EncodedRow:
        """Tokenise the parts together, or one by one where a token would straddle a boundary."""
        full = "".join(part.text for part in parts)
        whole, text, scored = self._bare(full), "", list[bool]()
        for part in parts:
            text += part.text
            ids = whole if text == full else self._bare(text)
            if whole[: len(ids)] != ids:
                break
            scored += [part.scored] * (len(ids) - len(scored))
        else:
            return EncodedRow(whole, scored, False)
        pieces = [(self._bare(part.text), part.scored) for part in parts]
        ids = [index for piece, _ in pieces for index in piece]
        return EncodedRow(ids, [scored for piece, scored in pieces for _ in piece], True)

    def _conversation(self, turns: list[dict[str, str]], where: str) -> EncodedRow:
        self._needs_template(f"{where}: 'messages'")
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        whole, parts, done = self._render(turns, where), list[_Part](), 0  # nothing follows the last scored part
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(turns[:index], where, ask=True)
            after = self._render(turns[: index + 1], where)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise DataError(
                    f"{where}: the chat template of {self._name()} does not keep the text before messages[{index}] as "
                    "it is, so the assistant's part cannot be told apart. Split the conversation there, or use another "
                    "template."
                )
            end = len(before) + len(self._turn(after[len(before) :]))
            parts += [_Part(whole[done : len(before)], False), _Part(whole[len(before) : end], True)]
            done = end
        return self._join([part for part in parts if part.text])

    def _turn(self, written: str) -> str:
        """An assistant's turn without the white space that a template puts behind its end token."""
        stripped = written.rstrip()
        ends = tuple(token for token in self.tokenizer.all_special_tokens if token)
        return stripped if stripped.endswith(ends) else written

    def _render(self, turns: list[dict[str, str]], where: str, *, ask: bool = False) -> str:
        if not turns and not ask:
            return ""
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # templates are programs: they raise what they like
            raise DataError(
                f"{where}: the chat template of {self._name()} refuses the conversation ({error}). "
                "Check its roles and their order."
            ) from error

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text by itself, such as a begin token."""
        bare, full = self._bare("a"), self.tokenizer("a").input_ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []

    @cached_property
    def _after(self) -> int:
        """How many tokens the tokenizer puts behind a text by itself."""
        return len(self.tokenizer("a").input_ids) - len(self._begin) - len(self._bare("a"))

    def _end(self, where: str) -> list[int]:
        if not self.add_eos:
            return []
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: {self._name()} has no end token to put behind a completion. Set tokenizer.eos_token, or "
                "pass add_eos=False."
            )
        return [self.tokenizer.eos_token_id]

    def _name(self) -> Any:
        return self.tokenizer.name_or_path or type(self.tokenizer).__name__

    def _needs_template(self, what: str) -> None:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{what} needs a chat template, and {self._name()} has none. Use an instruction-tuned model's "
                "tokenizer, or set tokenizer.chat_template."
            )
