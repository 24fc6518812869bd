"""One look for every figure: size, fonts, colours, panels, intervals, and PNG bytes that the content alone decides."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol

__all__ = [
    "BLUE",
    "COLOURS",
    "GREY",
    "INK",
    "ORANGE",
    "band",
    "bars",
    "dash",
    "heat_map",
    "in_house_style",
    "label",
    "legend_below",
    "panels",
    "png",
    "whiskers",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Those of Okabe and Ito, which people with colour-blindness tell apart; the first two also differ in lightness."""

BLUE, ORANGE = COLOURS[:2]
GREY, INK = "#8c8c8c", "#333333"

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

P = ParamSpec("P")


class Interval(Protocol):
    """A number with the ends of its interval, which are NaN where there is none."""

    @property
    def value(self) -> float:
        """The estimate."""

    @property
    def low(self) -> float:
        """The lower end."""

    @property
    def high(self) -> float:
        """The upper end."""


def in_house_style(draw: Callable[P, Any]) -> Callable[P, Any]:
    """Have a function draw its figure, which :func:`png` saves, in the house style, whatever the user's own is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        from matplotlib import style

        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return drawn


def panels(
    count: int, *, size: tuple[float, float], title: str = "", columns: int = 0, **share: Any
) -> tuple[Any, list[Any]]:
    """Make a figure of some inches with panels side by side, or in rows of so many columns.

    ``share`` takes ``sharex`` and ``sharey``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    if title.strip():
        figure.suptitle(title.strip())
    across = min(columns or count, count)
    axes = list(figure.subplots(math.ceil(count / across), across, squeeze=False, **share).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def label(
    axis: Any, across: str = "", up: str = "", *, title: str = "", zero: bool = False, whole: bool = False
) -> None:
    """Name what a panel shows below it, beside it and above it, draw a line at zero, and tick whole numbers below."""
    axis.set(xlabel=across, ylabel=up, title=title)
    if whole:
        axis.xaxis.get_major_locator().set_params(integer=True)
    if zero:
        axis.axhline(0, color=INK, linewidth=0.8)


def legend_below(figure: Any, columns: int, **more: Any) -> None:
    """Put one legend for all panels below them, each name once."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=max(1, columns), **more)


def band(axis: Any, x: Sequence[float], found: Sequence[Interval], colour: str, name: str = "", **line: Any) -> None:
    """Draw a line of estimates, to which ``line`` gives its look, in the band of their intervals."""
    axis.plot(x, [e.value for e in found], **{"marker": "o", "color": colour, "label": name or None} | line)
    low = [e.value if math.isnan(e.low) else e.low for e in found]
    high = [e.value if math.isnan(e.high) else e.high for e in found]
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def dash(axis: Any, height: float, name: str = "", colour: str = GREY) -> None:
    """Draw a dashed line across a panel, for what others are compared with."""
    axis.axhline(height, color=colour, linestyle="--", linewidth=0.9, label=name or None)


def bars(
    axis: Any,
    places: Sequence[Any],
    found: Sequence[Interval],
    colour: str | Sequence[str],
    name: str = "",
    *,
    width: float = 0.8,
    lying: bool = False,
) -> None:
    """Draw a bar for each estimate (``lying``: from left to right), and a line for each interval."""
    values, reach = [e.value for e in found], whiskers(found)
    line: dict[str, Any] = {"fmt": "none", "ecolor": INK, "elinewidth": 0.9, "capsize": 2.5}
    if lying:
        axis.barh(places, values, height=width, color=colour, label=name or None)
        axis.errorbar(values, places, xerr=reach, **line)
    else:
        axis.bar(places, values, width=width, color=colour, label=name or None)
        axis.errorbar(places, values, yerr=reach, **line)


def whiskers(found: Sequence[Interval]) -> list[list[float]]:
    """How far intervals reach below and above their estimates, for ``errorbar``; 0 where an end is not known."""
    below = [0.0 if math.isnan(e.low) else max(0.0, e.value - e.low) for e in found]
    above = [0.0 if math.isnan(e.high) else max(0.0, e.high - e.value) for e in found]
    return [below, above]


def heat_map(axis: Any, table: Sequence[Sequence[float]], columns: Sequence[str], **look: Any) -> None:
    """Draw a table as a map with the look of ``imshow``, its first row at the bottom, with its scale beside it."""
    image = axis.imshow(table, origin="lower", aspect="auto", **look)
    axis.figure.colorbar(image, ax=axis)
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)


def png(figure: Any) -> bytes:
    """Save a figure as PNG; the same content gives the same bytes, whatever the time and the user's own settings."""
    from matplotlib import style

    data = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure.savefig(data, format="png", bbox_inches="tight", metadata={"Software": None})
    return data.getvalue()
