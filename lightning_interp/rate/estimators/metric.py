"""Rewrite-based effects as a metric: rewards arrive in any batches on any processes, and a unit counts once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.core.measure.clustered import Vector
from lightning_interp.core.measure.seeding import hashed_number
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.columns import check_lengths, shown
from lightning_interp.rate.estimators.effects import Settings, rate_effects
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.estimators.unit_table import STAGES

__all__ = ["RewriteTreatmentEffect", "unit_key"]

_WIDTH = 5  # high and low half of the id, stage, label, reward
_HALF = 2**32


def unit_key(unit: int | str) -> int:
    """The integer by which a unit is known in every process."""
    if isinstance(unit, str):
        return hashed_number(unit)
    if isinstance(unit, bool) or not isinstance(unit, int) or not -(2**63) <= unit < 2**63:
        raise DataError(f"Unit id {unit!r:.80} is no string and no integer of 64 bits. Give every unit such an id.")
    return unit


class RewriteTreatmentEffect(Metric):
    """Rewrite-based effects of an attribute on a reward, gathered over batches and processes.

    Each reward comes with the id of its unit and its stage, so the three rewards of a unit may arrive in different
    batches and processes, and what a sampler repeats counts once. The estimator is that of Reber et al. (arXiv
    2410.11348). ``compute`` returns plain numbers; ``result`` holds everything.

    Args:
        se, ci, alpha, n_boot, seed: See :func:`~lightning_interp.rate.estimators.effects.rate_effects`.
        missing: ``"raise"`` or ``"drop"`` for units of which a reward has not arrived.
        tolerance: How far repeated rewards of one text may lie apart, in standard deviations of all rewards.

    Example:
        >>> metric = RewriteTreatmentEffect()
        >>> for stage, rewards in (("rewrite", [1.0, 1.0, 2.0, 1.0]), ("rewrite2", [2.0, 2.0, 1.0, 0.0])):
        ...     metric.update(["a", "b", "c", "d"], stage, torch.tensor(rewards), torch.tensor([1, 1, 0, 0]))
        >>> float(metric.compute()["ate"])
        1.0
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(
        self,
        *,
        se: str = "paired",
        ci: str = "auto",
        alpha: float = 0.05,
        n_boot: int = 2000,
        seed: int = 0,
        missing: str = "raise",
        tolerance: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if se == "cluster":
            raise RecipeError(
                "RewriteTreatmentEffect has se='cluster', but it gathers no clusters. Gather the rewards and call "
                "rate_effects(cluster=...)."
            )
        self.settings = Settings(se, ci, alpha, n_boot, seed, missing=missing)
        self.tolerance = tolerance
        self.result: RateResult | None = None
        """What the last ``compute`` was made of; its ids are those of :func:`unit_key`."""
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Float64, also for what a process without any data sends to the others."""
        return torch.float64

    def update(self, ids: Any, stage: str | Sequence[str], rewards: Tensor, w: Any) -> None:
        """Add rewards.

        Args:
            ids: Units, integers or strings, ``[n]``.
            stage: ``"original"``, ``"rewrite"`` or ``"rewrite2"``: one for all, or one each.
            rewards: Of the texts, ``[n]``.
            w: Whether the unit's original has the attribute, 0 or 1, ``[n]``, whatever the stage.

        Raises:
            DataError: If the shapes differ, or an id, stage or label cannot be used.
        """
        values = torch.as_tensor(rewards).detach().cpu().double()
        labels = torch.as_tensor(w).detach().cpu().double()
        names = ids.tolist() if hasattr(ids, "tolist") else [getattr(one, "item", lambda one=one: one)() for one in ids]
        stages = [stage] * len(names) if isinstance(stage, str) else list(stage)
        _check(names, stages, values, labels)
        keys = torch.tensor([unit_key(name) for name in names], dtype=torch.int64)
        numbers = torch.tensor([STAGES.index(one) for one in stages], dtype=torch.int64)
        # One state of one type: a 64-bit id would not survive as one float64, its halves do.
        columns = (keys.div(_HALF, rounding_mode="floor"), keys.remainder(_HALF), numbers, labels, values)
        packed = torch.stack([column.double() for column in columns], dim=1)
        self.rows.append(packed.flatten().to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Estimate from all rewards.

        Returns:
            Scalars ``ate``, ``att``, ``atu``, their ``_se``, ``n``, and where there are original rewards ``naive``,
            ``single`` (the ATE of the single rewrite), their ``_se`` and ``reward_std``.

        Raises:
            DataError: If nothing has arrived, a unit is incomplete, or one id stands for several texts.
        """
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(rows, Tensor) or rows.numel() == 0:
            raise DataError("RewriteTreatmentEffect has no rewards, so there is no effect. Call update() first.")
        ids, w, rewards = _unit_table(rows.cpu().reshape(-1, _WIDTH).numpy(), self.tolerance)
        original = None if all(reward is None for reward in rewards[0]) else rewards[0]
        self.result = rate_effects(w, original, *rewards[1:], ids=ids, **asdict(self.settings))
        numbers = self.result.numbers().items()
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in numbers}

    def reset(self) -> None:
        """Forget all rewards and the last result."""
        super().reset()
        self.result = None

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> RewriteTreatmentEffect:
        # A module that is cast to half precision must not take the ids with it: rewards only change their device.
        super()._apply(fn, exclude_state=["rows", *exclude_state])
        held: Any = self.rows
        moved: Any = held.to(self.device) if isinstance(held, Tensor) else [row.to(self.device) for row in held]
        self.rows = moved
        return self


