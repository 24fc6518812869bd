"""What one forward pass knows about its tokens: absolute positions under padding and a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from lightning_interp.core.tokens.generation import Generation, repeat_rows
from lightning_interp.errors import PositionError

__all__ = ["Selector", "StepContext"]


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
        generation: What ``generate`` was called with, inside of such a call.
        virtual: Columns at the start that no text has, of prompt learning: never chosen, and not counted.
        unseen: Columns of text that were cached before anything was attached, where this is the first pass after them.
        follows: Whether the cache was filled by passes that were seen.
        rewound: Whether part of what was read has been taken off the cache again.
        before: The pass that filled the cache and was taken for the whole prompt, though more of it comes now.
        shorter: Ids of texts read before that are one token shorter, as in a loop that reads the whole text anew.
        carried: What earlier passes over the same KV cache left for later ones.
        assumed: What gates answer where there is no activation to ask.
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
    generation: Generation | None = None
    virtual: int = 0
    unseen: int = 0
    follows: bool = False
    rewound: bool = False
    before: StepContext | None = field(default=None, repr=False)
    shorter: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    carried: dict[Any, Any] = field(default_factory=dict, repr=False)
    assumed: bool | None = None
    activation: torch.Tensor | None = field(default=None, repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def is_prefill(self) -> bool:
        """True while prompt tokens are read, False where all are new ones."""
        if self.generation is not None and not self.generation.doubt:
            return self.past < self.generation.columns + self.virtual
        return self.past <= self.virtual or self.length > 1

    @property
    def phase(self) -> Literal["prompt", "new", "mixed"]:
        """Whether this pass reads the prompt, new tokens, or both, told without looking at a tensor.

        A call of ``generate`` knows its prompt's columns. In a loop of somebody's own the first pass is the prompt, and
        each token that comes alone after it is new.

        Raises:
            PositionError: If nothing tells.
        """
        if self.known_prompt_lengths is not None:
            return "mixed"
        if (told := self.generation) is not None:
            self._check_told(told)
            end = told.columns + self.virtual
            return "new" if self.past >= end else "prompt" if self.past + self.length <= end else "mixed"
        if self.is_prefill and not self.follows:
            self._check_not_grown()
            return "prompt"
        if self.length == 1:
            return "new"
        raise PositionError(
            f"{self.length} tokens came in one pass after {self.past} that were cached, outside of generate: whether "
            "they are the rest of a prompt or candidates for new tokens is not known. Set attachment.prompt_lengths, "
            "or call generate of the model that was attached to."
        )

    @cached_property
    def valid(self) -> torch.Tensor:
        """Real tokens of this pass (no padding, nothing virtual), bool ``[B, T]``."""
        return self._full_mask[:, self.past :]

    @property
    def padding(self) -> torch.Tensor:
        """Padding of this pass, bool ``[B, T]``."""
        return ~self.valid & (self.columns >= self.virtual)

    @property
    def all_real(self) -> bool:
        """Whether every column is a real token that may be chosen, as far as can be told without looking."""
        checked = not self.unseen and self.before is None
        return self.attention_mask is None and self.past >= self.virtual and checked

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
        """Real tokens of each row's prompt, ``[B]``: as the caller says, or as ``generate`` or a first pass was given.

        Raises:
            PositionError: If nothing tells, or what the caller said fits no batch of this size.
        """
        known = self.known_prompt_lengths
        if known is None:
            read = self.prompt if self.phase == "new" else None
            if read is not None and read.batch_size == self.batch_size and read.generation is self.generation:
                return read.prompt_lengths
            return self.prompt_mask.sum(dim=1)
        known = torch.as_tensor(known, device=self.device).flatten()
        if len(known) == 0 or self.batch_size % len(known):
            raise PositionError(
                f"prompt_lengths has {len(known)} entries, but the pass has {self.batch_size} rows; expected one a row "
                "(or one a prompt, for beams)."
            )
        return repeat_rows(known, self.batch_size)

    @cached_property
    def prompt_mask(self) -> torch.Tensor:
        """Real tokens among the prompt's columns, bool ``[B, columns]``."""
        if self.phase == "prompt" and self.generation is None:
            return self._full_mask
        if (told := self.generation) is None:
            raise PositionError(
                f"Where the prompt ended is not known in a decoding step of {self.batch_size} rows after {self.past} "
                "tokens: its first pass was not seen. Attach before generating, or set attachment.prompt_lengths."
            )
        end = told.columns + self.virtual
        if self.past + self.length >= end:
            return self._full_mask[:, :end]
        if told.mask is None and self.attention_mask is not None:
            raise PositionError(
                f"A chunk of {self.length} of {told.columns} columns of the prompt does not tell how its rows end. "
                "Pass attention_mask to generate."
            )
        mask = torch.ones(self.batch_size, end, dtype=torch.bool, device=self.device)
        mask[:, : self.virtual] = False
        if told.mask is not None:
            mask[:, self.virtual :] = repeat_rows(told.mask, self.batch_size).to(mask)
        return mask

    def _check_not_grown(self) -> None:
        """Refuse a text that is read anew with one more token: only its first pass was the prompt."""
        if not self.shorter or self.input_ids is None:
            return
        if "grown" not in self.cache:
            self.cache["grown"] = any(torch.equal(self.input_ids[:, :-1], ids) for ids in self.shorter)
        if self.cache["grown"]:
            raise PositionError(
                f"The text of a pass before came again with one more token ({self.length} columns, no cache), so "
                "where the prompt ends is not known. Set attachment.prompt_lengths, or call model.generate."
            )

    def check_text(self) -> None:
        """Refuse a pass that reads another text than its call of ``generate`` was given."""
        told, start = self.generation, self.past - self.virtual
        if told is None or told.ids is None or told.doubt or self.input_ids is None:
            return
        if "told" in self.cache or start >= told.ids.shape[1]:  # nothing of what it was given is read here
            return
        ids = repeat_rows(told.ids, self.batch_size)[:, start : start + self.length]
        self.cache["told"] = torch.equal(self.input_ids[:, : ids.shape[1]], ids.to(self.device))
        if not self.cache["told"]:
            told.doubt = "a pass reads another text than it was given, as the loop of a custom_generate may"
            self._check_told(told)

    def _check_told(self, told: Generation) -> None:
        """Refuse a call whose prompts do not end where their columns end."""
        self.check_text()
        end = told.columns + self.virtual
        if told.doubt or "checked" not in told.notes:
            mask = told.mask
            if mask is None and self.attention_mask is not None and self.past + self.length >= end:
                mask = self._full_mask[:, :end]
            if not told.doubt and mask is not None and not bool(mask[:, -1].all()):
                told.doubt = "its prompts are padded on the right, behind which new tokens begin (pad on the left)"
            told.notes["checked"] = mask is not None
        if told.doubt:
            raise PositionError(
                f"Where the prompt ends in this call of generate is not known: {told.doubt}. Generate without that, or "
                "set attachment.prompt_lengths."
            )

    def window(self, given: torch.Tensor) -> torch.Tensor:
        """What this pass ``[B, T]`` holds of a mask over the columns of the text ``[B, n]``; False beyond it."""
        start, found = self.past - self.virtual, torch.zeros_like(self.valid)
        low, high = max(start, 0), min(start + self.length, given.shape[1])
        if low < high:
            found[:, low - start : high - start] = given[:, low:high].to(found)
        return found

    def select(self, positions: Selector) -> torch.Tensor:
        """Tokens of this pass that a selector chooses, bool ``[B, T]``; see :meth:`check_cached`."""
        self.check_cached(positions)
        return positions.mask(self)

    def check_cached(self, positions: Selector) -> None:
        """Refuse a selector that chooses tokens which are cached already, and were not treated so when read."""
        if not (self.unseen or self.before is not None) or ("select", positions) in self.cache:
            return
        self.cache["select", positions] = True
        told, total = self.generation, self.past + self.length
        ids = None if told is None or told.ids is None else repeat_rows(told.ids, self.batch_size)
        if ids is None and self.before is not None and self.before.input_ids is not None and self.input_ids is not None:
            ids = torch.cat([repeat_rows(self.before.input_ids, self.batch_size), self.input_ids], dim=1)
        part: dict[str, Any] = {
            "input_ids": None if ids is None else ids[:, : total - self.virtual],
            "prompt": None, "activation": None, "unseen": 0, "before": None, "shorter": (), "follows": False,
        }  # fmt: skip
        remedy = (
            f"{self.unseen} columns were cached before attaching, where nothing can be done any more. Attach before "
            "the cache is filled, or choose later tokens, such as Generated()."
            if self.before is None
            else f"the prompt came in pieces, and the pass that read its first {self.past} columns was taken for the "
            "whole. Set attachment.prompt_lengths before the first pass, or give generate the whole prompt."
        )
        for answer in (True, False):  # of gates, which nobody can ask about cached tokens
            whole = replace(self, length=total, past=0, assumed=answer, cache={}, **part)
            try:
                now = positions.mask(whole)[:, : self.past]
                then = torch.zeros_like(now)
                if self.before is not None:
                    read = replace(self.before, assumed=answer, cache={})
                    then = repeat_rows(positions.mask(read), self.batch_size)
            except PositionError as error:
                raise PositionError(
                    f"What {positions} chooses in the cache is not known ({error}): {remedy}"
                ) from error
            if not torch.equal(now, then):
                raise PositionError(f"{positions} chooses tokens that are cached already: {remedy}")

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
            return self.fit(self.select(positions), x.shape[1])
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
        alone = self.generation is None and not self.is_prefill and self.prompt is not None
        told = self.known_prompt_lengths is not None or alone
        part: dict[str, Any] = {
            "batch_size": len(index),
            "input_ids": None if self.input_ids is None else self.input_ids[index],
            "attention_mask": None if self.attention_mask is None else self._full_mask[index],
            "row_numbers": tuple(self.row_number(row) for row in index),
            "batch": None if self.batch is None else _BatchRows(self.batch, self.batch_size, index),
            "prompt": None,
            "known_prompt_lengths": self.prompt_lengths[index] if told else None,
            "generation": None if self.generation is None else self.generation.rows(index, self.batch_size),
            "before": None,
            "shorter": (),
        }
        if self.before is not None:
            times = self.batch_size // self.before.batch_size
            part["before"] = self.before.rows([row // times for row in index])
        return replace(self, cache={}, **part)

    def row_number(self, row: int) -> int:
        """What the user calls a row of this context, for messages."""
        return row if self.row_numbers is None else self.row_numbers[row]

    @cached_property
    def _full_mask(self) -> torch.Tensor:
        total = self.past + self.length
        mask = self.attention_mask
        if mask is None:
            mask = torch.ones(self.batch_size, total, dtype=torch.bool, device=self.device)
        if mask.dim() != 2 or mask.shape[0] != self.batch_size or mask.shape[1] < total:
            raise PositionError(
                f"Cannot tell positions from an attention_mask of shape {tuple(mask.shape)}; expected "
                f"[{self.batch_size}, {total}] (cache of {self.past} + {self.length} tokens). Pass a 2-D mask, and "
                "generate with a dynamic cache (a static one prepares its own masks)."
            )
        mask = mask[:, :total].to(device=self.device, dtype=torch.bool)
        return mask & (torch.arange(total, device=self.device) >= self.virtual) if self.virtual else mask


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
