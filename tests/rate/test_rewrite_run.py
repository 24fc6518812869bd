from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import warnings
from collections import Counter
from functools import cache
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rewriting import ATTR, Counting, KilledError, kill_after, store_of, units

from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation.work import Prices
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.export import export_records
from lightning_interp.rate.rewriting.records import RewriteResult, Unit
from lightning_interp.rate.rewriting.store import RewriteStore

FAILED = RewriteResult(text=None, status="error", error="no luck", tokens_in=0, tokens_out=0)


def exported(store):
    return export_records(RewriteStore.open(store.folder), store.folder / "export.jsonl").read_bytes()


@cache
def uninterrupted(n=6):
    with TemporaryDirectory() as folder:
        store = store_of(folder, n)
        RewriteRun(store, Counting(), attr=ATTR).run()
        return exported(store)


class TestRun:
    def test_every_rewrite_is_asked_for_once(self, tmp_path):
        rewriter, seen = Counting(), []
        run = RewriteRun(store_of(tmp_path), rewriter, attr=ATTR)
        report = run.run(advance=seen.append)
        assert set(rewriter.asked.values()) == {1}
        assert sum(rewriter.asked.values()) == report.calls == sum(seen) == 12
        assert report.statuses == {"ok": 12}
        assert (report.stopped, report.missing, report.complete, report.cost) == (None, 0, True, None)
        again = run.run()
        assert (again.calls, again.statuses, again.complete) == (0, {}, True)
        assert sum(rewriter.asked.values()) == 12

    def test_units_become_complete_one_after_the_other(self, tmp_path):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR).run()
        assert [(record.id, record.number) for record in store.records()] == [
            (f"u{i}", number) for i in range(6) for number in (1, 2)
        ]

    @pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 3), (2, 1), (5, 3), (100, 1)])
    def test_batches_and_threads_change_nothing(self, tmp_path, batch_size, concurrency):
        expected = uninterrupted()
        delays = random.Random(batch_size)  # noqa: S311
        rewriter = Counting(
            batch_size=batch_size, concurrency=concurrency, delay=lambda text, target: delays.random() / 500
        )
        store = store_of(tmp_path / "other")
        RewriteRun(store, rewriter, attr=ATTR).run()
        assert exported(store) == expected
        assert set(rewriter.asked.values()) == {1}
        assert rewriter.most_at_once <= concurrency

    def test_calls_do_run_at_the_same_time(self, tmp_path):
        rewriter = Counting(concurrency=4, delay=lambda text, target: 0.02)
        RewriteRun(store_of(tmp_path, 8), rewriter, attr=ATTR).run()
        assert rewriter.most_at_once == 4

    def test_equal_texts_wait_for_one_answer(self, tmp_path):
        given = [Unit(id=str(i), text="same", w=i % 2) for i in range(8)]
        rewriter = Counting(concurrency=4, batch_size=2, delay=lambda text, target: 0.002)
        store = RewriteStore.create(tmp_path, given, attr=ATTR)
        RewriteRun(store, rewriter, attr=ATTR).run()
        assert sum(rewriter.asked.values()) == 4
        assert len(store.triples(ATTR)) == 8

    def test_unlabelled_units_are_not_asked_for(self, tmp_path):
        rewriter = Counting()
        store = RewriteStore.create(tmp_path, [*units(2), Unit(id="x", text="x", w=None)], attr=ATTR)
        RewriteRun(store, rewriter, attr=ATTR).run()
        assert "x" not in {text for text, *_ in rewriter.asked}

    def test_flags_are_kept_and_counted(self, tmp_path):
        answers = {("text 1", 0): RewriteResult(text="text 1"), ("text 2", 1): RewriteResult(text="text 2" * 9)}
        store = store_of(tmp_path)
        report = RewriteRun(store, Counting(answers=answers), attr=ATTR).run()
        assert report.flags["identical"] == 1
        assert {record.flags for record in store.records() if record.id == "u2"} == {("length",), ()}
        longer = Counting(answers=answers)
        longer.changes_length, longer.name = True, "longer"
        assert RewriteRun(store, longer, attr=ATTR).run().flags["length"] == 0

    def test_tokens_are_summed(self, tmp_path):
        report = RewriteRun(store_of(tmp_path, 2), Counting(), attr=ATTR, prices=Prices(1e6, 2e6)).run()
        assert (report.tokens_in, report.tokens_out) == (6 + 12 + 6 + 12, 1 + 2 + 1 + 2)
        assert report.cost == pytest.approx(36 + 2 * 6)

    def test_a_store_of_another_process_is_refused(self, tmp_path):
        store, rewriter = store_of(tmp_path), Counting()
        with RewriteStore.open(tmp_path).writer(), pytest.raises(ManifestError, match="is in use"):
            RewriteRun(store, rewriter, attr=ATTR).run()
        assert not rewriter.asked


