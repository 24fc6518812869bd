"""What one forward pass knows about its tokens: absolute positions under padding and a KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_interp.errors import PositionError

__all__ = ["StepContext", "step_reader"]


@dataclass(eq=False)
class StepContext:
    """The tokens of one forward pass ``[B, T]``; everything else is worked out when it is asked for.

    Args:
        batch_size: Rows ``B``.
        length: Columns ``T`` of this pass (1 while decoding with a cache).
        past: Columns already in the KV cache.
        device: Where masks are made.
        input_ids: Token ids ``[B, T]``, or None when embeddings were passed.
        attention_mask: ``[B, past + T]``, or None when every token is real.
        find_tokenizer: Gives the tokenizer for selectors that read text, or None.
        batch: The user's batch, for ``FromBatch``.
        rolling: Whether ``Last`` follows generated tokens, or stays in the prompt.
        row_numbers: Which rows of the whole batch these are (see :meth:`rows`); None for all of them.

    Example:
        >>> step = StepContext(2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
        >>> step.positions.tolist(), step.lengths.tolist()
        ([[-1, 0, 1], [0, 1, 2]], [2, 3])
    """

    batch_size: int
    length: int
    past: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    find_tokenizer: Callable[[], Any] = lambda: None
    batch: Mapping[str, Any] | None = None
    rolling: bool = True
    row_numbers: tuple[int, ...] | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def is_prefill(self) -> bool:
        """True while prompt tokens are read, False on a one-token decoding step."""
        return self.past == 0 or self.length > 1

    @cached_property
    def valid(self) -> torch.Tensor:
        """Real (not padding) tokens of this pass, bool ``[B, T]``."""
        return self._full_mask[:, self.past :]

    @cached_property
    def positions(self) -> torch.Tensor:
        """Index of each token among the real tokens of its row, ``[B, T]``; -1 on padding."""
        index = self._full_mask.long().cumsum(dim=1)[:, self.past :] - 1
        return index.masked_fill(~self.valid, -1)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each row so far, cache included, ``[B]``."""
        return self._full_mask.long().sum(dim=1)

    @cached_property
    def columns(self) -> torch.Tensor:
        """Column of each token in the whole sequence, padding counted, ``[T]``."""
        return torch.arange(self.past, self.past + self.length, device=self.device)

    def rows(self, index: list[int]) -> StepContext:
        """The same pass as some of its rows see it, the user's batch included.

        Args:
            index: Which rows.

        Returns:
            A context of ``len(index)`` rows.

        Example:
            >>> step = StepContext(2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
            >>> step.rows([1]).positions.tolist(), step.rows([1]).row_number(0)
            ([[0, 1, 2]], 1)
        """
        part: dict[str, Any] = {
            "batch_size": len(index),
            "input_ids": None if self.input_ids is None else self.input_ids[index],
            "attention_mask": None if self.attention_mask is None else self._full_mask[index],
            "row_numbers": tuple(self.row_number(row) for row in index),
            "batch": None if self.batch is None else _BatchRows(self.batch, self.batch_size, index),
        }
        return replace(self, cache={}, **part)

    def row_number(self, row: int) -> int:
        """What the user calls a row of this context, for messages."""
        return row if self.row_numbers is None else self.row_numbers[row]

    @cached_property
    def _full_mask(self) -> torch.Tensor:
        total = self.past + self.length
        if self.attention_mask is None:
            return torch.ones(self.batch_size, total, dtype=torch.bool, device=self.device)
        mask = self.attention_mask
        if mask.dim() != 2 or mask.shape[0] != self.batch_size or mask.shape[1] < total:
            raise PositionError(
                f"Cannot tell positions from an attention_mask of shape {tuple(mask.shape)}; expected "
                f"[{self.batch_size}, {total}] (cache of {self.past} + {self.length} tokens). Pass a 2-D mask, and "
                "generate with a dynamic cache (a static one prepares its own masks)."
            )
        return mask[:, :total].to(device=self.device, dtype=torch.bool)


class _BatchRows(Mapping[str, Any]):
    """Some rows of the user's batch, taken when a selector asks for them."""

    def __init__(self, batch: Mapping[str, Any], batch_size: int, index: list[int]) -> None:
        self.batch, self.batch_size, self.index = batch, batch_size, index

    def __getitem__(self, key: str) -> Any:
        value = self.batch[key]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if value.shape[0] != self.batch_size:
            raise PositionError(
                f"Mask {key!r} is {tuple(value.shape)}; expected a tensor [B, T] with B={self.batch_size}."
            )
        return value[self.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


def step_reader(backbone: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], StepContext]:
    """Make a function that reads a :class:`StepContext` off the arguments of a decoder's ``forward``.

    Args:
        backbone: The module that holds the block stack.

    Returns:
        ``read(args, kwargs) -> StepContext``, cheap enough for every forward pass.
    """
    order = {name: i for i, name in enumerate(inspect.signature(backbone.forward).parameters)}

    def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = order.get(name, len(args))
        return args[index] if index < len(args) else None

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepContext:
        ids = argument("input_ids", args, kwargs)
        tokens = ids if ids is not None else argument("inputs_embeds", args, kwargs)
        if tokens is None or tokens.dim() < 2:
            raise PositionError(
                f"{type(backbone).__name__} was called without input_ids or inputs_embeds of shape [B, T]."
            )
        cache = argument("past_key_values", args, kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = argument("attention_mask", args, kwargs)
        if isinstance(mask, dict):
            raise PositionError(
                f"{type(backbone).__name__} was given a dict of attention masks; expected one of shape [B, T]. "
                "Use a dynamic cache (static caches prepare their own masks)."
            )
        return StepContext(int(tokens.shape[0]), int(tokens.shape[1]), past, tokens.device, ids, mask)

    return read
