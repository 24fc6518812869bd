"""Train several adapters at once over one frozen base, each as if it were trained alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_interp.errors import RecipeError
from lightning_interp.models.data.text_data import TextDataModule
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.optimisation import Optimisation, check_settings

__all__ = ["AdapterCell", "CellResult", "train_adapters_together"]


@dataclass(frozen=True, kw_only=True)
class AdapterCell:
    """One adapter of many that are trained at once: what it is, on which rows, and until when.

    Attributes:
        key: Its name, also of its folder.
        data: Its own batches in their own order, or rows for a :class:`TextDataModule` of the cell's seed.
        lora: The adapter; DoRA cannot be trained so.
        optimisation: How it is trained.
        seed: Root seed of its start, its dropout and the order of rows.
        max_epochs: Passes over its rows after which it is finished.
        max_steps: Steps after which it is finished, if that is earlier.
        clip: Norm to which its gradient is clipped; None for no bound.

    Raises:
        RecipeError: If a value is out of range.

    Example:
        >>> cell = AdapterCell(key="r1", data=[{"text": "1, 2"}], optimisation=Optimisation(lr=1e-3), max_steps=3)
        >>> cell.lora.r, cell.seed
        (16, 0)
    """

    key: str
    data: TextDataModule | Sequence[Mapping[str, Any]]
    optimisation: Optimisation
    lora: LoraSettings = field(default_factory=LoraSettings)
    seed: int = 0
    max_epochs: int | None = None
    max_steps: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.max_epochs, self.max_steps) if limit is not None]
        plain = bool(self.key) and self.key not in (".", "..") and not set(self.key) & set("/\\\0")
        clipped = self.clip is None or (self.clip > 0 and math.isfinite(self.clip))
        wanted = {
            "key": (plain, "the name of a folder, without slashes"),
            "max_steps": (bool(limits), "max_steps or max_epochs, as it would never end"),
            "max_epochs": (all(limit >= 1 for limit in limits), "max_epochs and max_steps of at least 1"),
            "clip": (clipped, "a number above 0, or None"),
            "lora": (not self.lora.use_dora, "use_dora=False: the norms of DoRA are not shared by rows"),
        }
        check_settings(self, f"Adapter cell {self.key!r}", wanted)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What became of one cell.

    Attributes:
        key: Its name.
        status: ``finished``, or ``failed`` if its loss or gradient was not finite.
        folder: The PEFT folder of a finished adapter; None if it failed.
        why: What failed, and at which step.
        losses: Mean cross entropy of its labelled tokens, in nats, at each step.
        steps: Steps of its optimiser.
        update_norm: Frobenius norm of what the adapter adds to the base, over all modules; NaN if it failed.
    """

    key: str
    status: Literal["finished", "failed"]
    folder: Path | None
    why: str = ""
    losses: tuple[float, ...] = ()
    steps: int = 0
    update_norm: float = math.nan


def train_adapters_together(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    cells: Sequence[AdapterCell],
    out: Path,
    *,
    trainer: Mapping[str, Any] | None = None,
    checkpoint_every: int | None = None,
    on_end: Callable[[CellResult], None] | None = None,
) -> list[CellResult]:
    """Train adapters of any rank, target and rate in common passes over one frozen base.

    Args:
        model: A source for :func:`load_causal_lm`, or a loaded model without adapter, which stays as it is.
        tokenizer: Makes batches of cells that are given as rows; taken from the source if None.
        cells: The adapters, each with rows, optimiser, schedule and end of its own.
        out: Folder of checkpoints and, below each cell's key, of the PEFT folders.
        trainer: Arguments of ``lightning.Trainer``.
        checkpoint_every: Steps between checkpoints, from which a killed run goes on; None for one whenever a cell ends.
        on_end: Called with the result of each cell at the moment it ends.

    Returns:
        A result a cell, in their order.

    Raises:
        RecipeError: If there is no cell, or a key comes twice.
    """
    if not cells:
        raise RecipeError("train_adapters_together got no cells. Give one AdapterCell an adapter.")
    raise NotImplementedError
