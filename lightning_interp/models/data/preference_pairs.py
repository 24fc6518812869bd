"""Preferences and rated texts: checked rows, token ids in memory, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import DataError
from lightning_interp.models.data.batching import RowDataset
from lightning_interp.models.data.rows import TURN, check_text, form_of, raw_rows, turns_of

__all__ = ["Judged", "JudgedRow", "judged_batch", "judged_dataset", "judged_row", "read_judged"]

_PAIR, _POINT = ("chosen", "rejected"), ("response", "reward")
_EXPECTED = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} (with "margin": number, if you like) or '
    '{"prompt": ..., "response": ..., "reward": number}; without a prompt if the sides are whole conversations'
)


class JudgedRow(NamedTuple):
    """A checked row: two texts of which the first is preferred, or one text with a number."""

    where: str  # file and line, or name and index, for messages
    prompts: tuple[Any, ...]  # of each text: a user's message, or the turns of a conversation
    texts: tuple[str, ...]  # (chosen, rejected) or (response,)
    value: float  # the margin of a pair (0 if none is given), or the reward of a text


class Judged(NamedTuple):
    """The same with token ids; ``real`` is False for the filler of a validation share."""

    ids: tuple[list[int], ...]
    value: float
    real: bool = True
    types: tuple[Sequence[int], ...] = ()  # token types, where they are not all 0


def read_judged(source: Any, *, name: str) -> list[JudgedRow]:
    """Read and check all rows of a source, which are all pairs or all rated texts."""
    rows = [judged_row(row, where) for where, row in raw_rows(source, name=name, expected=_EXPECTED)]
    other = next((row for row in rows if len(row.texts) != len(rows[0].texts)), None)
    if other is not None:
        kinds = ["a rated text" if len(row.texts) == 1 else "a pair" for row in (other, rows[0])]
        raise DataError(
            f"{other.where}: this row is {kinds[0]}, but {rows[0].where} is {kinds[1]}. Keep each kind in a file of "
            "its own."
        )
    return rows


def judged_row(row: Any, where: str) -> JudgedRow:
    """Check one row."""
    pair = form_of(row, where, (_PAIR, _POINT), _EXPECTED) == _PAIR
    keys = ("chosen", "rejected") if pair else ("response",)
    prompts, texts = zip(*(_side(row.get("prompt"), row[key], key, where) for key in keys), strict=True)
    number = "margin" if pair else "reward"
    value = row.get(number)
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {number!r} is {value!r:.80}; expected a finite number.")
    return JudgedRow(where, prompts, texts, float(value))


def _side(prompt: Any, side: Any, key: str, where: str) -> tuple[Any, str]:
    """What a text answers, and the text; a side that is a list of messages ends with it, and may hold the prompt."""
    turns = None
    if prompt is not None and not isinstance(prompt, str):
        prompt = turns_of(prompt, "prompt", where, expected=f"a string, or a list of {TURN}")
    if isinstance(side, Sequence) and not isinstance(side, str):
        turns = turns_of(side, key, where, expected=f"a string, or a list of {TURN}")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        begun = turns[0]["role"] != "assistant"  # then the prompt is in it
        if begun and not all(turn in turns for turn in asked):
            raise DataError(
                f"{where}: {key!r} begins a conversation that does not hold 'prompt' ({asked[-1]['content']!r:.60}). "
                "Write the prompt beside the assistant's turn alone, or leave 'prompt' out."
            )
        turns = turns if begun else asked + turns
        roles = [turn["role"] for turn in turns]
        if roles[-1] != "assistant" or len(roles) < 2:
            raise DataError(
                f"{where}: the turns of {key!r}, with its prompt, are those of {', '.join(map(str, roles))}; expected "
                "some that end with the assistant's, behind what it answers."
            )
        for index, turn in enumerate(turns):
            check_text(turn["content"], f"{key}[{index}].content", where, may_be_empty=True)
        prompt, side = turns[:-1], turns[-1]["content"]
        if len(prompt) == 1 and prompt[0]["role"] == "user":
            prompt = prompt[0]["content"]  # written like a row whose prompt is that text
    check_text(side, key, where, may_be_empty=False)
    if prompt is None:
        raise DataError(
            f"{where}: there is no 'prompt', and {key!r} is a text. Write the prompt beside it (an empty one, if it is "
            "a whole dialogue as plain text), or the sides as lists of messages."
        )
    return prompt, side


def judged_dataset(rows: Iterable[Judged]) -> RowDataset:
    """Encoded rows in memory."""
    return RowDataset(rows, _not_real)


def _not_real(row: Judged) -> Judged:
    return row._replace(real=False)


def judged_batch(rows: Sequence[Judged], *, pad_id: int) -> dict[str, Tensor]:
    """Texts padded on the right, those of one place in the rows one after the other."""
    texts = [row.ids[place] for place in range(len(rows[0].ids)) for row in rows]
    ids, mask = padded(texts, pad_id)
    types = [list(row.types[place]) if row.types else [] for place in range(len(rows[0].ids)) for row in rows]
    more = {"token_type_ids": padded(types)[0]} if any(types) else {}
    value = torch.tensor([row.value for row in rows], dtype=torch.float32)
    real = torch.tensor([row.real for row in rows])
    name = "margin" if len(rows[0].ids) == 2 else "reward"
    return {"input_ids": ids, "attention_mask": mask, name: value, "real": real} | more
