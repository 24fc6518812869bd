"""Steering that removes: project directions out, or set or bound the coordinate along one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_interp.core.model.sites import Site
from lightning_interp.errors import RecipeError
from lightning_interp.steering.activation.intervention import Dose, Steering
from lightning_interp.steering.activation.placement import Sites, place
from lightning_interp.steering.vectors.reading import as_direction, frozen

__all__ = ["ClampDirection", "ProjectOut", "orthonormal"]

_DEPENDENT = 1e-5  # of the longest direction: what is left of one shorter than this lies in the span of the others


class ProjectOut(Steering):
    """Remove the part of the activation that lies in the span of one or several directions.

    Args:
        directions: ``[d]``, ``[k, d]`` or a list of ``[d]`` for every site of ``site``; a mapping from sites to these;
            a ``SteeringVector``; or a file of one. They are orthonormalised.
        site: One site or several. Left out, a vector's own sites.
        **dose: Of :class:`~lightning_interp.steering.activation.intervention.Steering`; at ``strength`` 1 nothing of
            the part is left (directional ablation), at 2 it is mirrored.

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
        given = self.tensors[site][0]
        if given.requires_grad:
            return orthonormal(given, what="ProjectOut").to(x.device, x.dtype)
        key = (site, x.device, x.dtype)
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
        **dose: Of :class:`~lightning_interp.steering.activation.intervention.Steering`; ``strength`` is the share of
            the way to the new value.

    Raises:
        RecipeError: If there is no value and no bound, both, or the bounds are the wrong way round.

    Example:
        >>> from lightning_interp import StepContext
        >>> steer = ClampDirection([0.0, 2.0], high=1.0, site="resid_post.0")
        >>> x = torch.tensor([[[3.0, 4.0], [3.0, -4.0]]])
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
        raise RecipeError(
            f"{what}: direction {k} of {len(directions)} lies in the span of the others. Leave it out; it removes "
            "nothing more."
        )
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
