"""Fill a rewrite store: ask only for what is missing, keep each answer at once, and stop where the budget ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile

from lightning_interp.errors import RecipeError
from lightning_interp.generation.work import Budget, Prices, WorkQueue, WorkReport, work_through
from lightning_interp.rate.rewriting.assembly import rewrite_flags
from lightning_interp.rate.rewriting.records import Request, RewriteRecord, RewriteResult, Unit
from lightning_interp.rate.rewriting.rewriters import Rewriter, ask, identity_in
from lightning_interp.rate.rewriting.store import RewriteStore, StoreWriter

__all__ = ["RewritePlan", "RewriteReport", "RewriteRun"]

_FINAL = ("refused", "empty", "truncated")


@dataclass
class RewriteReport(WorkReport):
    """What a run did.

    Args:
        flags: What looked wrong, by flag; see :data:`~lightning_interp.rate.rewriting.assembly.FLAGS`.
    """

    flags: Counter[str] = field(default_factory=Counter)


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
        tokens_in, tokens_out: Estimates of the tokens to be read and written.
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


class RewriteRun:
    """One attribute of a store and the rewriter that fills it.

    Each unit is rewritten to the other value, that text back again, and once more if three passes are asked for. Only
    what the store lacks is asked for, equal texts once. Answers are on disk before more is asked: start a killed run
    again. Final answers that cannot be used (refused, empty, truncated) are not asked for again; errors are, next time.

    Args:
        store: The store, with the units.
        rewriter: Who rewrites.
        attr: Name of the attribute.
        passes: 2, or 3 for the third rewrite too.
        draws: Rewrites a text, for rewriters that answer differently each time.
        retry_final: Ask once more for refused, empty and truncated answers too.
        prices: What tokens cost.
        max_calls: Texts to ask for at most, in one run.
        max_cost: What a run may cost, but for what the answers under way cost beyond their estimates; needs prices.
        give_up_after: End the run after so many errors in a row; None never.

    Raises:
        RecipeError: If an argument has a wrong value.
        DataError: If the store has no such attribute.

    Example:
        >>> import tempfile
        >>> from lightning_interp.rate import CallableRewriter
        >>> store = RewriteStore.create(tempfile.mkdtemp(), [Unit(id="a", text="oh!", w=1)], attr="mark")
        >>> mark = CallableRewriter(lambda text, prompt, w: text.strip("!") + "!" * w, name="mark")
        >>> RewriteRun(store, mark, attr="mark").run().calls, store.triples("mark").rewrite
        (2, ['oh'])
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
        if passes not in (2, 3):
            raise RecipeError(f"passes={passes!r}; expected 2, or 3 for the third rewrite too.")
        if draws < 1:
            raise RecipeError(f"draws={draws!r}; expected at least 1.")
        for name, value in (("max_calls", max_calls), ("give_up_after", give_up_after)):
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value!r}; expected at least 1, or None for no limit.")
        self.store, self.rewriter, self.attr = store, rewriter, attr
        self.passes, self.draws, self.retry_final = passes, draws, retry_final
        self.prices, self.max_calls, self.max_cost, self.give_up_after = prices, max_calls, max_cost, give_up_after
        self._budget()  # a limit without prices is refused here, and then an unknown attribute
        if max_cost is not None and not hasattr(rewriter, "estimate_tokens"):
            raise RecipeError(
                f"max_cost={max_cost} cannot be kept: rewriter {rewriter.name!r} estimates no tokens. Use max_calls."
            )
        store.units(attr)
        self.by = identity_in(store, attr, rewriter)

    def plan(self) -> RewritePlan:
        """Count what is there and what would be asked for; nothing is called.

        Returns:
            The plan.
        """
        there, blocked, ahead, keys = Counter[int](), Counter[str](), list[Request](), set[str]()
        for lane in self._lanes():
            walk = [(request.number, record) for request, record in self._chain(*lane) if record is not None]
            there.update(number for number, record in walk if record.usable)
            request = self._following(lane, set())
            if request is None:
                blocked.update(record.result.status for _, record in walk if not record.usable)
                continue
            for more in range(request.key in keys, self.passes + 1 - request.number):
                ahead.append(replace(request, number=request.number + more, w_target=(request.w_target + more) % 2))
            keys.add(request.key)
        calls, tokens = Counter(request.number for request in ahead), [self._estimate(request) for request in ahead]
        read, written = sum(one for one, _ in tokens), sum(one for _, one in tokens)
        labels = [unit.w for unit in self.store.units(self.attr)]
        return RewritePlan(
            attr=self.attr,
            units=len(labels) - labels.count(None),
            unlabelled=labels.count(None),
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
        found: dict[str, Request] = {}
        for lane in self._lanes():
            if request := self._following(lane, set()):
                found.setdefault(request.key, request)
        return list(found.values())

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
        report = RewriteReport()
        queue = WorkQueue(self._lanes(), self._following, self._budget(), report, give_up_after=self.give_up_after)
        with self._writing() as writer:

            def keep(batch: Sequence[Request], results: Sequence[RewriteResult]) -> None:
                report.flags.update(self._write(writer, zip(batch, results, strict=True)))

            work_through(queue, self.rewriter, lambda batch: ask(self.rewriter, batch), keep, advance)
        queue.finish(len(self.pending()), f"Attribute {self.attr!r}: the run")
        return report

    def keep(self, answers: Iterable[tuple[Request, RewriteResult]]) -> RewriteReport:
        """Write answers that came another way, such as from a batch file.

        Args:
            answers: Requests of :meth:`pending` with their answers.

        Returns:
            What was written.

        Raises:
            ManifestError: If another process works on the store, or it cannot be written.
        """
        report, answers = RewriteReport(), list(answers)
        with self._writing() as writer:
            report.flags.update(self._write(writer, answers))
        report.add(result for _, result in answers)
        report.missing = len(self.pending())
        report.cost = None if self.prices is None else self.prices.cost(report.tokens_in, report.tokens_out)
        return report

    def _budget(self) -> Budget[Request]:
        return Budget(self.max_calls, self.max_cost, self.prices, self._estimate)

    def _estimate(self, one: Request) -> tuple[int, int]:
        """Tokens that a rewrite would read and write, as the rewriter estimates them; none if it does not say."""
        estimate = getattr(self.rewriter, "estimate_tokens", lambda *asked: (0, 0))
        read, written = estimate(one.source, one.unit.prompt, one.w_target)
        return int(read), int(written)

    def _lanes(self) -> Iterator[tuple[Unit, int]]:
        """Units with a label and their draws, in order."""
        for unit in self.store.units(self.attr):
            if unit.w is not None:
                yield from ((unit, draw) for draw in range(self.draws))

    def _chain(self, unit: Unit, draw: int) -> Iterator[tuple[Request, RewriteRecord | None]]:
        return self.store.chain(unit, self.attr, self.by, draw=draw, passes=self.passes)

    def _following(self, lane: tuple[Unit, int], answered: set[str]) -> Request | None:
        again = ("error", *_FINAL) if self.retry_final else ("error",)
        for request, record in self._chain(*lane):
            if record is None or (record.result.status in again and request.key not in answered):
                return request
        return None

    @contextmanager
    def _writing(self) -> Iterator[StoreWriter]:
        params, instruction = getattr(self.rewriter, "params", {}), getattr(self.rewriter, "instruction", "")
        with self.store.writer() as writer:
            writer.describe(self.by, params=params, instruction=instruction)
            yield writer

    def _write(self, writer: StoreWriter, answers: Iterable[tuple[Request, RewriteResult]]) -> list[str]:
        """Put answers on disk; all flags of them."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        longer = bool(getattr(self.rewriter, "changes_length", False))
        records = [
            request.record(result, flags=rewrite_flags(request.source, result.text, changes_length=longer), time=now)
            for request, result in answers
        ]
        writer.append(records)
        return [flag for record in records for flag in record.flags]
