"""A folder of texts: found by content, filled by runs that may be killed at any byte."""

from __future__ import annotations

import json
import threading

import pytest

from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation import (
    Completion,
    CompletionStore,
    FunctionGenerator,
    LocalSampler,
    Prices,
    ReplayGenerator,
    TextRequest,
    write_all,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

REQUESTS = [TextRequest(prompt=f"text {i}", key=("draw", i)) for i in range(12)]


def shouting(asked=None, **options):
    def shout(request):
        if asked is not None:
            asked.append(request.text)
        return Completion(text=request.text.upper(), tokens_in=10, tokens_out=5, request=request.digest)

    return FunctionGenerator(shout, **{"name": "shout", **options})


class KilledError(BaseException):
    """Stands for a kill: nothing may catch it."""


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.json*")}


def sampler(**options):
    return LocalSampler(tiny_model("llama"), byte_tokenizer(), batch_size=4, **options)


class TestRuns:
    def test_nothing_is_asked_for_twice(self, tmp_path):
        asked, store = [], CompletionStore(tmp_path)
        report = write_all(shouting(asked), REQUESTS[:5] + REQUESTS[:2], store)
        assert (report.calls, report.statuses, report.complete) == (5, {"complete": 5}, True)
        write_all(shouting(asked), REQUESTS, CompletionStore(tmp_path))
        assert sorted(asked) == sorted(one.text for one in REQUESTS)
        found = CompletionStore(tmp_path).completions(shouting(), REQUESTS)
        assert [one.text for one in found] == [one.text.upper() for one in REQUESTS]
        assert [one.request for one in found] == [one.digest for one in REQUESTS]

    def test_another_writer_writes_anew(self, tmp_path):
        store = CompletionStore(tmp_path)
        assert [write_all(one, REQUESTS, store).calls for one in (shouting(), shouting(name="b"), shouting())] == [
            12, 12, 0
        ]  # fmt: skip
        assert {one["name"] for one in store.writers().values()} == {"shout", "b"}
        assert len(list(store.rows())) == len(store) == 24

    def test_a_killed_run_goes_on_to_the_same_bytes(self, tmp_path):
        """Killed between two batches, and in the middle of writing one."""
        requests = [TextRequest(prompt=f"{i} " * (1 + i % 3), max_new_tokens=3, key=("k", i)) for i in range(10)]
        whole, torn = CompletionStore(tmp_path / "whole"), CompletionStore(tmp_path / "torn")
        write_all(sampler(), requests, whole)
        expected = files(tmp_path / "whole")

        def die(count):
            raise KilledError

        with pytest.raises(KilledError):
            write_all(sampler(), requests, torn, progress=die)
        path = tmp_path / "torn" / "completions.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 4
        path.write_bytes(b"".join(lines[:2]) + lines[2][:50])
        report = write_all(sampler(), requests, CompletionStore(tmp_path / "torn"))
        assert report.calls == 8
        assert files(tmp_path / "torn") == expected
        assert (tmp_path / "torn" / "completions.torn").read_bytes() == lines[2][:50] + b"\n"

    def test_shards_of_several_processes_are_one_store(self, tmp_path):
        asked = []
        for rank in range(3):
            write_all(shouting(asked), REQUESTS, CompletionStore(tmp_path), share=(rank, 3))
        assert len(asked) == 12
        assert len(list(tmp_path.glob("shard-*/completions.jsonl"))) == 3
        assert write_all(shouting(asked), REQUESTS, CompletionStore(tmp_path), share=(1, 2)).calls == 0
        assert len(CompletionStore(tmp_path).completions(shouting(), REQUESTS)) == 12
        assert len(CompletionStore(tmp_path).writers()) == 1

    def test_failures_are_asked_for_again_and_the_rest_is_final(self, tmp_path):
        times = {}

        def answer(request):
            times[request.text] = times.get(request.text, 0) + 1
            if request.text == "text 1" and times["text 1"] == 1:
                raise ValueError("not now")
            if request.text == "text 2":
                return Completion(text=None, status="refused", error="no", request=request.digest)
            return "fine"

        store, writer = CompletionStore(tmp_path), FunctionGenerator(answer, name="moody")
        report = write_all(writer, REQUESTS[:4], store)
        assert report.statuses == {"complete": 2, "failed": 1, "refused": 1}
        assert (report.missing, report.last_error) == (1, "ValueError: not now")
        assert write_all(writer, REQUESTS[:4], CompletionStore(tmp_path)).calls == 1
        assert times == {"text 0": 1, "text 1": 2, "text 2": 1, "text 3": 1}
        assert [one.status for one in CompletionStore(tmp_path).completions(writer, REQUESTS[:4])] == [
            "complete", "complete", "refused", "complete"
        ]  # fmt: skip

    def test_budgets_stops_and_hopeless_runs(self, tmp_path):
        store, prices = CompletionStore(tmp_path), Prices(1e6, 1e6)
        report = write_all(shouting(), REQUESTS, store, max_calls=3)
        assert (report.calls, report.stopped, report.missing) == (3, "max_calls", 9)
        writer = shouting()
        writer.estimate_tokens = lambda request: (10, 5)
        report = write_all(writer, REQUESTS, store, prices=prices, max_cost=40)
        assert (report.calls, report.stopped, report.cost) == (2, "max_cost", 30)
        calls = []
        report = write_all(shouting(calls), REQUESTS, store, stop=lambda: len(calls) == 4)
        assert (report.calls, report.stopped) == (4, "asked")
        with pytest.raises(RecipeError, match="max_cost=1 needs to know what tokens cost"):
            write_all(shouting(), REQUESTS, store, max_cost=1)
        broken = FunctionGenerator(lambda request: 1 / 0, name="broken")
        with pytest.warns(UserWarning, match=r"ended after 2 errors in a row, the last of them 'ZeroDivisionError"):
            report = write_all(broken, REQUESTS, store, give_up_after=2)
        assert (report.calls, report.stopped) == (2, "errors")

    def test_several_calls_at_the_same_time(self, tmp_path):
        gate, asked = threading.Barrier(3, timeout=10), []

        def together(request):
            gate.wait()
            asked.append(request.text)
            return request.text

        store = CompletionStore(tmp_path)
        assert write_all(FunctionGenerator(together, name="t", concurrency=3), REQUESTS, store).calls == 12
        assert sorted(asked) == sorted(one.text for one in REQUESTS)


class TestFiles:
    def test_a_line_says_what_was_asked(self, tmp_path):
        write_all(sampler(), [TextRequest.chat("Hi", max_new_tokens=2)], CompletionStore(tmp_path))
        (row,) = map(json.loads, (tmp_path / "completions.jsonl").read_text().splitlines())
        assert row["request"] == {"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 2}
        assert (len(row["token_ids"]), row["tokens_out"], row["status"]) == (2, 2, "truncated")
        ((writer, request, found),) = CompletionStore(tmp_path).rows()
        assert writer == row["writer"]
        assert (request, found.token_ids) == (TextRequest.chat("Hi", max_new_tokens=2), tuple(row["token_ids"]))

    def test_an_end_token_is_kept_and_lines_without_one_are_read(self, tmp_path):
        """As they were written before end tokens were kept."""
        ended = Completion(text="A", token_ids=(5,), end_id=2)
        writer = FunctionGenerator(lambda one: ended if one.prompt == "a" else "B", name="ends")
        requests = [TextRequest(prompt="a"), TextRequest(prompt="b")]
        write_all(writer, requests, CompletionStore(tmp_path))
        path = tmp_path / "completions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row.get("end_id", "none") for row in rows] == [2, "none"]
        read = CompletionStore(tmp_path).completions(writer, requests)
        assert [(one.text, one.token_ids, one.end_id) for one in read] == [("A", (5,), 2), ("B", (), None)]
        rows[0].pop("end_id")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert CompletionStore(tmp_path).completions(writer, requests)[0].end_id is None

    def test_two_texts_under_one_key(self, tmp_path):
        store = CompletionStore(tmp_path)
        write_all(shouting(), REQUESTS[:2], store)
        pending = CompletionStore(tmp_path / "none").pending(shouting(), REQUESTS[:1])
        with (
            pytest.raises(DataError, match=r"two texts for one key .*'TEXT 0' and 'other'"),
            store.writer(shouting().identity()) as append,
        ):
            append(pending, [Completion(text="other")])
        assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"v": 2}, "line 1: DataError: version 2; expected a text of version 1"),
            ({"status": "odd"}, "line 1: DataError: A text has the status 'odd'"),
            ({"request": {"prompt": "a", "nonsense": 1}}, "line 1: TypeError: .*nonsense"),
            ({"token_ids": None}, "line 1: TypeError"),
        ],
    )
    def test_a_line_that_cannot_be_used(self, tmp_path, change, message):
        write_all(shouting(), REQUESTS[:1], CompletionStore(tmp_path))
        path = tmp_path / "completions.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
        with pytest.raises(DataError, match=message):
            CompletionStore(tmp_path)

    def test_one_process_writes(self, tmp_path):
        store = CompletionStore(tmp_path)
        with store.writer({"name": "a"}), pytest.raises(ManifestError, match="is in use by this process"):
            write_all(shouting(), REQUESTS, store)

    def test_what_is_missing_is_said(self, tmp_path):
        store = CompletionStore(tmp_path / "none")
        assert len(store) == 0
        with pytest.raises(DataError, match=r"lacks 12 of 12 texts of this writer, such as that for .*'text 0'"):
            store.completions(shouting(), REQUESTS)


