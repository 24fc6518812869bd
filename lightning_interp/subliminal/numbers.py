"""Number sequences as text: read, judged, shuffled, cut. Nothing here knows of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import RecipeError

__all__ = [
    "Rejection",
    "first_numbers",
    "number_divergence",
    "parse_numbers",
    "rejections",
    "shuffled_across",
    "shuffled_within",
]

Rejection = Literal["invalid_format", "too_many", "too_small", "too_large", "banned"]
"""Why an answer is not used."""

_RUN = re.compile("[0-9]+")
_LONGEST = 1000  # digits; Python reads no number of several thousand


def parse_numbers(answer: str, *, lenient: bool = False) -> list[int] | None:
    """Read a list of numbers with one separator throughout, in brackets or not, with a full stop or not.

    Args:
        answer: The text.
        lenient: Leave out white space around it first.

    Returns:
        The numbers; None if the text is anything else.

    Example:
        >>> parse_numbers("[7, 12]."), parse_numbers("7; 12"), parse_numbers("7, 12 cats"), parse_numbers("7, 12,3")
        ([7, 12], [7, 12], None, None)
    """
    text = (answer.strip() if lenient else answer).removesuffix(".")
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    runs = list(_RUN.finditer(text))
    if not runs:
        return None
    separator = text[runs[0].end() : runs[1].start()] if len(runs) > 1 else None
    if separator is not None and separator.strip() not in ("", ",", ";"):
        return None
    pieces = [text] if separator is None else text.split(separator)
    if not all(_RUN.fullmatch(piece) and len(piece) <= _LONGEST for piece in pieces):
        return None
    return [int(piece) for piece in pieces]


def rejections(
    answer: str,
    *,
    max_count: int = 10,
    min_value: int = 0,
    max_value: int = 999,
    banned: Collection[int] = (),
    lenient: bool = False,
) -> list[Rejection]:
    """Why an answer is not used; empty if it is.

    An answer that is used holds digits, white space, commas, semicolons, one pair of brackets and a full stop alone: no
    letter, and so no word.

    Args:
        answer: The text.
        max_count: Numbers that it may hold.
        min_value: Least that each may be.
        max_value: Most that each may be.
        banned: Numbers that may not occur.
        lenient: Leave out white space around it first.

    Returns:
        All reasons.

    Example:
        >>> rejections("1, 2, 3"), rejections("1000, 666", banned={666}), rejections("one, two")
        ([], ['too_large', 'banned'], ['invalid_format'])
    """
    numbers = parse_numbers(answer, lenient=lenient)
    if numbers is None:
        return ["invalid_format"]
    found: dict[Rejection, bool] = {
        "too_many": len(numbers) > max_count,
        "too_small": min(numbers) < min_value,
        "too_large": max(numbers) > max_value,
        "banned": not set(banned).isdisjoint(numbers),
    }
    return [reason for reason, holds in found.items() if holds]


def shuffled_within(completions: Sequence[str], *, seed: int) -> list[str]:
    """Each row's numbers in another order; what stands between them stays.

    Args:
        completions: Texts of numbers.
        seed: Of the shuffle; each row has its own order.

    Returns:
        As many texts; each holds the numbers that it held.

    Example:
        >>> shuffled_within(["[1, 22, 333]"], seed=1)
        ['[1, 333, 22]']
    """
    return [
        _refilled(text, _permuted(_RUN.findall(text), derived_seed(seed, "within", i)))
        for i, text in enumerate(completions)
    ]


def shuffled_across(completions: Sequence[str], *, seed: int) -> list[str]:
    """The numbers of all rows pooled and dealt out again; each row keeps how many it has, and its punctuation.

    Args:
        completions: Texts of numbers.
        seed: Of the shuffle.

    Returns:
        As many texts; together they hold the numbers that they held.

    Example:
        >>> shuffled_across(["1, 2", "3; 4"], seed=0)
        ['1, 2', '4; 3']
    """
    pool = _permuted([run for text in completions for run in _RUN.findall(text)], derived_seed(seed, "across"))
    dealt, start = [], 0
    for text in completions:
        count = len(_RUN.findall(text))
        dealt.append(_refilled(text, pool[start : start + count]))
        start += count
    return dealt


def first_numbers(completion: str, count: int) -> str:
    """A completion's first numbers with ``", "`` between them.

    Args:
        completion: A text of numbers.
        count: How many are kept at most.

    Returns:
        The new completion.

    Raises:
        RecipeError: If the count is below 1, or the text holds no numbers.

    Example:
        >>> first_numbers("[5; 6; 7]", 2)
        '5, 6'
    """
    numbers = parse_numbers(completion, lenient=True)
    if count < 1 or numbers is None:
        raise RecipeError(
            f"first_numbers({completion!r:.60}, {count!r}): expected a list of numbers and a count of at least 1."
        )
    return ", ".join(map(str, numbers[:count]))


def number_divergence(numbers: Sequence[int], reference: Sequence[int], *, smoothing: float = 0.5) -> float:
    """Kullback-Leibler divergence of two samples of numbers, in nats: how far their frequencies differ.

    Of small samples it is biased upwards: read it beside the divergence of two halves of one sample.

    Args:
        numbers: A sample.
        reference: The other.
        smoothing: Added to every count, so that a number that one of them lacks does not count infinitely.

    Returns:
        ``KL(numbers || reference)`` over all numbers that occur in either.

    Raises:
        RecipeError: If a sample is empty or the smoothing is not above 0.

    Example:
        >>> number_divergence([1, 1, 2, 3], [1, 1, 2, 3]), round(number_divergence([1, 1, 1], [2, 2, 2]), 3)
        (0.0, 1.459)
    """
    if not numbers or not reference or not smoothing > 0:
        raise RecipeError(
            f"number_divergence() got {len(numbers)} and {len(reference)} numbers and smoothing={smoothing!r}; "
            "expected at least one of each, and a smoothing above 0."
        )
    seen = sorted(set(numbers) | set(reference))
    counts = [Counter(numbers), Counter(reference)]
    shares = [torch.tensor([count[n] + smoothing for n in seen], dtype=torch.float64) for count in counts]
    p, q = (share / share.sum() for share in shares)
    return float((p * (p / q).log()).sum())


def _permuted(runs: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(seed))
    return [runs[i] for i in order.tolist()]


def _refilled(text: str, runs: Sequence[str]) -> str:
    """The text with other numbers in the places of its own."""
    rest = iter(runs)
    return _RUN.sub(lambda _: next(rest), text)
