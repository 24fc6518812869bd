import pytest

from lightning_interp.core.storage.json_reading import parse_json, read_json
from lightning_interp.errors import DataError, ManifestError

FAULTS = [
    (b"[1, 2", "Expecting ',' delimiter"),
    (b"", "Expecting value"),
    (b"\xff", "can't decode byte 0xff"),
    (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 200 levels"),
    (b"[" * 250 + b"]" * 250, "nested deeper than 200 levels"),
    (b'{"a":' * 250 + b"1" + b"}" * 250, "nested deeper than 200 levels"),
    (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' is there twice in one object"),
    (b"1" * 5000, "has 5000 digits"),
    (b"[1e999]", "the number 1e999 is larger than a float can hold"),
    (b'["\\uD83D"]', "holds half of a character"),
    (b'{"\\udc00": 1}', "holds half of a character"),
]


@pytest.mark.parametrize(("data", "reason"), FAULTS)
def test_each_fault_is_a_value_error(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(data)


def test_what_is_accepted():
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "\U0001f600 \\ud800"}
    assert parse_json(b"[" * 199 + b"]" * 199)
    assert parse_json(b"[" + b"[]," * 300 + b"1]")[-1] == 1
    assert parse_json(b"[1e308, NaN]")[0] == 1e308
    assert parse_json(b'["\\ud800", ' + b"1" * 400 + b"]", own=True)[0] == "\ud800"


def test_a_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ManifestError, match=r"a\.json' is no valid JSON \(the key 'a' .*\)\. Expected a plan\."):
        read_json(path, expected="a plan", error=ManifestError)
    with pytest.raises(DataError, match=r"Cannot read '.*gone': No such file or directory\. Expected a JSON file"):
        read_json(tmp_path / "gone")
    path.write_text("[1]")
    assert read_json(path) == [1]