class TestInterrupted:
    @pytest.mark.parametrize("records", [1, 2, 6, 11, 12])
    def test_killed_after_any_record(self, tmp_path, monkeypatch, records):
        expected = uninterrupted()
        store, rewriter = store_of(tmp_path / "killed"), Counting()
        with monkeypatch.context() as patch:
            kill_after(patch, records)
            with pytest.raises(KilledError):
                RewriteRun(store, rewriter, attr=ATTR).run()
        assert sum(rewriter.asked.values()) == records
        resumed = RewriteStore.open(store.folder)
        RewriteRun(resumed, rewriter, attr=ATTR).run()
        assert set(rewriter.asked.values()) == {1}
        assert sum(rewriter.asked.values()) == 12
        assert exported(store) == expected

    def test_killed_in_the_middle_of_a_line(self, tmp_path):
        """Wherever the last line is torn, one text is asked for again and the result is the same."""
        expected = uninterrupted(2)
        store, first = store_of(tmp_path / "torn", 2), Counting()
        RewriteRun(store, first, attr=ATTR, max_calls=3).run()
        path = store.folder / "rewrites.jsonl"
        whole = path.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        for cut in (last + 1, *range(last + 2, len(whole) - 2, 40), len(whole) - 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            again = Counting()
            RewriteRun(RewriteStore.open(store.folder), again, attr=ATTR).run()
            assert sum(again.asked.values()) == 2
            assert exported(store) == expected

    def test_a_real_kill(self, tmp_path):
        expected = uninterrupted()
        store_of(tmp_path / "killed")
        said = tmp_path / "said"

        class Logged(Counting):
            def __init__(self, stop_at):
                super().__init__()
                self.stop_at = stop_at

            def rewrite(self, texts, prompts, w_target, draws):
                if sum(self.asked.values()) == self.stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                with said.open("a") as file:
                    print(*texts, file=file, flush=True)
                return super().rewrite(texts, prompts, w_target, draws)

        def process(stop_at):
            run = RewriteRun(RewriteStore.open(tmp_path / "killed"), Logged(stop_at), attr=ATTR).run
            started = multiprocessing.get_context("fork").Process(target=run)
            started.start()
            started.join()
            return started.exitcode, said.read_text().splitlines()

        code, first = process(4)
        assert code == -signal.SIGKILL
        code, both = process(999)
        assert code == 0
        asked = Counter(both)
        assert len(first) == 4
        assert set(asked.values()) == {1}
        assert asked.total() == 12
        assert exported(RewriteStore.open(tmp_path / "killed")) == expected

    def test_an_error_in_one_thread_keeps_what_the_others_answer(self, tmp_path):
        class Broken(Counting):
            def rewrite(self, texts, prompts, w_target, draws):
                if texts == ["text 0"]:
                    raise OSError("the wire is cut")
                return super().rewrite(texts, prompts, w_target, draws)

        store, rewriter = store_of(tmp_path), Broken(concurrency=4, delay=lambda text, target: 0.03)
        with pytest.raises(OSError, match="the wire is cut"):
            RewriteRun(store, rewriter, attr=ATTR).run()
        kept = {record.src_sha for record in RewriteStore.open(tmp_path).records()}
        assert len(kept) == sum(rewriter.asked.values()) == 3
        with RewriteStore.open(tmp_path).writer():  # the lock is free
            pass

    def test_a_rewriter_that_waits_is_told_to_stop(self, tmp_path):
        stopped = []

        class Waiting(Counting):
            def rewrite(self, texts, prompts, w_target, draws):
                if texts == ["text 0"]:
                    raise KeyboardInterrupt
                return super().rewrite(texts, prompts, w_target, draws)

            def stop(self):
                stopped.append(True)

        with pytest.raises(KeyboardInterrupt):
            RewriteRun(store_of(tmp_path), Waiting(concurrency=2), attr=ATTR).run()
        assert stopped == [True]

    def test_a_full_disk_ends_the_run_and_says_so(self, tmp_path, monkeypatch):
        from lightning_interp.rate.rewriting.store import StoreWriter

        def full(self, records):
            raise ManifestError("Cannot write 'rewrites.jsonl': No space left on device.")

        monkeypatch.setattr(StoreWriter, "append", full)
        with pytest.raises(ManifestError, match="No space left"):
            RewriteRun(store_of(tmp_path), Counting(concurrency=3), attr=ATTR).run()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_gives_the_same_store(tmp_path_factory, data):
    """Kills, budgets, batches, threads, equal texts and passing errors leave no trace in what is exported."""
    folder = tmp_path_factory.mktemp("history")
    texts = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6))
    given = [Unit(id=str(i), text=text, w=data.draw(st.integers(0, 1))) for i, text in enumerate(texts)]
    options = {"passes": data.draw(st.sampled_from([2, 3])), "draws": data.draw(st.integers(1, 2))}
    plain = RewriteStore.create(folder / "plain", given, attr=ATTR)
    RewriteRun(plain, Counting(), attr=ATTR, **options).run()
    store = RewriteStore.create(folder / "other", given, attr=ATTR)
    failing = data.draw(st.sets(st.tuples(st.sampled_from("abcd"), st.integers(0, 1))))
    asked = Counter()
    for _ in range(20):
        rewriter = Counting(
            batch_size=data.draw(st.integers(1, 3)),
            concurrency=data.draw(st.integers(1, 3)),
            answers=dict.fromkeys(failing, FAILED),
        )
        failing = set()  # errors pass
        calls = data.draw(st.integers(1, 8))
        report = RewriteRun(
            RewriteStore.open(store.folder), rewriter, attr=ATTR, max_calls=calls, give_up_after=None, **options
        ).run()
        assert report.calls <= calls
        if data.draw(st.booleans()):
            with open(store.folder / "rewrites.jsonl", "ab") as file:
                file.write(b'{"v": 1, "te')
        asked.update(rewriter.asked)
        if report.complete:
            break
    RewriteRun(RewriteStore.open(store.folder), Counting(), attr=ATTR, **options).run()
    assert exported(store) == exported(plain)


