"""Tables and progress bars: Rich on a terminal, plain text or nothing elsewhere."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from lightning_interp.progress import ProgressBar, progress_bar

__all__ = [
    "ProgressBar",
    "columns",
    "plain_table",
    "print_table",
    "progress_bar",
    "shown",
    "shown_column",
    "shown_rows",
]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(value: Any) -> str:
    """Return a table cell as a person reads it: three significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.4g}"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))  # a terminal would obey them


def shown_column(values: Sequence[Any]) -> list[str]:
    """Return the cells of one column, numbers with equally many decimals so that they can be compared at a glance.

    A number that would read as zero without being it keeps its first digit.
    """
    numbers = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(map(abs, numbers), default=0.0)
    if not numbers or not 1e-4 <= largest < 1e5:
        return [shown(value) for value in values]
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    while decimals and all(f"{value:.{decimals}f}".endswith("0") for value in numbers):
        decimals -= 1
    return [_with_decimals(value, decimals) for value in values]


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of all rows in the order in which they first appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def shown_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of a table as texts, row by row, in the order of :func:`columns`."""
    by_column = [shown_column([row.get(name) for row in rows]) for name in columns(rows)]
    return [list(line) for line in zip(*by_column, strict=True)] or [[] for _ in rows]


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table as text, numbers to the right."""
    names = columns(rows)
    cells = [names, *([cell.replace("\n", " ") for cell in line] for line in shown_rows(rows))]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    numeric = [_is_numeric(rows, name) for name in names]
    lines = [_line(line, widths, numeric) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], file: IO[str] | None = None) -> None:
    """Print a table: with Rich on a terminal, as plain text elsewhere."""
    out = file or sys.stdout
    if not out.isatty():
        print(f"{title}\n{plain_table(rows)}", file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in columns(rows):
        table.add_column(Text(name), justify="right" if _is_numeric(rows, name) else "left")
    for line in shown_rows(rows):
        table.add_row(*map(Text, line))
    Console(file=out).print(table)


def _with_decimals(value: Any, decimals: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return shown(value)
    text = f"{value:.{decimals}f}"
    return f"{value:.1g}" if value and not float(text) else text


def _is_numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    return all(value is None or isinstance(value, int | float) for value in values)


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    sides = (">" if right else "<" for right in numeric)
    return "  ".join(f"{c:{side}{width}}" for c, side, width in zip(cells, sides, widths, strict=True)).rstrip()
