"""What the cells of a sweep have found: one table, one figure a metric, and what the report says of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_interp.core.measure.statistics import Estimate, counted
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.run_lock import CHILDREN
from lightning_interp.core.storage.sweep_cells import NOT_RUN, cell_key, cell_status, value_text
from lightning_interp.errors import RecipeError
from lightning_interp.figures import COLOURS, band, in_house_style, label, legend_below, panels
from lightning_interp.running.catalog import nearest
from lightning_interp.running.outcome import RecipeResult
from lightning_interp.running.results import read_metrics

__all__ = ["CellRow", "chosen_metrics", "flattened", "metric_figure", "read_cells", "sweep_result"]

_LINES = ("-", "--", ":", "-.")
_LOG_SPAN = 50  # largest by smallest value from which on an axis is logarithmic


@dataclass(frozen=True)
class CellRow:
    """What is known of a cell: its values, how its last start ended, its numbers, and what its run says of itself."""

    key: str
    values: dict[str, Any]
    status: str
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)


def flattened(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested metrics by dotted name; texts, lists and what is not known are left out.

    Example:
        >>> dict(flattened({"loss": 0.5, "score": {"value": 2, "method": "bootstrap"}}))
        {'loss': 0.5, 'score.value': 2}
    """
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def read_cells(folder: Path, grid: Mapping[str, Sequence[Any]], now: Sequence[str] = ()) -> list[CellRow]:
    """Read the cells of a grid from a sweep's folder; of those that are not in ``now`` only what has begun.

    Args:
        folder: The sweep's folder.
        grid: All values by setting; the last setting varies fastest.
        now: Keys of the cells that are asked for, which stand in the table before they have begun.
    """
    rows = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        key = cell_key(values)
        status, message = cell_status(folder, key)
        if status == NOT_RUN and key not in now:
            continue
        more: dict[str, Any] = {}
        if status == "finished":
            path = folder / CHILDREN / key
            more = {"metrics": dict(flattened(read_metrics(path / "metrics.json")))}
            more["outcome"] = read_manifest(path)["outcome"]
        rows.append(CellRow(key, values, status, message, **more))
    return rows


def chosen_metrics(rows: Sequence[CellRow], asked: Sequence[str] = ()) -> list[str]:
    """Return the metrics to show: those that are asked for, else the recipe's first number; none without results.

    A number with an interval has one name, without ``.value`` behind it.

    Raises:
        RecipeError: If no finished cell has a metric of that name.
    """
    known = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if not known:
        return []
    names = list(dict.fromkeys(name.removesuffix(".value") for name in known))
    for name in asked:
        if name not in names and name not in known:
            raise RecipeError(f"--metric {name!r}: the cells have no such number. {nearest(name, names)}")
    return list(dict.fromkeys(asked)) or names[:1]


def sweep_result(
    name: str, rows: Sequence[CellRow], grid: Mapping[str, Sequence[Any]], metrics: Sequence[str]
) -> RecipeResult:
    """Put the cells of a sweep into tables, figures and sentences.

    Args:
        name: The recipe's name.
        rows: The cells.
        grid: All values by setting.
        metrics: What to show, as :func:`chosen_metrics` gives it.
    """
    finished = [row for row in rows if row.status == "finished"]
    found = {metric: {row.key: _estimate(row, metric).value for row in finished} for metric in metrics}
    outcomes = [row.outcome for row in finished]
    shared = [text for text in (outcomes[0]["caveats"] if outcomes else []) if _everywhere(text, outcomes)]
    figures = {_file_name(metric): metric_figure(finished, grid, metric) for metric in metrics}
    return RecipeResult(
        metrics={"cells": len(rows), "finished": len(finished), "values": found},
        tables={
            "summary": [_summary_row(row, metrics) for row in rows],
            "cells": [_whole_row(row, rows) for row in rows],
        },
        figures=figures,
        question=f"How do the results of {name} depend on {' and '.join(grid)}?",
        findings=[
            f"{len(finished)} of {counted(len(rows), 'cell')} finished.",
            *(_range(metric, finished) for metric in metrics),
        ],
        captions={_file_name(metric): _caption(grid) for metric in metrics},
        terms=outcomes[0].get("terms", {}) if outcomes else {},
        caveats=[
            "The best of many cells looks better than it is: what is chosen by these numbers is confirmed by others.",
            *([] if len(finished) == len(rows) else ["Some cells are missing, and figures show what there is."]),
            *shared,
        ],
        summary="summary",
    )


