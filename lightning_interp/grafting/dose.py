"""Doses: a donor's weights mixed with the recipient's, module by module, by numbers or by tensors that learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_interp.core.weights.holders import Dose
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.dropout import Cell
from lightning_interp.grafting.plan import GraftRule

__all__ = ["Doses", "check_doses", "dose_of"]

Doses = Mapping[str, torch.Tensor]


def dose_of(dose: float | str, doses: Doses) -> Dose:
    """The dose of a rule for each layer: a number, or ``doses[dose]`` (scalar or ``[L]``) read anew at every call."""
    if not isinstance(dose, str):
        return dose
    name = dose

    def of_layer(layer: int | None) -> torch.Tensor:
        value = doses[name]
        return value if value.dim() == 0 or layer is None else value[layer]

    return of_layer


def check_doses(rule: GraftRule, cells: set[Cell], doses: Doses, n_layers: int) -> None:
    """Refuse a named dose that is missing or has a wrong shape, and doses of cells not linear in their parameters."""
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
