"""When to call an endpoint again: allowances a minute, and waiting after a failure."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import RecipeError

__all__ = ["LONGEST_WAIT", "Backoff", "Bucket", "Pace", "retry_after"]

LONGEST_WAIT = 600.0
"""Most seconds that a server is left alone because it asked for that."""


class Bucket:
    """An allowance that fills evenly; whoever takes is told how long to wait first.

    It holds one second's worth, so calls are spread over the minute. More than it holds can be taken at once: that
    waits for a full bucket and leaves a debt, which those who come later wait out.
    """

    def __init__(self, per_minute: float | None, *, clock: Callable[[], float]) -> None:
        if per_minute is not None and not per_minute > 0:
            raise RecipeError(f"A limit of {per_minute!r} a minute allows nothing; expected more than 0, or None.")
        self._rate = None if per_minute is None else per_minute / 60
        self._clock, self._lock = clock, threading.Lock()
        self._size = max(1.0, self._rate or 0.0)
        self._level, self._seen = self._size, clock()

    def take(self, amount: float) -> float:
        """Take an amount; returns the seconds to wait before using it."""
        if self._rate is None:
            return 0.0
        with self._lock:
            self._fill(self._rate)
            wait = max(0.0, (min(amount, self._size) - self._level) / self._rate)
            self._level -= amount
            return wait

    def give_back(self, amount: float) -> None:
        """Give back what was taken too much; negative if it was too little."""
        if self._rate is not None:
            with self._lock:
                self._fill(self._rate)
                self._level = min(self._size, self._level + amount)

    def _fill(self, rate: float) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._seen) * rate)
        self._seen = now


class Backoff:
    """How long to wait before another attempt: exponential with full jitter, and never less than the server asks.

    Args:
        first: Most seconds before the second attempt; doubled for each further one.
        most: Most seconds of any wait of its own.
        seed: Of the jitter.

    Raises:
        RecipeError: If a number is below zero.

    Example:
        >>> backoff = Backoff(first=1.0, most=60.0, seed=0)
        >>> all(0 <= backoff.seconds(n) <= min(60, 2**n) for n in range(10)), backoff.seconds(0, at_least=30.0)
        (True, 30.0)
    """

    def __init__(self, *, first: float = 1.0, most: float = 60.0, seed: int = 0) -> None:
        if not (first >= 0 and most >= 0):
            raise RecipeError(f"Backoff(first={first}, most={most}): expected seconds of at least 0.")
        self._first, self._most = first, most
        self._draws = random.Random(derived_seed(seed, "backoff"))  # noqa: S311 - waiting times, no secrets

    def seconds(self, attempt: int, *, at_least: float = 0.0) -> float:
        """Seconds to wait.

        Args:
            attempt: Number of the attempt that failed, from 0.
            at_least: What the server asks for.

        Returns:
            The seconds.
        """
        return max(at_least, self._draws.uniform(0.0, min(self._most, self._first * 2.0**attempt)))


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast an endpoint is called.

    Args:
        max_concurrency: Calls at the same time.
        requests_per_minute: Calls a minute; no limit if None.
        tokens_per_minute: Tokens a minute, read and written, estimated beforehand; no limit if None.
        max_retries: Further attempts after a failure that may pass.
        timeout: Seconds that one attempt may take.
        backoff: When to try again.
        sleep, clock: How to wait, and seconds that never go back; for tests.

    Raises:
        RecipeError: If a number is too small.
    """

    max_concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_retries: int = 6
    timeout: float = 120.0
    backoff: Backoff | None = None
    sleep: Callable[[float], object] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        for name, least in (("max_concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}={getattr(self, name)!r}; expected at least {least}.")
        if not self.timeout > 0:
            raise RecipeError(f"timeout={self.timeout!r}; expected seconds, more than 0.")


def retry_after(headers: Mapping[str, str], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> float:
    """Seconds that a server asks to wait, in either form of its ``Retry-After`` header; 0 if none can be read."""
    milliseconds, asked = headers.get("retry-after-ms"), headers.get("retry-after") or "0"
    with suppress(ValueError):
        return max(0.0, float(asked) if milliseconds is None else float(milliseconds) / 1000)
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        when = parsedate_to_datetime(asked)
        return max(0.0, (when - now()).total_seconds()) if when.tzinfo else 0.0
    return 0.0
