"""Files of lines: what ends a line, what is refused with file and number, and what a kill leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.storage.jsonl import JsonlAppender, json_lines, text_lines, torn_tail, write_json_lines
from lightning_interp.errors import DataError, ManifestError

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"  # what str.splitlines also splits at
BOM = b"\xef\xbb\xbf"


def read(path, **options):
    return [row for _, row in json_lines(path, **options)]


class TestReading:
    def test_a_line_ends_at_a_newline_alone(self, tmp_path):
        path = write_json_lines(tmp_path / "a.jsonl", [{"text": SEPARATORS}, {"text": "b"}])
        assert "\u2028".encode() in path.read_bytes()
        assert read(path) == [{"text": SEPARATORS}, {"text": "b"}]
        path.write_bytes(f"{SEPARATORS}\nlast".encode())
        assert list(text_lines(path)) == [(f"{path}, line 1", SEPARATORS), (f"{path}, line 2", "last")]

    @given(rows=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text() | st.integers() | st.none())))
    def test_what_was_written_is_read(self, tmp_path_factory, rows):
        path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
        assert read(write_json_lines(path, rows), own=True) == rows

    def test_marks_windows_ends_and_blank_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(BOM + b'{"n": 1}\r\n\r\n \t\n{"n": 2}')
        assert list(json_lines(path)) == [(f"{path}, line 1", {"n": 1}), (f"{path}, line 4", {"n": 2})]
        path.write_bytes(BOM + b"one\r\n\n  two \n")
        assert [text for _, text in text_lines(path)] == ["one", "  two "]
        path.write_bytes(BOM + b"\n")
        assert read(path) == list(text_lines(path)) == []

    def test_lines_are_streamed(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"n": 1}\nbroken\n')
        assert next(json_lines(path))[1] == {"n": 1}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", r"a\.jsonl, line 2: no valid JSON \(.*got b'\{\\n'\. Expected one fact a line\."),
            (b"\xff", r"line 2: no valid JSON \('utf-8' codec"),
            (b"[" * 100_000, r"line 2: no valid JSON \(it is nested deeper than 200 levels"),
            (b'{"n": 1e999}', r"line 2: no valid JSON \(the number 1e999 is larger than a float"),
            (b'{"n": 1, "n": 2}', r"line 2: no valid JSON \(the key 'n' is there twice"),
            (b'{"n": "\\ud83d"}', r"line 2: no valid JSON \(.*half of a character"),
            (b"[1]", r"line 2: expected an object, got list \[1\]\. Expected one fact a line\."),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"n": 1}\n' + line + b"\n")
        with pytest.raises(DataError, match=message):
            read(path, expected="one fact a line")

    def test_text_that_is_not_in_utf8_is_named(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"one\n\xe9\n")
        with pytest.raises(DataError, match=r"a\.txt, line 2: not in UTF-8 \(.*\)\. Expected one text a line\."):
            list(text_lines(path))

    @pytest.mark.parametrize("reader", [json_lines, text_lines])
    def test_a_file_that_is_not_there_is_named(self, tmp_path, reader):
        with pytest.raises(DataError, match=r"gone cannot be read: No such file or directory\. Expected one"):
            next(reader(tmp_path / "gone"))

    def test_own_files_hold_what_a_model_wrote(self, tmp_path):
        path = write_json_lines(tmp_path / "a.jsonl", [{"text": "\ud83d", "n": 10**400}])
        assert read(path, own=True) == [{"text": "\ud83d", "n": 10**400}]


class TestAppending:
    @pytest.mark.parametrize("length", [0, 1, 40, 70_000, 200_000])
    def test_what_a_kill_tore_is_cut_off_and_kept_if_wished(self, tmp_path, length):
        path, torn = tmp_path / "log.jsonl", (b'{"n": "' + b"x" * length)[:length]
        path.write_bytes(b'{"n": 1}\n' + torn)
        assert torn_tail(path) == torn
        assert read(path, log=True) == [{"n": 1}]
        for keep in ({"torn": tmp_path / "log.torn"}, {}):
            path.write_bytes(b'{"n": 1}\n' + torn)
            with JsonlAppender(path, **keep) as log:
                assert path.read_bytes() == b'{"n": 1}\n'
                log.append([{"n": 2}])
            assert read(path) == [{"n": 1}, {"n": 2}]
        assert not torn or (tmp_path / "log.torn").read_bytes() == torn + b"\n"

    def test_a_batch_is_on_disk_when_append_returns_and_nothing_makes_no_file(self, tmp_path):
        with JsonlAppender(tmp_path / "new" / "log.jsonl") as log:
            log.append([])
            assert not log.path.exists()
            log.append([{"n": 1}, {"n": 2}])
            assert read(log.path) == [{"n": 1}, {"n": 2}]
            log.close()
            log.append([{"n": 3}])
        assert len(read(log.path)) == 3
        assert torn_tail(tmp_path / "gone") == b""

    def test_a_full_disk_is_said_and_leaves_whole_lines(self, tmp_path):
        log = JsonlAppender(tmp_path / "log.jsonl")
        log.append([{"n": 1}])

        class Full:
            """A file whose disk takes five more bytes."""

            room = 5

            def __getattr__(self, name):
                return getattr(real, name)

            def write(self, data):
                if not self.room:
                    raise OSError(28, "No space left on device")
                self.room = 0
                return real.write(data[:5])

        real = log._file
        log._file = Full()
        with pytest.raises(ManifestError, match=r"Cannot write '.*log\.jsonl': No space left"):
            log.append([{"n": 2}])
        assert read(log.path) == [{"n": 1}]
        log.close()

    def test_an_unwritable_file_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ManifestError, match=r"Cannot write '.*/file/log\.jsonl'"):
            JsonlAppender(tmp_path / "file" / "log.jsonl")
        with pytest.raises(ManifestError, match=r"Cannot write '.*': Is a directory"):
            JsonlAppender(tmp_path).append([{}])
