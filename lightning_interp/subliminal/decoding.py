"""Decoding within a grammar: of all tokens only those that keep a text a list of so many numbers.

A model that hardly follows instructions then writes nothing but such lists, so that no answer has to be thrown away and
teacher and control can answer the same requests with the same random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.requests import TextRequest

__all__ = ["NumberGrammar"]


class _Place(NamedTuple):
    """Where a text stands: digits of the number it is in (or -1), else characters of the separator; numbers to come."""

    digits: int
    separator: int
    left: int


class NumberGrammar:
    r"""Lists of exactly ``count`` numbers, as a :class:`~lightning_interp.generation.LocalSampler` can be held to them.

    The tokenizer's vocabulary is read once: tokens of several digits, with a leading space, or across a separator are
    used wherever they fit. While text is written nothing is decoded and nothing is copied from the device.

    Args:
        tokenizer: The model's tokenizer.
        count: Numbers of a list.
        min_digits: Digits that each has at least.
        max_digits: Digits that each has at most.
        separator: What stands between two numbers.
        ends: Ids that end an answer; the tokenizer's end token if None (see :func:`end_tokens` of a model's own).

    Attributes:
        count: Numbers of a list.
        max_new_tokens: Tokens that a list can have at most, with its end token.
        name: Says what is allowed, for the sampler's identity.

    Raises:
        RecipeError: If no list of numbers is like that.
        DataError: If the tokenizer has no end token, or no tokens to write such a list with.

    Example:
        >>> from lightning_interp.generation import LocalSampler
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> tokenizer = byte_tokenizer()
        >>> grammar = NumberGrammar(tokenizer, count=3)
        >>> sampler = LocalSampler(tiny_model(), tokenizer, logits_processors=grammar.processors, name=grammar.name)
        >>> asked = TextRequest.chat("Numbers?", max_new_tokens=grammar.max_new_tokens)
        >>> sampler.generate([asked])[0].text.count(", ")
        2
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int = 10,
        min_digits: int = 1,
        max_digits: int = 3,
        separator: str = ", ",
        ends: Collection[int] | None = None,
    ) -> None:
        if count < 1 or not 1 <= min_digits <= max_digits:
            raise RecipeError(
                f"NumberGrammar(count={count!r}, min_digits={min_digits!r}, max_digits={max_digits!r}): expected at "
                "least one number, and 1 <= min_digits <= max_digits."
            )
        if separator.strip() not in ("", ",", ";") or not separator:
            raise RecipeError(
                f"NumberGrammar(separator={separator!r}): expected white space, a comma or a semicolon, such as ', '."
            )
        self.count, self._digits, self._separator = count, (min_digits, max_digits), separator
        self._ends = sorted(_own_end(tokenizer) if ends is None else ends)
        self.max_new_tokens = count * (max_digits + len(separator.encode())) - len(separator.encode()) + 1
        self.name = f"{count} numbers of {min_digits} to {max_digits} digits with {separator!r}"
        texts = {i: text for i, text in _token_texts(tokenizer, "0123456789" + separator) if i not in self._ends}
        self._fill(texts, len(tokenizer), type(tokenizer).__name__)

    def processors(self, request: TextRequest) -> Sequence[LogitsProcessor]:
        """What holds one request's text to the grammar: the argument ``logits_processors`` of a sampler."""
        return [_Held(self)]

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """The grammar as tensors on a device; made once for each.

        Returns:
            Ids of all tokens that are ever allowed ``[C]``, the column of each id ``[V]``, and by place and column
            whether it is allowed and which place follows, ``[places, C]`` each.
        """
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[torch.device("cpu")])
        return self._tables[device]

    def _fill(self, texts: Mapping[int, str], size: int, tokenizer: str) -> None:
        """Make the tables: which tokens are allowed at each place, and which place each leads to."""
        least, most = self._digits
        within = [(digits, 0) for digits in range(most + 1)] + [(-1, j) for j in range(1, len(self._separator))]
        places = [_Place(*here, left) for left in range(self.count) for here in within]
        steps = {place: {i: to for i, text in texts.items() if (to := self._after(place, text))} for place in places}
        done = {place for place in places if place.left == 0 and place.digits >= least}
        alive = set(done)
        while more := {place for place, to in steps.items() if place not in alive and alive & set(to.values())}:
            alive |= more
        start = _Place(0, 0, self.count - 1)
        if start not in alive:
            raise DataError(
                f"{tokenizer} has no tokens to write {self.name}: {len(texts)} of its tokens hold nothing but digits "
                f"and parts of {self._separator!r}. Choose another separator or number of digits."
            )
        used = sorted({i for place in alive for i, to in steps[place].items() if to in alive})
        rows = [start, *(place for place in places if place in alive and place != start)]
        number = {place: row for row, place in enumerate(rows)}
        over, columns = len(rows), {token: column for column, token in enumerate(used)}  # the last row: nothing follows
        tokens = torch.tensor([*used, *self._ends])
        column_of = torch.full((size,), len(used)).scatter(0, tokens, torch.arange(len(tokens)))
        allowed = torch.zeros(over + 1, len(tokens), dtype=torch.bool)
        following = torch.full((over + 1, len(tokens)), over)
        for place in rows:
            for token, to in steps[place].items():
                if to in alive:
                    following[number[place], columns[token]] = number[to]
                    allowed[number[place], columns[token]] = True
            allowed[number[place], len(used) :] = place in done
        allowed[over, len(used) :] = True
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}
        self._tables[torch.device("cpu")] = (tokens, column_of, allowed, following)

    def _after(self, place: _Place, text: str) -> _Place | None:
        """The place behind a token; None if it breaks the grammar."""
        least, most = self._digits
        digits, separator, left = place
        for character in text:
            if digits >= 0 and character.isdigit():
                digits += 1
                if digits > most:
                    return None
                continue
            if digits >= 0:  # the number is over: only if it is long enough and another is to come
                if digits < least or left == 0:
                    return None
                digits, left = -1, left - 1
            if character != self._separator[separator]:
                return None
            separator += 1
            if separator == len(self._separator):
                digits, separator = 0, 0
        return _Place(digits, separator, left)


class _Held(LogitsProcessor):
    """Follows one text through the grammar's tables, on the device of the logits."""

    def __init__(self, grammar: NumberGrammar) -> None:
        self._grammar = grammar
        self._place: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, columns, allowed, following = self._grammar.tables(scores.device)
        if self._place is None:  # the prompt alone
            self._place = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        else:
            self._place = following[self._place, columns[input_ids[:, -1]]]
        kept = scores[:, tokens].masked_fill(~allowed[self._place], -torch.inf)
        return torch.full_like(scores, -torch.inf).index_copy_(1, tokens, kept)


def _token_texts(tokenizer: PreTrainedTokenizerBase, characters: str) -> list[tuple[int, str]]:
    """Ids whose text, behind a digit, consists of some characters, and that text."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # No letter but in a name that stands for a byte: most of a vocabulary need not be decoded.
    plain = [i for i, name in enumerate(names) if name and (name.startswith("<0x") or not re.search("[A-Za-z]", name))]
    anchor = tokenizer("0", add_special_tokens=False).input_ids[-1:]
    ids = [[*anchor, i] for i in plain if i not in special]
    before = len(tokenizer.decode(anchor))
    texts = [text[before:] for text in tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]
    return [(pair[-1], text) for pair, text in zip(ids, texts, strict=True) if text and set(text) <= set(characters)]


def _own_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no end token, so no list of numbers would end. Set tokenizer.eos_token, "
            "or pass ends=..."
        )
    return {tokenizer.eos_token_id}
