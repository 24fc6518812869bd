"""Rows of text from JSONL files, lists and ``datasets``, checked one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_interp.core.storage.jsonl import json_lines
from lightning_interp.errors import DataError

__all__ = ["Row", "check_text", "raw_rows", "read_rows"]

_FORMS = (("text",), ("prompt", "completion"), ("messages",))
_EXPECTED = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'


class Row(NamedTuple):
    """A checked row.

    Attributes:
        where: File and line, or name and index, for messages.
        form: ``"text"``, ``"prompt"`` or ``"messages"``.
        content: The row's fields of that form.
    """

    where: str
    form: str
    content: dict[str, Any]


def read_rows(source: Any, *, name: str) -> list[Row]:
    """Read and check all rows of a source.

    Args:
        source: A JSONL file, a folder of ``datasets``' ``save_to_disk``, a list of dicts, or a ``datasets.Dataset``.
        name: What to call a source without a file, for messages.

    Raises:
        DataError: With file and line of the first row that is no such row, or if there is none.

    Example:
        >>> read_rows([{"prompt": "2+2=", "completion": "4", "id": 7}], name="train")
        [Row(where='train[0]', form='prompt', content={'prompt': '2+2=', 'completion': '4'})]
    """
    return [_checked(row, where) for where, row in raw_rows(source, name=name, expected=_EXPECTED)]


def raw_rows(source: Any, *, name: str, expected: str) -> Iterator[tuple[str, Any]]:
    """Read the rows of a source as they are.

    Yields:
        File and line (or name and index), and the row.

    Raises:
        DataError: If the source cannot be read or holds no row; with file and line of the first that is no JSON.
    """
    empty = True
    for where, row in _raw(source, name, expected):
        empty = False
        yield where, row
    if empty:
        where = str(source) if isinstance(source, str | os.PathLike) else name
        raise DataError(f"{where} holds no rows. Expected one JSON object a line: {expected}.")


def _raw(source: Any, name: str, expected: str) -> Iterator[tuple[str, Any]]:
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _from_folder(path, expected)
        else:
            yield from json_lines(path, expected=f"one object a line: {expected}")
    elif isinstance(source, Sequence) or (hasattr(source, "__getitem__") and hasattr(source, "column_names")):
        if isinstance(getattr(source, "column_names", None), Mapping):
            raise DataError(
                f"{name} is a dictionary of datasets with the splits {', '.join(source)}. Give one of them."
            )
        for index, row in enumerate(source):
            yield f"{name}[{index}]", row
    else:
        raise DataError(
            f"{name} is a {type(source).__name__}: expected the path of a JSONL file, a list of dicts or a "
            "datasets.Dataset."
        )


def _from_folder(path: Path, expected: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{path} is a folder, but no dataset written by save_to_disk ({error}). Give a JSONL file."
        ) from error
    yield from _raw(dataset, str(path), expected)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__} {row!r:.80}. Write {_EXPECTED}.")
    present = {key for key, value in row.items() if value is not None}  # datasets fills absent columns with None
    forms = [form for form in _FORMS if present & set(form)]
    if len(forms) != 1 or not set(forms[0]) <= present:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise DataError(f"{where}: the keys are {keys}; expected exactly one of {_EXPECTED}. Other keys are ignored.")
    form = forms[0]
    content = {key: row[key] for key in form}
    if form == ("messages",):
        content = {"messages": _messages(row["messages"], where)}
    else:
        for key, value in content.items():
            check_text(value, key, where, may_be_empty=key == "prompt")
    return Row(where, form[0], content)


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: 'messages' is {messages!r:.80}; expected a list of {{'role': ..., 'content': ...}}.")
    turns = []
    for index, turn in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where}: {name} is {turn!r:.80}; expected an object with 'role' and 'content'.")
        check_text(turn["role"], f"{name}.role", where, may_be_empty=False)
        check_text(turn["content"], f"{name}.content", where, may_be_empty=turn["role"] != "assistant")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if not any(turn["role"] == "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{where}: no turn has the role 'assistant' (the roles are {roles}), so there is nothing to learn."
        )
    return turns


def check_text(value: Any, key: str, where: str, *, may_be_empty: bool) -> None:
    """Refuse a value that is no text."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {value!r:.80}, a {type(value).__name__}; expected a string.")
    if not value and not may_be_empty:
        raise DataError(f"{where}: {key!r} is empty, so there is nothing to learn. Remove the row or fill it in.")
