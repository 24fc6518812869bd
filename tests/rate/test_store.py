from __future__ import annotations

import json
import multiprocessing
import threading

import pytest
from rewriting import ATTR, Counting, store_of, units

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.errors import DataError, ManifestError
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.report.study_files import read_triples, write_triples
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import (
    Request,
    RewriteRecord,
    RewriteResult,
    RewriterId,
    Unit,
    rewrite_key,
    text_sha,
)
from lightning_interp.rate.rewriting.store import RewriteStore

BY = RewriterId("somebody", "p", "i")
UNIT = Unit(id="a", text="oh!", w=1)


def request(unit=UNIT, *, source=None, number=1, target=None, draw=0, by=BY, attr=ATTR):
    return Request(
        unit=unit, attr=attr, number=number, draw=draw, by=by,
        w_target=1 - unit.w if target is None else target, source=unit.text if source is None else source,
    )  # fmt: skip


def record(text="oh", status="ok", error=None, **of):
    return request(**of).record(RewriteResult(text=text, status=status, error=error))


def lines(store):
    return (store.folder / "rewrites.jsonl").read_bytes().splitlines(keepends=True)


class TestUnits:
    @pytest.mark.parametrize(("w", "read"), [(0, 0), (1, 1), (True, 1), (0.0, 0), (1.0, 1), (None, None)])
    def test_labels(self, w, read):
        unit = Unit(id="a", text="t", w=w)
        assert unit.w == read
        assert type(unit.w) in (int, type(None))

    def test_labels_of_numpy_and_torch(self):
        import numpy as np
        import torch

        for w in (np.int64(1), np.float32(1), np.bool_(True), torch.tensor(1)):
            assert Unit(id="a", text="t", w=w).w == 1

    @pytest.mark.parametrize("w", [2, -1, 0.5, float("nan"), "1", "yes", [1]])
    def test_another_label_is_refused(self, w):
        with pytest.raises(DataError, match=r"Unit 'r7': w is .*; expected 0 or 1, or None"):
            Unit(id="r7", text="t", w=w)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text": None}, r"Unit 'r7': text is None; expected a string"),
            ({"text": "t", "prompt": 3}, r"Unit 'r7': prompt is 3; expected a string"),
            ({"text": "t", "cluster": 3}, r"Unit 'r7': cluster is 3; expected a string or None"),
        ],
    )
    def test_another_type_is_refused(self, fields, message):
        with pytest.raises(DataError, match=message):
            Unit(id="r7", w=1, **fields)
        with pytest.raises(DataError, match=r"Unit 7: id is 7; expected a string"):
            Unit(id=7, text="t", w=1)

    def test_they_come_back_in_their_order(self, tmp_path):
        given = [
            Unit(id="b", text="Zoë\u2028\n", w=1, prompt="p", cluster="c1"),
            Unit(id="a", text="", w=None, cluster="c2"),
            Unit(id="half \ud83d", text="half \udc9d", w=0, cluster="c1"),
        ]
        assert RewriteStore.create(tmp_path / "s", given, attr=ATTR).units(ATTR) == given
        assert RewriteStore.open(tmp_path / "s").units(ATTR) == given
        assert RewriteStore.open(str(tmp_path / "s")).attributes() == [ATTR]

    def test_the_same_again_changes_nothing_and_new_ones_are_added(self, tmp_path):
        store = store_of(tmp_path / "s", 3)
        before = (tmp_path / "s" / "units.jsonl").stat().st_mtime_ns
        store_of(tmp_path / "s", 3)
        assert (tmp_path / "s" / "units.jsonl").stat().st_mtime_ns == before
        assert store_of(tmp_path / "s", 5).units(ATTR) == units(5)
        assert store_of(tmp_path / "s", 2).units(ATTR) == units(5)
        other = RewriteStore.create(tmp_path / "s", [UNIT], attr="other")
        assert other.attributes() == [ATTR, "other"]
        assert store.units(ATTR) == units(3)  # an open store is as it was read

    def test_another_unit_under_an_id_is_refused(self, tmp_path):
        store_of(tmp_path)
        with pytest.raises(DataError, match=r"another unit 'u1' of attribute 'mark': 'text 1' with w=1, not 'new'"):
            RewriteStore.create(tmp_path, [Unit(id="u1", text="new", w=1)], attr=ATTR)
        with pytest.raises(DataError, match=r"another unit 'u1' .* with w=1, not 'text 1' with w=0"):
            RewriteStore.create(tmp_path, [Unit(id="u1", text="text 1", w=0, prompt="prompt 1")], attr=ATTR)

    def test_duplicate_ids_are_listed(self, tmp_path):
        many = [Unit(id=f"u{i % 13}", text=str(i), w=0) for i in range(26)]
        with pytest.raises(DataError, match=r"'mark': 13 ids occur more than once, such as 'u0', .*'u9' and 3 more\."):
            RewriteStore.create(tmp_path, many, attr=ATTR)

    def test_clusters_are_for_all_or_none(self, tmp_path):
        with pytest.raises(DataError, match=r"2 of 3 units have no cluster, such as 'u0', 'u1'"):
            RewriteStore.create(tmp_path, [*units(2), Unit(id="x", text="", w=0, cluster="c")], attr=ATTR)
        store_of(tmp_path, 2)
        with pytest.raises(DataError, match=r"2 of 3 units have no cluster"):
            RewriteStore.create(tmp_path, [Unit(id="x", text="", w=0, cluster="c")], attr=ATTR)

    def test_no_units_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="Attribute 'mark' holds no units"):
            RewriteStore.create(tmp_path, [], attr=ATTR)

    def test_an_unknown_attribute_lists_those_there(self, tmp_path):
        with pytest.raises(DataError, match=r"has no attribute 'long'; it has mark\."):
            store_of(tmp_path).units("long")

    def test_a_file_written_by_hand_needs_no_attribute(self, tmp_path):
        atomic_write_text(tmp_path / "units.jsonl", '{"id": "a", "text": "t", "w": true}\n\n')
        assert RewriteStore.open(tmp_path).units("anything") == [Unit(id="a", text="t", w=1)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"units\.jsonl, line 2: no valid JSON \(.*got b'\{\\n'"),
            ("[1]", r"units\.jsonl, line 2: expected an object, got list \[1\]"),
            ('{"id": "b", "w": 1}', r"units\.jsonl, line 2: the keys are id, w; expected at least id, text and w"),
            ('{"id": "b", "text": "t", "w": 3}', r"units\.jsonl, line 2: Unit 'b': w is 3; expected 0 or 1"),
            ('{"id": "a", "text": "t", "w": 0}', r"units\.jsonl: 1 ids occur more than once, such as 'a'"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, message):
        atomic_write_text(tmp_path / "units.jsonl", f'{{"id": "a", "text": "t", "w": 1}}\n{line}\n')
        with pytest.raises(DataError, match=message):
            RewriteStore.open(tmp_path)


