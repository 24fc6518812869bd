"""Which tensors of a steering intervention belong to which site."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lightning_interp.core.model.sites import Site
from lightning_interp.errors import RecipeError, SiteError
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["Sites", "as_sites", "place"]

Sites = Site | str | Sequence[Site | str]
T = TypeVar("T")


def as_sites(given: Sites, *, what: str) -> tuple[Site, ...]:
    """At least one site, each once, from one or several, as objects or as text; ``what`` names the intervention."""
    listed = [given] if isinstance(given, Site | str) else list(given)
    sites = tuple(site if isinstance(site, Site) else Site.parse(str(site)) for site in listed)
    if not sites:
        raise SiteError(f"{what}(site=[]) names no site, so it would change nothing. Expected at least one.")
    if len(set(sites)) < len(sites):
        twice = next(site for site in sites if sites.count(site) > 1)
        raise SiteError(f"{what} names {twice} twice; expected each site once.")
    return sites


def place(
    given: Any, site: Sites | None, read: Callable[[Any, str], T], *, what: str
) -> tuple[dict[Site, T], SteeringVector | None]:
    """Give each site its own value, as ``read`` checks it, and the vector that the values came from, if any.

    ``given`` is a value for every site of ``site``, a mapping from sites to values, a vector, or a file of one.
    """
    if isinstance(given, str | os.PathLike):
        given = SteeringVector.load(given)
    if isinstance(given, SteeringVector):
        chosen = given if site is None else given.select(as_sites(site, what=what))
        return {s: read(v, f"{what} at {s}") for s, v in chosen.directions.items()}, chosen
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