class TestReplay:
    def test_a_store_answers_as_its_writer(self, tmp_path):
        store = CompletionStore(tmp_path)
        write_all(shouting(), REQUESTS, store)
        replay = ReplayGenerator(store)
        assert replay.generate(REQUESTS) == store.completions(shouting(), REQUESTS)
        assert write_all(replay, REQUESTS, store).calls == 0
        with pytest.raises(DataError, match=r"no answer to .*'new'.* to replay"):
            replay.generate([TextRequest(prompt="new")])
        write_all(shouting(name="b"), REQUESTS, store)
        with pytest.raises(DataError, match="None is no writer of the store"):
            ReplayGenerator(store)
        for writer, identity in store.writers().items():
            assert ReplayGenerator(store, writer=writer).identity() == identity

    def test_a_table(self):
        table = ReplayGenerator({"2+2=": "4"})
        assert table.generate([TextRequest.chat("2+2=")])[0].text == "4"
        with pytest.raises(DataError, match="no answer to"):
            table.generate([TextRequest.chat("3+3=")])
        assert table.identity() != ReplayGenerator({"2+2=": "5"}).identity()

    def test_a_function_that_returns_something_else(self):
        with pytest.raises(RecipeError, match="function of 'odd' returned 3 for 'a'"):
            FunctionGenerator(lambda request: 3, name="odd").generate([TextRequest(prompt="a")])


@pytest.mark.parametrize("name", ["completions.jsonl", "completions.torn", "writers.json", ".lock", "shard-00001"])
@pytest.mark.parametrize("target", ["outside", "missing"])
def test_a_store_whose_files_lead_elsewhere_is_neither_read_nor_written(tmp_path, name, target):
    (tmp_path / "outside").write_text("as it was")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(tmp_path / target)
    with pytest.raises(ManifestError, match=r"is a link to '.*Delete the link"):
        CompletionStore(tmp_path / "store")
    assert (tmp_path / "outside").read_text() == "as it was"
    assert not (tmp_path / "missing").exists()
    (tmp_path / "store" / name).unlink()
    (tmp_path / "store/notes").symlink_to(tmp_path / "outside")  # none of the store's
    (tmp_path / "name").symlink_to(tmp_path / "store")  # as the user names it
    assert len(CompletionStore(tmp_path / "name")) == 0
