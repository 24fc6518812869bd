"""Several texts in one row: which go together, their batch, and whether a model keeps them apart.

Positions begin at 0 with each text, and there is no mask of padding: from that transformers makes attention that is
block-diagonal, with ``sdpa`` and ``eager``, in each mask of a model (full or sliding).
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.core.hooks.checks import quantized_modules
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.tokens.batches import padded
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.data.batching import RowDataset
from lightning_interp.models.data.encoding import EncodedRow
from lightning_interp.models.training.metric import IGNORED

__all__ = ["check_packing", "packed_batch", "packed_dataset", "rows_together"]

_WINDOW = 1024  # texts that are packed at a time
_KEPT_APART = ("sdpa", "eager")
_PROBE = 6  # tokens of a text that asks a model
_ROUNDING = 100  # what experts of other sizes may change, in units of the logits' precision
_COARSE = 0.1  # the same where it is coarse; 8-bit maps round by what is largest in all texts


def rows_together(lengths: Sequence[int], room: int, *, seed: int = 0, window: int = _WINDOW) -> list[list[int]]:
    """Which texts share a row: none is cut, and each is in one row.

    Texts are taken in an order that depends on the seed alone, ``window`` at a time; in a window the longest comes
    first, into the row with the least room that holds it.

    Args:
        lengths: Tokens of each text, none above ``room``.
        room: Tokens that a row may have.
        seed: Root seed of the order.
        window: Texts at a time.

    Returns:
        The numbers of the texts of each row.

    Example:
        >>> rows_together([3, 9, 7, 1], room=10)
        [[1, 3], [2, 0]]
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "packing"))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        free: list[tuple[int, int]] = []  # room and number of this window's rows, the fullest first
        for index in sorted(order[start : start + window], key=lambda index: -lengths[index]):
            place = bisect_left(free, (lengths[index], 0))
            left, row = free.pop(place) if place < len(free) else (room, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(index)
            insort(free, (left - lengths[index], row))
    return rows


def packed_dataset(texts: Sequence[EncodedRow], together: Sequence[Sequence[int]]) -> RowDataset:
    """Rows of several texts as three tensors each: ids, which are scored, and the position of each in its text.

    The first token of a text is not scored, as what stands before it is another text. In a filler nothing is scored.
    """
    return RowDataset((_joined([texts[i] for i in row]) for row in together), _unscored)


def _joined(texts: Sequence[EncodedRow]) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([index for text in texts for index in text.ids], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(text.ids), dtype=torch.int32) for text in texts])
    scored = torch.tensor([one for text in texts for one in text.scored], dtype=torch.bool)
    return ids, scored & (positions > 0), positions


def _unscored(row: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return row[0], torch.zeros_like(row[1]), row[2]


def packed_batch(rows: Sequence[tuple[Tensor, Tensor, Tensor]], *, pad_id: int) -> dict[str, Tensor]:
    """Packed rows padded on the right, without a mask; each token of padding is a text of its own, which none reads."""
    ids, labels = ([row[0] for row in rows], [torch.where(row[1], row[0].long(), IGNORED) for row in rows])
    return {
        "input_ids": padded(ids, pad_id)[0],
        "position_ids": padded([row[2] for row in rows])[0],
        "labels": padded(labels, IGNORED)[0],
    }


def check_packing(model: Any) -> None:
    """Refuse a model whose texts would read each other, or count on from each other, in a packed row.

    Beside what its parts tell, the model itself is asked: another first text must leave what it says of the second as
    it is. Its mode and all random states are as before.

    Args:
        model: A causal language model of transformers.

    Raises:
        IncompatibleModelError: With what keeps the model from it.
    """
    config = model.config.get_text_config()
    how, kinds = config._attn_implementation, set(getattr(config, "layer_types", None) or ())
    if "position_ids" not in inspect.signature(model.forward).parameters:
        why = "its forward takes no position_ids, so it cannot be told where a text begins"
    elif how not in _KEPT_APART:
        why = f"its attention is {how!r}, and texts are kept apart by {' and '.join(_KEPT_APART)} only"
    elif "chunked_attention" in kinds:
        why = "it attends in chunks that are counted from the row's start, not from the text's"
    elif any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules()):
        why = "its blocks carry a state or a convolution over tokens from one text into the next"
    elif _leaks(model):
        why = "what it says of a text depends on the text before it, as its attention ignores where texts begin"
    else:
        return
    raise IncompatibleModelError(
        f"{type(model).__name__} (model_type={config.model_type!r}) cannot be given several texts in one row: {why}. "
        "Pass TextDataModule(packing=False); length_window saves padding with any model."
    )


def _leaks(model: Any) -> bool:
    """Whether another first text changes the logits of the second, by more than rounding does."""
    size, device = model.get_input_embeddings().num_embeddings, next(model.parameters()).device
    ids = (torch.arange(4 * _PROBE, device=device) * 7 + 5) % size
    firsts, second = ids[: 2 * _PROBE].chunk(2), ids[3 * _PROBE :]
    apart = torch.arange(_PROBE, device=device).repeat(2)[None]

    def change(**more: Any) -> tuple[float, float]:
        rows = [torch.cat([first, second])[None] for first in firsts]
        one, other = (model(input_ids=row, use_cache=False, **more).logits[0, _PROBE:] for row in rows)
        return float((one.float() - other.float()).abs().max()), torch.finfo(one.dtype).eps

    with undisturbed(model):
        (apart_change, precision), (read_change, _) = change(position_ids=apart), change()
    rounding = _COARSE if quantized_modules(model) else min(_ROUNDING * precision, _COARSE)
    return apart_change > rounding * read_change
