"""Shards: the same bytes after any kill, whatever else was asked, and nothing that was changed is read."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
from served import serving

from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation import (
    Completion,
    CompletionStore,
    EndpointGenerator,
    FunctionGenerator,
    LocalSampler,
    Pace,
    ReplayGenerator,
    TextRequest,
    read_shards,
    write_all,
    write_shards,
)
from lightning_interp.generation.sampler import request_ids
from lightning_interp.testing import byte_tokenizer, tiny_model

ASKED = [TextRequest(prompt="ab " * (1 + 5 * i % 7), max_new_tokens=2 + i % 3, key=("k", i)) for i in range(10)]


@pytest.fixture(scope="module")
def sampler():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(0, 256, 3))  # so that some texts end
    return LocalSampler(model, byte_tokenizer(), batch_size=2)


def shouting(asked=None, **options):
    def shout(request):
        if asked is not None:
            asked.append(request.text)
        return request.text.upper()

    return FunctionGenerator(shout, **{"name": "shout", **options})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(path, number, change):
    """Change one line of a file."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def whole(sampler, tmp_path_factory):
    """A folder that was written in one go."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(sampler, ASKED, folder, shard_size=4, tokenizer=sampler.tokenizer)
    return folder


class TestRows:
    def test_they_hold_what_training_needs(self, whole, sampler):
        rows = read_shards(whole)
        found = [one for at in (0, 4, 8) for one in sampler.generate(ASKED[at : at + 4])]
        assert [row.completion for row in rows] == found
        assert [row.request for row in rows] == ASKED
        assert [row.row_id for row in rows] == [f"r{i:05d}" for i in range(10)]
        assert [list(row.prompt_ids) for row in rows] == [request_ids(sampler.tokenizer, one) for one in ASKED]
        assert {row.truncated for row in rows} == {True, False}
        for row in rows:
            assert (row.completion.end_id is None) == row.truncated
            assert row.completion.end_id not in row.completion.token_ids
            assert len({row.writer for row in rows}) == 1

    def test_a_line(self, whole):
        (first, *_), last = ((whole / f"shard_{i:05d}.jsonl").read_text().splitlines() for i in (0, 2))
        row = json.loads(first)
        assert row.keys() == {
            "row_id", "writer", "digest", "request", "prompt_ids", "token_ids", "text", "status", "error", "tokens_in",
            "tokens_out", "end_id", "truncated", "sha256"
        }  # fmt: skip
        assert (row["digest"], row["tokens_out"]) == (ASKED[0].digest, len(row["token_ids"]))
        assert len(last) == 2
        assert sorted(files(whole)) == [*(f"shard_{i:05d}.jsonl" for i in range(3)), "shards.json"]

    def test_names(self, tmp_path):
        write_shards(shouting(), {"b": ASKED[0], "a": ASKED[1]}, tmp_path)
        assert [row.row_id for row in read_shards(tmp_path)] == ["b", "a"]

    def test_none(self, tmp_path):
        assert write_shards(shouting(), [], tmp_path).complete
        assert read_shards(tmp_path) == []


class TestExactness:
    def test_twice_and_shard_by_shard(self, whole, sampler, tmp_path):
        write_shards(sampler, ASKED, tmp_path / "a", shard_size=4, tokenizer=sampler.tokenizer)
        assert files(tmp_path / "a") == files(whole)
        (tmp_path / "a/shard_00001.jsonl").unlink()
        report = write_shards(sampler, ASKED, tmp_path / "a", shard_size=4, tokenizer=sampler.tokenizer)
        assert report.calls == 4
        assert files(tmp_path / "a") == files(whole)

    def test_what_goes_together_depends_on_the_shard_alone(self, sampler, tmp_path, monkeypatch):
        """Batches of one shard are the same, whatever other shards hold, and sorted by length inside it."""
        batches, write = [], sampler._write
        monkeypatch.setattr(sampler, "_write", lambda rows: batches.append([r.request for r in rows]) or write(rows))
        write_shards(sampler, ASKED, tmp_path / "a", shard_size=4)
        longer = [TextRequest(prompt="x" * 30, max_new_tokens=2, key=("n", i)) for i in range(4)]
        both, batches[:] = list(batches), []
        write_shards(sampler, [*longer, *ASKED[4:8]], tmp_path / "b", shard_size=4)
        assert batches[2:] == both[2:4]
        assert [one for batch in both for one in batch] != ASKED
        for at in (0, 2):
            lengths = [len(one.prompt) for batch in both[at : at + 2] for one in batch]
            assert lengths == sorted(lengths)
        rows = [read_shards(tmp_path / name) for name in "ab"]
        assert [row.completion for row in rows[0][4:8]] == [row.completion for row in rows[1][4:]]

    @pytest.mark.parametrize(
        ("where", "nth", "kept"),
        [
            ("write", 1, 0),
            ("write", 4, 1),
            ("write", 5, 2),
            ("fsync", 3, 0),
            ("replace", 1, 0),
            ("replace", 3, 1),
            ("progress", 2, 2),
        ],
    )  # fmt: skip
    def test_killed_and_started_again(self, whole, sampler, tmp_path, where, nth, kept):
        """In a batch in the middle of a shard, while a file is written, before it has its name, and after that."""

        def run():
            count = [0]

            def dying(function):
                def counted(*args):
                    count[0] += 1
                    if count[0] == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args)

                return counted

            if where == "write":
                sampler._write = dying(sampler._write)
            elif where != "progress":
                setattr(os, where, dying(getattr(os, where)))
            progress = dying(lambda rows: None) if where == "progress" else None
            write_shards(sampler, ASKED, tmp_path, shard_size=4, tokenizer=sampler.tokenizer, progress=progress)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(list(tmp_path.glob("shard_*.jsonl"))) == kept
        write_shards(sampler, ASKED, tmp_path, shard_size=4, tokenizer=sampler.tokenizer)
        assert files(tmp_path) == files(whole)

    def test_ranks_share_the_shards(self, whole, sampler, tmp_path):
        counts = []
        for rank in range(2):
            if rank:
                with pytest.raises(DataError, match=r"shard_00001.jsonl cannot be read: No such file.*of 4 rows"):
                    read_shards(tmp_path)
            report = write_shards(
                sampler, ASKED, tmp_path, shard_size=4, tokenizer=sampler.tokenizer, share=(rank, 2),
                progress=counts.append,
            )  # fmt: skip
            assert (report.calls, report.missing) == ((6, 0), (4, 0))[rank]
        assert counts == [4, 2, 4]
        assert files(tmp_path) == files(whole)


class TestFailures:
    def test_a_failed_row_ends_the_run_and_the_next_goes_on(self, tmp_path):
        asked, bad = [], {ASKED[5].text}

        def moody(request):
            asked.append(request)
            if request.text in bad:
                raise ValueError("not now")
            return Completion(text=None, status="refused", error="no", request=request.digest)

        writer, texts = FunctionGenerator(moody, name="moody"), [TextRequest(prompt=f"t{i}") for i in range(8)]
        bad = {"t3"}
        with pytest.warns(UserWarning, match=r"ended at .*00001.jsonl', where an answer failed \('ValueError: not"):
            report = write_shards(writer, texts, tmp_path, shard_size=2)
        assert (report.stopped, report.calls, report.missing) == ("errors", 4, 6)
        assert report.statuses == {"refused": 3, "failed": 1}
        kept = write_shards(writer, texts, tmp_path / "kept", shard_size=2, keep_failed=True)
        assert (kept.stopped, kept.complete) == (None, True)
        assert [row.completion.status for row in read_shards(tmp_path / "kept")].index("failed") == 3
        bad, asked[:] = set(), []
        assert write_shards(writer, texts, tmp_path, shard_size=2).complete
        assert asked == texts[2:]
        assert {row.completion.status for row in read_shards(tmp_path)} == {"refused"}

    def test_a_prompt_too_long_for_the_model(self, sampler, tmp_path):
        asked = [TextRequest(prompt="x" * 9999), ASKED[0]]
        write_shards(sampler, asked, tmp_path, keep_failed=True)
        long, short = read_shards(tmp_path)
        assert (long.completion.status, long.completion.text, long.truncated) == ("failed", None, False)
        assert short.completion == sampler.generate(ASKED[:1])[0]

    def test_an_endpoint_with_a_store_keeps_each_answer(self, tmp_path):
        """A server that breaks: nothing that was paid for is asked for again."""
        asked = [TextRequest.chat(f"t{i}") for i in range(6)]
        pace = Pace(max_retries=0, max_concurrency=1, sleep=lambda seconds: None)
        store = CompletionStore(tmp_path / "store")
        with serving(script=[None, None, None, 500, 500]) as served:
            writer = EndpointGenerator("m", base_url=served.url, pace=pace)
            with pytest.warns(UserWarning, match="2 errors in a row"):
                assert write_all(writer, asked, store, give_up_after=2).stopped == "errors"
            with pytest.warns(UserWarning, match=r"shard_00001.jsonl', where an answer failed \('1 attempts: 500"):
                assert write_shards(ReplayGenerator(store), asked, tmp_path / "shards", shard_size=2).missing == 4
            write_all(writer, asked, store)
            assert write_shards(ReplayGenerator(store), asked, tmp_path / "shards", shard_size=2).calls == 4
            assert len(served.bodies) == 5 + 3
            assert write_shards(writer, asked, tmp_path / "shards", shard_size=2).calls == 0
        assert [row.completion.text for row in read_shards(tmp_path / "shards")] == [f"T{i}" for i in range(6)]


class TestRefused:
    @pytest.mark.parametrize(
        ("asked", "options", "message"),
        [
            (ASKED, {"shard_size": 2}, r"'shard_size' is 4, and this one's is 2"),
            (ASKED[:9], {}, r"'rows' is 10, and this one's is 9"),
            (ASKED[::-1], {}, r"'requests' is '[0-9a-f]{64}'"),
            (ASKED, {"writer": "other"}, r"'identity' is \{'name': 'shout'\}, and this one's is \{'name': 'other'\}"),
            (ASKED, {"tokenizer": byte_tokenizer()}, r"'prompt_ids' is False, and this one's is True"),
        ],
    )
    def test_another_run_in_the_folder(self, tmp_path, asked, options, message):
        write_shards(shouting(), ASKED, tmp_path, shard_size=4)
        before, writer = files(tmp_path), shouting(name=options.pop("writer", "shout"))
        with pytest.raises(ManifestError, match=f"{tmp_path}' holds texts of another run: its {message}"):
            write_shards(writer, asked, tmp_path, **{"shard_size": 4, **options})
        assert files(tmp_path) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda line: line[:40], r"line 2: no valid JSON"),
            (lambda line: line.replace(b'"AB', b'"BA', 1), r"line 2: it was torn or changed"),
            (lambda line: line[:-20] + b'ab"}\n', r"line 2: it was torn or changed"),
            (lambda line: b"", r"line 3: the shard ends there; expected 4 rows"),
            (lambda line: b"[]\n", r"line 2: expected an object, got list"),
        ],
    )
    def test_a_line_that_was_torn_or_changed(self, tmp_path, change, message):
        write_shards(shouting(), ASKED, tmp_path, shard_size=4)
        rewrite(tmp_path / "shard_00001.jsonl", 2, change)
        for read in (lambda: read_shards(tmp_path), lambda: write_shards(shouting(), ASKED, tmp_path, shard_size=4)):
            with pytest.raises(DataError, match=f"shard_00001.jsonl, {message}"):
                read()
        (tmp_path / "shard_00001.jsonl").unlink()
        assert write_shards(shouting(), ASKED, tmp_path, shard_size=4).calls == 4

    def test_rows_of_another_place_or_writer(self, tmp_path):
        """Lines that are whole, but do not belong there."""
        write_shards(shouting(), ASKED, tmp_path / "a", shard_size=5)
        write_shards(shouting(name="b"), ASKED, tmp_path / "b", shard_size=5)
        first, second, foreign = (
            tmp_path / path for path in ("a/shard_00000.jsonl", "a/shard_00001.jsonl", "b/shard_00000.jsonl")
        )
        own = first.read_bytes()
        first.write_bytes(second.read_bytes())
        with pytest.raises(DataError, match=r"are not those for which its shards.json was written"):
            read_shards(tmp_path / "a")
        with pytest.raises(DataError, match=r"shard_00000.jsonl, line 1: the row 'r00005' is not what was asked for"):
            write_shards(shouting(), ASKED, tmp_path / "a", shard_size=5)
        first.write_bytes(foreign.read_bytes())
        with pytest.raises(DataError, match=r"shard_00000.jsonl, line 1: 'r00000' is of another writer"):
            read_shards(tmp_path / "a")
        first.write_bytes(own)
        (tmp_path / "a/shards.json").write_bytes((tmp_path / "a/shards.json").read_bytes().replace(b": 5,", b": 4,"))
        with pytest.raises(DataError, match=r"shards.json: it was torn or changed"):
            read_shards(tmp_path / "a")

    def test_links_and_senseless_numbers(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/shard_00000.jsonl").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ManifestError, match="is a link to"):
            write_shards(shouting(), ASKED, tmp_path / "a")
        with pytest.raises(RecipeError, match="shard_size=0; expected at least 1"):
            write_shards(shouting(), ASKED, tmp_path, shard_size=0)
        with pytest.raises(RecipeError, match=r"share=\(2, 2\)\): expected a rank from 0"):
            write_shards(shouting(), ASKED, tmp_path, share=(2, 2))
        with pytest.raises(DataError, match=r"shards.json': No such file"):
            read_shards(tmp_path / "none")

    def test_a_disk_that_takes_no_more(self, tmp_path, monkeypatch):
        with pytest.MonkeyPatch.context() as patch:
            written = []

            def full(path, target):
                written.append(target)
                if len(written) == 3:
                    raise OSError(28, "No space left on device")
                os.rename(path, target)

            patch.setattr(os, "replace", full)
            with pytest.raises(ManifestError, match=r"Cannot write '.*shard_00001.jsonl': No space left"):
                write_shards(shouting(), ASKED, tmp_path, shard_size=4)
        assert sorted(files(tmp_path)) == ["shard_00000.jsonl", "shards.json"]
        assert write_shards(shouting(), ASKED, tmp_path, shard_size=4).calls == 6
