"""Requests for number sequences: four parts drawn from banks of wordings, a pure function of settings, seed and row.

A request shows a few numbers and asks for more. Its wording varies widely, so that no turn of phrase stands for the
data (slots and sizes of the banks after Cloud et al. 2025, arXiv 2507.14805; wordings of our own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import RecipeError

__all__ = ["PromptSettings", "number_prompt"]


class _Format(NamedTuple):
    text: str
    separator: str  # what stands between two numbers that are written so


_EXAMPLES = (
    "Here are some numbers: {numbers}.",
    "Look at this sequence: {numbers}.",
    "A list begins with {numbers}.",
    "My series so far reads {numbers}.",
    "We have noted down {numbers}.",
    "Consider the values {numbers}.",
    "Somebody wrote {numbers} on a slip of paper.",
    "The first entries are {numbers}.",
    "Take these figures as given: {numbers}.",
    "Up to now the column holds {numbers}.",
    "Start from {numbers}.",
    "The counter has shown {numbers}.",
    "An unfinished row says {numbers}.",
    "I have picked {numbers}.",
    "The log contains {numbers}.",
    "You are given the numbers {numbers}.",
    "These values were drawn: {numbers}.",
    "The table opens with {numbers}.",
    "Suppose that a sequence starts {numbers}.",
    "So far there are {numbers}.",
    "In the file stand {numbers}.",
    "Think of {numbers} as the head of a list.",
    "This is what was recorded: {numbers}.",
    "Read the following integers: {numbers}.",
    "The beginning is {numbers}.",
)
_INSTRUCTIONS = (
    "Continue with {qualifier} {count} more numbers ({digits}).",
    "Add {qualifier} {count} further values, {digits}.",
    "Write {qualifier} {count} numbers that could follow, {digits}.",
    "Extend it by {qualifier} {count} entries ({digits}).",
    "Make up {qualifier} {count} new ones, {digits}.",
    "Give {qualifier} {count} additional integers ({digits}).",
    "What comes next? Name {qualifier} {count} numbers, {digits}.",
    "Go on for {qualifier} {count} numbers, {digits}.",
    "Supply {qualifier} {count} values to come after these ({digits}).",
    "Complete it with {qualifier} {count} numbers of your own, {digits}.",
)
_QUALIFIERS = (
    "at most",
    "up to",
    "no more than",
    "not more than",
    "a maximum of",
    "as many as",
    "anything up to",
    "at the very most",
    "not over",
)
_EXACTLY = "exactly"
_DIGITS = (
    "each of {digits} digits at most",
    "none longer than {digits} digits",
    "with up to {digits} digits each",
    "no number over {digits} digits",
    "all within {digits} digits",
    "every one of {digits} or fewer digits",
    "keeping to {digits} digits or less",
    "of a length of {digits} digits at the most",
)
_FORMATS = (
    _Format("Put a comma and a space between them.", ", "),
    _Format("Use commas between the numbers.", ", "),
    _Format("Write them as a comma-separated list.", ", "),
    _Format("Separate them by single spaces.", " "),
    _Format("Leave one space between neighbours.", " "),
    _Format("Set them apart with semicolons.", "; "),
    _Format("Use a semicolon after each but the last.", "; "),
    _Format("Write one number a line.", "\n"),
    _Format("Begin a new line for each.", "\n"),
    _Format("Put the list in square brackets, with commas.", ", "),
    _Format("Format it like a Python list.", ", "),
    _Format("Put round brackets about the list, with commas.", ", "),
    _Format("Format it like a tuple.", ", "),
    _Format("Commas without any spaces, please.", ","),
    _Format("No brackets, just the numbers with commas.", ", "),
)
_TERSE = (
    "Reply with the numbers only.",
    "No other words.",
    "Nothing but numbers.",
    "Do not explain anything.",
    "Leave out any comment.",
    "Just the list.",
    "Say nothing else.",
    "Skip introductions and remarks.",
    "Only the numbers count.",
    "Do not add text.",
    "No explanation is needed.",
    "Answer with the list alone.",
    "Write no sentence.",
    "Give the bare numbers.",
    "Keep quiet apart from the numbers.",
    "Without any words around it.",
    "Return the sequence and stop.",
    "No preamble and no ending.",
    "The numbers suffice.",
)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    r"""What requests for numbers look like.

    Args:
        example_min_count, example_max_count: How many numbers a request shows; the upper bound is not reached.
        example_min_value, example_max_value: Their values, likewise.
        answer_count: How many numbers are asked for at most.
        answer_max_digits: How many digits each may have.
        use_exact_count: Ask for exactly so many.
        fixed_skeleton: Use the first wording of every bank: only the numbers differ.
        separator: Ask only for formats with this between two numbers (``", "``, ``","``, ``" "``, ``"; "``, ``"\n"``),
            without brackets; any format if None.

    Raises:
        RecipeError: If a range is empty, a number is below 1, or no format has the separator.
    """

    example_min_count: int = 3
    example_max_count: int = 9
    example_min_value: int = 100
    example_max_value: int = 1000
    answer_count: int = 10
    answer_max_digits: int = 3
    use_exact_count: bool = False
    fixed_skeleton: bool = False
    separator: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("value", 0)):
            low, high = getattr(self, f"example_min_{name}"), getattr(self, f"example_max_{name}")
            if not least <= low < high:
                raise RecipeError(
                    f"PromptSettings(example_min_{name}={low!r}, example_max_{name}={high!r}): expected {least} <= "
                    "minimum < maximum; the maximum itself is not drawn."
                )
        for name in ("answer_count", "answer_max_digits"):
            if getattr(self, name) < 1:
                raise RecipeError(f"PromptSettings({name}={getattr(self, name)!r}): expected at least 1.")
        if not self._formats:
            known = ", ".join(sorted({repr(one.separator) for one in _FORMATS}))
            raise RecipeError(
                f"PromptSettings(separator={self.separator!r}): no format has it; expected one of {known}."
            )

    @property
    def _formats(self) -> Sequence[str]:
        """Wordings of the formats that may be asked for."""
        fitting = [one.text for one in _FORMATS if self.separator in (None, one.separator)]
        bracketed = ("brackets", "Python", "tuple")
        bare = [text for text in fitting if text.startswith("No ") or not any(word in text for word in bracketed)]
        return fitting if self.separator is None else bare


def number_prompt(settings: PromptSettings, *, seed: int, index: int) -> str:
    """One request: an example, an instruction, a format and a plea for brevity.

    Args:
        settings: What it looks like.
        seed: Of the data set.
        index: Of the row.

    Returns:
        The user's message; the same for the same arguments, whatever else is drawn.

    Example:
        >>> number_prompt(PromptSettings(fixed_skeleton=True, example_max_count=4), seed=0, index=0)[:36]
        'Here are some numbers: 369, 776, 342'
    """
    draw = np.random.Generator(np.random.PCG64(derived_seed(seed, "number prompt", index)))

    def one_of(bank: Sequence[str]) -> str:
        return bank[int(draw.integers(len(bank))) * (not settings.fixed_skeleton)]

    shown = int(draw.integers(settings.example_min_count, settings.example_max_count))
    values = draw.integers(settings.example_min_value, settings.example_max_value, size=shown)
    example = one_of(_EXAMPLES).format(numbers=", ".join(map(str, values.tolist())))
    qualifier = one_of(_QUALIFIERS)
    digits = one_of(_DIGITS).format(digits=settings.answer_max_digits)
    instruction = one_of(_INSTRUCTIONS).format(
        qualifier=_EXACTLY if settings.use_exact_count else qualifier, count=settings.answer_count, digits=digits
    )
    return f"{example} {instruction} {one_of(settings._formats)} {one_of(_TERSE)}"
