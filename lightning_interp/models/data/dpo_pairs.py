"""Pairs of completions for DPO: as text or as token ids in, batches with labels and reference log-probabilities out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.data.batching import RowDataset, token_batch
from lightning_interp.models.data.encoding import EncodedRow, Encoder
from lightning_interp.models.data.preference_pairs import judged_row
from lightning_interp.models.data.rows import Row, raw_rows, token_ids
from lightning_interp.models.data.text_data import TextDataModule, TooLong, vocabulary_of
from lightning_interp.models.training.head_loss import scored_positions

__all__ = ["DPODataModule", "EncodedPair", "pair_batch"]

_SIDES = ("chosen", "rejected")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_EXPECTED = (
    '{"prompt": ..., "chosen": ..., "rejected": ...}, with whole conversations as sides if there is no prompt, or '
    '{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}'
)


class EncodedPair(NamedTuple):
    """A pair as tensors: of each side its ids, and whether each is scored."""

    chosen: tuple[Tensor, Tensor]
    rejected: tuple[Tensor, Tensor]
    digest: str  # SHA-256 of all that; what the reference's log-probabilities are kept under
    real: bool = True  # False for the filler of a validation share


class DPODataModule(TextDataModule):
    """Pairs for :class:`DPO`, with the reference's log-probabilities of each.

    A row has one of two forms; other keys are ignored:

    - ``{"prompt": ..., "chosen": ..., "rejected": ...}``, written as :class:`TextDataModule` writes a prompt and a
      completion. A prompt may be a list of turns, and so may the sides, which then end with the assistant's turn and
      may begin with the prompt, or hold it where there is no ``prompt``: these go through the chat template;
    - ``{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}``, used exactly as given: nothing is added.
      They win over text beside them.

    Of a conversation the last turn is scored. A batch has the chosen completions' rows and then the rejected ones' in
    ``input_ids``, ``attention_mask``, ``labels`` and ``reference``. Order, resuming and several processes are as in
    :class:`TextDataModule`; the last batch may be short.

    Args:
        train: A file (JSONL, a JSON list, CSV, TSV or Parquet), a folder of ``datasets``' ``save_to_disk``, a list of
            rows, or a ``datasets.Dataset``.
        tokenizer: The model's tokenizer.
        val: The same for validation; there is none if None.
        reference: A safetensors file for the reference's log-probabilities, which other runs on the same reference
            and rows share; it is made if it is missing. If None they are kept in memory and in checkpoints.
        batch_size: Pairs a batch and process.
        max_length: Tokens a prompt with its completion may have.
        too_long: Cut the ends of longer completions and count them, or raise. A pair with nothing scored left on a
            side is left out.
        **options: ``seed``, ``num_workers``, ``chat``, ``system_prompt``, ``add_eos`` and ``length_window`` of
            :class:`TextDataModule`.

    Attributes:
        counts: After ``setup``, by split: ``rows`` used, ``tokens``, ``scored`` tokens, ``truncated`` completions,
            ``dropped`` pairs, and ``identical`` ones, from which nothing is learned.
        reference: Path of the file, or None.
        logps: Log-probabilities of (chosen, rejected) by a pair's digest, as far as they are known.
        reference_of: Which model they are of; None if that is not known.

    Raises:
        RecipeError: If an argument has a wrong value.
        DataError: If the tokenizer lacks a chat template that is needed. ``setup`` raises it with file and line.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}]
        >>> batch = next(iter(DPODataModule(rows, tokenizer=byte_tokenizer()).train_dataloader()))
        >>> batch["input_ids"].shape, (batch["labels"] != -100).sum(dim=1)
        (torch.Size([2, 9]), tensor([2, 5]))
    """

    def __init__(
        self,
        train: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        val: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any | None = None,
        reference: str | os.PathLike[str] | None = None,
        batch_size: int = 2,
        max_length: int = 1024,
        too_long: TooLong = "truncate",
        **options: Any,
    ) -> None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "too_long": too_long}
        super().__init__(train, tokenizer=tokenizer, val=val, **sizes, **options)
        if self.packing:
            raise RecipeError(
                "DPODataModule cannot use packing=True: a completion's log-probability is a sum over a row of its "
                "own. Leave it out; length_window gives batches of like length."
            )
        self.reference = None if reference is None else Path(reference)
        self.logps: dict[str, tuple[float, float]] = {}
        self.reference_of: tuple[str, str] | None = None
        self._batch = partial(pair_batch, logps=self.logps)

    def pairs(self, split: str) -> Sequence[EncodedPair]:
        """The encoded pairs of ``"train"`` or ``"val"`` in the order of their rows; none if there is no such data."""
        if self._sources[split] is None:
            return []
        if split not in self._datasets:
            self.setup("fit" if split == "train" else "validate")
        dataset = self._datasets[split]
        return [dataset[index] for index in range(len(dataset))]

    def missing(self, splits: Sequence[str] = ("train", "val")) -> list[str]:
        """Digests of the pairs whose reference log-probabilities are not known."""
        pairs = [pair for split in splits for pair in self.pairs(split)]
        return [pair.digest for pair in pairs if pair.digest not in self.logps]

    def state_dict(self) -> dict[str, Any]:
        """Number of training batches that are done in this epoch, and the reference's log-probabilities."""
        own = {pair.digest for split in self._datasets for pair in self.pairs(split)}
        known = {key: list(self.logps[key]) for key in sorted(own & self.logps.keys())}
        return {**super().state_dict(), "logps": known, "reference_of": list(self.reference_of or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next run's first epoch go on behind the batches of a checkpoint, with its reference."""
        super().load_state_dict(state_dict)
        self.logps.clear()
        self.logps.update({key: (chosen, rejected) for key, (chosen, rejected) in state_dict["logps"].items()})
        weights, precision = state_dict["reference_of"] or ("", "")
        self.reference_of = (weights, precision) if weights else None

    def _encode(self, split: str) -> RowDataset:
        counts = dict.fromkeys(("rows", "tokens", "scored", "truncated", "dropped", "identical"), 0)
        kept = []
        encoder = replace(self._encoder, vocabulary=vocabulary_of(self.trainer))
        for where, row in raw_rows(self._sources[split], name=split, expected=_EXPECTED):
            sides = [self._side(side, where, counts) for side in _sides(row, where, encoder)]
            if not all(any(scored) for _, scored in sides):
                counts["dropped"] += 1
                continue
            counts["rows"] += 1
            counts["identical"] += sides[0] == sides[1]
            counts["tokens"] += sum(len(ids) for ids, _ in sides)
            counts["scored"] += sum(sum(scored) for _, scored in sides)
            kept.append(_encoded(sides))
        self.counts[split] = counts
        self._tell(split, counts)
        return RowDataset(kept, _filler)

    def _side(
        self, side: tuple[list[int], list[bool]], where: str, counts: dict[str, int]
    ) -> tuple[list[int], list[bool]]:
        ids, scored = side
        if len(ids) > self.max_length:
            if self.too_long == "error":
                raise DataError(
                    f"{where}: a side has {len(ids)} tokens with its prompt, more than max_length={self.max_length}. "
                    "Shorten it, raise max_length, or pass too_long='truncate'."
                )
            counts["truncated"] += 1
        return ids[: self.max_length], scored[: self.max_length]

    @staticmethod
    def _length(row: EncodedPair) -> int:
        return max(len(row.chosen[0]), len(row.rejected[0]))

    def _tell(self, split: str, counts: Mapping[str, int]) -> None:
        total = counts["rows"] + counts["dropped"]
        if not counts["rows"]:
            raise DataError(
                f"None of the {total} pairs of {split} has a scored token on both sides within "
                f"max_length={self.max_length}. Raise max_length, or check the rows."
            )
        if counts["truncated"] or counts["dropped"] or counts["identical"]:
            rank_zero_warn(
                f"{split}: {counts['truncated']} completions were cut to max_length={self.max_length} tokens with "
                f"their prompt, {counts['dropped']} of {total} pairs left out because nothing scored was left, and "
                f"{counts['identical']} have two equal sides, from which nothing is learned."
            )


def _sides(row: Any, where: str, encoder: Encoder) -> list[tuple[list[int], list[bool]]]:
    """Ids of each side, and whether each is scored."""
    if isinstance(row, Mapping) and all(row.get(key) is not None for key in _IDS):
        prompt, *sides = (token_ids(row[key], key, where) for key in _IDS)
        given = [Row(where, "ids", {"prompt_ids": prompt, "completion_ids": side}) for side in sides]
    else:
        judged = judged_row(row, where)
        if len(judged.texts) != len(_SIDES):
            raise DataError(f"{where}: this row is a rated text; expected {_EXPECTED}.")
        turns = any(not isinstance(row.get(key), str | None) for key in ("prompt", *_SIDES))
        given = [_in_text(where, *side, turns) for side in zip(judged.prompts, judged.texts, strict=True)]
    return [_last_turn(encoder.encode(side)) for side in given]


def _in_text(where: str, prompt: Any, text: str, turns: bool) -> Row:
    if not turns:
        return Row(where, "prompt", {"prompt": prompt, "completion": text})
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Row(where, "messages", {"messages": [*asked, {"role": "assistant", "content": text}]})


def _last_turn(row: EncodedRow) -> tuple[list[int], list[bool]]:
    """Ids, with the last scored run of them scored alone; nothing predicts the first token."""
    scored = row.scored
    end = len(scored) - scored[::-1].index(True)
    start = end
    while start > 1 and scored[start - 1]:
        start -= 1
    return row.ids, [max(start, 1) <= place < end for place in range(len(scored))]


def _encoded(sides: Sequence[tuple[list[int], list[bool]]]) -> EncodedPair:
    digest = hashlib.sha256()
    for ids, scored in sides:
        digest.update(f"{ids}{[int(x) for x in scored]}".encode())
    made = [(torch.tensor(ids, dtype=torch.int32), torch.tensor(scored)) for ids, scored in sides]
    return EncodedPair(made[0], made[1], digest.hexdigest())


def _filler(pair: EncodedPair) -> EncodedPair:
    return pair._replace(real=False)


def pair_batch(
    pairs: Sequence[EncodedPair], *, pad_id: int, logps: Mapping[str, tuple[float, float]]
) -> dict[str, Tensor]:
    """Pairs padded on the right, the chosen sides first; with ``reference`` if it is known of all of them.

    ``scored`` says where labelled tokens are predicted, so that no device needs to be asked.
    """
    batch = token_batch([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], pad_id=pad_id)
    batch |= {"scored": scored_positions(batch["labels"]), "real": torch.tensor([pair.real for pair in pairs])}
    known = [logps[pair.digest] for pair in pairs if pair.digest in logps]
    if len(known) == len(pairs):
        batch["reference"] = torch.tensor([*(a for a, _ in known), *(b for _, b in known)], dtype=torch.float32)
    return batch
