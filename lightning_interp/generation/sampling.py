"""From logits and one uniform number to a token, by the inverse of the cumulative distribution.

Probabilities are summed as whole numbers (multiples of 2**-52), so a sum depends neither on the order in which a device
adds nor on the rows beside it, and the same number gives the same token. Tokens below 2**-53 are never drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.errors import InterpError

__all__ = ["Ways", "check_drawable", "draw_tokens", "drawn_tokens", "uniform_numbers"]

_ONE = 2**52


def uniform_numbers(seeds: list[int], count: int) -> Tensor:
    """Numbers of a generator a row, float64 ``[rows, count]`` in [0, 1); a longer row begins like a shorter one."""
    draws = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(count, generator=draw, dtype=torch.float64) for draw in draws])


def draw_tokens(logits: Tensor, uniform: Tensor, *, temperature: Tensor, top_p: Tensor) -> Tensor:
    """One token a row: the first whose cumulative probability exceeds the row's number.

    Args:
        logits: ``[B, V]``; ``-inf`` forbids a token.
        uniform: Numbers in [0, 1), float64 ``[B]``.
        temperature: ``[B]``; 0 takes the most likely token and uses no number.
        top_p: ``[B]``; tokens behind the most likely ones that have this share together are left out.

    Returns:
        Token ids ``[B]``.

    Raises:
        InterpError: If a row has no token of finite logit, or a NaN.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]).expand(3, 4)
        >>> ones = torch.ones(3)
        >>> draw_tokens(logits, torch.tensor([0.1, 0.5, 0.99]).double(), temperature=ones, top_p=ones).tolist()
        [0, 1, 3]
    """
    check_drawable(logits.amax(-1)[None], logits.shape[1])
    uniform, temperature, top_p = (x.to(logits.device) for x in (uniform, temperature, top_p))
    ways = Ways(greedy=(temperature == 0).tolist(), nucleus=bool((top_p < 1).any()))
    return drawn_tokens(logits, uniform, temperature, top_p, ways)


@dataclass(frozen=True)
class Ways:
    """How a batch is drawn, known on the host: which rows are greedy, and whether any has a ``top_p`` below 1."""

    greedy: list[bool]
    nucleus: bool


def drawn_tokens(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, ways: Ways) -> Tensor:
    """:func:`draw_tokens` without checks, so the host never waits for the device; bad rows give any token."""
    if all(ways.greedy):
        return logits.argmax(-1)
    greedy = temperature == 0
    scaled = logits.double() / torch.where(greedy, 1.0, temperature.double())[:, None]
    weights = (scaled.softmax(-1) * _ONE).round().long()
    if ways.nucleus:
        weights = _nucleus(weights, top_p)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = (uniform[:, None] * total.double()).long().clamp(max=total - 1)
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.where(greedy, logits.argmax(-1), drawn) if any(ways.greedy) else drawn


def check_drawable(largest: Tensor, size: int) -> None:
    """Refuse rows without a token that can be drawn, by the largest of their ``size`` logits, ``[steps, B]``."""
    bad = (~largest.isfinite()).nonzero()
    if len(bad):
        step, row = bad[0].tolist()
        raise InterpError(
            f"No token can be written in row {row}: the largest of its {size} logits is {float(largest[step, row])}. "
            "Check what a logits processor or an intervention does there, or the model's dtype."
        )


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights without the tokens behind those that have the share together; equally likely ones by their ids."""
    ordered, index = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    share = (top_p.double() * ordered.sum(-1))[:, None]
    kept = ordered.masked_fill((before >= share) & (before > 0), 0)
    return torch.zeros_like(weights).scatter(-1, index, kept)
