"""What a rewrite store holds: units, the rewrites that they need, their records, and the keys that find them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from lightning_interp.core.storage.json_reading import half_character
from lightning_interp.errors import DataError
from lightning_interp.generation.answers import without_reasoning
from lightning_interp.generation.requests import HALF

if TYPE_CHECKING:
    from lightning_interp.generation.requests import Completion

__all__ = [
    "FORMAT",
    "Request",
    "RewriteRecord",
    "RewriteResult",
    "RewriterId",
    "Status",
    "Unit",
    "as_result",
    "chain",
    "check_units",
    "rewrite_key",
    "shown_ids",
    "text_sha",
]

FORMAT = 1
Status = Literal["ok", "empty", "refused", "error", "truncated"]
_STATUS: dict[str, Status] = {"complete": "ok", "failed": "error"}
_SHOWN = 10  # ids that a message lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One text that is to be rewritten: a response to a prompt, with the value of the attribute.

    Args:
        id: Name of the unit; no other unit of the attribute has it.
        text: The original response.
        w: 1 if the text has the attribute, 0 if not, None if nobody knows.
        prompt: What the text answers; the reward model sees it too.
        cluster: What units that are not independent share, such as the id of their prompt.

    Raises:
        DataError: If a value is of the wrong type, or ``w`` is not 0, 1 or None.

    Example:
        >>> Unit(id="r1", text="A fine film.", w=True).w
        1
    """

    id: str
    text: str
    w: int | None
    prompt: str = ""
    cluster: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("text", self.text), ("prompt", self.prompt)):
            if not isinstance(value, str):
                raise DataError(f"Unit {self.id!r}: {name} is {value!r:.80}; expected a string.")
        if self.cluster is not None and not isinstance(self.cluster, str):
            raise DataError(f"Unit {self.id!r}: cluster is {self.cluster!r:.80}; expected a string or None.")
        object.__setattr__(self, "w", _label(self.w, self.id))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is written; a unit without a cluster has no such key."""
        row = {"id": self.id, "prompt": self.prompt, "text": self.text, "w": self.w}
        return row if self.cluster is None else {**row, "cluster": self.cluster}


@dataclass(frozen=True, kw_only=True, slots=True)
class RewriteResult:
    """What a rewriter gave back for one text.

    Args:
        text: The rewrite; None if there is none.
        status: ``"ok"``; or why it cannot be used. A text that is blank becomes ``"empty"`` by itself, and one with
            half a character ``"truncated"``.
        error: What went wrong.
        tokens_in, tokens_out: Tokens read and written, if known.

    Raises:
        DataError: If the status is unknown, or ``"ok"`` comes without a text.

    Example:
        >>> RewriteResult(text="  ").status
        'empty'
    """

    text: str | None
    status: Status = "ok"
    error: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise DataError(f"A rewrite has the status {self.status!r}; expected one of {', '.join(get_args(Status))}.")
        if self.text is not None and not isinstance(self.text, str):
            raise DataError(f"A rewrite is {self.text!r:.80}, a {type(self.text).__name__}; expected a string or None.")
        if self.status == "ok" and self.text is None:
            raise DataError("A rewrite with the status 'ok' has text None. Give its text, or the status 'error'.")
        if self.status == "ok" and self.text is not None and not self.text.strip():
            object.__setattr__(self, "status", "empty")
        if self.status == "ok" and half_character(self.text or ""):
            object.__setattr__(self, "status", "truncated")
            object.__setattr__(self, "error", HALF)

    @property
    def failed(self) -> bool:
        """Whether there was no answer, so that it is asked for again."""
        return self.status == "error"


def as_result(completion: Completion) -> RewriteResult:
    """What a writer gave, as a rewrite: without reasoning and white space around it, ``empty`` if nothing is left."""
    same: dict[str, Any] = {name: getattr(completion, name) for name in ("error", "tokens_in", "tokens_out")}
    status = _STATUS.get(completion.status, completion.status)
    text = completion.text and without_reasoning(completion.text)
    if status == "ok" and text is None:
        status, same["error"] = "truncated", "ended inside its reasoning"
    return RewriteResult(text=text and text.strip(), status=status, **same)  # type: ignore[arg-type]


class RewriterId(NamedTuple):
    """Who wrote, with digests of its settings and its instruction: texts of two such are never mixed."""

    rewriter: str
    params_sha: str
    instruction_sha: str

    def __str__(self) -> str:
        return f"{self.rewriter} (settings {self.params_sha[:8]}, instruction {self.instruction_sha[:8]})"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewriteRecord:
    """One line of ``rewrites.jsonl``.

    ``id`` is the first unit that asked for it: units with the same content share a record. ``number`` is that of the
    pass (1 rewrites the original, 2 that text, 3 that one), digests are those of the source and the unit's prompt, and
    ``time`` is when it was written, ISO 8601.
    """

    id: str
    attr: str
    number: int
    draw: int
    w_target: int
    src_sha: str
    prompt_sha: str
    by: RewriterId
    result: RewriteResult
    flags: tuple[str, ...] = ()
    time: str = ""

    @property
    def key(self) -> str:
        """By which it is found again."""
        return rewrite_key(self.attr, self.w_target, self.src_sha, self.prompt_sha, self.draw, self.by)

    @property
    def usable(self) -> bool:
        """Whether the text may be scored and rewritten again."""
        return self.result.status == "ok"

    @property
    def told(self) -> tuple[str | None, str] | None:
        """Text and status; None of a record that another one replaces."""
        return (self.result.text, self.result.status) if self.usable else None

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return f"unit {self.id!r}, pass {self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is written."""
        one = self.result
        asked = {"id": self.id, "attr": self.attr, "pass": self.number, "draw": self.draw, "w_target": self.w_target}
        digests = {"src_sha": self.src_sha, "prompt_sha": self.prompt_sha}
        answer = {"text": one.text, "status": one.status, "error": one.error}
        tokens = {"tokens_in": one.tokens_in, "tokens_out": one.tokens_out}
        last = {"flags": list(self.flags), "t": self.time}
        return {"v": FORMAT, **asked, **digests, **answer, **self.by._asdict(), **tokens, **last}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], where: str) -> RewriteRecord:
        """Read a line back; messages begin with ``where``."""
        if not isinstance(row, Mapping) or row.get("v") != FORMAT:
            found = row.get("v") if isinstance(row, Mapping) else row
            raise DataError(f"{where}: version {found!r:.80}; expected a record of version {FORMAT}.")
        for key, kind in _FIELDS.items():
            if key not in row or not isinstance(row[key], kind) or (kind is int and isinstance(row[key], bool)):
                raise DataError(
                    f"{where}: {key!r} is {row.get(key)!r:.80}; expected {getattr(kind, '__name__', kind)}. "
                    "Delete the line (its rewrite is asked for again) or restore the file."
                )
        flags = row.get("flags", [])
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise DataError(f"{where}: 'flags' is {flags!r:.80}; expected a list of words. Delete the line.")
        counts = {name: row.get(name) for name in ("error", "tokens_in", "tokens_out")}
        try:
            result = RewriteResult(text=row["text"], status=row["status"], **counts)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return cls(
            **{name: row[name] for name in ("id", "attr", "draw", "w_target", "src_sha", "prompt_sha")},
            number=row["pass"],
            by=RewriterId(*(row[name] for name in RewriterId._fields)),
            result=result,
            flags=tuple(flags),
            time=row.get("t", ""),
        )


