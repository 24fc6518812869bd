"""Signs of a text that holds together, from 0 to 100 each, and plain numbers of its surface; each alone can be fooled.

Surprise alone cannot say it: text that a model finds too likely is a loop, and on its way into one a text can be more
surprising first. So there are several parts, and their mean is a proxy of coherence that says so in its name.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_interp.errors import DataError
from lightning_interp.generation.text_quality import distinct_n

__all__ = [
    "PARTS",
    "coherence_proxy",
    "fluency",
    "longest_repeated_run",
    "non_repetition",
    "share_below",
    "surface",
    "termination",
]

PARTS = ("fluency", "non_repetition", "termination", "relevance")
"""Parts of the proxy."""
_EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55]")


def share_below(values: Tensor, reference: Tensor) -> Tensor:
    """Share of a reference's values that lie below each value, ties counted half.

    Args:
        values: ``[n]``.
        reference: ``[m]``.

    Returns:
        Float64 ``[n]`` from 0 to 1; NaN where the value is.

    Raises:
        DataError: If the reference holds no number.

    Example:
        >>> share_below(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 0.375, 1.0]
    """
    values, known = values.double(), reference.double()[~reference.isnan()].sort().values
    if not len(known):
        raise DataError(f"share_below() got a reference of {len(reference)} values, none of them a number.")
    sides = [torch.searchsorted(known, values.contiguous(), right=right) for right in (False, True)]
    return ((sides[0] + sides[1]).double() / (2 * len(known))).where(~values.isnan(), torch.nan)


def fluency(surprise: Tensor, base: Tensor) -> Tensor:
    """How usual a model finds texts, among those that it writes itself: too low a surprise counts like too high a one.

    Args:
        surprise: Mean negative log-probability a token under the base model, ``[n]``.
        base: The same of the base model's own texts, ``[m]``.

    Returns:
        100 at their median, 0 beyond their range; the mean over the base's own texts is about 50.

    Example:
        >>> fluency(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [0.0, 100.0]
    """
    below = share_below(surprise, base)
    return 200 * torch.minimum(below, 1 - below)


def longest_repeated_run(text: Sequence[int] | Sequence[str], n: int = 4) -> float:
    """Share of a text that is covered by its longest stretch of n-grams each of which it had said before.

    Args:
        text: Token ids or words.
        n: Length of the n-grams.

    Returns:
        0 if no n-gram comes twice, near 1 for one word over and over; 0 for a text with fewer than ``n`` tokens.

    Example:
        >>> longest_repeated_run([1, 2, 3, 4, 9, 1, 2, 3, 4, 8])
        0.4
    """
    seen, run, longest = set[tuple[object, ...]](), 0, 0
    for gram in (tuple(text[i : i + n]) for i in range(len(text) - n + 1)):
        run = run + 1 if gram in seen else 0
        longest = max(longest, run)
        seen.add(gram)
    return (longest + n - 1) / len(text) if longest else 0.0


def non_repetition(text: Sequence[int] | Sequence[str]) -> float:
    """Share of different pairs of tokens, less the share that the longest repeated run of 4-grams covers, in percent.

    Args:
        text: Token ids or words.

    Returns:
        ``100 * distinct_2 * (1 - run)``; NaN for a text with fewer than two tokens.

    Example:
        >>> non_repetition(list(range(50))), round(non_repetition([7] * 500), 3)
        (100.0, 0.0)
    """
    return 100 * _pairs(text) * (1 - longest_repeated_run(text))


def termination(ended: float, base: float) -> float:
    """How often texts end by themselves, among as many of the base model under the same limit of tokens.

    Args:
        ended: Share of texts that ended.
        base: Share of the base model's.

    Returns:
        ``100 * ended / base``, at most 100; NaN if none of the base's ended.

    Example:
        >>> termination(0.3, 0.6), termination(0.9, 0.6)
        (50.0, 100.0)
    """
    return 100 * min(1.0, ended / base) if base > 0 else math.nan


def coherence_proxy(parts: Mapping[str, float]) -> float:
    """Mean of the parts that are known, NaN if none is; a proxy, which no reader has confirmed.

    Args:
        parts: Values by names of :data:`PARTS`; NaN where one is not known.

    Raises:
        DataError: If there is another name.

    Example:
        >>> coherence_proxy({"fluency": 40.0, "non_repetition": 80.0, "termination": math.nan})
        60.0
    """
    if unknown := [name for name in parts if name not in PARTS]:
        raise DataError(f"coherence_proxy() knows no part {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
    known = [value for value in parts.values() if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def surface(text: str) -> dict[str, float]:
    """Plain numbers of a text.

    Args:
        text: The text.

    Returns:
        ``characters``; ``nonalpha``, the share of those but white space that are no letters; ``zlib_ratio``, its
        compressed bytes by its bytes (a loop is near 0; short texts are near or above 1); ``emoji``, how many. NaN
        where there is nothing to count.

    Example:
        >>> surface("Oh! 🍀") | {"zlib_ratio": 0}
        {'characters': 5.0, 'nonalpha': 0.5, 'zlib_ratio': 0, 'emoji': 1.0}
    """
    shown, raw = [one for one in text if not one.isspace()], text.encode("utf-8", "backslashreplace")
    letters = sum(map(str.isalpha, shown))
    return {
        "characters": float(len(text)),
        "nonalpha": 1 - letters / len(shown) if shown else math.nan,
        "zlib_ratio": len(zlib.compress(raw)) / len(raw) if raw else math.nan,
        "emoji": float(len(_EMOJI.findall(text))),
    }


def _pairs(text: Sequence[int] | Sequence[str]) -> float:
    numbers = {one: i for i, one in enumerate(dict.fromkeys(text))}
    return distinct_n([[numbers[one] for one in text]], 2)
