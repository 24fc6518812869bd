import csv
import json
import math

import pytest

from lightning_interp.core.storage.files import atomic_write_bytes, atomic_write_text
from lightning_interp.core.storage.row_files import file_rows, holds_a_list
from lightning_interp.errors import DataError
from lightning_interp.models.data.rows import raw_rows
from lightning_interp.rate import read_own, read_triples

ROWS = [
    {"text": 'One, "two"\nthree\u2028\x85', "w": 1, "reward": -0.5, "id": "007"},
    {"text": "Zoë läuft 🎉", "w": 0, "prompt": "1984"},
    {"text": "\ufeffends\t", "reward": 2},
]
NUMBERS = ("w", "reward")


def written(folder, form, rows=ROWS):
    """The rows as a file of a form."""
    path = folder / f"rows.{form}"
    names = list(dict.fromkeys(key for row in rows for key in row))
    if form == "jsonl":
        return atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    if form == "json":
        return atomic_write_text(path, json.dumps(rows, indent=1))
    if form in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, names, delimiter="\t" if form == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
        return path
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    return path


@pytest.fixture(scope="module", params=["jsonl", "json", "csv", "tsv", "parquet"])
def file(request, tmp_path_factory):
    return written(tmp_path_factory.mktemp(request.param), request.param)


class TestOneBehaviour:
    def test_each_form_holds_the_same_rows(self, file):
        assert [row for _, row in file_rows(file, numbers=NUMBERS)] == ROWS

    def test_a_byte_order_mark_is_no_text(self, file, tmp_path):
        if file.suffix == ".parquet":
            pytest.skip("binary")
        marked = atomic_write_bytes(tmp_path / file.name, b"\xef\xbb\xbf" + file.read_bytes())
        assert [row for _, row in file_rows(marked, numbers=NUMBERS)] == ROWS

    def test_texts_for_training_and_own_texts_are_read_alike(self, file):
        assert [row["text"] for _, row in raw_rows(file, name="train", expected="")] == [row["text"] for row in ROWS]
        found = read_own(file)
        assert [(unit.id, unit.w, unit.prompt) for unit in found.units] == [
            ("007", 1, ""),
            ("2", 0, "1984"),
            ("3", None, ""),
        ]
        assert found.rewards["columns"] == {"007": {"original": -0.5}, "3": {"original": 2.0}}


NESTED = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "spans": {"FE": "a"}}
]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_what_is_nested_is_kept(form, tmp_path):
    assert [row for _, row in file_rows(written(tmp_path, form, NESTED))] == NESTED


def test_parquet_fills_in_what_a_row_lacks_and_the_reader_takes_it_out(tmp_path):
    rows = [{"spans": {"FE": "a"}}, {"spans": {"R": "b"}}]
    path = written(tmp_path, "parquet", [{"spans": {"FE": "a", "R": None}}, {"spans": {"FE": None, "R": "b"}}])
    assert [row for _, row in file_rows(path)] == rows


REFUSED = {
    "half.jsonl": (b'{"text": "\\ud83d"}\n', r"line 1: .*half of a character"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', r"the key 'text' is there twice"),
    "huge.jsonl": (b'{"reward": 1e999}', "larger than a float can hold"),
    "long.jsonl": (b'{"reward": ' + b"9" * 400 + b"}", "has 400 digits"),
    "deep.jsonl": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper than"),
    "latin.jsonl": ('{"text": "Zoë"}'.encode("latin-1"), "can't decode byte"),
    "half.json": (b'[{"text": "\\udc00"}]', "half of a character"),
    "twice.json": (b'[{"a": 1, "a": 2}]', "the key 'a' is there twice"),
    "deep.json": (b"[" * 5000, "nested deeper than"),
    "number.json": (b'[{"text": "a"}, 1]', r"row 2: expected an object, got int 1"),
    "latin.csv": ("text\nZoë\n".encode("latin-1"), "is no CSV file .*decode"),
    "twice.csv": (b"text,text\na,b\n", r"names of its columns are \['text', 'text'\]"),
    "unnamed.csv": (b"text,\na,b\n", "names of its columns"),
    "empty.csv": (b"", r"names of its columns are \[\]"),
    "ragged.csv": (b"text,w\na,1\nb\n", r"row 2: 1 cells under 2 names \(text, w\)"),
    "quote.csv": (b'text,w\n"a,1\n', "is no CSV file"),
    "number.csv": (b"text,w\na,yes\n", "row 1: 'w' is 'yes'; expected a number"),
    "true.csv": (b"text,w\na,true\n", "row 1: 'w' is 'true'; expected a number"),
    "huge.csv": (b"text,w\na,1e999\n", "row 1: 'w' is '1e999'; expected a number"),
    "cut.parquet": (b"PAR1" + b"\0" * 40, "is no PARQUET file"),
    "none.parquet": (b"", "is no PARQUET file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(name, tmp_path):
    data, message = REFUSED[name]
    path = atomic_write_bytes(tmp_path / name, data)
    with pytest.raises(DataError, match=message):
        list(file_rows(path, numbers=("w",)))


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_file_that_is_not_there(form, tmp_path):
    with pytest.raises(DataError, match=rf"gone\.{form}.* cannot be read: No such file"):
        list(file_rows(tmp_path / f"gone.{form}"))


def test_a_name_of_a_file_that_no_file_can_have():
    with pytest.raises(DataError, match="cannot be read: embedded null"):
        list(file_rows("a\0b.jsonl"))


def test_json_of_one_object_a_line_is_no_list(tmp_path):
    path = atomic_write_text(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')
    assert not holds_a_list(path)
    assert [row["text"] for _, row in file_rows(path)] == ["a", "b"]


def test_half_a_character_in_rows_of_python_is_refused_as_in_a_file():
    with pytest.raises(DataError, match=r"train\[1\]: .*half of a character"):
        list(raw_rows([{"text": "a"}, {"messages": [{"content": "\ud83d"}]}], name="train", expected=""))


def test_blank_cells_and_lines_of_csv(tmp_path):
    path = atomic_write_text(tmp_path / "a.csv", 'text,w,note\na,,\n\n,,\n"b, c", 1 ,nan\n')
    assert [row for _, row in file_rows(path, numbers=("w",))] == [
        {"text": "a"},
        {"text": "b, c", "w": 1, "note": "nan"},
    ]


def test_triples_come_back_from_each_form(tmp_path):
    row = {
        "id": "1",
        "w": 1,
        "original": "2",
        "rewrite": "3",
        "rewrite2": "4",
        "reward": 0.5,
        "reward_rewrite": 1,
        "reward_rewrite2": 2.5,
    }
    found = {
        form: read_triples(written(tmp_path, form, [row, row | {"id": "x", "w": 0}]))
        for form in ("jsonl", "csv", "tsv", "parquet")
    }
    assert found["csv"] == found["jsonl"] == found["tsv"] == found["parquet"]
    assert math.isclose(found["csv"].reward["rewrite2"][0], 2.5)
