"""A grid of adapters as data: ranks, learning rates, targets and seeds, with full finetuning beside them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_interp.core.model.components import maps_of
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.storage.sweep_cells import cell_key, value_text
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.lora.gate_spec import GATE_MODULES
from lightning_interp.models.training.lora import LoraSettings

__all__ = ["FULL", "GridCell", "LoraGrid", "check_ranks", "target_modules"]

FULL = "full"
"""Stands for the rank of a cell whose weights are all trained."""

_ALL = "all-linear"
Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class GridCell:
    """One training of a grid.

    Args:
        rank: Of the adapter, whose alpha is the rank, so that its update has the scale 1 at each; None trains all
            weights.
        lr: Learning rate.
        targets: What carries the adapter: ``all-linear``, a preset, or names of modules; see :func:`target_modules`.
        data_seed: Which data set.
        training_seed: Of the adapter's start and the order of rows.
        more: Values of further axes, which the caller's data knows.

    Example:
        >>> GridCell(8, 1e-3).label, GridCell(None, 1e-5).values["rank"]
        ('rank=8, lr=0.001, targets=all-linear, data_seed=0, training_seed=0', 'full')
    """

    rank: int | None
    lr: float
    targets: Targets = _ALL
    data_seed: int = 0
    training_seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """What tells it from the other cells, as plain values."""
        targets = self.targets if isinstance(self.targets, str) else "+".join(self.targets)
        seeds = {"data_seed": self.data_seed, "training_seed": self.training_seed}
        return {"rank": self.rank or FULL, "lr": self.lr, "targets": targets, **seeds, **self.more}

    @property
    def key(self) -> str:
        """Its name: the hash of its values, the same in every grid."""
        return cell_key(self.values)

    @property
    def label(self) -> str:
        """Its values, to be read."""
        return ", ".join(f"{name}={value_text(value)}" for name, value in self.values.items())

    def lora(self, model: nn.Module | ModelMap) -> LoraSettings | None:
        """The adapter's settings in a model; None if all weights are trained."""
        if self.rank is None:
            return None
        return LoraSettings(r=self.rank, alpha=self.rank, target_modules=target_modules(model, self.targets))


@dataclass(frozen=True, kw_only=True)
class LoraGrid:
    """Adapters of all ranks at all learning rates, on all targets, for each data set and training seed.

    At one learning rate the update grows with the rank, so a grid of ranks alone compares sizes of updates too.

    Args:
        ranks: Ranks of adapters.
        learning_rates: Learning rates of adapters.
        targets: ``all-linear``, presets (``attn``, ``ffn``), or lists of names of modules.
        data_seeds: Data sets.
        training_seeds: Trainings for each data set.
        full_finetuning: Learning rates at which all weights are trained too, behind the adapters.
        more: Further axes, such as ``{"arm": ["trait", "control"]}``, which vary fastest.

    Raises:
        RecipeError: If an axis is empty, has a value twice, or one that cannot be.

    Example:
        >>> grid = LoraGrid(ranks=[1, 8], learning_rates=[1e-4, 1e-3], full_finetuning=[1e-5])
        >>> [(cell.rank, cell.lr) for cell in grid.cells()]
        [(1, 0.0001), (1, 0.001), (8, 0.0001), (8, 0.001), (None, 1e-05)]
    """

    ranks: Sequence[int]
    learning_rates: Sequence[float]
    targets: Sequence[str | Sequence[str]] = (_ALL,)
    data_seeds: Sequence[int] = (0,)
    training_seeds: Sequence[int] = (0,)
    full_finetuning: Sequence[float] = ()
    more: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = {"ranks": 1, "data_seeds": 0, "training_seeds": 0}
        axes = {**{name: getattr(self, name) for name in whole}, "learning_rates": self.learning_rates}
        for name, values in {
            **axes,
            "targets": self.targets,
            **self.more,
            "full_finetuning": self.full_finetuning,
        }.items():
            texts = [value_text(value) for value in values]
            if (not texts and name != "full_finetuning") or len(set(texts)) < len(texts) or isinstance(values, str):
                raise RecipeError(f"LoraGrid({name}={values!r}): expected a list of values, each of them once.")
        for name, least in whole.items():
            for value in axes[name]:
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise RecipeError(f"LoraGrid({name}): {value!r} is no whole number of at least {least}.")
        for value in (*self.learning_rates, *self.full_finetuning):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise RecipeError(f"LoraGrid: the learning rate {value!r} is no number above 0.")
        for targets in self.targets:
            _check_preset(targets)

    def cells(self) -> list[GridCell]:
        """The cells, full finetuning last."""
        adapters = itertools.product(self.targets, self.ranks, self.learning_rates)
        kinds: list[tuple[Any, int | None, float]] = [*adapters, *((_ALL, None, lr) for lr in self.full_finetuning)]
        further = [dict(zip(self.more, values, strict=True)) for values in itertools.product(*self.more.values())]
        return [
            GridCell(rank, lr, targets if isinstance(targets, str) else tuple(targets), data, training, more)
            for targets, rank, lr in kinds
            for data, training, more in itertools.product(self.data_seeds, self.training_seeds, further)
        ]


