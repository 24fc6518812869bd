"""The inside of a writing run: who is next, what is under way, what the budget still allows, and what was done."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lightning_interp.errors import InterpError, RecipeError

__all__ = ["Budget", "Prices", "WorkQueue", "WorkReport", "called", "one_each", "work_through"]


Lane = TypeVar("Lane")
Asked = TypeVar("Asked", bound=Any)  # has a key
Given = TypeVar("Given")  # has status, error, failed, tokens_in and tokens_out
Kind = TypeVar("Kind")


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
        tokens_in, tokens_out: Tokens read and written, as far as the writer told.
        cost: Price of them; None without prices.
        stopped: What ended the run early: ``"max_calls"``, ``"max_cost"``, ``"errors"`` or ``"asked"``; or None.
        missing: Texts that can be asked for now; after a run that did not stop, those that failed.
        last_error: What the last failed answer said.
        in_a_row: How many answers failed since the last that did not.
    """

    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    stopped: str | None = None
    missing: int = 0
    last_error: str | None = None
    in_a_row: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to ask for."""
        return self.missing == 0

    def add(self, answers: Iterable[Any]) -> None:
        """Count answers, in the order in which they came."""
        for answer in answers:
            self.calls += 1
            self.statuses[answer.status] += 1
            self.tokens_in += answer.tokens_in or 0
            self.tokens_out += answer.tokens_out or 0
            self.in_a_row = self.in_a_row + 1 if answer.failed else 0
            self.last_error = answer.error if answer.failed else self.last_error


class Budget(Generic[Asked]):
    """Calls and money that a run may spend; what is under way counts with its estimate (tokens read and written).

    Once an answer has cost more than its estimate, all estimates are raised by that factor.
    """

    def __init__(
        self,
        max_calls: int | None,
        max_cost: float | None,
        prices: Prices | None,
        estimate: Callable[[Asked], tuple[int, int]],
    ) -> None:
        if max_cost is not None and prices is None:
            raise RecipeError(f"max_cost={max_cost} needs to know what tokens cost. Pass prices=Prices(read, written).")
        self._max_calls, self._max_cost, self._prices, self._estimate = max_calls, max_cost, prices, estimate
        self._reserved: dict[str, tuple[float, float]] = {}  # by key: the estimate, and what is set aside for it
        self._factor = 1.0  # the most that an answer cost of its estimate
        self.calls, self.spent = 0, 0.0

    def refuses(self, request: Asked) -> str | None:
        """Set aside what a request may cost; or say what forbids it, ``"max_calls"`` or ``"max_cost"``."""
        if self._max_calls is not None and self.calls >= self._max_calls:
            return "max_calls"
        price = self._prices.cost(*self._estimate(request)) if self._prices is not None else 0.0
        aside = price * self._factor
        under_way = sum(reserved for _, reserved in self._reserved.values())
        if self._max_cost is not None and self.spent + under_way + aside > self._max_cost:
            return "max_cost"
        self.calls += 1
        self._reserved[request.key] = (price, aside)
        return None

    def settle(self, request: Asked, result: Any) -> None:
        """Replace what was set aside by what the answer cost, as far as it tells."""
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

    @property
    def cost(self) -> float | None:
        """What was spent; None without prices."""
        return None if self._prices is None else self.spent


class WorkQueue(Generic[Lane, Asked]):
    """Lanes (such as a unit and a draw each) in their order; each has at most one request under way.

    A lane whose request was answered goes to the front, so that units become complete one after the other and a run
    that ends early leaves as many complete ones as it can. Lanes that need the same text wait for one answer.

    ``following`` gives a lane's next request, or None when it is finished; it is told which keys were answered.
    ``stop`` is asked before each batch, and ``give_up_after`` so many failures in a row the run ends (None: never).
    """

    def __init__(
        self,
        lanes: Iterable[Lane],
        following: Callable[[Lane, set[str]], Asked | None],
        budget: Budget[Asked],
        report: WorkReport,
        *,
        give_up_after: int | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ready, self._following, self._budget, self._report = deque(lanes), following, budget, report
        self._give_up_after, self._stop = give_up_after, stop
        self._waiting: dict[str, list[Lane]] = {}
        self._answered: set[str] = set()

    def take(self, size: int) -> list[Asked]:
        """The next requests, with different keys; none if all lanes are finished or waiting, or the run ends."""
        report, batch = self._report, list[Asked]()
        if report.stopped is None:
            hopeless = self._give_up_after is not None and report.in_a_row >= self._give_up_after
            report.stopped = "asked" if self._stop() else "errors" if hopeless else None
        while self._ready and len(batch) < size and report.stopped is None:
            lane = self._ready.popleft()
            request = self._following(lane, self._answered)
            if request is None:
                continue
            if request.key in self._waiting:
                self._waiting[request.key].append(lane)
                continue
            report.stopped = self._budget.refuses(request)
            if report.stopped is None:
                self._waiting[request.key] = [lane]
                batch.append(request)
        return batch

    def answered(self, batch: Sequence[Asked], results: Sequence[Any]) -> None:
        """Count the answers to a batch, and let the lanes that waited for them go on."""
        self._report.add(results)
        free: list[Lane] = []
        for request, result in zip(batch, results, strict=True):
            self._budget.settle(request, result)
            self._answered.add(request.key)
            free += self._waiting.pop(request.key)
        self._ready.extendleft(reversed(free))

    def finish(self, missing: int, run: str = "The run") -> None:
        """Complete the report, and warn if the run was hopeless."""
        report = self._report
        report.missing, report.cost = missing, self._budget.cost
        if report.stopped == "errors":
            warnings.warn(
                f"{run} ended after {self._give_up_after} errors in a row, the last of them {report.last_error!r}. "
                f"{report.calls} texts were asked for; start it again to go on.",
                stacklevel=3,
            )


def work_through(
    queue: WorkQueue[Lane, Asked],
    writer: Any,
    ask: Callable[[list[Asked]], Sequence[Given]],
    keep: Callable[[list[Asked], Sequence[Given]], None],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Ask until nothing is left, as many at once as the writer takes; the calling thread keeps the answers.

    When something breaks, calls that are under way are awaited and their answers kept: they may have cost money.
    """
    size, concurrency = int(getattr(writer, "batch_size", 1)), int(getattr(writer, "concurrency", 1))

    def kept(batch: list[Asked], results: Sequence[Given]) -> None:
        keep(batch, results)
        queue.answered(batch, results)
        if progress is not None:
            progress(len(batch))

    if concurrency > 1:
        _work_in_threads(lambda: queue.take(size), ask, kept, concurrency, getattr(writer, "stop", lambda: None))
    else:
        while batch := queue.take(size):
            kept(batch, ask(batch))


