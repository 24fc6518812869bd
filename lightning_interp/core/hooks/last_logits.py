"""What a model says at the end of many rows, read in batches of like length, with or without something attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.head import whole_head
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.core.tokens.pass_arguments import model_inputs
from lightning_interp.errors import DataError

__all__ = ["Gate", "last_logits_of", "read_logits"]


class Gate(Protocol):
    """Anything that acts on a model while it is attached, such as an adapter at chosen tokens alone."""

    def attach(self, model: Any, *, tokenizer: Any = None) -> AbstractContextManager[Any]:
        """Put it on, until the block is left."""
        ...


def read_logits(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    read: Callable[[Tensor, list[int]], Tensor],
    *,
    keep: Sequence[int] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    tokenizer: Any = None,
    gate: Gate | None = None,
    token_budget: int = 4096,
) -> Tensor:
    """Read something off the last logits of each row, in batches of like length, padded on the left.

    The model is left as found: modes, gradients, random states. What is read goes to the CPU once, at the end.

    Args:
        model: A plain model, a PEFT wrapper, or a LightningModule.
        rows: Token ids.
        read: Takes logits ``[n, k, V]`` (float32, or float64) and the numbers of these rows; returns ``[n, ...]``, of
            like shape in every batch.
        keep: How many last logits each row needs, 1 if None; ``k`` is the batch's largest.
        prompt_lengths: How many tokens of each row are the prompt, for a gate; all if None.
        tokenizer: For a gate that reads text.
        gate: What is attached meanwhile.
        token_budget: Most tokens of one forward pass, padding included.

    Returns:
        What was read of each row, in the order of the rows, in float64.

    Raises:
        DataError: If there is no row, or one without a token.
    """
    if not rows or not all(map(len, rows)):
        raise DataError(f"Nothing to read: {len(rows)} rows, of which {sum(not len(r) for r in rows)} have no token.")
    model_map = ModelMap.build(model)
    inner: Any = model_map.model
    batches = packed([len(row) for row in rows], token_budget)
    found = []
    with (
        undisturbed(model),
        whole_head(model_map),
        nullcontext() if gate is None else gate.attach(model, tokenizer=tokenizer) as attachment,
    ):
        for numbers in batches:
            if prompt_lengths is not None and attachment is not None:
                attachment.prompt_lengths = torch.tensor([prompt_lengths[number] for number in numbers])
            kept = max(keep[number] for number in numbers) if keep is not None else 1
            found.append(read(last_logits_of(inner, [rows[number] for number in numbers], kept), numbers))
    order = torch.tensor([number for numbers in batches for number in numbers]).argsort()
    return torch.cat(found).cpu().double()[order]


def last_logits_of(model: nn.Module, rows: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
    """The last logits of some rows in one pass, ``[rows, keep, V]`` in float32 (or float64); short rows end alike."""
    ids, mask = padded(rows, side="left")
    logits: Tensor = model(**model_inputs(model, ids, mask.bool(), keep=keep), use_cache=False).logits[:, -keep:]
    return logits if logits.dtype == torch.float64 else logits.float()