def _check(names: Sequence[Any], stages: Sequence[str], values: Tensor, labels: Tensor) -> None:
    for name, tensor in (("rewards", values), ("w", labels)):
        if tensor.ndim != 1:
            raise DataError(f"{name} has the shape {list(tensor.shape)}; expected one axis, one value a text.")
    check_lengths("ids", len(names), [("stage", stages), ("rewards", values), ("w", labels)], one="value a reward")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise DataError(f"Stage {unknown[0]!r} is unknown; expected one of {', '.join(map(repr, STAGES))}.")
    if wrong := [label for label in labels.tolist() if label not in (0.0, 1.0)]:
        raise DataError(f"w holds {wrong[0]!r}; expected 0 or 1, the attribute of the unit's original text.")


def _unit_table(rows: NDArray[np.float64], tolerance: float) -> tuple[list[int], list[int], list[list[float | None]]]:
    """Ids, labels, and for each stage one reward a unit: the smallest of those that came, in whatever order."""
    ids, unit = np.unique(rows[:, 0].astype(np.int64) * _HALF + rows[:, 1].astype(np.int64), return_inverse=True)
    finite = rows[np.isfinite(rows[:, 4]), 4]
    limit = tolerance * float(finite.std()) if finite.size else 0.0
    units, low, high = _ends(unit, rows[:, 3])
    _refuse(ids[units[low != high]], "labels of both arms")
    labels = low.astype(int).tolist()
    table = np.full((ids.size, len(STAGES)), None, dtype=object)
    places, low, high = _ends(unit * len(STAGES) + rows[:, 2].astype(np.int64), rows[:, 4])
    known = np.isfinite(low) & np.isfinite(high)  # others are for the policy of missing rewards to judge
    apart = np.subtract(high, low, out=np.zeros_like(low), where=known) > limit
    _refuse(ids[np.unique(places[apart] // len(STAGES))], f"rewards of one stage over {limit:.3g} apart")
    table.reshape(-1)[places] = low.tolist()
    return ids.tolist(), labels, table.T.tolist()


def _ends(group: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], Vector, Vector]:
    """The groups in order, with the smallest and the largest value of each; NaN if it holds one."""
    order = np.argsort(group, kind="stable")
    groups, starts = np.unique(group[order], return_index=True)
    return groups, np.minimum.reduceat(values[order], starts), np.maximum.reduceat(values[order], starts)


def _refuse(ids: NDArray[np.int64], what: str) -> None:
    if ids.size:
        raise DataError(
            f"{ids.size} unit ids came with {what}: {shown(ids.tolist())} (strings as unit_key() hashes them). Give "
            "every unit an id of its own, and score its texts in evaluation mode."
        )
