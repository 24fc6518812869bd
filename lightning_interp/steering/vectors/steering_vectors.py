"""Steering vectors: one direction for each site, what is known about them, arithmetic, and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.model.fingerprint import check_fingerprint, tensor_hash
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.files import jsonable
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.errors import IncompatibleModelError, RecipeError, SiteError
from lightning_interp.steering.vectors.reading import as_direction, read_made

__all__ = ["SteeringVector"]

FORMAT = "lightning_interp.steering_vector/1"
_REMEDY = (
    "Write it again with SteeringVector.save; for tensors of another program, pass SteeringVector({'resid_post.12': "
    "tensor}) yourself."
)
_ABOUT = ("concept", "method", "model", "model_type", "fingerprint", "n", "positions")


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """A direction at one or several sites, and where it comes from.

    Vectors of one model add, subtract and scale; a site that only one of two has counts as zero in the other.

    Args:
        directions: Site (or its text, such as ``"resid_post.12"``) to ``[d]``.
        concept: What it stands for.
        method: How it was made.
        model: Name of the model.
        model_type: Its family, as its configuration says.
        fingerprint: From ``model_fingerprint``; None if it is not known.
        n: Texts (or pairs of them) that it rests on.
        positions: Which tokens were read, as ``Positions.to_dict`` says.
        scale: Site to the mean norm of the activations that were read there, to judge strengths by.

    Raises:
        RecipeError: If there is no direction, or one is zero or not finite.
        SiteError: If a site is no site.

    Example:
        >>> kind = SteeringVector({"resid_post.2": [3.0, 4.0]}, concept="kind")
        >>> (0.5 * kind).norms(), kind.cosine(-kind)
        ({Site(kind='resid_post', layer=2): 2.5}, {Site(kind='resid_post', layer=2): -1.0})
    """

    directions: Mapping[Site, Tensor]
    concept: str = ""
    method: str = ""
    model: str = ""
    model_type: str = ""
    fingerprint: str | None = None
    n: int | None = None
    positions: Mapping[str, Any] | None = None
    scale: Mapping[Site, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.directions, Mapping) or not self.directions:
            raise RecipeError(
                f"SteeringVector(directions={self.directions!r:.60}) holds no direction; expected site to [d]."
            )
        made = {}
        for key, value in self.directions.items():
            site = _site(key)
            made[site] = as_direction(value, what=f"The direction at {site}{self._of}")
        object.__setattr__(self, "directions", made)
        object.__setattr__(self, "scale", {_site(key): float(value) for key, value in self.scale.items()})

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in their order."""
        return tuple(self.directions)

    @property
    def sha256(self) -> str:
        """Hash of the sites and numbers."""
        return tensor_hash(*(self.directions[site] for site in sorted(self.sites, key=str)))

    def only(self, site: Site | str | None = None) -> Tensor:
        """The direction ``[d]`` at a site.

        Args:
            site: Which; may be left out where there is one.

        Returns:
            ``[d]``.

        Raises:
            SiteError: With the sites that there are.
        """
        known = ", ".join(map(str, self.sites))
        if site is None:
            if len(self.directions) > 1:
                raise SiteError(f"{self!r} has directions at {known}. Say which with site=...")
            return next(iter(self.directions.values()))
        wanted = _site(site)
        if wanted not in self.directions:
            raise SiteError(f"{self!r} has no direction at {wanted}; it has: {known}.")
        return self.directions[wanted]

    def select(self, sites: Sequence[Site | str]) -> SteeringVector:
        """The same at some of its sites.

        Raises:
            SiteError: If one of them is not there.
        """
        return replace(self, directions={_site(site): self.only(site) for site in sites})

    def norms(self) -> dict[Site, float]:
        """Length of the direction at each site."""
        return {site: float(v.detach().norm()) for site, v in self.directions.items()}

    def normalised(self) -> SteeringVector:
        """The same directions with length 1."""
        return self._mapped(lambda _, v: v / v.norm())

    def without(self, other: SteeringVector) -> SteeringVector:
        """What is left when the part along another vector is projected out, at the sites they share.

        Args:
            other: A vector of the same model.

        Returns:
            A vector at the shared sites.

        Raises:
            IncompatibleModelError: If the vectors belong to different models, or share no site.
            RecipeError: If nothing is left.
        """
        shared = self._shared(other)

        def rest(site: Site, v: Tensor) -> Tensor:
            u = other.directions[site].double()
            left = v.double() - (v.double() @ u) / (u @ u) * u
            if float(left.norm()) <= 1e-6 * float(v.double().norm()):
                raise RecipeError(f"{self!r} at {site} lies along {other!r}; nothing is left without it.")
            return left.to(v.dtype)

        return replace(self.select(shared)._mapped(rest), concept=_joined(self, "without", other))

    def cosine(self, other: SteeringVector) -> dict[Site, float]:
        """Cosine of the two directions at each site that both have.

        Raises:
            IncompatibleModelError: If the vectors belong to different models, or share no site.
        """
        pairs = {
            site: (self.directions[site].double(), other.directions[site].double()) for site in self._shared(other)
        }
        return {site: float(torch.cosine_similarity(a, b, dim=0)) for site, (a, b) in pairs.items()}

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_same_model(other)
        both = dict(self.directions)
        for site, v in other.directions.items():
            both[site] = both[site] + v if site in both else v
        scale = {**other.scale, **self.scale}
        return replace(self, directions=both, concept=_joined(self, "+", other), scale=scale)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return replace(self + (-other), concept=_joined(self, "-", other))

    def __mul__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self._mapped(lambda _, v: factor * v)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1.0 / divisor)

    def describe(self) -> dict[str, Any]:
        """What is known about the vector, in plain values."""
        about: dict[str, Any] = jsonable({name: getattr(self, name) for name in _ABOUT})
        norms = {str(site): norm for site, norm in self.norms().items()}
        return {**about, "sha256": self.sha256, "norms": norms, "scale": {str(s): v for s, v in self.scale.items()}}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.safetensors`` file (one tensor a site, the rest as metadata) or a control-vector ``.gguf`` file.

        Args:
            path: The file; it appears whole or not at all.

        Returns:
            ``path``.

        Raises:
            RecipeError: If the ending is neither.
            SiteError: If a ``.gguf`` file cannot hold one of the sites.
            ManifestError: If the file cannot be written.
        """
        if _suffix(path) == ".gguf":
            from lightning_interp.steering.vectors.gguf_vectors import save_control_vector

            return save_control_vector(self, path)
        about = jsonable({name: getattr(self, name) for name in _ABOUT})
        about["scale"] = {str(site): value for site, value in self.scale.items()}
        tensors = {str(site): v for site, v in self.directions.items()}
        return save_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Read what :meth:`save` wrote, or a control-vector ``.gguf`` file of llama.cpp or repeng.

        Args:
            path: The file.

        Returns:
            The vector.

        Raises:
            DataError: If the file is missing, damaged, or holds something else.
            RecipeError: If the ending is neither ``.safetensors`` nor ``.gguf``.
        """
        if _suffix(path) == ".gguf":
            from lightning_interp.steering.vectors.gguf_vectors import load_control_vector

            return load_control_vector(path)

        def made(tensors: dict[str, Tensor], metadata: dict[str, str]) -> SteeringVector:
            return cls({Site.parse(name): v for name, v in tensors.items()}, **parse_json(metadata["about"]))

        return read_made(path, FORMAT, made, what="steering vector", remedy=_REMEDY)

    @property
    def _of(self) -> str:
        return f" of {self.concept!r}" if self.concept else ""

    def _mapped(self, change: Callable[[Site, Tensor], Tensor]) -> SteeringVector:
        return replace(self, directions={site: change(site, v) for site, v in self.directions.items()})

    def _shared(self, other: SteeringVector) -> list[Site]:
        self._check_same_model(other)
        shared = [site for site in self.sites if site in other.directions]
        if not shared:
            raise IncompatibleModelError(
                f"{self!r} and {other!r} share no site: one has {', '.join(map(str, self.sites))}, the other "
                f"{', '.join(map(str, other.sites))}. Use vectors of the same sites."
            )
        return shared

    def _check_same_model(self, other: SteeringVector) -> None:
        check_fingerprint(other.fingerprint, self.fingerprint, what=repr(self), model=repr(other))
        for site in self.sites:
            theirs = other.directions.get(site)
            if theirs is not None and theirs.shape != self.directions[site].shape:
                raise IncompatibleModelError(
                    f"{self!r} has width {len(self.directions[site])} at {site}, {other!r} has {len(theirs)}. Use "
                    "vectors of one model."
                )

    def __repr__(self) -> str:
        return f"SteeringVector({self.concept or 'no name'!r}, {', '.join(_ranges(self.sites))})"


def _site(key: Site | str) -> Site:
    return key if isinstance(key, Site) else Site.parse(str(key))


def _joined(one: SteeringVector, sign: str, other: SteeringVector) -> str:
    return f"{one.concept or '?'} {sign} {other.concept or '?'}"


def _ranges(sites: Sequence[Site]) -> Iterator[str]:
    """Kinds with the layers that they come at, for people to read."""
    for kind in dict.fromkeys(site.kind for site in sites):
        layers = [site.layer for site in sites if site.kind == kind and site.layer is not None]
        text = ", ".join(map(str, layers)) if len(layers) <= 4 else f"{layers[0]}...{layers[-1]} ({len(layers)} layers)"
        yield f"{kind} {text}".strip()


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".gguf"):
        raise RecipeError(f"{str(path)!r} is no steering vector; expected a file that ends in .safetensors or .gguf.")
    return suffix
