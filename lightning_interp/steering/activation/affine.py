"""Steering by an affine map of the activation, in full or of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_interp.core.model.sites import Site
from lightning_interp.errors import RecipeError
from lightning_interp.steering.activation.intervention import Dose, Steering
from lightning_interp.steering.activation.placement import Sites, as_sites, place
from lightning_interp.steering.vectors.reading import as_direction, check_finite, frozen, numbers_of

__all__ = ["AffineMap"]


class AffineMap(Steering):
    """Map the activation affinely: ``x -> A x + b``.

    Args:
        matrix: ``A`` ``[d, d]``; or a tuple ``(U [d, r], V [r, d])`` for ``A = I + U V``, a change of low rank. None
            leaves ``x`` and adds the bias. A mapping from sites gives each its own.
        bias: ``b`` ``[d]``; None for 0. A mapping from sites gives each its own.
        site: One site or several. Left out, the keys of the mapping.
        **dose: Of :class:`~lightning_interp.steering.activation.intervention.Steering`; ``strength`` is the share of
            the way from ``x`` to its image.

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
            f"{what} got {shapes} with a bias {list(b.shape)}; expected [d, d], or a tuple of U [d, r] and V [r, d], "
            "and a bias [d]."
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
