"""The inside of a rewriting run: who is next, what is under way, and what the budget still allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Generic, TypeVar

from lightning_interp.errors import InterpError
from lightning_interp.rate.rewriting.chain import Request
from lightning_interp.rate.rewriting.records import RewriteResult
from lightning_interp.rate.rewriting.rewriting_plan import Prices

__all__ = ["Budget", "WorkQueue", "work_through"]

Lane = TypeVar("Lane")
_UnderWay = dict[Future[Sequence[RewriteResult]], list[Request]]


class Budget:
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
        max_calls: int | None,
        max_cost: float | None,
        prices: Prices | None,
        estimate: Callable[[Request], tuple[int, int]],
    ) -> None:
        self._max_calls, self._max_cost, self._prices, self._estimate = max_calls, max_cost, prices, estimate
        self._reserved: dict[str, tuple[float, float]] = {}  # by key: the estimate, and what is set aside for it
        self._factor = 1.0  # the most that an answer cost of its estimate
        self.calls, self.spent = 0, 0.0

    def refuses(self, request: Request) -> str | None:
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

    def settle(self, request: Request, result: RewriteResult) -> None:
        """Replace what was set aside by what the answer cost, as far as it tells.

        Args:
            request: The request.
            result: Its answer.
        """
        price, aside = self._reserved.pop(request.key, (0.0, 0.0))
        if self._prices is None:
            return
        if result.tokens_in is None and result.tokens_out is None:
            self.spent += 0.0 if result.status == "error" else aside
            return
        cost = self._prices.cost(result.tokens_in or 0, result.tokens_out or 0)
        self.spent += cost
        if price > 0:
            self._factor = max(self._factor, cost / price)


class WorkQueue(Generic[Lane]):
    """Lanes (a unit and a draw each) in their order; each has at most one request under way.

    A lane whose request was answered goes to the front, so that units become complete one after the other and a run
    that ends early leaves as many complete ones as it can. Lanes that need the same rewrite wait for one answer.

    Args:
        lanes: All lanes.
        following: Gives a lane's next request, or None when it is finished; takes the keys that were answered.
        budget: What may be spent.
        size: Requests in a batch.
    """

    def __init__(
        self,
        lanes: Iterable[Lane],
        following: Callable[[Lane, set[str]], Request | None],
        budget: Budget,
        *,
        size: int,
    ) -> None:
        self._ready, self._following, self._budget, self._size = deque(lanes), following, budget, size
        self._waiting: dict[str, list[Lane]] = {}
        self._answered: set[str] = set()
        self.stopped: str | None = None

    def take(self) -> list[Request]:
        """The next requests; none if all lanes are finished or waiting, or the run is stopped.

        Returns:
            Requests with different keys.
        """
        batch: list[Request] = []
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

    def answered(self, batch: Sequence[Request], results: Sequence[RewriteResult]) -> None:
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
    take: Callable[[], list[Request]],
    ask: Callable[[list[Request]], Sequence[RewriteResult]],
    keep: Callable[[list[Request], Sequence[RewriteResult]], None],
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
    under_way: _UnderWay = {}
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
    under_way: _UnderWay,
    take: Callable[[], list[Request]],
    ask: Callable[[list[Request]], Sequence[RewriteResult]],
    concurrency: int,
) -> bool:
    """Fill up with new calls; whether any call is under way."""
    while len(under_way) < concurrency and (batch := take()):
        under_way[pool.submit(ask, batch)] = batch
    return bool(under_way)


def _keep_the_rest(under_way: _UnderWay, keep: Callable[[list[Request], Sequence[RewriteResult]], None]) -> None:
    for future, batch in under_way.items():
        if not future.cancel() and future.exception() is None:
            with suppress(InterpError):  # such as a full disk: what broke first is raised
                keep(batch, future.result())
