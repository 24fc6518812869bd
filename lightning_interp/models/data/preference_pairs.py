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

__all__ = ["Judged", "JudgedRow", "judged_batch", "judged_dataset", "read_judged"]

_PAIR, _POINT = ("prompt", "chosen", "rejected"), ("prompt", "response", "reward")
_EXPECTED = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} (with "margin": number, if you like) or '
    '{"prompt": ..., "response": ..., "reward": number}'
)


class JudgedRow(NamedTuple):
    """A checked row: two texts of which the first is preferred, or one text with a number."""

    where: str  # file and line, or name and index, for messages
    prompt: Any  # a user's message, or the turns of a conversation
    texts: tuple[str, ...]  # (chosen, rejected) or (response,)
    value: float  # the margin of a pair (0 if none is given), or the reward of a text


class Judged(NamedTuple):
    """The same with token ids; ``real`` is False for the filler of a validation share."""

    ids: tuple[list[int], ...]
    value: float
    real: bool = True


def read_judged(source: Any, *, name: str) -> list[JudgedRow]:
    """Read and check all rows of a source, which are all pairs or all rated texts."""
    rows = [_checked(row, where) for where, row in raw_rows(source, name=name, expected=_EXPECTED)]
    other = next((row for row in rows if len(row.texts) != len(rows[0].texts)), None)
    if other is not None:
        kinds = ["a rated text" if len(row.texts) == 1 else "a pair" for row in (other, rows[0])]
        raise DataError(
            f"{other.where}: this row is {kinds[0]}, but {rows[0].where} is {kinds[1]}. Keep each kind in a file of "
            "its own."
        )
    return rows


def _checked(row: Any, where: str) -> JudgedRow:
    pair = form_of(row, where, (_PAIR, _POINT), _EXPECTED) == _PAIR
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = turns_of(prompt, "prompt", where, expected=f"a string, or a list of {TURN}")
    keys = ("chosen", "rejected") if pair else ("response",)
    for key in keys:
        check_text(row[key], key, where, may_be_empty=False)
    number = "margin" if pair else "reward"
    value = row.get(number)
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {number!r} is {value!r:.80}; expected a finite number.")
    return JudgedRow(where, prompt, tuple(row[key] for key in keys), float(value))


def judged_dataset(rows: Iterable[Judged]) -> RowDataset:
    """Encoded rows in memory."""
    return RowDataset(rows, _not_real)


def _not_real(row: Judged) -> Judged:
    return row._replace(real=False)


def judged_batch(rows: Sequence[Judged], *, pad_id: int) -> dict[str, Tensor]:
    """Texts padded on the right, those of one place in the rows one after the other."""
    texts = [row.ids[place] for place in range(len(rows[0].ids)) for row in rows]
    ids, mask = padded(texts, pad_id)
    value = torch.tensor([row.value for row in rows], dtype=torch.float32)
    real = torch.tensor([row.real for row in rows])
    name = "margin" if len(rows[0].ids) == 2 else "reward"
    return {"input_ids": ids, "attention_mask": mask, name: value, "real": real}
