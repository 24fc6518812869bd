"""Maps of a model: one plan for each cell of a (layer x component) or (layer x position) grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_interp.core.model.sites import resolve_layers
from lightning_interp.core.tokens.positions import FromBatch, Last, Positions
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.plan import GraftPlan, GraftRule

__all__ = ["GraftGrid", "component_grid", "layer_grid"]


@dataclass(frozen=True)
class GraftGrid:
    """Plans with their places in a map.

    Attributes:
        rows: Labels of the rows: first layer of each window, from the embedding up.
        columns: Labels of the columns: components or positions.
        plans: Plans by name.
        cells: Name of the plan in each (row, column).
        title: What the map shows.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    plans: dict[str, GraftPlan] = field(repr=False)
    cells: dict[tuple[str, str], str] = field(repr=False)
    title: str = ""


def component_grid(
    n_layers: int,
    *,
    positions: Positions = Last(),  # noqa: B008  a frozen dataclass
    components: Sequence[str] = ("ATTN", "O", "FFN"),
    width: int = 1,
    base: GraftPlan | None = None,
    necessity: bool = False,
    source: str = "donor",
    label: str = "LT",
) -> GraftGrid:
    """One plan for each (layer, component) at some positions.

    At the last token all of these plans share the prompt before it, so a map of hundreds costs little more than their
    last tokens.

    Args:
        n_layers: Blocks of the model.
        positions: Where.
        components: Columns; names or groups.
        width: Layers in each window, which slides by one. A single layer alone often moves little.
        base: Rules that hold besides, such as the entity's tokens grafted in full.
        necessity: Graft everything at the positions *except* the cell.
        source: Name of the donor.
        label: Name of the positions, for plan names and titles.

    Returns:
        The grid.

    Raises:
        RecipeError: If the window is no window of the model, or there is no component.

    Example:
        >>> grid = component_grid(4, components=["q", "o"], width=2)
        >>> len(grid.plans), grid.rows, grid.cells["L2-3", "o"]
        (6, ('L0-1', 'L1-2', 'L2-3'), 'LT L2-3 o')
    """
    if not components:
        raise RecipeError("component_grid(components=[]) has no column; name at least one component.")
    rules = {name: (positions, name, source) for name in components}
    title = f"all of {label} except one component" if necessity else f"one component at {label}"
    return _grid(n_layers, width, rules, base, necessity, title, lambda row, column: f"{label} {row} {column}")


def layer_grid(
    n_layers: int,
    positions: Mapping[str, Positions] | None = None,
    *,
    components: str = "BLOCK",
    width: int = 1,
    base: GraftPlan | None = None,
    necessity: bool = False,
    source: str = "donor",
) -> GraftGrid:
    """One plan for each (layer, position).

    Args:
        n_layers: Blocks of the model.
        positions: Columns by name; default ``FE``, ``LT`` and ``FE+LT``.
        components: What is grafted in the layer.
        width: Layers in each window, which slides by one.
        base: Rules that hold besides.
        necessity: Graft everything at the positions *except* the cell.
        source: Name of the donor.

    Returns:
        The grid.

    Raises:
        RecipeError: If the window is no window of the model.

    Example:
        >>> grid = layer_grid(4)
        >>> grid.columns, len(grid.plans)
        (('FE', 'LT', 'FE+LT'), 12)
    """
    entity, last = FromBatch("FE"), Last()
    places = dict(positions) if positions is not None else {"FE": entity, "LT": last, "FE+LT": entity | last}
    rules = {name: (where, components, source) for name, where in places.items()}
    title = f"everything there except {components} of one layer" if necessity else f"{components} of one layer"
    return _grid(n_layers, width, rules, base, necessity, title, lambda row, column: f"{column} {row} {components}")


def _grid(
    n_layers: int,
    width: int,
    rules: Mapping[str, tuple[Positions, str, str]],
    base: GraftPlan | None,
    necessity: bool,
    title: str,
    named: Callable[[str, str], str],
) -> GraftGrid:
    if not 1 <= width <= n_layers:
        raise RecipeError(f"A window of width={width} is no window of {n_layers} layers; expected 1 to {n_layers}.")
    plans: dict[str, GraftPlan] = {}
    cells: dict[tuple[str, str], str] = {}
    rows = []
    for first in range(n_layers - width + 1):
        window = f"{first}-{first + width - 1}" if width > 1 else str(first)
        rows.append(f"L{window}")
        for column, (positions, component, source) in rules.items():
            layers = tuple(sorted(resolve_layers(window, n_layers)))
            rule = GraftRule(positions, (component,), layers, source, others=necessity)
            name = named(rows[-1], column)
            plans[name] = GraftPlan((*base.rules, rule), base.head, base.final_norm) if base else GraftPlan((rule,))
            cells[rows[-1], column] = name
    return GraftGrid(tuple(rows), tuple(rules), plans, cells, title)
