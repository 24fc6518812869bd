"""The LightningDataModule for text: JSONL, lists or ``datasets`` in, padded batches with labels out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.batching import (
    EpochSampler,
    LengthWindow,
    ResumableLoader,
    RowDataset,
    token_batch,
    token_dataset,
)
from lightning_interp.models.data.encoding import EncodedRow, Encoder
from lightning_interp.models.data.packing import packed_batch, packed_dataset, rows_together
from lightning_interp.models.data.rows import Row, read_rows

__all__ = ["TextDataModule", "TooLong", "vocabulary_of"]

TooLong = Literal["truncate", "error"]


class TextDataModule(L.LightningDataModule):
    """Text for :class:`CausalLM`, with labels on what the model should learn to write and nowhere else.

    A row has one of four forms; other keys are ignored:

    - ``{"text": ...}``: every token is scored;
    - ``{"prompt": ..., "completion": ...}``: the completion is scored. The prompt keeps exactly the ids that it has
      alone; a space between the two is yours to write;
    - ``{"messages": [{"role": ..., "content": ...}, ...]}``: in the chat template, the assistant's turns scored;
    - ``{"prompt_ids": [...], "completion_ids": [...]}``: token ids, used as they are: nothing is put before, between or
      behind them. The completion is scored; with an empty prompt a whole document is, but for its first token, which
      nothing predicts.

    The order of training rows depends on seed and epoch alone, so a resumed run sees the batches of an uninterrupted
    one, and several processes see together those of one process with a larger batch.

    Args:
        train: A file (JSONL, a JSON list, CSV, TSV or Parquet), a folder of ``datasets``' ``save_to_disk``, a list of
            rows, or a ``datasets.Dataset``.
        tokenizer: The model's tokenizer.
        val: The same for validation; there is none if None.
        batch_size: Rows a batch and process.
        max_length: Tokens a row may have.
        seed: Root seed of the order.
        num_workers: Processes that make batches; the rows are in memory, so more than 0 seldom helps.
        chat: Turn prompt and completion into a user's and an assistant's turn of the chat template.
        system_prompt: System text of conversations without one; None keeps the template's own, ``""`` has an empty one.
        add_eos: Whether texts and completions end with the end token (conversations end as the template says).
        too_long: Cut the ends of longer rows and count them, or raise. A row with nothing scored left is left out.
        length_window: Give training batches rows of like length: rows are sorted within that many batches at a time,
            and the batches shuffled; 0 for none.
        packing: Put several rows (and none in parts) into one of up to ``max_length`` tokens; ``batch_size`` counts
            these. Each keeps positions of its own and reads itself alone, so the loss is that of the rows one by one;
            batches have ``position_ids`` and no ``attention_mask``. Models that cannot do so are refused.

    Attributes:
        counts: After ``setup``, for each split: ``rows`` used, ``tokens``, ``scored`` tokens, ``truncated`` and
            ``dropped`` rows, and ``split`` rows (whose parts were tokenised one by one). With ``packing``, how many
            are ``packed`` rows, and how many tokens more would fit into them (``unfilled``). With ``length_window``,
            once there is a loader, the tokens of ``padding`` in this process's first epoch, and ``padding_unsorted``.

    Raises:
        RecipeError: If an argument has a wrong value.
        DataError: If the tokenizer lacks a chat template that is needed. ``setup`` raises it with file and line.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+3=", "completion": "6"}]
        >>> data = TextDataModule(rows, tokenizer=byte_tokenizer(), batch_size=2)
        >>> data.setup("fit")
        >>> data.counts["train"]["scored"], next(iter(data.train_dataloader()))["labels"].shape
        (4, torch.Size([2, 6]))
    """

    _batch: Callable[..., dict[str, Tensor]] = staticmethod(token_batch)

    def __init__(
        self,
        train: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        val: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any | None = None,
        batch_size: int = 16,
        max_length: int = 1024,
        seed: int = 0,
        num_workers: int = 0,
        chat: bool = False,
        system_prompt: str | None = None,
        add_eos: bool = True,
        too_long: TooLong = "truncate",
        length_window: int = 0,
        packing: bool = False,
    ) -> None:
        super().__init__()
        least_of = {
            "batch_size": (batch_size, 1),
            "max_length": (max_length, 2),
            "num_workers": (num_workers, 0),
            "length_window": (length_window, 0),
        }
        for name, (value, least) in least_of.items():
            if value < least:
                raise RecipeError(f"{type(self).__name__} cannot use {name}={value!r}: expected at least {least}.")
        if too_long not in get_args(TooLong):
            known = ", ".join(get_args(TooLong))
            raise RecipeError(f"{type(self).__name__} cannot use too_long={too_long!r}: expected one of {known}.")
        self._sources = {"train": train, "val": val}
        self._encoder = Encoder(tokenizer=tokenizer, chat=chat, system_prompt=system_prompt, add_eos=add_eos)
        self._datasets: dict[str, RowDataset] = {}
        self.tokenizer = tokenizer
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.num_workers, self.too_long = num_workers, too_long
        self.length_window, self.packing = length_window, packing
        if packing:
            self._batch = packed_batch
        self._train_loader: ResumableLoader | None = None
        self._resume_at = 0
        self.counts: dict[str, dict[str, int]] = {}

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs; once read, rows are kept.

        Raises:
            DataError: With file and line of the first row that cannot be used.
        """
        self._resume_at = 0  # a checkpoint's state is loaded after this hook
        for split in ("train", "val") if stage == "fit" else ("val",):
            if self._sources[split] is not None and split not in self._datasets:
                self._datasets[split] = self._encode(split)

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this process."""
        loader = self._train_loader = self._loader("train")
        loader.load_state_dict({"batches": self._resume_at})
        self._resume_at = 0
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            loader.processed = lambda: int(progress.current.processed)
        return loader

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the validation batches of this process; an empty list if there is no validation data."""
        return [] if self._sources["val"] is None else self._loader("val")

    def state_dict(self) -> dict[str, Any]:
        """Number of training batches that are done in this epoch.

        Lightning does not restore the loader's own state when it was needed early, to count the steps of a schedule.
        """
        return {} if self._train_loader is None else dict(self._train_loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next run's first epoch go on behind the batches of a checkpoint."""
        self._resume_at = int(state_dict.get("batches", 0))

    def _encode(self, split: str) -> RowDataset:
        counts = dict.fromkeys(("rows", "tokens", "scored", "truncated", "dropped", "split"), 0)
        kept = []
        encoder = replace(self._encoder, vocabulary=vocabulary_of(self.trainer))
        for row in read_rows(self._sources[split], name=split):
            encoded = encoder.encode(row)
            if len(encoded.ids) > self.max_length:
                encoded = self._cut(encoded, row)
                counts["truncated"] += 1
            if not any(encoded.scored[1:]):
                counts["dropped"] += 1
                continue
            kept.append(encoded)
            counts["rows"] += 1
            counts["tokens"] += len(encoded.ids)
            counts["scored"] += sum(encoded.scored[1:])
            counts["split"] += encoded.split
        self.counts[split] = counts
        self._report(split, counts)
        return self._packed(split, kept) if self.packing else token_dataset(kept)

    def _packed(self, split: str, texts: list[EncodedRow]) -> RowDataset:
        together = rows_together([len(text.ids) for text in texts], self.max_length, seed=self.seed)
        room = len(together) * self.max_length
        counts = self.counts[split]
        counts |= {"packed": len(together), "unfilled": room - counts["tokens"]}
        rank_zero_info(
            f"{split}: {counts['rows']} rows are packed into {len(together)} of up to {self.max_length} tokens, "
            f"{counts['tokens'] / room:.0%} full."
        )
        return packed_dataset(texts, together)

    @staticmethod
    def _length(row: Any) -> int:
        """Tokens by which rows are of like length."""
        return len(row[0])

    def _cut(self, encoded: EncodedRow, row: Row) -> EncodedRow:
        if self.too_long == "error":
            raise DataError(
                f"{row.where}: the row has {len(encoded.ids)} tokens, more than max_length={self.max_length}. "
                "Shorten it, raise max_length, or pass too_long='truncate'."
            )
        return EncodedRow(encoded.ids[: self.max_length], encoded.scored[: self.max_length], encoded.split)

    def _report(self, split: str, counts: dict[str, int]) -> None:
        total = counts["rows"] + counts["dropped"]
        if not counts["rows"]:
            raise DataError(
                f"None of the {total} rows of {split} has a scored token within max_length={self.max_length}: their "
                "prompts alone are that long. Raise max_length."
            )
        if counts["truncated"] or counts["dropped"]:
            rank_zero_warn(
                f"{split}: {counts['truncated']} of {total} rows were cut to max_length={self.max_length} tokens, and "
                f"{counts['dropped']} left out because nothing scored was left."
            )

    def _loader(self, split: str) -> ResumableLoader:
        if split not in self._datasets:
            self.setup("fit" if split == "train" else "validate")
        dataset, trainer = self._datasets[split], self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        train, size = split == "train", len(dataset)
        lengths = None
        if train and self.length_window:
            lengths = LengthWindow([self._length(dataset[i]) for i in range(size)], self.batch_size, self.length_window)
        share = EpochSampler(size, seed=self.seed, shuffle=train, rank=rank, world_size=world_size, lengths=lengths)
        self.counts[split] |= share.padding()
        pad_ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=share,
            collate_fn=partial(self._batch, pad_id=next((int(i) for i in pad_ids if i is not None), 0)),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def vocabulary_of(trainer: L.Trainer | None) -> int | None:
    """Number of tokens of the model that a Trainer fits; None if it is not known."""
    model: Any = getattr(trainer and trainer.lightning_module, "model", None)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embeddings, "num_embeddings", None)