class TestErrors:
    def test_errors_are_asked_for_again_in_the_next_run_only(self, tmp_path):
        answers = {("text 1", 0): lambda times: FAILED if times == 1 else None}
        store, rewriter = store_of(tmp_path), Counting(answers=answers)
        run = RewriteRun(store, rewriter, attr=ATTR)
        report = run.run()
        assert report.statuses == {"ok": 10, "error": 1}
        assert (report.missing, report.complete, report.stopped, report.last_error) == (1, False, None, "no luck")
        assert run.run().statuses == {"ok": 2}
        assert exported(store) == uninterrupted()

    @pytest.mark.parametrize("status", ["refused", "empty", "truncated"])
    def test_final_answers_are_asked_for_again_only_if_wanted(self, tmp_path, status):
        bad = RewriteResult(text=None, status=status)
        answers = {("text 1", 0): lambda times: bad if times == 1 else None}
        store, rewriter = store_of(tmp_path), Counting(answers=answers)
        assert RewriteRun(store, rewriter, attr=ATTR).run().complete
        assert RewriteRun(store, rewriter, attr=ATTR).run().calls == 0
        again = RewriteRun(store, rewriter, attr=ATTR, retry_final=True)
        assert again.plan().calls == {1: 1, 2: 1}
        assert again.run().calls == 2
        assert len(store.triples(ATTR)) == 6

    @pytest.mark.parametrize("status", ["refused", "truncated", "error"])
    def test_half_an_answer_is_not_rewritten_further(self, tmp_path, status):
        rewriter = Counting(answers={("text 1", 0): RewriteResult(text="tex", status=status)})
        run = RewriteRun(store_of(tmp_path), rewriter, attr=ATTR)
        run.run()
        assert "tex" not in {text for text, *_ in rewriter.asked}
        assert run.pending() == ([] if status != "error" else [run.pending()[0]])

    def test_a_final_answer_that_stays_bad_ends_the_run(self, tmp_path):
        store, rewriter = store_of(tmp_path), Counting(answers={("text 1", 0): RewriteResult(text="")})
        RewriteRun(store, rewriter, attr=ATTR).run()
        report = RewriteRun(store, rewriter, attr=ATTR, retry_final=True).run()
        assert report.statuses == {"empty": 1}
        assert rewriter.asked["text 1", "prompt 1", 0, 0] == 2

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_many_errors_in_a_row_end_the_run(self, tmp_path, concurrency):
        answers = {(f"text {i}", 1 - i % 2): FAILED for i in range(40)}
        run = RewriteRun(store_of(tmp_path, 40), Counting(answers=answers, concurrency=concurrency), attr=ATTR)
        with pytest.warns(UserWarning, match=r"'mark': the run ended after 20 errors in a row.*'no luck'"):
            report = run.run()
        assert report.stopped == "errors"
        assert 20 <= report.calls < 20 + concurrency
        assert report.missing == 40

    def test_errors_between_answers_do_not(self, tmp_path, recwarn):
        answers = {(f"text {i}", 1 - i % 2): FAILED for i in range(40) if i % 4}
        report = RewriteRun(store_of(tmp_path, 40), Counting(answers=answers), attr=ATTR, give_up_after=4).run()
        assert report.stopped is None
        assert report.statuses == {"error": 30, "ok": 20}
        assert not recwarn


