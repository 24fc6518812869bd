"""Batches of token ids in an order that depends on seed and epoch alone, and that a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.tokens.batches import padded
from lightning_interp.models.data.encoding import EncodedRow
from lightning_interp.models.training.metric import IGNORED

__all__ = [
    "EpochSampler",
    "LengthWindow",
    "ResumableLoader",
    "RowDataset",
    "bucketed",
    "padding_of",
    "token_batch",
    "token_dataset",
]


class RowDataset(Dataset[Any]):
    """Rows in memory. A negative index ``~i`` gives row ``i`` as a filler, which a validation share does not count."""

    def __init__(self, rows: Iterable[Any], filler: Callable[[Any], Any]) -> None:
        self._rows, self._filler = list(rows), filler

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._filler(self._rows[~index]) if index < 0 else self._rows[index]


def token_dataset(rows: Iterable[EncodedRow]) -> RowDataset:
    """Encoded rows as two tensors each: ids and, for each, whether it is scored; in a filler nothing is."""
    tensors = ((torch.tensor(r.ids, dtype=torch.int32), torch.tensor(r.scored, dtype=torch.bool)) for r in rows)
    return RowDataset(tensors, _unscored)


def _unscored(row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return row[0], torch.zeros_like(row[1])


def token_batch(rows: Sequence[tuple[Tensor, Tensor]], *, pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the right; what is padding is told by the mask alone, so ``pad_id`` may be the end token's."""
    input_ids, attention_mask = padded([ids for ids, _ in rows], pad_id)
    labels, _ = padded([torch.where(scored, ids.long(), IGNORED) for ids, scored in rows], IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def bucketed(
    order: Sequence[int], lengths: Sequence[int], batch: int, window: int, generator: torch.Generator
) -> list[int]:
    """The same rows in an order whose batches hold rows of like length.

    Rows are sorted by length within ``window`` batches at a time, and the batches are shuffled; the rows that fill no
    batch stay at the end.

    Example:
        >>> order = bucketed(range(5), [3, 1, 3, 1, 2], 2, 50, torch.Generator().manual_seed(0))
        >>> sorted([sorted(order[:2]), sorted(order[2:4])]), order[4:]
        ([[0, 2], [1, 3]], [4])
    """
    whole = len(order) - len(order) % batch
    parts = [order[start : min(start + window * batch, whole)] for start in range(0, whole, window * batch)]
    rows = [index for part in parts for index in sorted(part, key=lengths.__getitem__)]
    batches = torch.randperm(whole // batch, generator=generator).tolist()
    return [index for number in batches for index in rows[number * batch : (number + 1) * batch]] + list(order[whole:])


def padding_of(order: Sequence[int], lengths: Sequence[int], batch: int) -> int:
    """Tokens of padding, if rows of these lengths come in this order in batches of ``batch``.

    Example:
        >>> padding_of([0, 2, 1], [3, 1, 2], 2)
        1
    """
    sizes = [[lengths[index] for index in order[start : start + batch]] for start in range(0, len(order), batch)]
    return sum(len(rows) * max(rows) - sum(rows) for rows in sizes)


class LengthWindow(NamedTuple):
    """How rows of like length come together in training."""

    lengths: Sequence[int]  # tokens of each row
    batch: int  # rows a batch and process
    window: int  # batches of all processes that are sorted at a time


class EpochSampler(DistributedSampler[int]):
    """Row indices in an order that depends on seed and epoch alone, shared out over processes.

    Lightning leaves it as it is (it is a ``DistributedSampler``) and tells it the epoch. ``n`` processes with batches
    of ``b`` rows see together the same batches as one process with batches of ``n * b``. Processes get equally many
    rows: in training some rows are seen twice for that, otherwise fillers that score nothing are put in. With a
    :class:`LengthWindow` a shuffled order is that of :func:`bucketed`, and all this holds as well.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        lengths: LengthWindow | None = None,
    ) -> None:
        # The base class asks only for the number of rows.
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle)  # type: ignore[arg-type]
        self.root_seed = seed
        self.lengths = lengths
        self.start = 0  # rows of this process that a resumed epoch has seen already

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        order = list(range(size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.root_seed, "order", self.epoch))
            order = torch.randperm(size, generator=generator).tolist()
            if self.lengths is not None:
                lengths, batch, window = self.lengths
                order = bucketed(order, lengths, batch * self.num_replicas, window, generator)
        fillers = list(islice(cycle(order), self.total_size - size))
        order += fillers if self.shuffle else [~index for index in fillers]
        yield from order[self.rank : self.total_size : self.num_replicas][self.start :]

    @property
    def key(self) -> int | list[int]:
        """What the order depends on beside the epoch: the root seed, and the window if there is one."""
        return self.root_seed if self.lengths is None else [self.root_seed, self.lengths.window]

    def padding(self) -> dict[str, int]:
        """Tokens of padding in this process's epoch, with the :class:`LengthWindow` and without."""
        found, window = {}, self.lengths
        if window is not None:
            found["padding"] = padding_of(list(self), window.lengths, window.batch)
            self.lengths = None
            found["padding_unsorted"] = padding_of(list(self), window.lengths, window.batch)
            self.lengths = window
        return found


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader that a run which was saved in the middle of an epoch continues at the next batch."""

    processed: Callable[[], int] | None = None  # batches that the trainer has finished; if None, those given out count
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
