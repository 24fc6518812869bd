"""Batches of token ids in an order that depends on seed and epoch alone, and that a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.tokens.batches import padded
from lightning_interp.models.data.encoding import EncodedRow
from lightning_interp.models.training.metric import IGNORED

__all__ = ["Collator", "EpochSampler", "ResumableLoader", "TokenDataset"]


class TokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Encoded rows in memory: ids and, for each, whether it is scored.

    A negative index ``~i`` gives row ``i`` with nothing scored: the filler of a validation share.
    """

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self._ids = [torch.tensor(row.ids, dtype=torch.int32) for row in rows]
        self._scored = [torch.tensor(row.scored, dtype=torch.bool) for row in rows]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index < 0:
            return self._ids[~index], torch.zeros_like(self._scored[~index])
        return self._ids[index], self._scored[index]


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of a batch.

    Attributes:
        pad_id: The id of padding; what is padding is told by the mask alone, so it may be the end token's.

    Example:
        >>> rows = [(torch.tensor([5, 6]), torch.tensor([False, True])), (torch.tensor([7]), torch.tensor([True]))]
        >>> batch = Collator(0)(rows)
        >>> {name: tensor.tolist() for name, tensor in batch.items()}
        {'input_ids': [[5, 6], [7, 0]], 'attention_mask': [[1, 1], [1, 0]], 'labels': [[-100, 6], [7, -100]]}
    """

    pad_id: int

    def __call__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Make a batch."""
        input_ids, attention_mask = padded([ids for ids, _ in rows], self.pad_id)
        labels, _ = padded([torch.where(scored, ids.long(), IGNORED) for ids, scored in rows], IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class EpochSampler(DistributedSampler[int]):
    """Row indices in an order that depends on seed and epoch alone, shared out over processes.

    Lightning leaves it as it is (it is a ``DistributedSampler``) and tells it the epoch. ``n`` processes with batches
    of ``b`` rows see together the same batches as one process with batches of ``n * b``. Processes get equally many
    rows: in training some rows are seen twice for that, otherwise fillers that score nothing are put in.

    Args:
        size: Number of rows.
        seed: Root seed.
        shuffle: Whether this is training: a new order each epoch.
        rank: This process.
        world_size: Number of processes.

    Example:
        >>> sampler = EpochSampler(5, seed=0, shuffle=True)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> first, list(sampler)
        ([1, 4, 3, 2, 0], [0, 1, 3, 2, 4])
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        # The base class asks only for the number of rows.
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle)  # type: ignore[arg-type]
        self.root_seed = seed
        self.start = 0  # rows of this process that a resumed epoch has seen already

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        order = list(range(size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.root_seed, "order", self.epoch))
            order = torch.randperm(size, generator=generator).tolist()
        fillers = list(islice(cycle(order), self.total_size - size))
        order += fillers if self.shuffle else [~index for index in fillers]
        yield from order[self.rank : self.total_size : self.num_replicas][self.start :]


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader that a run which was saved in the middle of an epoch continues at the next batch.

    Attributes:
        processed: Gives how many batches the trainer has finished in this epoch; if None, those given out count.
    """

    processed: Callable[[], int] | None = None
    _done = 0
    _skip = 0

    def __iter__(self) -> Any:
        self._done, self._skip = self._skip, 0
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = self._done * (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches that are done in this epoch."""
        return {"batches": self._done if self.processed is None else self.processed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass begin behind these batches; a finished epoch is followed by a whole one."""
        self._skip = state["batches"] if state["batches"] < len(self) else 0
