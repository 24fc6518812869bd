"""The LightningDataModule for preferences and rated texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.errors import DataError
from lightning_interp.models.data.batching import RowDataset
from lightning_interp.models.data.preference_pairs import Judged, JudgedRow, judged_batch, judged_dataset, read_judged
from lightning_interp.models.data.text_data import TextDataModule, TooLong
from lightning_interp.models.scoring.reward_text import RewardEncoder

__all__ = ["PreferenceDataModule"]

_UNLIMITED = 10**9


class PreferenceDataModule(TextDataModule):
    """Preferences (or rated texts) for :class:`RewardModel`, written as the model writes what it scores.

    A row has one of two forms, the same in a whole file; other keys are ignored:

    - ``{"prompt": ..., "chosen": ..., "rejected": ...}``, with a ``margin`` if you like;
    - ``{"prompt": ..., "response": ..., "reward": ...}``.

    A prompt may be a list of turns if a chat template writes them, and so may ``chosen``, ``rejected`` and
    ``response``, which then end with the assistant's turn and may begin with the prompt, or hold it where there is no
    ``prompt``. Order, resuming and several processes are as in :class:`TextDataModule`.

    Args:
        train: A file (JSONL, a JSON list, CSV, TSV or Parquet), a folder of ``datasets``' ``save_to_disk``, a list of
            rows, or a ``datasets.Dataset``.
        encoder: The model's ``encoder``: both must write texts in the same way.
        val: The same as ``train`` for validation; there is none if None.
        batch_size: Rows a batch and process; a pair is one row and two texts.
        seed: Root seed of the order.
        num_workers: Processes that make batches; the rows are in memory, so more than 0 seldom helps.
        too_long: Cut longer texts and count them, or raise. A pair whose two texts are the same (maybe because what
            differed was cut off) is left out and counted.

    Attributes:
        counts: After ``setup``, by split: ``rows`` used, ``tokens``, ``truncated`` texts and ``identical`` pairs.

    Raises:
        RecipeError: If an argument has a wrong value. ``setup`` raises DataError with file and line.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}]
        >>> data = PreferenceDataModule(rows, encoder=RewardEncoder(tokenizer=byte_tokenizer()))
        >>> next(iter(data.train_dataloader()))["input_ids"].shape, data.counts["train"]["tokens"]
        (torch.Size([2, 9]), 15)
    """

    _batch = staticmethod(judged_batch)

    def __init__(
        self,
        train: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any,
        *,
        encoder: RewardEncoder,
        val: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        too_long: TooLong = "truncate",
    ) -> None:
        super().__init__(
            train,
            tokenizer=encoder.tokenizer,
            val=val,
            batch_size=batch_size,
            max_length=max(2, encoder.max_length or _UNLIMITED),
            seed=seed,
            num_workers=num_workers,
            too_long=too_long,
        )
        self.encoder = encoder

    def _encode(self, split: str) -> RowDataset:
        rows = read_judged(self._sources[split], name=split)
        counts = dict.fromkeys(("rows", "tokens", "truncated", "identical"), 0)
        kept = []
        for row in rows:
            judged, cut = self._judged(row)
            counts["truncated"] += cut
            if len(judged.ids) == 2 and judged.ids[0] == judged.ids[1]:
                counts["identical"] += 1
                continue
            kept.append(judged)
            counts["rows"] += 1
            counts["tokens"] += sum(map(len, judged.ids))
        self.counts[split] = counts
        self._tell(split, counts, len(rows))
        return judged_dataset(kept)

    def _judged(self, row: JudgedRow) -> tuple[Judged, int]:
        try:
            encoded = self.encoder.encode_texts(row.prompts, row.texts)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        cut = sum(text.truncated for text in encoded)
        if cut and self.too_long == "error":
            raise DataError(
                f"{row.where}: a text has more than max_length={self.encoder.max_length} tokens. Shorten it, raise "
                "max_length, or pass too_long='truncate'."
            )
        if not all(text.ids for text in encoded):
            raise DataError(f"{row.where}: a text has no tokens, so nothing can be scored. Remove the row.")
        types = [list(text.types) or [0] * len(text.ids) for text in encoded]
        pair = any(text.types for text in encoded)
        return Judged(tuple(text.ids for text in encoded), row.value, types=tuple(types) if pair else ()), cut

    def _tell(self, split: str, counts: Mapping[str, int], total: int) -> None:
        if not counts["rows"]:
            raise DataError(
                f"None of the {total} pairs of {split} has two different texts within "
                f"max_length={self.encoder.max_length}. Raise max_length, or check the rows."
            )
        if counts["truncated"] or counts["identical"]:
            rank_zero_warn(
                f"{split}: {counts['truncated']} texts were cut to max_length={self.encoder.max_length} tokens, and "
                f"{counts['identical']} of {total} pairs left out because their texts are the same."
            )
