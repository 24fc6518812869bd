"""What steering needs to know of any selector: is it empty, does it look at activations, what does it need to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from lightning_interp.core.hooks.intervention import Attachment
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.files import jsonable
from lightning_interp.core.tokens.positions import (
    All,
    And,
    Generated,
    GenerationSteps,
    Not,
    Or,
    Positions,
    Prompt,
    Span,
    Tokens,
)
from lightning_interp.errors import DataError, PositionError
from lightning_interp.steering.activation.where import Gate

__all__ = ["bind_positions", "check_positions", "describe_positions", "same_at_every_site"]

_SHOWN = 32  # numbers of a list that a description shows


def bind_positions(positions: Positions, attachment: Attachment, sites: Sequence[Site]) -> Positions:
    """Give every gate inside a selector what it needs from the model that is being hooked.

    Args:
        positions: The selector.
        attachment: Owns the hooks of gates that read a site of their own.
        sites: Where the selector will be asked.

    Returns:
        The selector to ask; ``positions`` itself if it holds no gate.

    Raises:
        SiteError: If a gate means nothing at one of the sites.
        IncompatibleModelError: If a gate belongs to another model.
        PositionError: If a gate names tokens that the model lacks.
    """
    if isinstance(positions, Gate):
        for site in sites:
            positions.check(site, attachment)
        return positions.bound(attachment)
    inside = {name: bind_positions(part, attachment, sites) for name, part in _parts(positions)}
    changed = {name: part for name, part in inside.items() if part is not getattr(positions, name)}
    return replace(positions, **changed) if changed else positions


def check_positions(positions: Any, *, what: str) -> Positions:
    """Refuse what is no selector, or one that can choose no token whatever comes; ``what`` names the intervention."""
    if not isinstance(positions, Positions):
        raise PositionError(
            f"{what}(positions={positions!r}) is no selector. Expected one such as All(), Last(), Generated() or "
            "Substring('...'), or a combination with &, | and ~."
        )
    if _never(positions):
        raise PositionError(f"{what}(positions={positions}) can never choose a token. Use one that can, such as All().")
    return positions


def same_at_every_site(positions: Positions) -> bool:
    """Whether a selector looks at tokens alone, so that one mask serves every site of a pass."""
    if parts := [part for _, part in _parts(positions)]:
        return all(same_at_every_site(part) for part in parts)
    return type(positions).__module__ == Positions.__module__


def describe_positions(positions: Positions) -> dict[str, Any]:
    """A selector as plain data for records: long lists of numbers stand as their length.

    Args:
        positions: The selector.

    Returns:
        What :meth:`Positions.to_dict` gives, short enough to read.

    Example:
        >>> describe_positions(Generated(0, 20))
        {'kind': 'Generated', 'start': 0, 'stop': 20}
    """
    try:
        plain: dict[str, Any] = jsonable(_short(positions.to_dict()))
    except DataError:  # a user's own selector may hold what has no JSON form
        return {"kind": type(positions).__name__, "text": repr(positions)}
    return plain


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return f"{len(value)} values" if isinstance(value, list) and len(value) > _SHOWN else value


def _parts(positions: Positions) -> Iterator[tuple[str, Positions]]:
    for entry in fields(positions) if is_dataclass(positions) else ():
        value = getattr(positions, entry.name)
        if isinstance(value, Positions):
            yield entry.name, value


def _never(positions: Positions) -> bool:
    """Whether no token can be chosen, as far as the selector alone tells."""
    match positions:
        case Tokens():
            return not positions.ids
        case Span():
            return _empty_span(positions)
        case Not(inner):
            return _always(inner)
        case Or(left, right):
            return _never(left) and _never(right)
        case And(left, right):
            return _never(left) or _never(right) or _disjoint(left, right)
    return False


def _always(positions: Positions) -> bool:
    match positions:
        case Not(inner):
            return _never(inner)
        case Or(left, right):
            return _always(left) or _always(right)
        case And(left, right):
            return _always(left) and _always(right)
    return isinstance(positions, All)


def _empty_span(span: Span) -> bool:
    if span.stop is None or (span.start < 0) != (span.stop < 0):
        return span.stop == 0 and span.start >= 0
    return span.stop <= span.start


def _disjoint(left: Positions, right: Positions) -> bool:
    if Not(left) == right or Not(right) == left or {type(left), type(right)} == {Prompt, Generated}:
        return True
    for kind in (Generated, GenerationSteps):
        if isinstance(left, kind) and isinstance(right, kind):
            first, second = sorted((left, right), key=lambda window: window.start)
            return first.stop is not None and first.stop <= second.start
    return False
