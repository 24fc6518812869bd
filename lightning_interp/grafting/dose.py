"""Doses: a donor's weights mixed with the recipient's, module by module.

Linear maps, embeddings and norms are linear in their parameters, so ``(1 - a) f(x; recipient) + a f(x; donor)`` is
``f(x; (1 - a) recipient + a donor)``, and the dose ``a`` may carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_interp.core.hooks.intervention import split_output
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.dropout import Cell
from lightning_interp.grafting.plan import GraftRule

__all__ = ["Doses", "check_doses", "dosed", "dosed_delta"]

Doses = Mapping[str, torch.Tensor]


def dosed(
    plain: Callable[..., Any],
    change: Callable[..., Any],
    dose: float | str,
    doses: Doses,
    layer: int | None,
) -> Callable[..., Any]:
    """A map at a dose: ``change`` itself at 1, else what lies between.

    Args:
        plain: The recipient's map.
        change: The donor's map.
        dose: A number, or a key of ``doses``.
        doses: Tensors, scalar or ``[L]``; read at every call, so that an optimiser may move them.
        layer: Which value of ``[L]``.

    Returns:
        A map of the same arguments.

    Example:
        >>> dosed(lambda x: x, lambda x: 3 * x, 0.5, {}, None)(torch.ones(1))
        tensor([2.])
    """
    if dose == 1:
        return change

    def between(*args: Any, **kwargs: Any) -> torch.Tensor:
        own, other = split_output(plain(*args, **kwargs))[0], split_output(change(*args, **kwargs))[0]
        share = _share(dose, doses, layer)
        return own + (share.to(own) if isinstance(share, torch.Tensor) else share) * (other - own)

    return between


def dosed_delta(
    delta: Callable[[torch.Tensor], torch.Tensor], dose: float | str, doses: Doses, layer: int | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a donor adds, at a dose; see :func:`dosed`."""
    if dose == 1:
        return delta

    def between(x: torch.Tensor) -> torch.Tensor:
        whole, share = delta(x), _share(dose, doses, layer)
        return (share.to(whole) if isinstance(share, torch.Tensor) else share) * whole

    return between


def check_doses(rule: GraftRule, cells: set[Cell], doses: Doses, n_layers: int) -> None:
    """Refuse doses that do not fit.

    Args:
        rule: A rule.
        cells: What it grafts.
        doses: Tensors by name.
        n_layers: Blocks of the model.

    Raises:
        RecipeError: If a named dose is missing or has the wrong shape, or a cell is not linear in its parameters.
    """
    if rule.dose in (0, 1):
        return
    if any(name == "moe" for name, _ in cells):
        raise RecipeError(
            f"dose={rule.dose!r} on 'moe' is no mixture of weights: a router is not linear in its parameters. Use 0 or "
            "1 there, or name other components."
        )
    if not isinstance(rule.dose, str):
        return
    if rule.dose not in doses:
        raise RecipeError(
            f"A rule has dose={rule.dose!r}, but the doses are {', '.join(doses) or 'none'}. Pass "
            f"Graft(..., doses={{{rule.dose!r}: tensor}})."
        )
    shape = tuple(doses[rule.dose].shape)
    if shape not in ((), (n_layers,)):
        raise RecipeError(f"The dose {rule.dose!r} has shape {shape}; expected a scalar or [{n_layers}] (one a layer).")
    outside = sorted(name for name, layer in cells if layer is None)
    if shape and outside:
        raise RecipeError(
            f"The dose {rule.dose!r} has one value a layer, but the rule grafts {', '.join(outside)} too, which is in "
            "no layer. Name components inside of blocks ('BLOCK'), or pass a scalar."
        )


def _share(dose: float | str, doses: Doses, layer: int | None) -> float | torch.Tensor:
    if not isinstance(dose, str):
        return dose
    value = doses[dose]
    return value if value.dim() == 0 or layer is None else value[layer]
