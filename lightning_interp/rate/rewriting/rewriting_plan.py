"""What a rewriting run would cost, before any call is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RewritePlan", "estimate_tokens"]


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
