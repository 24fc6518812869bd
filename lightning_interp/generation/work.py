"""The inside of a writing run: who is next, what is under way, what the budget still allows, and what was done."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from lightning_interp.errors import InterpError, RecipeError

__all__ = ["Answer", "Budget", "Keyed", "Prices", "Tally", "WorkQueue", "WorkReport", "work_through"]


class Keyed(Protocol):
    """What is asked for: found again by its key."""

    @property
    def key(self) -> str: ...  # noqa: D102


class Answer(Protocol):
    """What comes back."""

    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def error(self) -> str | None: ...  # noqa: D102
    @property
    def failed(self) -> bool: ...  # noqa: D102
    @property
    def tokens_in(self) -> int | None: ...  # noqa: D102
    @property
    def tokens_out(self) -> int | None: ...  # noqa: D102


Lane = TypeVar("Lane")
Asked = TypeVar("Asked", bound=Keyed)
Given = TypeVar("Given", bound=Answer)
Report = TypeVar("Report", bound="WorkReport")


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


@dataclass
class WorkReport:
    """What a run did.

    Args:
        calls: Texts that were asked for.
        statuses: Answers by status.
        tokens_in: Tokens read, as far as the writer told.
        tokens_out: Tokens written, likewise.
        cost: Price of them; None without prices.
        stopped: Why the run ended early: ``"max_calls"``, ``"max_cost"``, ``"errors"`` or ``"asked"``; None if it did
            not.
        missing: Texts that can be asked for now; after a run that did not stop, those that failed.
        last_error: What the last failed answer said.
    """

    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    stopped: str | None = None
    missing: int = 0
    last_error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to ask for."""
        return self.missing == 0


class Tally(Generic[Report]):
    """Counts answers into a report, and tells when asking is hopeless.

    Args:
        report: The report.
        give_up_after: So many failures in a row are hopeless; None never.
    """

    def __init__(self, report: Report, give_up_after: int | None = None) -> None:
        self.report, self._give_up_after, self._in_a_row = report, give_up_after, 0

    @property
    def hopeless(self) -> bool:
        """Whether too many answers in a row failed."""
        return self._give_up_after is not None and self._in_a_row >= self._give_up_after

    def add(self, answers: Iterable[Answer]) -> None:
        """Count answers.

        Args:
            answers: In the order in which they came.
        """
        for answer in answers:
            self.report.calls += 1
            self.report.statuses[answer.status] += 1
            self.report.tokens_in += answer.tokens_in or 0
            self.report.tokens_out += answer.tokens_out or 0
            self._in_a_row = self._in_a_row + 1 if answer.failed else 0
            self.report.last_error = answer.error if answer.failed else self.report.last_error


class Budget(Generic[Asked]):
    """Calls and money that a run may spend; what is under way counts with its estimate.

    Once an answer has cost more than its estimate, all estimates are raised by that factor.

    Args:
        max_calls: Texts to ask for at most.
        max_cost: Most that may be spent.
        prices: What tokens cost.
        estimate: Gives the tokens that a request would read and write.
    """

    def __init__(
        self,
        *,
        max_calls: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
        estimate: Callable[[Asked], tuple[int, int]] = lambda asked: (0, 0),
    ) -> None:
        self._max_calls, self._max_cost, self._prices, self._estimate = max_calls, max_cost, prices, estimate
        self._reserved: dict[str, tuple[float, float]] = {}  # by key: the estimate, and what is set aside for it
        self._factor = 1.0  # the most that an answer cost of its estimate
        self.calls, self.spent = 0, 0.0

    def refuses(self, request: Asked) -> str | None:
        """Set what a request may cost aside, or say why it cannot be made.

        Args:
            request: The next request.

        Returns:
            None if it may be made, else ``"max_calls"`` or ``"max_cost"``.
        """
        if self._max_calls is not None and self.calls >= self._max_calls:
            return "max_calls"
        price = self._prices.cost(*self._estimate(request)) if self._prices is not None else 0.0
        aside = price * self._factor
        if self._max_cost is not None and self.spent + self._under_way() + aside > self._max_cost:
            return "max_cost"
        self.calls += 1
        self._reserved[request.key] = (price, aside)
        return None

    def _under_way(self) -> float:
        return sum(aside for _, aside in self._reserved.values())

    def settle(self, request: Asked, result: Answer) -> None:
        """Replace what was set aside by what the answer cost, as far as it tells.

        Args:
            request: The request.
            result: Its answer.
        """
        price, aside = self._reserved.pop(request.key, (0.0, 0.0))
        if self._prices is None:
            return
        if result.tokens_in is None and result.tokens_out is None:
            self.spent += 0.0 if result.failed else aside
            return
        cost = self._prices.cost(result.tokens_in or 0, result.tokens_out or 0)
        self.spent += cost
        if price > 0:
            self._factor = max(self._factor, cost / price)


