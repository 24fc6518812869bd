"""What a rewriting run would cost, before any call is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_interp.errors import RecipeError

__all__ = ["Prices", "RewritePlan", "estimate_tokens", "tokens_of_characters"]

_CHARACTERS_A_TOKEN = 4  # of English text, roughly


@dataclass(frozen=True)
class Prices:
    """What tokens cost.

    Args:
        read: Price of a million tokens that the model reads, in any currency.
        written: Price of a million tokens that it writes.

    Raises:
        RecipeError: If a price is negative.

    Example:
        >>> Prices(2.5, 10.0).cost(1_000_000, 500_000)
        7.5
    """

    read: float
    written: float

    def __post_init__(self) -> None:
        if not (self.read >= 0 and self.written >= 0):
            raise RecipeError(f"Prices(read={self.read}, written={self.written}): expected numbers of at least 0.")

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Price of so many tokens.

        Args:
            tokens_in: Tokens read.
            tokens_out: Tokens written.

        Returns:
            The price.
        """
        return (tokens_in * self.read + tokens_out * self.written) / 1e6


@dataclass(frozen=True, kw_only=True)
class RewritePlan:
    """What is there, and what would be asked for.

    Rewrites of texts that are not written yet are counted one a unit and estimated by the original, so the numbers of
    calls are upper bounds: equal texts are asked for once, and a unit whose first rewrite fails needs no second.

    Args:
        attr: Name of the attribute.
        units: Units with a label.
        unlabelled: Units without one; nothing is asked for them.
        there: Rewrites that are in the store and need no call, by pass.
        calls: Rewrites to ask for, by pass.
        blocked: Units that cannot become complete, because an answer is final and cannot be used, by status.
        tokens_in: Estimate of the tokens to be read.
        tokens_out: Estimate of the tokens to be written.
        cost: Estimate of the price; None without prices.
    """

    attr: str
    units: int
    unlabelled: int
    there: Mapping[int, int]
    calls: Mapping[int, int]
    blocked: Mapping[str, int]
    tokens_in: int
    tokens_out: int
    cost: float | None

    @property
    def total_calls(self) -> int:
        """Calls of all passes together."""
        return sum(self.calls.values())

    def __str__(self) -> str:
        passes = ", ".join(f"{count} of pass {number}" for number, count in sorted(self.calls.items()))
        there = sum(self.there.values())
        lines = [
            f"{self.attr}: {self.units} units ({self.unlabelled} more have no label and are left out)",
            f"  in the store: {there} rewrites; to ask for: at most {self.total_calls} ({passes})",
            f"  tokens, estimated: {self.tokens_in:,} read, {self.tokens_out:,} written",
        ]
        if self.blocked:
            why = ", ".join(f"{count} {status}" for status, count in sorted(self.blocked.items()))
            lines.append(f"  cannot become complete: {why} (ask again with retry_final=True)")
        if self.cost is not None:
            lines.append(f"  cost, estimated: {self.cost:.2f}")
        return "\n".join(lines)


def estimate_tokens(rewriter: Any, text: str, prompt: str, w_target: int) -> tuple[int, int]:
    """Tokens that a rewrite would read and write, as the rewriter estimates them; none if it does not say.

    Args:
        rewriter: The rewriter.
        text: The text.
        prompt: What it answers.
        w_target: Value of the attribute that is asked for.

    Returns:
        ``(read, written)``.
    """
    estimate = getattr(rewriter, "estimate_tokens", None)
    if estimate is None:
        return 0, 0
    read, written = estimate(text, prompt, w_target)
    return int(read), int(written)


def tokens_of_characters(text: str) -> int:
    """How many tokens a text has, roughly: for plans and limits only.

    Args:
        text: The text.

    Returns:
        A quarter of its characters.

    Example:
        >>> tokens_of_characters("A fine film.")
        3
    """
    return -(-len(text) // _CHARACTERS_A_TOKEN)