class TestBudget:
    @pytest.mark.parametrize(("calls", "batch_size", "concurrency"), [(1, 1, 4), (5, 3, 4), (5, 1, 1), (11, 3, 1)])
    def test_calls(self, tmp_path, calls, batch_size, concurrency):
        rewriter = Counting(batch_size=batch_size, concurrency=concurrency)
        run = RewriteRun(store_of(tmp_path), rewriter, attr=ATTR, max_calls=calls)
        report = run.run()
        assert sum(rewriter.asked.values()) == report.calls == calls
        assert report.stopped == "max_calls"
        assert not report.complete
        while not run.run().complete:
            pass
        assert set(rewriter.asked.values()) == {1}
        assert exported(run.store) == uninterrupted()

    def test_a_budget_that_is_just_enough_stops_nothing(self, tmp_path):
        report = RewriteRun(store_of(tmp_path), Counting(), attr=ATTR, max_calls=12).run()
        assert (report.stopped, report.complete) == (None, True)

    class Priced(Counting):
        """Estimates what it later charges: 100 tokens read for a text, 50 written."""

        def estimate_tokens(self, text, prompt, w_target):
            return 100, 50

        def _one(self, text, prompt, target, draw):
            result = super()._one(text, prompt, target, draw)
            return RewriteResult(text=result.text, status=result.status, tokens_in=100, tokens_out=50)

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_cost(self, tmp_path, concurrency):
        prices = Prices(1e4, 2e4)  # so a call costs 2
        run = RewriteRun(
            store_of(tmp_path), self.Priced(concurrency=concurrency), attr=ATTR, prices=prices, max_cost=9.0
        )
        assert run.plan().cost == pytest.approx(24)
        report = run.run()
        assert report.calls == 4
        assert report.cost == pytest.approx(8)
        assert report.stopped == "max_cost"
        while not run.run().complete:
            pass
        assert exported(run.store).count(b"\n") == 12

    def test_what_is_under_way_counts(self, tmp_path):
        """With the answers still out, their estimates are set aside: four calls at once cannot overspend."""
        rewriter = self.Priced(concurrency=8, delay=lambda text, target: 0.02)
        report = RewriteRun(store_of(tmp_path, 8), rewriter, attr=ATTR, prices=Prices(1e4, 2e4), max_cost=5.0).run()
        assert report.calls == 2

    def test_estimates_that_were_too_low_are_raised(self, tmp_path):
        """Each call costs 2 where 1 was estimated: after the first, the others are reckoned at 2."""

        class Dear(self.Priced):
            def estimate_tokens(self, text, prompt, w_target):
                return 50, 25

        prices = Prices(1e4, 2e4)
        report = RewriteRun(store_of(tmp_path), Dear(), attr=ATTR, prices=prices, max_cost=5.5).run()
        assert (report.calls, report.cost, report.stopped) == (2, pytest.approx(4.0), "max_cost")

    def test_errors_without_tokens_cost_nothing(self, tmp_path):
        answers = {(f"text {i}", 1 - i % 2): RewriteResult(text=None, status="error") for i in range(6)}

        class Failing(Counting):
            def estimate_tokens(self, text, prompt, w_target):
                return 100, 50

        run = RewriteRun(store_of(tmp_path), Failing(answers=answers), attr=ATTR, prices=Prices(1e4, 2e4), max_cost=2.5)
        report = run.run()
        assert (report.calls, report.cost, report.stopped) == (6, 0.0, None)

    def test_answers_that_tell_no_tokens_cost_their_estimate(self, tmp_path):
        class Silent(Counting):
            def estimate_tokens(self, text, prompt, w_target):
                return 100, 50

            def _one(self, text, prompt, target, draw):
                return RewriteResult(text=super()._one(text, prompt, target, draw).text)

        run = RewriteRun(store_of(tmp_path), Silent(), attr=ATTR, prices=Prices(1e4, 2e4), max_cost=5.0)
        assert (run.run().calls, run.plan().total_calls) == (2, 10)