_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("id", "attr", "src_sha", "prompt_sha", "status", *RewriterId._fields), str),
    **dict.fromkeys(("pass", "draw", "w_target"), int),
    "text": str | None,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One rewrite that a unit needs; its parts are those of :class:`RewriteRecord`."""

    unit: Unit
    attr: str
    number: int
    draw: int
    w_target: int
    source: str
    by: RewriterId

    @cached_property
    def key(self) -> str:
        """By which the answer is found again."""
        source, prompt = text_sha(self.source), text_sha(self.unit.prompt)
        return rewrite_key(self.attr, self.w_target, source, prompt, self.draw, self.by)

    def record(self, result: RewriteResult, *, flags: tuple[str, ...] = (), time: str = "") -> RewriteRecord:
        """The record of an answer, with this request's key."""
        same: dict[str, Any] = {name: getattr(self, name) for name in ("attr", "number", "draw", "w_target", "by")}
        same |= {"src_sha": text_sha(self.source), "prompt_sha": text_sha(self.unit.prompt)}
        return RewriteRecord(id=self.unit.id, result=result, flags=flags, time=time, **same)


def chain(
    unit: Unit,
    attr: str,
    by: RewriterId,
    find: Callable[[str], RewriteRecord | None],
    *,
    draw: int = 0,
    passes: int = 2,
) -> Iterator[tuple[Request, RewriteRecord | None]]:
    """Walk along a labelled unit's passes: each request with its record, up to the first missing or unusable one.

    The source of a pass is the text of the one before, so another text there asks for everything after it anew.
    """
    source, target = unit.text, 1 - int(unit.w or 0)
    for number in range(1, passes + 1):
        request = Request(unit=unit, attr=attr, number=number, draw=draw, w_target=target, source=source, by=by)
        record = find(request.key)
        yield request, record
        if record is None or record.result.text is None or not record.usable:
            return
        source, target = record.result.text, 1 - target


def rewrite_key(attr: str, w_target: int, src_sha: str, prompt_sha: str, draw: int, by: RewriterId) -> str:
    """Digest of everything that decides what is written; the same key is never asked for twice.

    The number of the pass is no part of it: what decides is the text.
    """
    parts = (attr, str(w_target), src_sha, prompt_sha, str(draw), *by)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_sha(text: str) -> str:
    """SHA-256 of a text in UTF-8 (half characters, lone surrogates, are allowed), in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_units(units: Iterable[Unit], where: str) -> list[Unit]:
    """Make a list of units that belong together; messages begin with ``where``."""
    found = list(units)
    if not found:
        raise DataError(f"{where} holds no units. Give at least one text.")
    seen: set[str] = set()
    twice = [unit.id for unit in found if unit.id in seen or seen.add(unit.id)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(
            f"{where}: {len(twice)} ids occur more than once, such as {shown_ids(twice)}. Give every unit its own id."
        )
    lone = [unit.id for unit in found if unit.cluster is None]
    if lone and len(lone) < len(found):
        raise DataError(
            f"{where}: {len(lone)} of {len(found)} units have no cluster, such as {shown_ids(lone)}. "
            "Give every unit one, or none of them."
        )
    return found


def shown_ids(ids: Iterable[str]) -> str:
    """The first ids of a list, for messages."""
    different = list(dict.fromkeys(ids))
    rest = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return ", ".join(repr(one) for one in different[:_SHOWN]) + rest


def _label(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if callable(getattr(value, "item", None)):  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, bool | int | float) and value in (0, 1):
        return int(value)
    raise DataError(f"Unit {name!r}: w is {value!r:.80}; expected 0 or 1, or None if it is not known.")
