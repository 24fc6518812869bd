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
    """One rewrite that a unit needs.

    Args:
        unit: The unit.
        attr: Name of the attribute.
        number: 1 for the rewrite of the original, 2 for the rewrite of that, 3 for one more.
        draw: Number of the draw.
        w_target: Value of the attribute to ask for.
        source: The text to rewrite.
        by: Who is to write it.
    """

    unit: Unit
    attr: str
    number: int
    draw: int
    w_target: int
    source: str
    by: RewriterId

    @cached_property
    def src_sha(self) -> str:
        """Digest of the source."""
        return text_sha(self.source)

    @cached_property
    def prompt_sha(self) -> str:
        """Digest of the unit's prompt."""
        return text_sha(self.unit.prompt)

    @cached_property
    def key(self) -> str:
        """By which the answer is found again; see :func:`~lightning_interp.rate.rewriting.records.rewrite_key`."""
        return rewrite_key(
            attr=self.attr,
            w_target=self.w_target,
            src_sha=self.src_sha,
            prompt_sha=self.prompt_sha,
            draw=self.draw,
            by=self.by,
        )

    def record(self, result: RewriteResult, *, flags: tuple[str, ...] = (), time: str = "") -> RewriteRecord:
        """The record of an answer.

        Args:
            result: The answer.
            flags: What looks wrong with it.
            time: When it came, ISO 8601.

        Returns:
            The record, with this request's key.
        """
        return RewriteRecord(
            id=self.unit.id,
            attr=self.attr,
            number=self.number,
            draw=self.draw,
            w_target=self.w_target,
            src_sha=self.src_sha,
            prompt_sha=self.prompt_sha,
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
    """Walk along a unit's passes: each request with its record, up to the first that is missing or not usable.

    The source of a pass is the text of the one before, so another text there asks for everything after it anew.

    Args:
        unit: A unit with a label.
        attr: Name of the attribute.
        by: Who writes.
        find: Gives the record of a key.
        draw: Number of the draw.
        passes: How many passes a unit needs.

    Yields:
        A request and its record; None where there is none yet.

    Example:
        >>> unit, by = Unit(id="a", text="oh!", w=1), RewriterId("nobody", "", "")
        >>> [(request.number, request.w_target, record) for request, record in chain(unit, "mark", by, {}.get)]
        [(1, 0, None)]
    """
    source, target = unit.text, 1 - int(unit.w or 0)
    for number in range(1, passes + 1):
        request = Request(unit=unit, attr=attr, number=number, draw=draw, w_target=target, source=source, by=by)
        record = find(request.key)
        yield request, record
        if record is None or record.result.text is None or not record.usable:
            return
        source, target = record.result.text, 1 - target
