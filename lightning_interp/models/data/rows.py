"""Rows of text from files, lists and ``datasets``, checked one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_interp.core.storage.json_reading import check_characters
from lightning_interp.core.storage.row_files import FORMS, file_rows
from lightning_interp.errors import DataError

__all__ = ["Row", "check_text", "form_of", "raw_rows", "read_rows", "token_ids", "turns_of"]

_IDS = ("prompt_ids", "completion_ids")
_FORMS = (("text",), ("prompt", "completion"), ("messages",), _IDS)
_EXPECTED = (
    '{"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]} or '
    '{"prompt_ids": [...], "completion_ids": [...]}'
)
TURN = "{'role': ..., 'content': ...}"


class Row(NamedTuple):
    """A checked row."""

    where: str  # file and line, or name and index, for messages
    form: str  # "text", "prompt", "messages" or "ids"
    content: dict[str, Any]  # the row's fields of that form


def read_rows(source: Any, *, name: str) -> list[Row]:
    """Read and check all rows of a source (see :func:`raw_rows`)."""
    return [_checked(row, where) for where, row in raw_rows(source, name=name, expected=_EXPECTED)]


def raw_rows(source: Any, *, name: str, expected: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, a folder of ``save_to_disk``, a list or a ``Dataset``, each with its place.

    A place is file and line, or ``name`` and index. A source that holds no row is refused.
    """
    empty = True
    for where, row in _raw(source, name, expected):
        empty = False
        yield where, row
    if empty:
        where = str(source) if isinstance(source, str | os.PathLike) else name
        raise DataError(f"{where} holds no rows. Expected one object a row: {expected}.")


def _raw(source: Any, name: str, expected: str) -> Iterator[tuple[str, Any]]:
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _raw(_from_folder(path), str(path), expected)
        else:
            yield from file_rows(path, expected=f"one object a row: {expected}", numbers=("margin", "reward"))
    elif isinstance(source, Sequence) or (hasattr(source, "__getitem__") and hasattr(source, "column_names")):
        if isinstance(getattr(source, "column_names", None), Mapping):
            raise DataError(
                f"{name} is a dictionary of datasets with the splits {', '.join(source)}. Give one of them."
            )
        for index, row in enumerate(source):
            where = f"{name}[{index}]"
            try:
                check_characters(row)
            except ValueError as error:
                raise DataError(f"{where}: {error}. Remove it, or write the whole character.") from error
            yield where, row
    else:
        raise DataError(
            f"{name} is a {type(source).__name__}: expected the path of a file ({FORMS}), a list of dicts or a "
            "datasets.Dataset."
        )


def _from_folder(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{path} is a folder, but no dataset written by save_to_disk ({error}). Give a JSONL file."
        ) from error


def form_of(
    row: Any, where: str, forms: Sequence[tuple[str, ...]], expected: str, *, alone: bool = False
) -> tuple[str, ...]:
    """The one form whose keys a row has; with ``alone``, no key of another form may be beside them."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__} {row!r:.80}. Write {expected}.")
    present = {key for key, value in row.items() if value is not None}  # datasets fills absent columns with None
    found = [form for form in forms if (present & set(form) if alone else present >= set(form))]
    if len(found) != 1 or not present >= set(found[0]):
        keys = ", ".join(repr(key) for key in row) or "none"
        raise DataError(f"{where}: the keys are {keys}; expected exactly one of {expected}. Other keys are ignored.")
    return found[0]


def _checked(row: Any, where: str) -> Row:
    form = form_of(row, where, _FORMS, _EXPECTED, alone=True)
    if form == ("messages",):
        return Row(where, "messages", {"messages": _messages(row["messages"], where)})
    if form == _IDS:
        return Row(where, "ids", {key: token_ids(row[key], key, where) for key in _IDS})
    for key in form:
        check_text(row[key], key, where, may_be_empty=key == "prompt")
    return Row(where, form[0], {key: row[key] for key in form})


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    turns = turns_of(messages, "messages", where, expected=f"a list of {TURN}")
    for index, turn in enumerate(turns):
        check_text(turn["role"], f"messages[{index}].role", where, may_be_empty=False)
        may_be_empty = turn["role"] != "assistant"
        check_text(turn["content"], f"messages[{index}].content", where, may_be_empty=may_be_empty)
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise DataError(
            f"{where}: no turn has the role 'assistant' (the roles are {', '.join(roles)}), so there is nothing to "
            "learn."
        )
    return turns


def token_ids(value: Any, key: str, where: str) -> list[int]:
    """Refuse a value that is no list of token ids; a prompt alone may be empty."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: {key!r} is {value!r:.80}, a {type(value).__name__}; expected a list of token ids.")
    for index, one in enumerate(value):
        if type(one) is not int or one < 0:  # a bool is an int, too
            raise DataError(
                f"{where}: {key}[{index}] is {one!r:.80}; expected a token id, a whole number of at least 0."
            )
    if not value and key != "prompt_ids":
        raise DataError(f"{where}: {key!r} is empty, so there is nothing to learn. Remove the row or fill it in.")
    return list(value)


def turns_of(value: Any, key: str, where: str, *, expected: str) -> list[dict[str, Any]]:
    """The turns of a conversation, with role and content alone."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: {key!r} is {value!r:.80}; expected {expected}.")
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where}: {key}[{index}] is {turn!r:.80}; expected an object with 'role' and 'content'.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def check_text(value: Any, key: str, where: str, *, may_be_empty: bool) -> None:
    """Refuse a value that is no text."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {value!r:.80}, a {type(value).__name__}; expected a string.")
    if not value and not may_be_empty:
        raise DataError(f"{where}: {key!r} is empty, so there is nothing to learn. Remove the row or fill it in.")