class TestPlan:
    def test_of_an_empty_store(self, tmp_path):
        rewriter = Counting()
        store = RewriteStore.create(tmp_path, [*units(4), Unit(id="x", text="x", w=None)], attr=ATTR)
        plan = RewriteRun(store, rewriter, attr=ATTR, passes=3, draws=2).plan()
        assert not rewriter.asked
        assert (plan.units, plan.unlabelled) == (4, 1)
        assert plan.calls == {1: 8, 2: 8, 3: 8}
        assert (plan.there, plan.blocked, plan.total_calls, plan.cost) == ({}, {}, 24, None)
        assert (plan.tokens_in, plan.tokens_out) == (0, 0)
        assert not (tmp_path / "rewrites.jsonl").exists()

    @pytest.mark.parametrize("calls", [1, 4, 5, 11])
    def test_it_says_what_the_run_then_does(self, tmp_path, calls):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR, max_calls=calls).run()
        run = RewriteRun(store, Counting(), attr=ATTR)
        plan = run.plan()
        assert sum(plan.there.values()) == calls
        assert run.run().calls == plan.total_calls == 12 - calls

    def test_equal_texts_count_once_as_far_as_they_are_known(self, tmp_path):
        store = RewriteStore.create(tmp_path, [Unit(id=str(i), text="same", w=1) for i in range(3)], attr=ATTR)
        run = RewriteRun(store, Counting(), attr=ATTR)
        assert run.plan().calls == {1: 1, 2: 3}  # that the rewrites will be equal is not known yet
        assert run.run().calls == 2

    def test_tokens_and_cost(self, tmp_path):
        class Estimating(Counting):
            def estimate_tokens(self, text, prompt, w_target):
                return len(text), 10 * w_target + len(prompt)

        store = RewriteStore.create(tmp_path, [Unit(id="a", text="12345", w=1, prompt="123")], attr=ATTR)
        plan = RewriteRun(store, Estimating(), attr=ATTR, prices=Prices(1e6, 1e7)).plan()
        assert (plan.tokens_in, plan.tokens_out) == (5 + 5, 3 + 13)
        assert plan.cost == pytest.approx(10 + 160)
        assert str(plan).splitlines() == [
            "mark: 1 units (0 more have no label and are left out)",
            "  in the store: 0 rewrites; to ask for: at most 2 (1 of pass 1, 1 of pass 2)",
            "  tokens, estimated: 10 read, 16 written",
            "  cost, estimated: 170.00",
        ]

    def test_blocked_units_are_named(self, tmp_path):
        store = store_of(tmp_path)
        answers = {("text 1", 0): RewriteResult(text=""), ("text 2", 1): FAILED}
        RewriteRun(store, Counting(answers=answers), attr=ATTR).run()
        plan = RewriteRun(store, Counting(), attr=ATTR).plan()
        assert plan.blocked == {"empty": 1}
        assert plan.calls == {1: 1, 2: 1}
        assert plan.there == {1: 4, 2: 4}
        assert "cannot become complete: 1 empty" in str(plan)

    def test_prices(self):
        with pytest.raises(RecipeError, match=r"Prices\(read=-1, written=2\): expected numbers of at least 0"):
            Prices(-1, 2)
        with pytest.raises(RecipeError, match="written=nan"):
            Prices(1, float("nan"))


