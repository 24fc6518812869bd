"""Cells of a model: one canonical component in one layer, the smallest thing whose weights can be chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import SiteError

__all__ = ["Cell", "cells_of"]

Cell = tuple[str, int | None]
"""Name of a component and its layer; None for what is outside of the blocks, as ``embed`` and ``unembed``."""


def cells_of(
    model_map: ModelMap, name: str, members: Iterable[str], layers: Collection[int], *, shared: bool = False
) -> set[Cell]:
    """Cells that a component, or a group of them, has in some layers.

    Args:
        model_map: The model.
        name: What messages call them.
        members: Canonical names.
        layers: Indices of blocks.
        shared: Also those outside of the blocks.

    Raises:
        SiteError: If the model has none of them there.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> sorted(cells_of(ModelMap.build(tiny_model("gpt2")), "mlp", ("up", "gate", "down"), [1]))
        [('down', 1), ('up', 1)]
    """
    members = tuple(members)
    found: set[Cell] = {(n, None) for n in members if n in model_map.shared} if shared else set()
    found |= {(n, layer) for layer in layers for n in members if n in model_map.components[layer]}
    if not found:
        present = ", ".join([*model_map.shared, *dict.fromkeys(n for table in model_map.components for n in table)])
        raise SiteError(
            f"{type(model_map.model).__name__} has no component {name!r} in these layers. It has: {present}."
        )
    return found
