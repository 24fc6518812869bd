"""Which tokens: frozen selectors with one pure method, ``mask(step) -> bool [B, T]``.

Selectors combine with ``~``, ``&`` and ``|`` and round-trip through plain data (JSON, YAML). Positions are those of
real tokens, so a prompt selects the same tokens with and without padding, and with and without a KV cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lightning_interp.core.tokens.repeats import given_mask
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.tokens.text import PARTS, find_occurrence, ids_of, mask_by_text, template_mask, token_spans
from lightning_interp.errors import PositionError

__all__ = [
    "All",
    "And",
    "ChatTemplate",
    "FromBatch",
    "Generated",
    "GenerationSteps",
    "Last",
    "Not",
    "Or",
    "Positions",
    "Prompt",
    "Span",
    "StepContext",
    "Substring",
    "Tokens",
]


@dataclass(frozen=True)
class Positions(ABC):
    """A choice of token positions; subclass it to write your own.

    Example:
        >>> step = StepContext(1, 4)
        >>> (All() & ~Last()).mask(step).tolist()
        [[True, True, True, False]]
        >>> Positions.from_dict((Span(0, 2) | Last()).to_dict()) == Span(0, 2) | Last()
        True
    """

    @abstractmethod
    def mask(self, step: StepContext) -> torch.Tensor:
        """Chosen tokens of this pass.

        Args:
            step: The tokens of the pass.

        Returns:
            bool ``[B, T]``, never True on padding.

        Raises:
            PositionError: If the tokens cannot be found.
        """

    def __and__(self, other: Positions) -> Positions:
        return And(self, other)

    def __or__(self, other: Positions) -> Positions:
        return Or(self, other)

    def __invert__(self) -> Positions:
        return Not(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` reads back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.to_dict() if isinstance(v, Positions) else v for k, v in values.items()}
        return {"kind": type(self).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Positions:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PositionError: If the kind or its fields are unknown.
        """
        if not isinstance(data, Mapping):
            raise PositionError(f"Cannot read positions from {data!r}; expected a mapping such as {{'kind': 'Last'}}.")
        kind = str(data.get("kind"))
        kinds: dict[str, Any] = {cls.__name__: cls for cls in _subclasses(Positions)}
        if kind not in kinds:
            raise PositionError(f"Unknown kind of positions {kind!r}. Known: {', '.join(sorted(kinds))}.")
        values = {k: v for k, v in data.items() if k != "kind"}
        values = {k: Positions.from_dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            made: Positions = kinds[kind](**values)
            return made
        except TypeError as error:
            raise PositionError(f"Cannot read positions {kind!r} from {dict(data)}: {error}.") from error


class _Combined:
    """What is made of other positions."""

    def __post_init__(self) -> None:
        for part in vars(self).values():
            if not isinstance(part, Positions):
                raise PositionError(f"{type(self).__name__} combines positions, but got {part!r}.")


@dataclass(frozen=True)
class And(_Combined, Positions):
    """Tokens that both selectors choose."""

    left: Positions
    right: Positions

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return self.left.mask(step) & self.right.mask(step)


@dataclass(frozen=True)
class Or(_Combined, Positions):
    """Tokens that either selector chooses."""

    left: Positions
    right: Positions

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return self.left.mask(step) | self.right.mask(step)


@dataclass(frozen=True)
class Not(_Combined, Positions):
    """Real tokens that a selector leaves out."""

    inner: Positions

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return step.valid & ~self.inner.mask(step)


@dataclass(frozen=True)
class All(Positions):
    """Every real token."""

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return step.valid


@dataclass(frozen=True)
class Last(Positions):
    """The last ``n`` real tokens seen so far: the end of a prompt, then each new token as it is read.

    In a pass over prompt and answer together (``prompt_lengths`` says where the answer begins, or ``generate`` runs
    without a cache), these are the prompt's last ``n`` tokens and the whole answer.
    """

    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PositionError(f"Last(n={self.n}) chooses nothing; expected n >= 1.")

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        if step.phase == "new":
            return step.valid if step.rolling else torch.zeros_like(step.valid)
        chosen = step.valid & (step.positions >= step.prompt_lengths[:, None] - self.n)
        return chosen if step.rolling else chosen & (step.positions < step.prompt_lengths[:, None])


@dataclass(frozen=True)
class Span(Positions):
    """Real tokens ``start`` to ``stop`` (excluded) of the prompt, counted from 0.

    Args:
        start: First token; negative counts from the end of the prompt.
        stop: One past the last token; negative counts from the end, None is for one token only.
        strict: Raise when the prompt has no such token. Turn it off for windows that lie in generated text.
    """

    start: int
    stop: int | None = None
    strict: bool = True

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        stop = self.start + 1 if self.stop is None else self.stop
        from_end = stop < 0 or (stop == 0 and self.start < 0)
        relative = self.start < 0 or from_end
        check = self.strict and not step.follows and step.is_prefill
        if not relative and not check:
            return step.valid & (step.positions >= self.start) & (step.positions < stop)
        if not check and step.phase == "new":  # the end of the prompt has gone by
            return torch.zeros_like(step.valid)
        size = step.prompt_lengths[:, None]
        low = torch.full_like(size, self.start) if self.start >= 0 else size + self.start
        high = size + stop if from_end else torch.full_like(size, stop)
        if check:
            self._check(low, high, step)
        chosen = step.valid & (step.positions >= low) & (step.positions < high)
        return chosen & (step.positions < size) if relative else chosen

    def _check(self, low: torch.Tensor, high: torch.Tensor, step: StepContext) -> None:
        outside = ((low < 0) | (high > step.prompt_lengths[:, None]) | (high <= low)).flatten().nonzero()
        if len(outside):
            row = int(outside[0])
            raise PositionError(
                f"Span({self.start}, {self.stop}) lies outside the prompt in row {step.row_number(row)}, which has "
                f"{int(step.prompt_lengths[row])} tokens. Choose positions inside it, or pass strict=False."
            )


@dataclass(frozen=True)
class Prompt(Positions):
    """Every token of the prompt.

    A call of ``generate`` says what its prompt is; in a loop of your own the first pass is the prompt. In a pass over
    prompt and answer together, the attachment's (or the batch's) ``prompt_lengths`` says where the answer begins;
    without it the whole pass counts as prompt.
    """

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return step.valid & (step.positions < step.prompt_lengths[:, None])


@dataclass(frozen=True)
class _Window:
    """What has a first and a last step."""

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise PositionError(f"{self} chooses nothing; expected 0 <= start < stop, or stop=None for no end.")

    def inside(self, step: StepContext, index: torch.Tensor) -> torch.Tensor:
        """Real tokens whose index ``[B, T]`` is in the window."""
        chosen = step.valid & (index >= self.start)
        return chosen if self.stop is None else chosen & (index < self.stop)


@dataclass(frozen=True)
class Generated(_Window, Positions):
    """New tokens ``start`` to ``stop`` (excluded), counted from 0 at the first token after the prompt.

    The first of them is predicted at the prompt's last token, which :class:`GenerationSteps` begins with.

    Args:
        start: First new token.
        stop: One past the last; None for no end.

    Example:
        >>> step = StepContext(1, 5, known_prompt_lengths=torch.tensor([2]))
        >>> Generated(1).mask(step).tolist(), GenerationSteps(0, 1).mask(step).tolist()
        ([[False, False, False, True, True]], [[False, True, False, False, False]])
    """

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return self.inside(step, step.positions - step.prompt_lengths[:, None])


@dataclass(frozen=True)
class GenerationSteps(_Window, Positions):
    """The tokens that predict new tokens ``start`` to ``stop`` (excluded); step 0 is the prompt's last token.

    Args:
        start: First step.
        stop: One past the last; None for no end.
    """

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return self.inside(step, step.generation_steps)


@dataclass(frozen=True)
class Tokens(Positions):
    """Every token whose id is one of ``ids``."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        ids = ids_of(step, self)
        return step.valid & torch.isin(ids, torch.tensor(self.ids, device=ids.device, dtype=ids.dtype))


@dataclass(frozen=True)
class Substring(Positions):
    """The tokens that spell a piece of the prompt's text.

    Args:
        text: What to find, for example an entity's name, also inside of a longer word. A token that holds any of its
            characters is chosen.
        which: ``first``, ``last`` or ``all`` mentions.
        missing: ``raise``, or ``ignore`` to choose nothing in rows without it.
    """

    text: str
    which: str = "first"
    missing: str = "raise"

    def __post_init__(self) -> None:
        if self.which not in ("first", "last", "all"):
            raise PositionError(f"Substring(which={self.which!r}) is unknown; expected 'first', 'last' or 'all'.")
        if self.missing not in ("raise", "ignore"):
            raise PositionError(f"Substring(missing={self.missing!r}) is unknown; expected 'raise' or 'ignore'.")
        if not self.text:
            raise PositionError("Substring('') is empty; expected the text to find.")

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return mask_by_text(step, self, lambda tokenizer, ids, row: self._find(tokenizer, ids, step.row_number(row)))

    def _find(self, tokenizer: Any, ids: list[int], row: int) -> torch.Tensor:
        text, spans = token_spans(tokenizer, ids)
        places = find_occurrence(text, self.text, self.which)
        if not places and self.missing == "raise":
            raise PositionError(
                f"{self.text!r} does not occur in row {row}: {text!r}. Check the spelling, or pass missing='ignore'."
            )
        hit = [any(a < end and b > begin for begin, end in places) for a, b in spans]
        return torch.tensor(hit, dtype=torch.bool)


@dataclass(frozen=True)
class ChatTemplate(Positions):
    """Parts of a conversation that was written by the tokenizer's own chat template.

    Args:
        part: ``user``, ``assistant`` or ``system`` for what that role said, ``template`` for what the template added
            to it, ``inserted`` for the system text that the template has where none was given, or
            ``generation_prompt`` for what opens the last answer.
    """

    part: str = "template"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise PositionError(f"ChatTemplate({self.part!r}) is unknown; expected one of {', '.join(PARTS)}.")

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        return mask_by_text(step, self, lambda tokenizer, ids, _: template_mask(tokenizer, ids, self.part))


@dataclass(frozen=True)
class FromBatch(Positions):
    """A mask that travels with the batch: bool ``[B, T]`` over the prompt's columns, under this key.

    Within ``generate``, one row a prompt serves all of its beams or samples.
    """

    key: str

    def mask(self, step: StepContext) -> torch.Tensor:
        """See :meth:`Positions.mask`."""
        batch = step.batch or {}
        if self.key not in batch:
            known = ", ".join(map(str, batch)) or "nothing"
            raise PositionError(
                f"The batch has no mask {self.key!r}; it holds: {known}. Put bool [B, T] under that key."
            )
        return step.window(given_mask(step, batch[self.key], f"Mask {self.key!r}")) & step.valid


def _subclasses(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
