"""Which tensors of a steering intervention belong to which site, and which vectors to which model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import IncompatibleModelError, RecipeError, SiteError
from lightning_interp.steering.vectors.reading import check_made_for
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["CheckModel", "Sites", "as_sites", "check_vector_model", "place"]

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
