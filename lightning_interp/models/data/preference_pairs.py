"""Preferences and rated texts: rows, token ids in memory, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import DataError
from lightning_interp.models.data.rows import check_text, raw_rows

__all__ = ["Judged", "JudgedRow", "PairCollator", "PairDataset", "read_judged"]

_PAIR, _POINT = ("chosen", "rejected"), ("response", "reward")
_EXPECTED = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} (with "margin": number, if you like) or '
    '{"prompt": ..., "response": ..., "reward": number}'
)


class JudgedRow(NamedTuple):
    """A checked row: two texts of which the first is preferred, or one text with a number.

    Attributes:
        where: File and line, or name and index, for messages.
        prompt: A user's message, or the turns of a conversation.
        texts: ``(chosen, rejected)`` or ``(response,)``.
        value: The margin of a pair (0 if none is given), or the reward of a text.
    """

    where: str
    prompt: Any
    texts: tuple[str, ...]
    value: float


class Judged(NamedTuple):
    """The same with token ids; ``real`` is False for the filler of a validation share."""

    ids: tuple[list[int], ...]
    value: float
    real: bool = True


def read_judged(source: Any, *, name: str) -> list[JudgedRow]:
    """Read and check all rows of a source, which are all pairs or all rated texts.

    Raises:
        DataError: With file and line of the first row that is no such row, or of another form than the first.

    Example:
        >>> read_judged([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], name="train")
        [JudgedRow(where='train[0]', prompt='2+2=', texts=('4', '5'), value=0.0)]
    """
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
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__} {row!r:.80}. Write {_EXPECTED}.")
    present = {key for key, value in row.items() if value is not None}  # datasets fills absent columns with None
    forms = [form for form in (_PAIR, _POINT) if {"prompt", *form} <= present]
    if len(forms) != 1:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise DataError(f"{where}: the keys are {keys}; expected exactly one of {_EXPECTED}. Other keys are ignored.")
    prompt = _prompt(row["prompt"], where)
    if forms[0] == _PAIR:
        for key in _PAIR:
            check_text(row[key], key, where, may_be_empty=False)
        margin = row["margin"] if "margin" in present else 0.0
        return JudgedRow(where, prompt, (row["chosen"], row["rejected"]), _number(margin, "margin", where))
    check_text(row["response"], "response", where, may_be_empty=False)
    return JudgedRow(where, prompt, (row["response"],), _number(row["reward"], "reward", where))


def _prompt(prompt: Any, where: str) -> Any:
    if isinstance(prompt, str):
        return prompt
    turns = list(prompt) if isinstance(prompt, Sequence) else []
    if not turns or not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns):
        raise DataError(
            f"{where}: 'prompt' is {prompt!r:.80}; expected a string, or a list of {{'role': ..., 'content': ...}}."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value!r:.80}; expected a finite number.")
    return float(value)


class PairDataset(Dataset[Judged]):
    """Encoded rows in memory.

    A negative index ``~i`` gives row ``i`` as a filler: the one that makes validation shares equally long.
    """

    def __init__(self, rows: Sequence[Judged]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Judged:
        return self._rows[~index]._replace(real=False) if index < 0 else self._rows[index]

    def __iter__(self) -> Iterator[Judged]:
        return iter(self._rows)


@dataclass(frozen=True)
class PairCollator:
    """Pads texts on the right to the longest of a batch.

    Attributes:
        pad_id: The id of padding; what is padding is told by the mask alone.

    Example:
        >>> batch = PairCollator(0)([Judged(([5, 6], [7]), 0.5), Judged(([8], [9]), 0.0)])
        >>> batch["input_ids"].tolist(), batch["margin"].tolist()
        ([[5, 6], [8, 0], [7, 0], [9, 0]], [0.5, 0.0])
    """

    pad_id: int

    def __call__(self, rows: Sequence[Judged]) -> dict[str, Tensor]:
        """Make a batch."""
        texts = [row.ids[place] for place in range(len(rows[0].ids)) for row in rows]
        ids, mask = padded(texts, self.pad_id)
        value = torch.tensor([row.value for row in rows], dtype=torch.float32)
        real = torch.tensor([row.real for row in rows])
        name = "margin" if len(rows[0].ids) == 2 else "reward"
        return {"input_ids": ids, "attention_mask": mask, name: value, "real": real}