def _work_in_threads(
    take: Callable[[], list[Asked]],
    ask: Callable[[list[Asked]], Sequence[Given]],
    keep: Callable[[list[Asked], Sequence[Given]], None],
    concurrency: int,
    stop: Callable[[], object],
) -> None:
    under_way: dict[Future[Sequence[Given]], list[Asked]] = {}
    with ThreadPoolExecutor(concurrency) as pool:

        def fill() -> bool:
            while len(under_way) < concurrency and (batch := take()):
                under_way[pool.submit(ask, batch)] = batch
            return bool(under_way)

        try:
            while fill():
                wait(under_way, return_when=FIRST_COMPLETED)
                for future in [future for future in under_way if future.done()]:
                    results = future.result()
                    keep(under_way.pop(future), results)
        except BaseException:
            stop()
            for future, batch in under_way.items():
                if not future.cancel() and future.exception() is None:
                    with suppress(InterpError):  # such as a full disk: what broke first is raised
                        keep(batch, future.result())
            raise


def one_each(writer: str, answers: Iterable[Kind], count: int, kind: type[Kind]) -> list[Kind]:
    """Refuse too few or too many answers to so many requests, and those of another kind."""
    found = list(answers)
    wrong = [one for one in found if not isinstance(one, kind)]
    if wrong or len(found) != count:
        raise RecipeError(
            f"{writer} gave {len(found)} answers to {count} requests"
            f"{f', among them {wrong[0]!r:.60}' if wrong else ''}; expected one {kind.__name__} for each."
        )
    return found


def called(function: Callable[[], Any], whose: str, asked: str, kind: Any, failed: str, **more: Any) -> Any:
    """What a user's function returns, a text or an answer, as an answer; its error, as a failed one."""
    try:
        found = function()
    except Exception as error:  # whatever a user's function raises is that request's trouble
        return kind(text=None, status=failed, error=f"{type(error).__name__}: {error}", **more)
    if isinstance(found, kind):
        return found
    if not isinstance(found, str):
        raise RecipeError(
            f"The function of {whose} returned {found!r:.60} for {asked!r:.60}; expected a text or a {kind.__name__}."
        )
    return kind(text=found, **more)