class WorkQueue(Generic[Lane, Asked]):
    """Lanes (such as a unit and a draw each) in their order; each has at most one request under way.

    A lane whose request was answered goes to the front, so that units become complete one after the other and a run
    that ends early leaves as many complete ones as it can. Lanes that need the same text wait for one answer.

    Args:
        lanes: All lanes.
        following: Gives a lane's next request, or None when it is finished; takes the keys that were answered.
        budget: What may be spent.
        size: Requests in a batch.
    """

    def __init__(
        self,
        lanes: Iterable[Lane],
        following: Callable[[Lane, set[str]], Asked | None],
        budget: Budget[Asked],
        *,
        size: int,
    ) -> None:
        self._ready, self._following, self._budget, self._size = deque(lanes), following, budget, size
        self._waiting: dict[str, list[Lane]] = {}
        self._answered: set[str] = set()
        self.stopped: str | None = None

    def take(self) -> list[Asked]:
        """The next requests; none if all lanes are finished or waiting, or the run is stopped.

        Returns:
            Requests with different keys.
        """
        batch: list[Asked] = []
        while self._ready and len(batch) < self._size and self.stopped is None:
            lane = self._ready.popleft()
            request = self._following(lane, self._answered)
            if request is None:
                continue
            if request.key in self._waiting:
                self._waiting[request.key].append(lane)
                continue
            self.stopped = self._budget.refuses(request)
            if self.stopped is None:
                self._waiting[request.key] = [lane]
                batch.append(request)
        return batch

    def answered(self, batch: Sequence[Asked], results: Sequence[Answer]) -> None:
        """Let the lanes that waited for these go on.

        Args:
            batch: From :meth:`take`.
            results: Their answers.
        """
        free: list[Lane] = []
        for request, result in zip(batch, results, strict=True):
            self._budget.settle(request, result)
            self._answered.add(request.key)
            free += self._waiting.pop(request.key)
        self._ready.extendleft(reversed(free))


def work_through(
    take: Callable[[], list[Asked]],
    ask: Callable[[list[Asked]], Sequence[Given]],
    keep: Callable[[list[Asked], Sequence[Given]], None],
    *,
    concurrency: int,
    stop: Callable[[], object] | None = None,
) -> None:
    """Ask until nothing is left, from several threads if wanted; answers are kept by the calling thread.

    When something breaks, calls that are under way are awaited and their answers kept: they may have cost money.

    Args:
        take: Gives the next batch; an empty one when there is none for now.
        ask: Answers a batch.
        keep: Puts answers on disk.
        concurrency: Calls at the same time.
        stop: Makes calls that wait come back.
    """
    if concurrency == 1:
        while batch := take():
            keep(batch, ask(batch))
        return
    under_way: dict[Future[Sequence[Given]], list[Asked]] = {}
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while _submit(pool, under_way, take, ask, concurrency):
                wait(under_way, return_when=FIRST_COMPLETED)
                for future in [future for future in under_way if future.done()]:
                    results = future.result()
                    keep(under_way.pop(future), results)
        except BaseException:
            if stop is not None:
                stop()
            _keep_the_rest(under_way, keep)
            raise


def _submit(
    pool: ThreadPoolExecutor,
    under_way: dict[Future[Sequence[Given]], list[Asked]],
    take: Callable[[], list[Asked]],
    ask: Callable[[list[Asked]], Sequence[Given]],
    concurrency: int,
) -> bool:
    """Fill up with new calls; whether any call is under way."""
    while len(under_way) < concurrency and (batch := take()):
        under_way[pool.submit(ask, batch)] = batch
    return bool(under_way)


def _keep_the_rest(
    under_way: dict[Future[Sequence[Given]], list[Asked]], keep: Callable[[list[Asked], Sequence[Given]], None]
) -> None:
    for future, batch in under_way.items():
        if not future.cancel() and future.exception() is None:
            with suppress(InterpError):  # such as a full disk: what broke first is raised
                keep(batch, future.result())