class TestOpen:
    def test_a_folder_without_a_store(self, tmp_path):
        with pytest.raises(ManifestError, match=r"nowhere' is no rewrite store: it has no units\.jsonl\. Give"):
            RewriteStore.open(tmp_path / "nowhere")
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ManifestError, match=r"no units\.jsonl \(it has notes\.txt\)"):
            RewriteStore.open(tmp_path)

    def test_reading_changes_nothing(self, tmp_path):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR).run()
        (tmp_path / "rewrites.jsonl").write_bytes(b"".join(lines(store)) + b'{"torn')
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        again = RewriteStore.open(tmp_path)
        assert len(again.triples(ATTR)) == 6
        assert again.torn == b'{"torn'
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class TestKeys:
    def test_everything_that_decides_is_part_of_the_key(self):
        base = {"attr": "a", "w_target": 1, "src_sha": "s", "prompt_sha": "p", "draw": 0, "by": BY}
        changes = [
            {"attr": "b"}, {"w_target": 0}, {"src_sha": "t"}, {"prompt_sha": "q"}, {"draw": 1},
            {"by": RewriterId("else", "p", "i")}, {"by": RewriterId("somebody", "q", "i")},
            {"by": RewriterId("somebody", "p", "j")},
        ]  # fmt: skip
        keys = {rewrite_key(**{**base, **change}) for change in [{}, *changes]}
        assert len(keys) == len(changes) + 1

    def test_the_unit_and_the_pass_are_no_part_of_it(self):
        twin = Unit(id="twin", text=UNIT.text, w=1)
        assert request().key == request(twin).key == request(number=3).key == record().key

    def test_parts_do_not_run_into_one_another(self):
        one, two = RewriterId("a", "bc", ""), RewriterId("ab", "c", "")
        assert request(by=one).key != request(by=two).key

    def test_digests_of_texts(self):
        assert text_sha("half \ud83d") != text_sha("half \ud83e")
        assert text_sha("é") != text_sha("e\u0301")  # normalisation is for comparing, not for the key