@in_house_style
def metric_figure(rows: Sequence[CellRow], grid: Mapping[str, Sequence[Any]], metric: str) -> Any:
    """Draw a metric over the first setting that is a number, with a line for each combination of the others.

    Cells that differ in a seed alone are one point, their mean, in the band from the lowest to the highest; a single
    cell's band is the metric's own interval, where it has one.
    """
    across, lines, _ = _roles(grid)
    numeric = _is_numeric(grid[across])
    figure, (axis,) = panels(1, size=(6.4, 4.2))
    combinations = list(itertools.product(*(grid[name] for name in lines)))
    for number, combination in enumerate(combinations):
        mine = [row for row in rows if [row.values[name] for name in lines] == list(combination)]
        points = [
            (
                value if numeric else place,
                _pooled([_estimate(row, metric) for row in mine if row.values[across] == value]),
            )
            for place, value in enumerate(grid[across])
        ]
        there = sorted((x, point) for x, point in points if point is not None)
        if there:
            name = ", ".join(f"{key}={value_text(value)}" for key, value in zip(lines, combination, strict=True))
            look = {"linestyle": _LINES[number // len(COLOURS) % len(_LINES)] if numeric else ""}
            xs, found = [x for x, _ in there], [Estimate(*point, 1, 0.0, "") for _, point in there]
            band(axis, xs, found, COLOURS[number % len(COLOURS)], name, **look)
    _scale(axis, grid[across], numeric)
    label(axis, across, metric)
    if lines:
        legend_below(figure, min(4, len(combinations)))
    return figure


def _roles(grid: Mapping[str, Sequence[Any]]) -> tuple[str, list[str], list[str]]:
    """The setting across the figure, those that make its lines, and seeds, over which it pools."""
    seeds = [name for name in grid if name.rpartition(".")[2].endswith("seed")]
    others = [name for name in grid if name not in seeds] or seeds[:1]
    across = next((name for name in others if _is_numeric(grid[name])), others[0])
    return across, [name for name in others if name != across], [name for name in seeds if name != across]


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _scale(axis: Any, values: Sequence[Any], numeric: bool) -> None:
    if not numeric:
        axis.set_xticks(range(len(values)), [value_text(value) for value in values])
        return
    many = len(set(values)) > 1 and min(values) > 0
    base = 2 if many and all(math.log2(value).is_integer() for value in values) else 10
    if many and (base == 2 or max(values) / min(values) >= _LOG_SPAN):
        axis.set_xscale("log", base=base)
        axis.minorticks_off()
    axis.set_xticks(sorted(values), [value_text(value) for value in sorted(values)])


def _estimate(row: CellRow, metric: str) -> Estimate:
    """A cell's number, with its interval where it has one."""
    if metric in row.metrics:
        return Estimate(float(row.metrics[metric]), math.nan, math.nan, 1, 0.0, "")
    value, low, high = (float(row.metrics.get(f"{metric}.{end}", math.nan)) for end in ("value", "low", "high"))
    return Estimate(value, low, high, 1, 0.0, "")


def _pooled(found: Sequence[Estimate]) -> tuple[float, float, float] | None:
    """Mean, lowest and highest; of one number its own interval."""
    known = [one for one in found if math.isfinite(one.value)]
    if len(known) < 2:
        return (known[0].value, known[0].low, known[0].high) if known else None
    values = [one.value for one in known]
    return math.fsum(values) / len(values), min(values), max(values)


def _caption(grid: Mapping[str, Sequence[Any]]) -> str:
    across, lines, seeds = _roles(grid)
    parts = [f"Each point is one cell over {across}"]
    if seeds:
        parts = [f"Each point is the mean over {' and '.join(seeds)} at one {across}, its band lowest and highest"]
    if lines:
        parts.append(f"a line for each {' and '.join(lines)}")
    return f"{', '.join(parts)}. The order along a line says nothing of a cell that is missing."


def _summary_row(row: CellRow, metrics: Sequence[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for metric in metrics:
        found = _estimate(row, metric)
        known = math.isfinite(found.value)
        shown[metric] = None if not known else found.value if math.isnan(found.low) else str(found)
    return {**row.values, "status": row.status, **shown}


def _whole_row(row: CellRow, rows: Sequence[CellRow]) -> dict[str, Any]:
    taken = {"cell", "status", "message", *row.values}
    numbers = {f"{name} (metric)" if name in taken else name: value for name, value in row.metrics.items()}
    why = {"message": row.message} if any(other.message for other in rows) else {}
    return {"cell": row.key, **row.values, "status": row.status, **why, **numbers}


def _range(metric: str, rows: Sequence[CellRow]) -> str:
    known = [row for row in rows if math.isfinite(_estimate(row, metric).value)]
    if not known:
        return f"{metric}: no cell has a number."
    ends = [pick(known, key=lambda row: _estimate(row, metric).value) for pick in (min, max)]
    low, high = (f"{_estimate(row, metric).value:.3g} ({_named(row)})" for row in ends)
    return f"{metric}: from {low} to {high}."


def _named(row: CellRow) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in row.values.items())


def _everywhere(text: str, outcomes: Sequence[Mapping[str, Any]]) -> bool:
    return all(text in outcome.get("caveats", ()) for outcome in outcomes)


def _file_name(metric: str) -> str:
    kept = "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "._-" else "_" for letter in metric)
    return kept.strip("._-")[:80] or "metric"
