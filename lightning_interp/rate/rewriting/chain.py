"""From a unit to the rewrites it needs: flip, flip back, and once more if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from lightning_interp.rate.rewriting.records import (
    RewriteRecord,
    RewriteResult,
    RewriterId,
    Unit,
    rewrite_key,
    text_sha,
)

__all__ = ["Request", "chain"]


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
        return RewriteRecord(
            id=self.unit.id,
            attr=self.attr,
            number=self.number,
            draw=self.draw,
            w_target=self.w_target,
            src_sha=text_sha(self.source),
            prompt_sha=text_sha(self.unit.prompt),
            by=self.by,
            result=result,
            flags=flags,
            time=time,
        )


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