class TestRecords:
    def test_they_come_back_as_they_were(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        given = [
            request().record(
                RewriteResult(text="Zoë \ud83d\n", tokens_in=3, tokens_out=4), flags=("length",), time="2026-01-01"
            ),
            record(None, "error", "went wrong", draw=1),
            record(None, "refused", draw=2),
            record("cut o", "truncated", draw=3),
            record(" ", draw=4),
        ]
        with store.writer() as writer:
            writer.append(given)
            assert store.records() == given
        assert RewriteStore.open(tmp_path).records() == given
        assert RewriteStore.open(tmp_path).records("other") == []
        assert given[-1].result.status == "empty"
        row = json.loads(lines(store)[0])
        assert list(row) == [
            "v", "id", "attr", "pass", "draw", "w_target", "src_sha", "prompt_sha", "text", "status", "error",
            "rewriter", "params_sha", "instruction_sha", "tokens_in", "tokens_out", "flags", "t",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text": "a", "status": "fine"}, r"the status 'fine'; expected one of ok, empty, refused"),
            ({"text": None}, r"status 'ok' has text None"),
            ({"text": b"a"}, r"A rewrite is b'a', a bytes; expected a string or None"),
        ],
    )
    def test_a_wrong_result_is_refused(self, fields, message):
        with pytest.raises(DataError, match=message):
            RewriteResult(**fields)

    def test_the_last_of_equal_records_wins(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        late = request().record(RewriteResult(text="oh", tokens_in=9))
        with store.writer() as writer:
            writer.append([record("oh")])
            writer.append([late])
        assert RewriteStore.open(tmp_path).records() == [late]

    def test_an_error_never_replaces_a_text_and_a_text_replaces_it(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            for text, status in ((None, "error"), ("oh", "ok"), (None, "error"), (None, "refused")):
                writer.append([record(text, status)])
        assert [one.result.text for one in RewriteStore.open(tmp_path).records()] == ["oh"]
        assert [one.result.text for one in store.records()] == ["oh"]

    def test_two_texts_for_one_key_are_refused_when_written_and_when_read(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            writer.append([record("oh")])
            before = lines(store)
            with pytest.raises(DataError, match=r"two texts for one key \(.*unit 'a', pass 1\): 'oh' and 'uh'"):
                writer.append([record("new", draw=1), record("uh")])
            with pytest.raises(DataError, match=r"'one' and 'two'"):
                writer.append([record("one", draw=2), record("two", draw=2)])
        assert lines(store) == before
        other = json.dumps({**json.loads(before[0]), "text": "uh"})
        (tmp_path / "rewrites.jsonl").write_text(before[0].decode() + other + "\n")
        with pytest.raises(DataError, match=r"rewrites\.jsonl, line 2: two texts for one key .*'oh' and 'uh'"):
            RewriteStore.open(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"v": 2}, "line 1: version 2; expected a record of version 1"),
            ({"id": 3}, "line 1: 'id' is 3; expected str"),
            ({"pass": "1"}, "line 1: 'pass' is '1'; expected int"),
            ({"draw": True}, "line 1: 'draw' is True; expected int"),
            ({"text": 4}, r"line 1: 'text' is 4; expected str \| None"),
            ({"status": "odd"}, "line 1: A rewrite has the status 'odd'"),
            ({"flags": "length"}, "line 1: 'flags' is 'length'; expected a list of words"),
            ({"flags": [1]}, r"line 1: 'flags' is \[1\]; expected a list of words"),
        ],
    )
    def test_a_record_of_another_kind_is_named(self, tmp_path, change, message):
        RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        row = {**record().to_dict(), **change}
        atomic_write_text(tmp_path / "rewrites.jsonl", json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"rewrites\.jsonl, {message}"):
            RewriteStore.open(tmp_path)

    def test_a_missing_field_is_named(self):
        row = record().to_dict()
        del row["src_sha"]
        with pytest.raises(DataError, match="there: 'src_sha' is None; expected str"):
            RewriteRecord.from_dict(row, "there")
        with pytest.raises(DataError, match=r"there: version \[\]; expected"):
            RewriteRecord.from_dict([], "there")

    @pytest.mark.parametrize("line", [b"garbage\n", b"{}\n", b"\x00\x00\n", b'{"v": 1, "id": "\xff"}\n'])
    def test_a_broken_line_that_is_not_the_last_is_an_error(self, tmp_path, line):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            writer.append([record("oh")])
        whole = lines(store)[0]
        (tmp_path / "rewrites.jsonl").write_bytes(whole + line + whole)
        with pytest.raises(DataError, match=r"rewrites\.jsonl, line 2: "):
            RewriteStore.open(tmp_path)


