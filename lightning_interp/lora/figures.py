"""Figures of adapters: what one does at each token of a text."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_interp.errors import RecipeError
from lightning_interp.figures import heat_map, in_house_style, label, panels
from lightning_interp.lora.trace_result import AdapterTrace

__all__ = ["trace_figure"]

Value = Literal["relative", "norm", "scalar", "coordinate"]
_NAMES = {
    "relative": "branch / output of the base",
    "norm": "norm of the branch",
    "scalar": "A x",
    "coordinate": "along the first direction",
}
_MOST = 40  # characters of a token
_BLANKS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


@in_house_style
def trace_figure(
    trace: AdapterTrace,
    tokenizer: Any = None,
    ids: torch.Tensor | None = None,
    *,
    row: int = 0,
    value: Value = "relative",
    module: str | None = None,
    title: str = "",
) -> Any:
    """A heat map over a text: its tokens from left to right, layers from the bottom up (outside of blocks last).

    Of several modules in a layer ``norm`` is the root of the sum of squares, and ``relative`` is their branches' over
    their bases'; ``scalar`` and ``coordinate`` are signed, and need one module.

    Args:
        trace: What an adapter did.
        tokenizer: Spells the tokens; without one their ids are shown.
        ids: Token ids ``[B, T]``, where the model was given embeddings.
        row: Which row of the batch.
        value: ``relative``, ``norm``, ``scalar`` (of rank 1) or ``coordinate`` (the first one).
        module: Only modules of this name below their block, such as ``mlp.down_proj``.
        title: Above the map.

    Raises:
        RecipeError: If ``value`` is unknown, no module has that name, or a signed value is asked of several modules.
    """
    if value not in _NAMES:
        raise RecipeError(f"trace_figure(value={value!r}): expected {', '.join(_NAMES)}.")
    names = sorted({each.name for each in trace.modules})
    if module is not None and module not in names:
        raise RecipeError(f"trace_figure(module={module!r}): the adapter sits on {', '.join(names)}.")
    if module is None and value in ("scalar", "coordinate") and len(names) > 1:
        raise RecipeError(f"trace_figure(value={value!r}) has a sign: name one module=, of {', '.join(names)}.")
    chosen = [m for m, each in enumerate(trace.modules) if module in (None, each.name)]
    tokens = list(trace.tokens(row, tokenizer, ids))
    layers = sorted({trace.modules[m].layer for m in chosen}, key=lambda layer: (layer is None, layer))
    columns = torch.tensor([column for column, _, _ in tokens])
    table = []
    for layer in layers:
        of_layer = [m for m in chosen if trace.modules[m].layer == layer]
        table.append(_line(trace, row, of_layer, value)[columns].tolist())
    width = max(4.0, 0.22 * len(tokens) + 1.6)
    figure, (axis,) = panels(1, size=(width, max(2.2, 0.2 * len(layers) + 1.6)), title=title)
    signed = value in ("scalar", "coordinate")
    reach = max((abs(x) for line in table for x in line if x == x), default=1.0)
    look = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if signed else {"cmap": "viridis", "vmin": 0.0}
    heat_map(axis, table, [_shown(token) for _, _, token in tokens], **look)
    axis.tick_params(axis="x", rotation=90)
    axis.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers])
    label(axis, "", "layer", title=f"{_NAMES[value]}{f', {module}' if module else ''}")
    return figure


def _line(trace: AdapterTrace, row: int, modules: list[int], value: Value) -> torch.Tensor:
    """One number for each column of a row."""
    if value == "scalar":
        return trace.scalars[row, :, modules[0]]
    if value == "coordinate":
        return trace.coordinates[row, :, modules[0], 0]
    branch = trace.norms[row][:, modules].double()
    total = branch.square().sum(dim=1).sqrt()
    if value == "norm":
        return total
    return total / trace.bases[row][:, modules].double().square().sum(dim=1).sqrt()


def _shown(token: Any) -> str:
    """A token's text with its blanks to be seen, and with the numbers of characters that the figure's font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    text = str(token).translate({ord(blank): mark for blank, mark in _BLANKS.items()})[:_MOST]
    return "".join(c if font.get_char_index(ord(c)) else f"\\u{ord(c):x}" for c in text).replace("$", r"\$")
