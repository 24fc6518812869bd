"""Fill a rewrite store: ask only for what is missing, keep each answer at once, and stop where the budget ends."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile

from lightning_interp.errors import RecipeError
from lightning_interp.generation.work import Budget, Prices, Tally, WorkQueue, WorkReport, work_through
from lightning_interp.rate.rewriting.chain import Request
from lightning_interp.rate.rewriting.flags import rewrite_flags
from lightning_interp.rate.rewriting.records import RewriteRecord, RewriteResult, Unit
from lightning_interp.rate.rewriting.rewriters import Rewriter, ask, identity_in
from lightning_interp.rate.rewriting.rewriting_plan import RewritePlan, estimate_tokens
from lightning_interp.rate.rewriting.store import RewriteStore, StoreWriter

__all__ = ["RewriteReport", "RewriteRun"]

_FINAL = ("refused", "empty", "truncated")


@dataclass
class RewriteReport(WorkReport):
    """What a run did.

    Args:
        flags: What looked wrong, by flag; see :data:`~lightning_interp.rate.rewriting.flags.FLAGS`.
    """

    flags: Counter[str] = field(default_factory=Counter)


class RewriteRun:
    """One attribute of a store and the rewriter that fills it.

    Each unit is rewritten to the other value, that text back again, and once more if three passes are asked for. Only
    what the store lacks is asked for, equal texts once; a unit's second pass begins when its first is there. Answers
    are on disk before more is asked, so a run that was killed goes on where it was: start it again. Final answers that
    cannot be used (refused, empty, truncated) are not asked for again; errors are, in the next run.

    Args:
        store: The store, with the units.
        rewriter: Who rewrites.
        attr: Name of the attribute.
        passes: 2, or 3 for the third rewrite too.
        draws: Rewrites a text, for rewriters that answer differently each time.
        retry_final: Ask once more for refused, empty and truncated answers too.
        prices: What tokens cost.
        max_calls: Texts to ask for at most, in one run.
        max_cost: What a run may cost; needs prices. A call is made only if its estimate fits in as well, so no more
            is spent than that, and what the answers under way cost beyond their estimates.
        give_up_after: End the run after so many errors in a row; None never.

    Raises:
        RecipeError: If an argument has a wrong value.
        DataError: If the store has no such attribute.

    Example:
        >>> import tempfile
        >>> from lightning_interp.rate import CallableRewriter
        >>> store = RewriteStore.create(tempfile.mkdtemp(), [Unit(id="a", text="oh!", w=1)], attr="mark")
        >>> mark = CallableRewriter(lambda text, prompt, w: text.strip("!") + "!" * w, name="mark")
        >>> run = RewriteRun(store, mark, attr="mark")
        >>> run.plan().total_calls, run.run().calls, run.run().calls
        (2, 2, 0)
        >>> triples = store.triples("mark")
        >>> triples.rewrite, triples.rewrite2
        (['oh'], ['oh!'])
    """

    def __init__(
        self,
        store: RewriteStore,
        rewriter: Rewriter,
        *,
        attr: str,
        passes: int = 2,
        draws: int = 1,
        retry_final: bool = False,
        prices: Prices | None = None,
        max_calls: int | None = None,
        max_cost: float | None = None,
        give_up_after: int | None = 20,
    ) -> None:
        _check_numbers(passes=passes, draws=draws, max_calls=max_calls, give_up_after=give_up_after)
        if max_cost is not None and prices is None:
            raise RecipeError(f"max_cost={max_cost} needs to know what tokens cost. Pass prices=Prices(read, written).")
        if max_cost is not None and not hasattr(rewriter, "estimate_tokens"):
            raise RecipeError(
                f"max_cost={max_cost} cannot be kept: rewriter {rewriter.name!r} estimates no tokens. Use max_calls."
            )
        self.store, self.rewriter, self.attr = store, rewriter, attr
        self.passes, self.draws, self.retry_final = passes, draws, retry_final
        self.prices, self.max_calls, self.max_cost, self.give_up_after = prices, max_calls, max_cost, give_up_after
        store.units(attr)  # an unknown attribute is refused here
        self.by = identity_in(store, attr, rewriter)

    def plan(self) -> RewritePlan:
        """Count what is there and what would be asked for; nothing is called.

        Returns:
            The plan.
        """
        units = self.store.units(self.attr)
        there, calls, blocked = Counter[int](), Counter[int](), Counter[str]()
        read, written, keys = 0, 0, set[str]()
        for unit, draw in self._lanes():
            walk = list(self._chain(unit, draw))
            there.update(request.number for request, record in walk if record is not None and record.usable)
            request = self._following((unit, draw), set())
            if request is None:
                blocked.update(record.result.status for _, record in walk if record is not None and not record.usable)
                continue
            for ahead in range(self.passes + 1 - request.number):
                if ahead or request.key not in keys:
                    calls[request.number + ahead] += 1
                    target = (request.w_target + ahead) % 2
                    tokens = estimate_tokens(self.rewriter, request.source, unit.prompt, target)
                    read, written = read + tokens[0], written + tokens[1]
            keys.add(request.key)
        return RewritePlan(
            attr=self.attr,
            units=sum(unit.w is not None for unit in units),
            unlabelled=sum(unit.w is None for unit in units),
            there=dict(there),
            calls={number: calls[number] for number in range(1, self.passes + 1)},
            blocked=dict(blocked),
            tokens_in=read,
            tokens_out=written,
            cost=None if self.prices is None else self.prices.cost(read, written),
        )

    def pending(self) -> list[Request]:
        """What can be asked for now: of each unit and draw the next rewrite, equal ones once.

        Returns:
            The requests, in the order of the units.
        """
        found = (self._following(lane, set()) for lane in self._lanes())
        return list({request.key: request for request in reversed([one for one in found if one])}.values())[::-1]

    def within_budget(self) -> list[Request]:
        """What of :meth:`pending` the budget allows, by the estimates alone.

        Returns:
            The first of the requests.
        """
        budget = self._budget()
        return list(takewhile(lambda request: budget.refuses(request) is None, self.pending()))

    def run(self, advance: Callable[[int], object] | None = None) -> RewriteReport:
        """Ask for everything that is missing.

        Args:
            advance: Called with the number of answers that were just kept.

        Returns:
            What was done; its ``stopped`` says whether the budget or too many errors ended it.

        Raises:
            ManifestError: If another process works on the store, or it cannot be written.
        """
        budget = self._budget()
        size = int(getattr(self.rewriter, "batch_size", 1))
        queue = WorkQueue(self._lanes(), self._following, budget, size=size)
        report = RewriteReport()
        tally = Tally(report, self.give_up_after)
        with self.store.writer() as writer:
            self._describe(writer)

            def keep(batch: list[Request], results: Sequence[RewriteResult]) -> None:
                self._write(writer, zip(batch, results, strict=True), tally)
                queue.answered(batch, results)
                if tally.hopeless and queue.stopped is None:
                    queue.stopped = "errors"
                if advance is not None:
                    advance(len(batch))

            work_through(
                queue.take,
                lambda batch: ask(self.rewriter, batch),
                keep,
                concurrency=int(getattr(self.rewriter, "concurrency", 1)),
                stop=getattr(self.rewriter, "stop", None),
            )
        return self._finish(report, queue.stopped, budget.spent)

    def keep(self, answers: Iterable[tuple[Request, RewriteResult]]) -> RewriteReport:
        """Write answers that came another way, such as from a batch file.

        Args:
            answers: Requests of :meth:`pending` with their answers.

        Returns:
            What was written.

        Raises:
            ManifestError: If another process works on the store, or it cannot be written.
        """
        report = RewriteReport()
        tally = Tally(report)
        with self.store.writer() as writer:
            self._describe(writer)
            self._write(writer, answers, tally)
        spent = self.prices.cost(report.tokens_in, report.tokens_out) if self.prices is not None else 0.0
        return self._finish(report, None, spent)

    def _budget(self) -> Budget[Request]:
        return Budget(
            max_calls=self.max_calls,
            max_cost=self.max_cost,
            prices=self.prices,
            estimate=lambda one: estimate_tokens(self.rewriter, one.source, one.unit.prompt, one.w_target),
        )

    def _lanes(self) -> Iterator[tuple[Unit, int]]:
        """Units with a label and their draws, in order."""
        for unit in self.store.units(self.attr):
            if unit.w is not None:
                yield from ((unit, draw) for draw in range(self.draws))

    def _chain(self, unit: Unit, draw: int) -> Iterator[tuple[Request, RewriteRecord | None]]:
        return self.store.chain(unit, self.attr, self.by, draw=draw, passes=self.passes)

    def _following(self, lane: tuple[Unit, int], answered: set[str]) -> Request | None:
        for request, record in self._chain(*lane):
            if record is None or (self._again(record) and request.key not in answered):
                return request
        return None

    def _again(self, record: RewriteRecord) -> bool:
        status = record.result.status
        return status == "error" or (self.retry_final and status in _FINAL)

    def _describe(self, writer: StoreWriter) -> None:
        writer.describe(
            self.by,
            params=getattr(self.rewriter, "params", {}),
            instruction=getattr(self.rewriter, "instruction", ""),
        )

    def _write(
        self, writer: StoreWriter, answers: Iterable[tuple[Request, RewriteResult]], tally: Tally[RewriteReport]
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        longer = bool(getattr(self.rewriter, "changes_length", False))
        records = [
            request.record(result, flags=rewrite_flags(request.source, result.text, changes_length=longer), time=now)
            for request, result in answers
        ]
        writer.append(records)
        tally.add(record.result for record in records)
        for record in records:
            tally.report.flags.update(record.flags)

    def _finish(self, report: RewriteReport, stopped: str | None, spent: float) -> RewriteReport:
        report.stopped, report.missing = stopped, len(self.pending())
        report.cost = None if self.prices is None else spent
        if stopped == "errors":
            warnings.warn(
                f"Attribute {self.attr!r}: the run ended after {self.give_up_after} errors in a row, the last of them "
                f"{report.last_error!r}. {report.calls} texts were asked for; start it again to go on.",
                stacklevel=3,
            )
        return report


def _check_numbers(*, passes: int, draws: int, max_calls: int | None, give_up_after: int | None) -> None:
    if passes not in (2, 3):
        raise RecipeError(f"passes={passes!r}; expected 2, or 3 for the third rewrite too.")
    if draws < 1:
        raise RecipeError(f"draws={draws!r}; expected at least 1.")
    for name, value in (("max_calls", max_calls), ("give_up_after", give_up_after)):
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value!r}; expected at least 1, or None for no limit.")
