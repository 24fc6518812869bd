"""What one forward pass knows about its tokens: absolute positions under padding and a KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from lightning_interp.core.tokens.kv_cache import cache_in, installed_versions
from lightning_interp.errors import PositionError

__all__ = ["Selector", "StepContext", "argument_reader", "step_reader"]


class Selector(Protocol):
    """What chooses tokens of a pass; see :class:`~lightning_interp.core.tokens.positions.Positions`."""

    def mask(self, step: StepContext) -> torch.Tensor:
        """Chosen tokens, bool ``[B, T]``."""


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
        kept: ``logits_to_keep`` of the call: a number of last columns, an index of columns, or None. Only sites of the
            head see fewer columns.
        prompt: The pass that read the prompt, for a decoding step with a cache.
        known_prompt_lengths: Real tokens of each row's prompt ``[B]``, where the caller says so.
        activation: What the running site holds, ``[B, n, d]``, for selectors that depend on it; see :meth:`choose`.

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
    kept: int | torch.Tensor | None = None
    prompt: StepContext | None = None
    known_prompt_lengths: torch.Tensor | None = None
    activation: torch.Tensor | None = field(default=None, repr=False)
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

    @cached_property
    def prompt_lengths(self) -> torch.Tensor:
        """Real tokens of each row's prompt, ``[B]``: as the caller says, or what the first pass of a generation read.

        Raises:
            PositionError: If nothing tells, or what the caller said fits no batch of this size.
        """
        known = self.known_prompt_lengths
        if known is None and self.is_prefill:
            return self.lengths
        if known is None and self.prompt is not None and self.prompt.batch_size == self.batch_size:
            return self.prompt.lengths
        if known is None:
            raise PositionError(
                f"Where the prompt ended is not known in a decoding step of {self.batch_size} rows after {self.past} "
                "tokens: its first pass was not seen. Attach before generating, or set attachment.prompt_lengths."
            )
        known = torch.as_tensor(known, device=self.device).flatten()
        if len(known) == 0 or self.batch_size % len(known):
            raise PositionError(
                f"prompt_lengths has {len(known)} entries, but the pass has {self.batch_size} rows; expected one a row "
                "(or one a prompt, for beams)."
            )
        return known.repeat_interleave(self.batch_size // len(known))

    @cached_property
    def generation_steps(self) -> torch.Tensor:
        """Which new token each position predicts, ``[B, T]``: 0 at the prompt's last token, negative before it."""
        return self.positions - self.prompt_lengths[:, None] + 1

    def fit(self, mask: torch.Tensor, columns: int) -> torch.Tensor:
        """The part ``[B, n]`` of a mask ``[B, T]`` that a site of ``n`` columns sees.

        Args:
            mask: Of every column of the pass.
            columns: Columns of the site; fewer than ``T`` only at the head.

        Example:
            >>> step = StepContext(1, 3, kept=torch.tensor([0, 2]))
            >>> step.fit(torch.tensor([[True, False, False]]), 2).tolist()
            [[True, False]]
        """
        if isinstance(self.kept, torch.Tensor) and len(self.kept) == columns:
            return mask[:, self.kept]
        return mask[:, -columns:]

    def choose(self, positions: Selector, x: torch.Tensor) -> torch.Tensor:
        """Chosen tokens of an activation.

        Args:
            positions: The selector, which may depend on the activation.
            x: Activation ``[B, n, d]``; ``n`` is ``T``, or fewer at the head.

        Returns:
            bool ``[B, n]``.
        """
        self.activation = x
        try:
            return self.fit(positions.mask(self), x.shape[1])
        finally:
            self.activation = None

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
        told = self.known_prompt_lengths is not None or (not self.is_prefill and self.prompt is not None)
        part: dict[str, Any] = {
            "batch_size": len(index),
            "input_ids": None if self.input_ids is None else self.input_ids[index],
            "attention_mask": None if self.attention_mask is None else self._full_mask[index],
            "row_numbers": tuple(self.row_number(row) for row in index),
            "batch": None if self.batch is None else _BatchRows(self.batch, self.batch_size, index),
            "prompt": None,
            "known_prompt_lengths": self.prompt_lengths[index] if told else None,
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


def argument_reader(module: nn.Module) -> Callable[[str, tuple[Any, ...], dict[str, Any]], Any]:
    """Make ``argument(name, args, kwargs)``, which finds an argument of a module's ``forward`` by name or place."""
    order = {name: i for i, name in enumerate(inspect.signature(module.forward).parameters)}

    def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = order.get(name, len(args))
        return args[index] if index < len(args) else None

    return argument


def step_reader(backbone: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], StepContext]:
    """Make a function that reads a :class:`StepContext` off the arguments of a decoder's ``forward``."""
    argument = argument_reader(backbone)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepContext:
        ids = argument("input_ids", args, kwargs)
        tokens = ids if ids is not None else argument("inputs_embeds", args, kwargs)
        if tokens is None or tokens.dim() < 2:
            raise PositionError(
                f"{type(backbone).__name__} was called without input_ids or inputs_embeds of shape [B, T]."
            )
        cache = cache_in(args, kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = argument("attention_mask", args, kwargs)
        if isinstance(mask, dict):
            raise PositionError(
                f"{type(backbone).__name__} was given a dict of attention masks; expected one of shape [B, T]. "
                "Use a dynamic cache (static caches prepare their own masks)."
            )
        if cache is None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > tokens.shape[1]:
            raise PositionError(
                f"{type(backbone).__name__} was called with {tokens.shape[1]} tokens and an attention_mask of "
                f"{mask.shape[1]}, but without a cache that tells how many tokens came before, so the positions of "
                f"these are not known (with {installed_versions()}). Generate with a cache of transformers' own "
                "(get_seq_length()), or with use_cache=False."
            )
        return StepContext(int(tokens.shape[0]), int(tokens.shape[1]), past, tokens.device, ids, mask)

    return read