class TestTornLine:
    @pytest.mark.parametrize("cut", [1, 20, -1])
    def test_it_is_moved_aside_and_asked_for_again(self, tmp_path, cut):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR).run()
        complete = lines(store)
        torn = complete[-1][:cut]
        (tmp_path / "rewrites.jsonl").write_bytes(b"".join(complete[:-1]) + torn)
        again = Counting()
        RewriteRun(RewriteStore.open(tmp_path), again, attr=ATTR).run()
        lost = json.loads(complete[-1])
        assert sum(again.asked.values()) == 1
        assert (tmp_path / "rewrites.torn").read_bytes() == torn + b"\n"
        assert json.loads(lines(store)[-1])["text"] == lost["text"]
        assert len(RewriteStore.open(tmp_path).triples(ATTR)) == 6

    def test_every_torn_line_is_kept(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        for torn in (b'{"one', b'{"two'):
            with open(tmp_path / "rewrites.jsonl", "ab") as file:
                file.write(torn)
            with store.writer():
                pass
        assert (tmp_path / "rewrites.torn").read_bytes() == b'{"one\n{"two\n'
        assert lines(store) == []


class TestWriter:
    def test_a_record_is_on_disk_when_append_returns(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            writer.append([])
            assert not (tmp_path / "rewrites.jsonl").exists()
            writer.append([record("oh")])
            assert RewriteStore.open(tmp_path).find(request().key).result.text == "oh"

    def test_it_is_forced_to_disk(self, tmp_path, monkeypatch):
        synced = []
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(len(lines(store))))
            writer.append([record("oh"), record("no", draw=1)])
            writer.append([record("so", draw=2)])
        assert synced == [2, 3]

    def test_one_process_at_a_time(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            with pytest.raises(ManifestError, match="is in use by this process"), RewriteStore.open(tmp_path).writer():
                pass
            writer.append([record("oh")])
            said = tmp_path / "said"

            def another():
                try:
                    RewriteStore.open(tmp_path).writer().__enter__()
                except ManifestError as error:
                    said.write_text(str(error))

            process = multiprocessing.get_context("fork").Process(target=another)
            process.start()
            process.join()
            assert "is in use by process" in said.read_text()
        with store.writer():
            pass

    def test_what_another_process_wrote_meanwhile_is_seen(self, tmp_path):
        store, other = RewriteStore.create(tmp_path, [UNIT], attr=ATTR), RewriteStore.open(tmp_path)
        with other.writer() as writer:
            writer.append([record("oh")])
        assert store.find(request().key) is None
        with store.writer():
            assert store.find(request().key).result.text == "oh"
        other.reload()
        assert len(other.records()) == 1

    def test_a_closed_writer_says_so(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            pass
        for one in (writer, store.writer()):
            with pytest.raises(ManifestError, match=rf"The writer of '{tmp_path}' is closed"):
                one.append([record("oh")])

    def test_the_lock_is_given_free_when_a_broken_file_stops_it(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        (tmp_path / "rewrites.jsonl").write_bytes(b"broken\n")
        for _ in range(2):
            with pytest.raises(DataError, match="line 1: no valid JSON"), store.writer():
                pass
        (tmp_path / "rewrites.jsonl").unlink()
        (tmp_path / "rewrites.jsonl").mkdir()
        for _ in range(2):
            with pytest.raises(DataError, match=r"rewrites\.jsonl cannot be read: Is a directory"), store.writer():
                pass

    def test_a_full_disk_leaves_whole_lines(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            writer.append([record("oh")])
            kept = lines(store)
            monkeypatch.setattr("os.fsync", full)
            with pytest.raises(ManifestError, match=r"Cannot write '.*rewrites\.jsonl': No space left"):
                writer.append([record("new", draw=1)])
        assert lines(store) == kept
        assert store.find(request(draw=1).key) is None

    def test_who_wrote_is_written_down(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        with store.writer() as writer:
            writer.describe(RewriterId("z", "1", "2"), params={"t": 0.5}, instruction="Do it.")
            writer.describe(BY, params={}, instruction="")
            before = (tmp_path / "rewriters.json").stat().st_mtime_ns
            writer.describe(BY, params={}, instruction="")
            assert (tmp_path / "rewriters.json").stat().st_mtime_ns == before
        found = json.loads((tmp_path / "rewriters.json").read_text())
        assert list(found) == ["somebody/p/i", "z/1/2"]
        assert found["z/1/2"]["params"] == {"t": 0.5}
        assert found["z/1/2"]["instruction"] == "Do it."


class TestWhoWrote:
    @pytest.fixture
    def store(self, tmp_path):
        store = RewriteStore.create(tmp_path, [UNIT], attr=ATTR)
        both = (BY, RewriterId("else", "p", "i"), RewriterId("else", "q", "i"))
        with store.writer() as writer:
            for by in both:
                first = f"oh, {by.rewriter} {by.params_sha}"
                back = record(first + "!", source=first, target=1, number=2, by=by)
                writer.append([record(first, by=by), back])
        return store

    def test_one_of_several_must_be_named(self, store):
        assert [str(by) for by in store.rewriters(ATTR)] == [
            "somebody (settings p, instruction i)",
            "else (settings p, instruction i)",
            "else (settings q, instruction i)",
        ]
        with pytest.raises(DataError, match=r"3 rewriters of attribute 'mark' fit None; .*somebody \(settings p"):
            store.triples(ATTR)
        with pytest.raises(DataError, match=r"2 rewriters of attribute 'mark' fit 'else'"):
            store.triples(ATTR, rewriter="else")
        with pytest.raises(DataError, match=r"No rewriters of attribute 'mark' fit 'nobody'"):
            store.triples(ATTR, rewriter="nobody")
        assert store.triples(ATTR, rewriter="somebody").rewrite == ["oh, somebody p"]
        assert store.triples(ATTR, rewriter=RewriterId("else", "q", "i")).rewrite2 == ["oh, else q!"]

    def test_nobody_yet(self, tmp_path):
        store = store_of(tmp_path / "new")
        assert store.rewriter_id(ATTR) is None
        with pytest.raises(DataError, match=r"6 with 'rewrite_absent'"):
            store.triples(ATTR)


def test_readers_may_look_while_somebody_writes(tmp_path):
    store, stop, seen = store_of(tmp_path, 15), threading.Event(), []

    def look():
        while not stop.is_set():
            seen.append(len(RewriteStore.open(tmp_path).records()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        RewriteRun(store, Counting(), attr=ATTR).run()
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
    assert len(store.records()) == 30


@pytest.mark.parametrize("name", ["units.jsonl", "rewrites.jsonl", "rewriters.json", ".lock"])
def test_a_store_whose_files_lead_elsewhere_is_neither_read_nor_written(tmp_path, name):
    store_of(tmp_path / "store", 2)
    outside = atomic_write_text(tmp_path / "outside", "as it was")
    (tmp_path / "store" / name).unlink(missing_ok=True)
    (tmp_path / "store" / name).symlink_to(outside)
    for use in (lambda: RewriteStore(tmp_path / "store"), lambda: store_of(tmp_path / "store", 3)):
        with pytest.raises(ManifestError, match=r"is a link to '.*Delete the link"):
            use()
    assert outside.read_text() == "as it was"


class TestHalfACharacter:
    """A text with a lone surrogate was paid for and is kept; it cannot be scored, and it stops nothing."""

    def store(self, folder, text):
        store = store_of(folder, 4)
        half = {("text 1", 0): RewriteResult(text=text)}
        RewriteRun(store, Counting(answers=half), attr=ATTR).run()
        return store

    @pytest.mark.parametrize("text", ["half \ud83d", "\udc9d", "\ud83d\n", "a \udfff b"])
    def test_its_unit_is_left_out(self, tmp_path, text):
        self.store(tmp_path, text)
        store, again = RewriteStore.open(tmp_path), Counting()
        assert RewriteRun(store, again, attr=ATTR).run().calls == 0
        with pytest.warns(UserWarning, match="left out"):
            triples = store.triples(ATTR, missing="drop")
        assert triples.ids == ["u0", "u2", "u3"]
        assert triples.dropped == {"rewrite_truncated": {"w1": 1}}
        with pytest.raises(DataError, match=r"1 with 'rewrite_truncated'. Their ids: 'u1'"):
            store.triples(ATTR)

    def test_a_line_from_before_does_not_count_as_usable(self, tmp_path):
        self.store(tmp_path, "half \ud83d")
        lines = (tmp_path / "rewrites.jsonl").read_text().splitlines()
        old = [json.loads(line) | ({"status": "ok", "error": None} if "half" in line else {}) for line in lines]
        (tmp_path / "rewrites.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
        store = RewriteStore.open(tmp_path)
        assert [record.result.status for record in store.records() if "half" in record.result.text] == ["truncated"]
        again = Counting()
        RewriteRun(store, again, attr=ATTR, retry_final=True).run()
        assert set(again.asked) == {("text 1", "prompt 1", 0, 0), ("[0.0] text 1", "prompt 1", 1, 0)}
        assert len(RewriteStore.open(tmp_path).triples(ATTR)) == 4

    def test_units_that_hold_one_are_written_and_read(self, tmp_path):
        row = {"id": "a", "w": 1, "original": "oh \ud83d!", "rewrite": "oh", "rewrite2": "oh!"}
        triples = RewriteTriples.from_rows([row])
        assert read_triples(write_triples(tmp_path, triples)) == triples
        for name in ("a.csv", "a.parquet"):
            with pytest.raises(DataError, match=rf"{name} cannot hold a text with half of a character"):
                write_triples(tmp_path, triples, name=name)
            assert not (tmp_path / name).exists()