def target_modules(model: nn.Module | ModelMap, targets: str | Sequence[str]) -> str | list[str]:
    """Return names of modules as PEFT matches them.

    Args:
        model: The model.
        targets: ``all-linear``; ``attn`` or ``ffn``, the maps of attention or feed-forward by whatever names the family
            gives them; or the names themselves.

    Raises:
        RecipeError: If a preset is unknown.
        IncompatibleModelError: If the model has no such map.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> target_modules(tiny_model("gpt2"), "attn"), target_modules(tiny_model("llama"), "ffn")
        (['attn.c_attn', 'attn.c_proj'], ['mlp.down_proj', 'mlp.gate_proj', 'mlp.up_proj'])
    """
    _check_preset(targets)
    if not isinstance(targets, str):
        return list(targets)
    if targets == _ALL:
        return _ALL
    found = {path.rpartition(f".{layer}.")[2] for layer, path in _paths(_map(model), targets)}
    if not found:
        raise IncompatibleModelError(f"{type(_map(model).model).__name__} has no maps of {targets!r} to adapt.")
    return sorted(found)


def check_ranks(model: nn.Module | ModelMap, cells: Sequence[GridCell]) -> None:
    """Refuse a rank that no map of its targets can have.

    Raises:
        IncompatibleModelError: Naming the rank and the largest map.
    """
    by_path = {
        path: module for path, module in _map(model).model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    head = _map(model).head
    for targets in dict.fromkeys(cell.targets for cell in cells if cell.rank is not None):
        names = target_modules(model, targets)
        maps = {
            path: min(module.weight.shape)
            for path, module in by_path.items()
            if module is not head and (names == _ALL or any(f".{path}".endswith(f".{name}") for name in names))
        }
        rank = max(cell.rank or 0 for cell in cells if cell.targets == targets)
        if maps and rank > max(maps.values()):
            path = max(maps, key=lambda path: maps[path])
            raise IncompatibleModelError(
                f"Rank {rank} is above the size of every map of {targets!r}: the largest, {path}, has {maps[path]}. "
                "Give smaller ranks, or train all weights."
            )


def _paths(model_map: ModelMap, preset: str) -> list[tuple[int, str]]:
    paths = {id(module): path for path, module in model_map.model.named_modules()}
    return [
        (layer, paths[id(part.module)])
        for name, layer, _ in model_map.cells()
        if layer is not None and name in GATE_MODULES[preset]
        for part in maps_of(model_map.parts(name, layer))
        if isinstance(part.module, nn.Linear | Conv1D)
    ]


def _map(model: nn.Module | ModelMap) -> ModelMap:
    return model if isinstance(model, ModelMap) else ModelMap.build(model)


def _check_preset(targets: Any) -> None:
    presets = (_ALL, *GATE_MODULES)
    if isinstance(targets, str) and targets not in presets:
        raise RecipeError(
            f"targets={targets!r} is no preset: expected one of {', '.join(presets)}, or a list of names of modules."
        )
    if not isinstance(targets, str) and not (targets and all(isinstance(name, str) and name for name in targets)):
        raise RecipeError(f"targets={targets!r}: expected a preset ({', '.join(presets)}) or a list of names.")
