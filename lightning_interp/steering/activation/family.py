"""Steering that removes a direction, sets or bounds the coordinate along one, or maps the activation affinely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_interp.core.model.sites import Site
from lightning_interp.errors import RecipeError
from lightning_interp.steering.activation.intervention import Dose, Steering
from lightning_interp.steering.activation.selectors import Sites, as_sites, place
from lightning_interp.steering.vectors.reading import as_direction, check_finite, frozen, numbers_of

__all__ = ["AffineMap", "ClampDirection", "ProjectOut", "orthonormal"]

_DEPENDENT = 1e-5  # of the longest direction: what is left of one shorter than this lies in the span of the others


class ProjectOut(Steering):
    """Remove the part of the activation that lies in the span of one or several directions.

    Args:
        directions: ``[d]``, ``[k, d]`` or a list of ``[d]``, to be orthonormalised, for every site of ``site``; a
            mapping from sites to such; a ``SteeringVector``; or a file of one.
        site: One site or several. Left out, a vector's own sites.
        **dose: As in ``AddDirection``; at ``strength`` 1 nothing of the part is left, at 2 it is mirrored.

    Raises:
        RecipeError: If a direction is zero, not finite, or in the span of the others.

    Example:
        >>> from lightning_interp import StepContext
        >>> steer = ProjectOut([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], site="resid_post.0")
        >>> steer.transform(Site("resid_post", 0), torch.tensor([[[3.0, 4.0, 5.0]]]), StepContext(1, 1)).tolist()
        [[[0.0, 0.0, 5.0]]]
    """

    def __init__(self, directions: Any, *, site: Sites | None = None, **dose: Unpack[Dose]) -> None:
        found, vector = place(directions, site, _span, what=type(self).__name__)
        super().__init__({s: (v,) for s, v in found.items()}, vector=vector, **dose)
        for s, tensor in found.items():
            orthonormal(tensor.detach(), what=f"ProjectOut at {s}")

    def change(self, site: Site, x: Tensor) -> Tensor:
        """See :meth:`Steering.change`."""
        basis = self._basis(site, x)
        return -((x @ basis.T) @ basis)

    def _basis(self, site: Site, x: Tensor) -> Tensor:
        given, key = self.tensors[site][0], (site, x.device, x.dtype)
        if given.requires_grad:
            return orthonormal(given, what="ProjectOut").to(x.device, x.dtype)
        if key not in self._moved:
            with torch.inference_mode(False), torch.no_grad():
                self._moved[key] = (orthonormal(given, what="ProjectOut").to(x.device, x.dtype),)
        return self._moved[key][0]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Steering.settings`."""
        return {"directions": {str(site): len(tensors[0]) for site, tensors in self.tensors.items()}}


class ClampDirection(Steering):
    """Set the activation's coordinate along a direction, or keep it within bounds.

    The coordinate is the dot product with the direction's unit vector, so values are in the activation's own units.

    Args:
        direction: See ``AddDirection``; only where it points matters.
        to: The value that the coordinate gets.
        low: Its lower bound (instead of ``to``).
        high: Its upper bound (instead of ``to``).
        site: One site or several. Left out, a vector's own sites.
        **dose: As in ``AddDirection``; ``strength`` is the share of the way to the new value.

    Raises:
        RecipeError: If there is no value and no bound, both, or the bounds are the wrong way round.

    Example:
        >>> from lightning_interp import StepContext
        >>> steer, x = ClampDirection([0.0, 2.0], high=1, site="resid_post.0"), torch.tensor([[[3.0, 4.0], [3, -4]]])
        >>> steer.transform(Site("resid_post", 0), x, StepContext(1, 2)).tolist()
        [[[3.0, 1.0], [3.0, -4.0]]]
    """

    def __init__(
        self,
        direction: Any,
        *,
        to: float | None = None,
        low: float | None = None,
        high: float | None = None,
        site: Sites | None = None,
        **dose: Unpack[Dose],
    ) -> None:
        _check_bounds(to, low, high)
        found, vector = place(direction, site, as_direction, what=type(self).__name__)
        super().__init__({s: (v,) for s, v in found.items()}, vector=vector, **dose)
        self.to, self.low, self.high = to, low, high

    def change(self, site: Site, x: Tensor) -> Tensor:
        """See :meth:`Steering.change`."""
        (direction,) = self.at(site, x)
        unit = direction / direction.norm()
        now = (x @ unit)[..., None]
        wanted = torch.full_like(now, self.to) if self.to is not None else now.clamp(self.low, self.high)
        moved: Tensor = (wanted - now) * unit
        return moved

    def settings(self) -> dict[str, Any]:
        """See :meth:`Steering.settings`."""
        return {"to": self.to, "low": self.low, "high": self.high}


def _span(value: Any, what: str) -> Tensor:
    """Directions ``[k, d]``, checked one by one."""
    if isinstance(value, Tensor) and value.dim() == 2:
        for k, row in enumerate(value):
            as_direction(row.detach(), what=f"{what}, direction {k},")
        return frozen(value)
    nested = isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Sequence | Tensor)
    rows = [as_direction(v, what=f"{what}, direction {k},") for k, v in enumerate(value)] if nested else []
    if len({len(row) for row in rows}) > 1:
        raise RecipeError(f"{what} got directions of the widths {', '.join(str(len(r)) for r in rows)}; expected one.")
    return torch.stack(rows) if nested else as_direction(value, what=what)[None]


