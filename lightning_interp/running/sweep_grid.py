"""The grid of a sweep: values of a recipe's settings, read by the recipe's own fields before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_interp.core.storage.files import canonical_json, jsonable
from lightning_interp.core.storage.run_lock import CHILDREN
from lightning_interp.core.storage.sweep_cells import cell_key, value_text
from lightning_interp.errors import InterpError, RecipeError
from lightning_interp.running.asked import built, recipe_class
from lightning_interp.running.catalog import RecipeSource, nearest
from lightning_interp.running.recipe import Recipe
from lightning_interp.running.settings import option_key, read_values

__all__ = ["Cell", "Grid", "base_of", "cells_of", "chosen_cells", "read_grid", "split_values"]

K = TypeVar("K", bound="Keyed")

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_YAML_BOOLEANS = ("y", "n", "yes", "no", "on", "off")
_OPEN, _CLOSED = "[{(", "]})"
_MOST_CELLS = 10_000


@dataclass(frozen=True)
class Grid:
    """Values by setting, each once as a plain value and once as it was written.

    Attributes:
        values: Plain values of the recipe's own type by setting.
        texts: The same as texts, which the recipe's own reader of settings takes.
    """

    values: dict[str, list[Any]]
    texts: dict[str, list[str]]

    def overrides(self, places: Sequence[int]) -> list[str]:
        """The settings of a cell, one value of each axis, as options."""
        return [f"--{key}={texts[place]}" for (key, texts), place in zip(self.texts.items(), places, strict=True)]


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep.

    Attributes:
        key: The name of its folder, a hash of its values.
        values: The grid's values by setting.
        recipe: The recipe with these values, whose ``run_dir`` is the cell's own folder. ``recipe.run()`` runs it
            alone, in any process, while the sweep's own run is closed.
    """

    key: str
    values: dict[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        """Its values to be read: ``rank=2, lr=0.001``."""
        return ", ".join(f"{name}={value_text(value)}" for name, value in self.values.items())


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes.

    Example:
        >>> split_values("1,2"), split_values("[1,2],[3]"), split_values("'a,b',c")
        (['1', '2'], ['[1,2]', '[3]'], ["'a,b'", 'c'])
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "," and not depth:
            parts.append("")
            continue
        depth += 0 if quote else (letter in _OPEN) - (letter in _CLOSED)
        parts[-1] += letter
    return [part.strip() for part in parts]


def read_grid(
    options: Sequence[str], source: RecipeSource, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> Grid:
    """Read ``--grid`` options such as ``rank=1,2,4`` or ``trainer.max_epochs=1,2``.

    Args:
        options: One text an axis. A recipe's own setting ``grid`` is one too: ``grid=[1,2]``, with one value or more.
        source: The recipe, whose fields decide which settings there are and of what type.
        overrides: The settings that all cells share, as options.
        imports: Modules whose classes the settings may name.

    Raises:
        RecipeError: If an option is no setting with values, the recipe has no such setting, a value does not fit it or
            is there twice, or a setting is no part of what a run computes.
    """
    if not options:
        raise RecipeError("A sweep needs a grid. Give --grid SETTING=VALUE,VALUE for each setting that varies.")
    texts: dict[str, list[str]] = {}
    names = {field.name for field in fields(recipe_class(source))}
    for option in options:
        key, given, listed = option.partition("=")
        if not _KEY.fullmatch(key) or not given or not all(split_values(listed)):
            own = " The recipe's own setting grid, too: --grid grid=VALUE." if "grid" in names else ""
            raise RecipeError(f"--grid {option!r}: expected a setting and its values, as rank=1,2,4.{own}")
        _check_axis(key, texts, recipe_class(source), overrides)
        texts[key] = split_values(listed)
    if (count := _product(texts)) > _MOST_CELLS:
        raise RecipeError(f"The grid has {count:,} cells, and {_MOST_CELLS:,} are the most. Give fewer values.")
    cls, modules = recipe_class(source), [name for name in imports if not name.endswith(".py")]
    first = _required(cls, texts)
    values = {
        key: [_typed(cls, source, [*overrides, *first], key, text, modules) for text in listed]
        for key, listed in texts.items()
    }
    for key, typed in values.items():
        if twice := [value for place, value in enumerate(typed) if _same_in(value, typed[:place])]:
            raise RecipeError(f"--grid {key}: the value {value_text(twice[0])} is there twice. Give each value once.")
    return Grid(values, texts)


def cells_of(
    grid: Grid, source: RecipeSource, folder: Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> list[Cell]:
    """Build the recipe of each cell, which checks all settings; the last axis varies fastest.

    Args:
        grid: The grid.
        source: The recipe.
        folder: The sweep's folder.
        overrides: The settings that all cells share, as options.
        imports: Modules whose classes the settings may name.

    Raises:
        RecipeError: If the recipe refuses the settings of a cell, whose values are named.
    """
    cells = []
    for places in itertools.product(*(range(len(values)) for values in grid.values.values())):
        values = {key: grid.values[key][place] for key, place in zip(grid.values, places, strict=True)}
        key = cell_key(values)
        own = [*overrides, *grid.overrides(places), f"--run_dir={folder / CHILDREN / key}"]
        try:
            cells.append(Cell(key, values, built(source, own, imports)))
        except InterpError as error:
            raise RecipeError(f"Cell {', '.join(grid.overrides(places))}: {error}") from error
    return cells


def base_of(
    source: RecipeSource, overrides: Sequence[str], texts: Mapping[str, Sequence[str]], imports: Sequence[str]
) -> Recipe:
    """Build the recipe that the cells share; of the grid it has what has no default, which no cell shares."""
    return built(source, [*overrides, *_required(recipe_class(source), texts)], imports)


class Keyed(Protocol):
    """A cell of any grid, as far as choosing one needs it."""

    @property
    def key(self) -> str:
        """The name of its folder."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The grid's values by setting."""


def chosen_cells(cells: Sequence[K], only: Sequence[str]) -> list[K]:
    """Return the cells that ``--only`` options name, by values of a setting (``rank=1,2``) or by a cell's own name.

    Each option leaves fewer cells; names of cells count as one option.

    Raises:
        RecipeError: If a setting, a value or a name is none of the grid's.
    """
    names = [name for option in only if "=" not in option for name in split_values(option)]
    known = [cell.key for cell in cells]
    for name in names:
        if name not in known:
            raise RecipeError(f"--only {name!r} is no cell of this grid. {nearest(name, known)}")
    chosen = [cell for cell in cells if not names or cell.key in names]
    for option in only:
        key, given, listed = option.partition("=")
        if given:
            wanted = _wanted(key, split_values(listed), cells)
            chosen = [cell for cell in chosen if _same_in(cell.values[key], wanted)]
    return chosen


def _wanted(key: str, texts: Sequence[str], cells: Sequence[Keyed]) -> list[Any]:
    axes = cells[0].values
    if key not in axes:
        raise RecipeError(f"--only {key}: the grid has no setting {key!r}. {nearest(key, axes)}")
    known = {value_text(cell.values[key]): cell.values[key] for cell in cells}
    wanted = []
    for text in texts:
        same = [value for name, value in known.items() if name == text or _as_number(name) == _as_number(text) != text]
        if not same:
            raise RecipeError(f"--only {key}={text}: the grid has no such value. It has {', '.join(known)}.")
        wanted += same
    return wanted


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_axis(key: str, others: Mapping[str, Any], cls: type[Recipe], overrides: Sequence[str]) -> None:
    if key in others:
        raise RecipeError(f"--grid {key} is there twice. Give all its values in one: --grid {key}=VALUE,VALUE.")
    for other in (*others, *filter(None, map(option_key, overrides))):
        if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
            raise RecipeError(f"--grid {key} and {other!r} decide the same setting. Leave one of them out.")
    if any(f"{key}.".startswith(f"{free}.") for free in cls.identity_free()):
        raise RecipeError(
            f"--grid {key}: this setting says where or how a run is computed and shown, not what, so its cells would "
            f"be equal. Give it once: --{key}=..."
        )


def _required(cls: type[Any], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The first value of each axis that has no default, as options."""
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    return [f"--{key}={texts[key][0]}" for key in texts if key.partition(".")[0] in needed]


def _typed(
    cls: type[Any], source: RecipeSource, overrides: Sequence[str], key: str, text: str, modules: Sequence[str]
) -> Any:
    """Return what the recipe's own fields make of a value, as a plain value."""
    value: Any = read_values(cls, source, [*overrides, f"--{key}={text}"], modules)
    for part in key.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    if isinstance(value, bool) and text.lower() in _YAML_BOOLEANS:
        raise RecipeError(
            f"--grid {key}={text}: YAML reads {text!r} as {str(value).lower()}. Write true or false; where it is meant "
            "as a name, the setting takes no names."
        )
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return jsonable(plain, where=f"--grid {key}")


def _same_in(value: Any, others: Sequence[Any]) -> bool:
    return canonical_json(value) in map(canonical_json, others)


def _product(texts: Mapping[str, Sequence[str]]) -> int:
    count = 1
    for listed in texts.values():
        count *= len(listed)
    return count