class TestPending:
    def test_the_next_rewrite_of_each_unit(self, tmp_path):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR, max_calls=3).run()
        found = RewriteRun(store, Counting(), attr=ATTR).pending()
        assert [(one.unit.id, one.number, one.w_target, one.source) for one in found] == [
            ("u1", 2, 1, "[0.0] text 1"),
            *((f"u{i}", 1, 1 - i % 2, f"text {i}") for i in range(2, 6)),
        ]

    def test_answers_that_came_another_way(self, tmp_path):
        store, rewriter = store_of(tmp_path), Counting()
        run = RewriteRun(store, rewriter, attr=ATTR, prices=Prices(1e6, 0))
        for calls in (6, 6):
            requests = run.pending()
            results = rewriter.rewrite(
                *zip(*((r.source, r.unit.prompt, r.w_target, r.draw) for r in requests), strict=True)
            )
            report = run.keep(zip(requests, results, strict=True))
            assert report.calls == calls
        assert report.complete
        assert report.cost == sum(len(text) for text, *_ in rewriter.asked if text.startswith("["))
        assert exported(store) == uninterrupted()


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"passes": 1}, "passes=1; expected 2, or 3"),
            ({"draws": 0}, "draws=0; expected at least 1"),
            ({"max_calls": 0}, "max_calls=0; expected at least 1, or None"),
            ({"give_up_after": -1}, "give_up_after=-1; expected at least 1"),
            ({"max_cost": 3.0}, r"max_cost=3.0 needs to know what tokens cost\. Pass prices="),
            (
                {"max_cost": 3.0, "prices": Prices(1, 1)},
                "max_cost=3.0 cannot be kept: rewriter 'counting'",
            ),
        ],
    )
    def test_wrong_ones_are_refused(self, tmp_path, options, message):
        with pytest.raises(RecipeError, match=message):
            RewriteRun(store_of(tmp_path), Counting(), attr=ATTR, **options)

    def test_an_unknown_attribute(self, tmp_path):
        with pytest.raises(DataError, match="no attribute 'long'; it has mark"):
            RewriteRun(store_of(tmp_path), Counting(), attr="long")


def test_two_attributes_in_one_store_do_not_meet(tmp_path):
    store = store_of(tmp_path)
    RewriteStore.create(tmp_path, units(3), attr="other")
    store = RewriteStore.open(tmp_path)
    for attr in (ATTR, "other"):
        RewriteRun(store, Counting(), attr=attr).run()
    assert len(store.records(ATTR)) == 12
    assert len(store.records("other")) == 6
    assert [len(store.triples(attr)) for attr in store.attributes()] == [6, 3]


def test_the_written_file_is_plain(tmp_path):
    store = store_of(tmp_path, 1)
    RewriteRun(store, Counting(), attr=ATTR).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in (tmp_path / "rewrites.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert row["rewriter"] == "counting"
            assert row["t"].endswith("+00:00")
