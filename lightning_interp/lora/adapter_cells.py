"""Adapters that are trained together: what each is given, what becomes of it, and the batches of all in one pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_interp.errors import RecipeError
from lightning_interp.models.training.lora import LoraSettings
from lightning_interp.models.training.metric import IGNORED
from lightning_interp.models.training.optimisation import Optimisation, check_settings, plain

if TYPE_CHECKING:
    from lightning_interp.models.data.text_data import TextDataModule

__all__ = ["AdapterCell", "CellResult", "batches_from", "check_cells", "joined"]

_OURS = {"max_epochs": "max_epochs", "max_steps": "max_steps", "gradient_clip_val": "clip"}


@dataclass(frozen=True, kw_only=True)
class AdapterCell:
    """One adapter of many that are trained at once: what it is, on which rows, and until when.

    Attributes:
        key: Its name, also of its folder.
        data: Its own batches in their own order, or rows for a :class:`TextDataModule` of the cell's seed.
        lora: The adapter; DoRA cannot be trained so.
        optimisation: How it is trained.
        seed: Root seed of its start, its dropout and, if rows are given, of their order.
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
        simple = bool(self.key) and self.key not in (".", "..") and not set(self.key) & set("/\\\0")
        clipped = self.clip is None or (self.clip > 0 and math.isfinite(self.clip))
        wanted = {
            "key": (simple, "the name of a folder, without slashes"),
            "max_steps": (bool(limits), "max_steps or max_epochs, as it would never end"),
            "max_epochs": (all(limit >= 1 for limit in limits), "max_epochs and max_steps of at least 1"),
            "clip": (clipped, "a number above 0, or None"),
            "lora": (not self.lora.use_dora, "use_dora=False: DoRA scales whole weights, which rows cannot share"),
        }
        check_settings(self, f"Adapter cell {self.key!r}", wanted)

    def steps(self, an_epoch: int) -> int:
        """Number of its steps, if a pass over its rows takes ``an_epoch``."""
        limits = (self.max_epochs and self.max_epochs * an_epoch, self.max_steps)
        return min(limit for limit in limits if limit)

    def to_dict(self) -> dict[str, Any]:
        """All but its rows, as values that a checkpoint can hold."""
        names = ("key", "seed", "max_epochs", "max_steps", "clip")
        own = {name: getattr(self, name) for name in names}
        return own | {"lora": self.lora.to_dict(), "optimisation": plain(self.optimisation)}


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What became of one cell.

    Attributes:
        key: Its name.
        status: ``finished``, or ``failed`` if its loss, gradient or weights were not finite.
        folder: The PEFT folder of a finished adapter; None if it failed.
        why: What failed, and at which step.
        losses: Mean cross entropy of its labelled tokens, in nats, at each step.
        steps: Steps of its optimiser.
        update_norm: Frobenius norm of what the adapter adds to the base, over all modules; None if it failed.
    """

    key: str
    status: Literal["finished", "failed"]
    folder: Path | None
    why: str = ""
    losses: tuple[float, ...] = ()
    steps: int = 0
    update_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As values that a checkpoint or a JSON file can hold; the folder by its name alone."""
        return asdict(self) | {"folder": self.folder and self.folder.name, "losses": list(self.losses)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], out: Path) -> CellResult:
        """What :meth:`to_dict` gave, for a folder inside ``out``."""
        folder = out / values["folder"] if values["folder"] else None
        return cls(**{**values, "folder": folder, "losses": tuple(values["losses"])})


def check_cells(cells: Sequence[AdapterCell], trainer: Mapping[str, Any]) -> None:
    """Refuse cells that cannot be trained together, and arguments of a Trainer that are a cell's part."""
    if not cells:
        raise RecipeError("train_adapters_together got no cells. Give one AdapterCell an adapter.")
    key, times = Counter(cell.key for cell in cells).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"{times} cells have the key {key!r}, so they would be written into one folder. Rename them.")
    for name, own in _OURS.items():
        if name in trainer:
            raise RecipeError(
                f"The Trainer cannot be given {name}, as each cell has its own. Set AdapterCell({own}=...)."
            )
    if trainer.get("accumulate_grad_batches", 1) != 1:
        raise RecipeError("Adapters that are trained together accumulate no gradients. Give their data larger batches.")
    checkpointing = [cell.optimisation.gradient_checkpointing for cell in cells]
    if any(checkpointing) and not (all(checkpointing) and not any(cell.lora.dropout for cell in cells)):
        raise RecipeError(
            "gradient_checkpointing recomputes the passes of all cells, and would draw their dropout anew: set it in "
            "every cell, with lora dropout of 0, or in none."
        )


def batches_from(loader: Any, done: int) -> Iterator[dict[str, Tensor]]:
    """Batches of a :class:`ResumableLoader` behind its first ``done``, epoch after epoch without end."""
    epoch, skipped = divmod(done, len(loader))
    for number in count(epoch):
        loader.sampler.set_epoch(number)
        loader.load_state_dict({"batches": skipped})
        yield from loader
        skipped = 0


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches one below the other, all padded on the right to the longest.

    Example:
        >>> one, two = ({"input_ids": torch.ones(1, n), "labels": torch.ones(1, n)} for n in (1, 2))
        >>> joined([one, two])["labels"]
        tensor([[   1., -100.],
                [   1.,    1.]])
    """
    width = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"labels": IGNORED}
    return {
        name: torch.cat(
            [F.pad(b[name], (0, width - b[name].shape[1]), value=fill.get(name, 0)) for b in batches],
        )
        for name in batches[0]
    }
