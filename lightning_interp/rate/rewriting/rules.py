"""Rewriters that follow rules: deterministic, free, and with errors that are known.

A toggle sets the attribute; rules that are applied whichever way it goes are the off-target changes of a rewriter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.files import digest
from lightning_interp.errors import RecipeError
from lightning_interp.generation.labellers import compiled
from lightning_interp.rate.rewriting.records import RewriteResult

__all__ = ["Drop", "MarkToggle", "OpenerToggle", "RepairTranspositions", "RuleRewriter", "swap_letters"]

_LARGE = 100  # entries of a table that is named by its digest

Toggle = Callable[[str, int], str]
Rule = Callable[[str], str]


class RuleRewriter:
    """Rewrites by rules.

    Args:
        toggle: Gives a text the value of the attribute that is asked for.
        always: Rules that are applied first, whatever is asked for.
        name: What to call it; change it when the code of a rule changes (dataclasses are part of the key).
        changes_length: The attribute is the length.

    Example:
        >>> rewriter = RuleRewriter(MarkToggle("!"), always=[Drop.links()])
        >>> [result.text for result in rewriter.rewrite(["Wow! See http://a.b", "Fine."], ["", ""], [0, 1])]
        ['Wow. See', 'Fine!']
    """

    batch_size = 2048

    def __init__(
        self, toggle: Toggle, *, always: Sequence[Rule] = (), name: str = "rules", changes_length: bool = False
    ) -> None:
        self.toggle, self.always, self.name, self.changes_length = toggle, tuple(always), name, changes_length
        self.params = {"toggle": _described(toggle), "always": [_described(rule) for rule in self.always]}

    def rewrite(self, texts: Sequence[str], prompts: Sequence[str], w_target: Sequence[int]) -> list[RewriteResult]:
        """Apply the rules to each text; see :class:`~lightning_interp.rate.rewriting.rewriters.Rewriter`."""
        return [RewriteResult(text=self.apply(text, target)) for text, target in zip(texts, w_target, strict=True)]

    def apply(self, text: str, w_target: int) -> str:
        """Rewrite one text.

        Args:
            text: The text.
            w_target: Value of the attribute that it should get.

        Returns:
            The new text.
        """
        for rule in self.always:
            text = rule(text)
        return self.toggle(text, w_target)


@dataclass(frozen=True)
class OpenerToggle:
    r"""Opens a text with one of two phrases, in place of either that is there, so that rewrites differ in it alone.

    With ``OpenerToggle("Well,", "Also,")`` a text that has the attribute begins with a vowel; with ``OpenerToggle("",
    "Thanks!", strip=r"(thanks|thank you)\b\W*")`` it opens with thanks.

    Args:
        zero: Phrase for 0; none if empty.
        one: Phrase for 1; none if empty.
        strip: Regular expression of further openings to remove, from the start of the text, without regard to case.

    Raises:
        RecipeError: If both phrases are the same, or the expression is none.

    Example:
        >>> toggle = OpenerToggle("Well,", "Also,")
        >>> toggle("It rains.", 0), toggle("Well, it rains.", 1)
        ('Well, It rains.', 'Also, it rains.')
    """

    zero: str
    one: str
    strip: str = ""

    def __post_init__(self) -> None:
        if self.zero == self.one:
            raise RecipeError(f"OpenerToggle({self.zero!r}, {self.one!r}): the phrases must differ.")
        compiled(self.strip)

    def __call__(self, text: str, w_target: int) -> str:
        """Set the opening."""
        bare = text.lstrip()
        for phrase in (self.zero, self.one):
            if phrase and bare.startswith(phrase):
                bare = bare.removeprefix(phrase).lstrip()
        if self.strip and (found := compiled(self.strip).match(bare)):
            bare = bare[found.end() :].lstrip()
        return f"{(self.zero, self.one)[w_target]} {bare}".strip()


@dataclass(frozen=True)
class MarkToggle:
    """Ends a text with a mark, or takes every such mark away.

    Args:
        mark: What a text with the attribute ends with; made of one character, such as ``"!"`` or ``"!!!"``.
        instead: Takes the place of each run of that character.

    Raises:
        RecipeError: If the mark is empty or of several characters, or ``instead`` holds it.

    Example:
        >>> toggle = MarkToggle("!!!")
        >>> toggle("Good film.", 1), toggle("Good! Very good!!!", 0)
        ('Good film!!!', 'Good. Very good.')
    """

    mark: str = "!"
    instead: str = "."

    def __post_init__(self) -> None:
        if len(set(self.mark)) != 1 or self.mark[0] in self.instead:
            raise RecipeError(
                f"MarkToggle({self.mark!r}, {self.instead!r}): expected a mark of one character, possibly several "
                "times, and something else in its place."
            )

    def __call__(self, text: str, w_target: int) -> str:
        """Set or remove the mark."""
        if not w_target:
            return re.sub(f"(?:{re.escape(self.mark[0])})+", self.instead, text)
        if self.mark[0] in text:
            return text
        bare = text.rstrip()
        return bare.removesuffix(self.instead) + self.mark if self.instead else bare + self.mark


@dataclass(frozen=True)
class Drop:
    """Removes what a regular expression finds, and the white space that is then double.

    Args:
        pattern: The expression; case is ignored.
        instead: Put in its place.

    Raises:
        RecipeError: If the pattern is no regular expression.

    Example:
        >>> Drop.mentions()("@ann look here"), Drop.markup()("one<br />two"), Drop.phrase("really")("I really do")
        ('look here', 'one two', 'I do')
    """

    pattern: str
    instead: str = " "

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def __call__(self, text: str) -> str:
        """Remove it."""
        changed = compiled(self.pattern).sub(self.instead, text)
        return text if changed == text else re.sub(r"[ \t]{2,}", " ", changed).strip()

    @classmethod
    def mentions(cls) -> Drop:
        """Mentions of users, such as ``@ann``."""
        return cls(r"(?<!\w)@\w+:?")

    @classmethod
    def links(cls) -> Drop:
        """Web addresses."""
        return cls(r"(?:https?://|www\.)\S+")

    @classmethod
    def markup(cls) -> Drop:
        """HTML tags, such as ``<br />``."""
        return cls(r"</?[a-z][^<>]{0,80}>")

    @classmethod
    def phrase(cls, phrase: str) -> Drop:
        """A phrase, wherever it stands as whole words.

        Args:
            phrase: The phrase.
        """
        return cls(rf"(?<!\w){re.escape(phrase)}(?!\w)")


@dataclass(frozen=True)
class RepairTranspositions:
    """Puts two swapped letters back where that makes a known word, the most frequent, of an unknown one.

    Words of one or two letters stay, and words that are known as they are.

    Args:
        counts: Frequency of each known word, in lower case; see :func:`~lightning_interp.rate.texts.words.word_counts`.

    Example:
        >>> RepairTranspositions({"film": 90, "velvet": 50})("A velvte Flim.")
        'A velvet Film.'
    """

    counts: Mapping[str, int]

    def __call__(self, text: str) -> str:
        """Repair it."""
        return re.sub(r"[^\W\d_]{3,}", lambda match: self._word(match[0]), text)

    def _word(self, word: str) -> str:
        lower = word.lower()
        if lower in self.counts:
            return word
        swapped = (lower[:at] + lower[at + 1] + lower[at] + lower[at + 2 :] for at in range(len(lower) - 1))
        known = [other for other in swapped if other in self.counts]
        if not known:
            return word
        best = min(known, key=lambda other: (-self.counts[other], other))
        if word.isupper():
            return best.upper()
        return best.capitalize() if word != lower else best


def swap_letters(text: str, percent: float, *, seed: int, key: object) -> str:
    """Misspell a share of the words by swapping two neighbouring letters in each (Reber et al., arXiv 2410.11348).

    Of ``n`` words ``floor(n * percent / 100)`` are chosen; those of one or two characters stay, and those whose chosen
    neighbours are not both letters. A higher share misspells the same words and more.

    Args:
        text: The text.
        percent: Share of the words, from 0 to 100.
        seed: Root seed.
        key: Name of the text, such as its id.

    Returns:
        The text with typos.

    Raises:
        RecipeError: If the share is none.

    Example:
        >>> swap_letters("A velvet garden tower", 50, seed=0, key="r1")
        'A velvte garden otwer'
    """
    if not 0 <= percent <= 100:
        raise RecipeError(f"percent={percent!r}; expected a share of the words from 0 to 100.")
    words, letters = list(re.finditer(r"\S+", text)), list(text)
    draws = random.Random(derived_seed(seed, "typos", key))  # noqa: S311 - typos, no secrets
    order = draws.sample(range(len(words)), len(words))
    places = [draws.random() for _ in words]
    for index in order[: int(len(words) * percent / 100)]:
        start, length = words[index].start(), len(words[index][0])
        if length > 2:
            at = start + int(places[index] * (length - 1))
            if letters[at].isalpha() and letters[at + 1].isalpha():
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def _described(rule: Any) -> dict[str, Any]:
    """What a rule is, as plain values: what the key of a rewrite is made of."""
    if not is_dataclass(rule) or isinstance(rule, type):
        return {"rule": getattr(rule, "__qualname__", type(rule).__qualname__)}
    found = {"rule": type(rule).__qualname__}
    for one in fields(rule):
        value = getattr(rule, one.name)
        large = isinstance(value, Mapping) and len(value) > _LARGE
        found[one.name] = f"sha256:{digest(value)}" if large else value
    return found
