"""Where a steering intervention acts: sites and their tensors, selectors of tokens, and the model of a vector."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from lightning_interp.core.hooks.intervention import Attachment
from lightning_interp.core.model.model_map import ModelMap
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
from lightning_interp.errors import DataError, IncompatibleModelError, PositionError, RecipeError, SiteError
from lightning_interp.steering.activation.where import Gate
from lightning_interp.steering.vectors.reading import check_made_for
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = [
    "CheckModel",
    "Sites",
    "as_sites",
    "bind_positions",
    "check_positions",
    "check_vector_model",
    "describe_positions",
    "place",
    "same_at_every_site",
]

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


Sites = Site | str | Sequence[Site | str]
CheckModel = Literal["error", "warn", "off"]
T = TypeVar("T")


def as_sites(given: Sites, *, what: str) -> tuple[Site, ...]:
    """At least one site, each once, from one or several, as objects or as text; ``what`` names the intervention."""
    listed = [given] if isinstance(given, Site | str) else list(given)
    sites = tuple(site if isinstance(site, Site) else Site.parse(str(site)) for site in listed)
    if not sites:
        raise SiteError(f"{what}(site=[]) names no site, so it would change nothing. Expected at least one.")
    if twice := [site for site in sites if sites.count(site) > 1]:
        raise SiteError(f"{what} names {twice[0]} twice; expected each site once.")
    return sites


def place(
    given: Any, site: Sites | None, read: Callable[[Any, str], T], *, what: str
) -> tuple[dict[Site, T], SteeringVector | None]:
    """Give each site its own value, as ``read`` checks it, and the vector that the values came from, if any.

    ``given`` is a value for every site of ``site``, a mapping from sites to values, a vector, or a file of one.
    """
    vector = SteeringVector.load(given) if isinstance(given, str | os.PathLike) else given
    if isinstance(vector, SteeringVector):
        vector = vector if site is None else vector.select(as_sites(site, what=what))
        return {s: read(v, f"{what} at {s}") for s, v in vector.directions.items()}, vector
    if isinstance(given, Mapping):
        if site is not None:
            raise RecipeError(
                f"{what} got site={site!r} beside a mapping of {len(given)} sites; leave site out, the keys are sites."
            )
        sites = as_sites(list(given), what=what)
        return {s: read(value, f"{what} at {s}") for s, value in zip(sites, given.values(), strict=True)}, None
    if site is None:
        raise SiteError(
            f"{what} got no site. Pass site=Site('resid_post', 12), or a SteeringVector, which has its own."
        )
    return {s: read(given, what) for s in as_sites(site, what=what)}, None


def check_vector_model(vector: SteeringVector, model_map: ModelMap, choice: CheckModel, *, what: str) -> None:
    """Refuse a vector of another model, or warn of it, as ``choice`` says; ``what`` names the intervention.

    One without a fingerprint (from a control-vector file, or made by hand) is compared by its family alone, and only
    warned of, as such names differ between programs.
    """
    if choice == "off":
        return
    name, family = type(model_map.model).__name__, str(model_map.config_value("model_type", ""))
    if vector.fingerprint is None and vector.model_type and _plain(vector.model_type) != _plain(family):
        warnings.warn(
            f"{what}: {vector!r} says that it is for a model of type {vector.model_type!r}, but {name} is of type "
            f"{family!r}. Pass check_model='off' if they are the same.",
            stacklevel=2,
        )
    try:
        check_made_for(model_map, vector.fingerprint, what=repr(vector))
    except IncompatibleModelError as error:
        if choice == "error":
            raise IncompatibleModelError(
                f"{error} Where another finetuning of the same model is meant, pass {what}(check_model='warn')."
            ) from None
        warnings.warn(f"{what}: {error}", stacklevel=2)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
