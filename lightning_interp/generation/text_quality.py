"""How much a text repeats itself, and how surprising a model finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.core.measure.statistics import Estimate, mean_interval, proportion_interval
from lightning_interp.errors import IncompatibleModelError, RecipeError

__all__ = ["distinct_n", "loop_period", "perplexity", "repeated_share", "repetition"]

_LOOPS = 3


def perplexity(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Perplexity of each text: ``exp`` of the mean negative log-probability of its scored tokens.

    Score generated text with the model that was not steered: by its own distribution a steered one is always fluent.

    Args:
        logits: ``[B, T, V]``; those at one token predict the next.
        ids: The texts ``[B, T]``.
        mask: Tokens that are scored, bool ``[B, T]`` (generated ones, say); None for all. The first column never is.

    Returns:
        ``[B]`` in float32 (float64 if the logits are); NaN where nothing is scored.

    Raises:
        IncompatibleModelError: If the shapes do not fit.

    Example:
        >>> perplexity(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])).tolist()
        [8.0]
    """
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or (mask is not None and mask.shape != ids.shape):
        shapes = [list(x.shape) for x in (logits, ids, mask) if x is not None]
        raise IncompatibleModelError(
            f"perplexity() got shapes {shapes}; expected logits [B, T, V], ids and mask [B, T]."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scored = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    targets = ids[:, 1:].masked_fill(~scored, 0)
    surprise = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    total = torch.where(scored, surprise, 0.0).sum(1)
    return (total / scored.sum(1)).exp()  # 0 / 0 is NaN, as it should be


def distinct_n(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of all texts together, as a share of all n-grams (Li et al., 2016).

    Args:
        texts: Token ids (or words) of each text.
        n: Length of the n-grams.

    Returns:
        Between 0 and 1; NaN if no text has ``n`` tokens.

    Raises:
        RecipeError: If ``n`` is below 1.

    Example:
        >>> distinct_n([[1, 2, 1, 2], [1, 2]], n=2)
        0.5
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repeated_share(text: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that it had said before (``seq-rep-n``, Welleck et al., 2020).

    Args:
        text: Token ids (or words).
        n: Length of the n-grams.

    Returns:
        0 if all differ; NaN if the text has fewer than ``n`` tokens.

    Raises:
        RecipeError: If ``n`` is below 1.

    Example:
        >>> repeated_share([1, 2, 1, 2, 1, 2], n=2)
        0.6
    """
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def loop_period(text: Sequence[int], *, times: int = _LOOPS) -> int:
    """Length of the piece that a text says over and over at its end, or 0.

    Args:
        text: Token ids (or words).
        times: How often in a row the piece must come, the last time in full.

    Returns:
        The shortest such length.

    Raises:
        RecipeError: If ``times`` is below 2.

    Example:
        >>> loop_period([9, 1, 2, 1, 2, 1, 2]), loop_period([9, 1, 2, 1, 2])
        (2, 0)
    """
    if times < 2:
        raise RecipeError(f"loop_period(times={times}): expected at least 2 repetitions to call it a loop.")
    text = list(text)
    for period in range(1, len(text) // times + 1):
        end = text[-period:]
        if text[-times * period :] == end * times:
            return period
    return 0


def repetition(texts: Sequence[Sequence[int]], *, level: float = 0.95) -> dict[str, Estimate]:
    """Repetition of generated texts, with intervals over texts.

    Args:
        texts: Token ids of each text, without the prompt and without padding.
        level: Confidence level.

    Returns:
        Means of ``distinct_1``, ``distinct_2`` and ``repeated_4`` of each text, and the share ``looping`` at its end;
        texts that are too short for one are left out of its ``n``.

    Example:
        >>> found = repetition([[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7]])
        >>> {name: round(estimate.value, 3) for name, estimate in found.items()}
        {'distinct_1': 0.583, 'distinct_2': 0.6, 'repeated_4': 0.333, 'looping': 0.5}
    """
    columns = {f"distinct_{n}": [distinct_n([text], n) for text in texts] for n in (1, 2)}
    columns["repeated_4"] = [repeated_share(text, 4) for text in texts]
    kept = {name: [value for value in values if not math.isnan(value)] for name, values in columns.items()}
    loops = [float(loop_period(text) > 0) for text in texts if len(text) >= _LOOPS]
    found = {name: mean_interval(values, level=level) for name, values in kept.items()}
    return {**found, "looping": proportion_interval(loops, level=level)}


def _ngrams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise RecipeError(f"n-grams of length {n} do not exist; expected n >= 1.")
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