def orthonormal(directions: Tensor, *, what: str) -> Tensor:
    """Orthonormal rows ``[k, d]`` that span the same as ``directions``, float64 and differentiable."""
    wide = directions.double()
    unit = wide / wide.norm(dim=1, keepdim=True)
    q, r = torch.linalg.qr(unit.T)
    left = r.diagonal().abs() if len(unit) <= unit.shape[1] else torch.zeros(len(unit))
    if bool((left < _DEPENDENT).any()):
        k = int((left < _DEPENDENT).nonzero()[0])
        raise RecipeError(f"{what}: direction {k} of {len(directions)} lies in the span of the others. Leave it out.")
    rows: Tensor = q.T
    return rows


def _check_bounds(to: float | None, low: float | None, high: float | None) -> None:
    given = {name: v for name, v in (("to", to), ("low", low), ("high", high)) if v is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecipeError(f"ClampDirection({name}={value!r}): expected a finite number.")
    if not given or ("to" in given and len(given) > 1):
        got = given or "no value"
        raise RecipeError(f"ClampDirection got {got}; expected to=..., or low=... and high=... (or one of them).")
    if low is not None and high is not None and low > high:
        raise RecipeError(f"ClampDirection(low={low}, high={high}): the lower bound lies above the upper one.")


class AffineMap(Steering):
    """Map the activation affinely: ``x -> A x + b``.

    Args:
        matrix: ``A`` ``[d, d]``, or a tuple ``(U [d, r], V [r, d])`` for ``A = I + U V``; None leaves ``x`` and adds
            the bias. A mapping from sites gives each its own.
        bias: ``b`` ``[d]``, None for 0, or a mapping from sites.
        site: One site or several. Left out, the keys of the mapping.
        **dose: As in ``AddDirection``; ``strength`` is the share of the way from ``x`` to its image.

    Raises:
        RecipeError: If shapes do not fit, a number is not finite, or the map changes nothing.
        SiteError: If no site is named.

    Example:
        >>> from lightning_interp import StepContext
        >>> steer = AffineMap([[0.0, 1.0], [1.0, 0.0]], [10.0, 0.0], site="resid_post.0")
        >>> steer.transform(Site("resid_post", 0), torch.tensor([[[1.0, 2.0]]]), StepContext(1, 1)).tolist()
        [[[12.0, 1.0]]]
    """

    def __init__(
        self, matrix: Any = None, bias: Any = None, *, site: Sites | None = None, **dose: Unpack[Dose]
    ) -> None:
        name = type(self).__name__
        maps, biases = _by_site(matrix, bias, site, name)
        super().__init__({s: _parts(maps[s], biases[s], f"{name} at {s}") for s in maps}, **dose)

    def change(self, site: Site, x: Tensor) -> Tensor:
        """See :meth:`Steering.change`."""
        bias, *factors = self.at(site, x)
        if not factors:
            return bias
        moved = x
        for factor in factors:  # [d, d]; or V [r, d] and then U [d, r]
            moved = moved @ factor.T
        return bias + (moved - x if len(factors) == 1 else moved)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Steering.settings`."""
        kinds = {1: "bias", 2: "full", 3: "low rank"}
        return {
            "map": {str(s): kinds[len(t)] for s, t in self.tensors.items()},
            "rank": {str(s): len(t[1]) for s, t in self.tensors.items() if len(t) == 3},
        }


def _by_site(matrix: Any, bias: Any, site: Sites | None, what: str) -> tuple[dict[Site, Any], dict[Site, Any]]:
    """Matrix and bias of each site; both have the same sites."""
    if matrix is None and bias is None:
        raise RecipeError(f"{what}() got matrix=None and bias=None, so it would change nothing; pass one.")
    keys = [as_sites(list(given), what=what) for given in (matrix, bias) if isinstance(given, Mapping)]
    if len(keys) == 2 and set(keys[0]) != set(keys[1]):
        one, other = (", ".join(map(str, each)) for each in keys)
        raise RecipeError(f"{what} got matrices at {one}, but biases at {other}; expected the same sites.")
    where = site if site is not None or not keys else keys[0]

    def spread(given: Any) -> dict[Site, Any]:
        at = site if isinstance(given, Mapping) else where
        return place(given, at, lambda value, _: value, what=what)[0]

    return spread(matrix), spread(bias)


def _parts(matrix: Any, bias: Any, what: str) -> tuple[Tensor, ...]:
    """``(b,)``, ``(b, A)`` or, for low rank, ``(b, V, U)``."""
    if matrix is None:
        return (as_direction(bias, what=f"The bias of {what}"),)
    low_rank = isinstance(matrix, tuple)
    factors = [_numbers(each, f"The matrix of {what}", 2) for each in (reversed(matrix) if low_rank else (matrix,))]
    width = factors[0].shape[1]
    fits = factors[-1].shape[0] == width and (len(factors) == 1 or factors[0].shape[0] == factors[1].shape[1])
    b = torch.zeros(width) if bias is None else _numbers(bias, f"The bias of {what}", 1)
    if len(factors) != 1 + low_rank or not fits or len(b) != width:
        shapes = " and ".join(str(list(factor.shape)) for factor in reversed(factors))
        raise RecipeError(
            f"{what} got {shapes} with a bias {list(b.shape)}; expected [d, d] or (U [d, r], V [r, d]), and [d]."
        )
    change = factors[1] @ factors[0] if low_rank else factors[0] - torch.eye(width).to(factors[0])
    if not bool(change.detach().any()) and not bool(b.detach().any()):
        raise RecipeError(f"{what} is the identity of width {width}, so it would change nothing.")
    return (b, *factors)


def _numbers(value: Any, what: str, dims: int) -> Tensor:
    tensor = value if isinstance(value, Tensor) else numbers_of(value, what)
    if tensor.dim() != dims or tensor.numel() == 0 or tensor.is_complex():
        raise RecipeError(f"{what} has the shape {list(tensor.shape)} ({tensor.dtype}); expected {dims} dimensions.")
    check_finite(tensor, what)
    return frozen(tensor)
