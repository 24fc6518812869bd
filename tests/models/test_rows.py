from __future__ import annotations

import json

import pytest

from lightning_interp.errors import DataError
from lightning_interp.models.data.rows import Row, read_rows

GOOD = {"prompt": "a", "completion": "b"}
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


def test_forms_of_rows():
    rows = read_rows([{"text": "a"}, {**GOOD, "id": 3}, {"messages": CHAT}, {**GOOD, "text": None}], name="train")
    assert rows == [
        Row("train[0]", "text", {"text": "a"}),
        Row("train[1]", "prompt", GOOD),
        Row("train[2]", "messages", {"messages": CHAT}),
        Row("train[3]", "prompt", GOOD),
    ]


def test_token_ids_are_a_form_of_row(tmp_path):
    ids = {"prompt_ids": [3, 0], "completion_ids": [1]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ids, "row_id": "a"}) + "\n" + json.dumps({"prompt_ids": [], "completion_ids": [2]}))
    assert read_rows(path, name="train") == [
        Row(f"{path}, line 1", "ids", ids),
        Row(f"{path}, line 2", "ids", {"prompt_ids": [], "completion_ids": [2]}),
    ]
    given = {"prompt_ids": (3, 0), "completion_ids": (1,), "text": None}
    assert read_rows([given], name="train") == [Row("train[0]", "ids", ids)]


def test_jsonl_counts_lines_skips_blank_ones_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n" + '{"text": "é\u2028x"}'.encode())
    for source in (path, str(path)):
        rows = read_rows(source, name="train")
        assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 4"]
        assert rows[1].content == {"text": "é\u2028x"}


def test_datasets_in_memory_and_on_disk(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list([{"text": "a", "messages": None}, {"text": None, "messages": CHAT}])
    dataset.save_to_disk(tmp_path / "saved")
    for source, name in ((dataset, "val"), (tmp_path / "saved", str(tmp_path / "saved"))):
        rows = read_rows(source, name="val")
        assert [(row.where, row.form) for row in rows] == [(f"{name}[0]", "text"), (f"{name}[1]", "messages")]
        assert rows[1].content["messages"] == CHAT


def test_a_dictionary_of_datasets_lists_its_splits():
    import datasets

    both = datasets.DatasetDict({"one": datasets.Dataset.from_list([GOOD]), "two": datasets.Dataset.from_list([GOOD])})
    with pytest.raises(DataError, match="dictionary of datasets with the splits one, two"):
        read_rows(both, name="train")


BAD_LINES = {
    '{"text": "a"': r"line 2: no valid JSON \(.*got b'{\"text\": \"a\"",
    "\xff": r"line 2: no valid JSON",
    '["a"]': r"line 2: expected an object, got list \['a'\]",
    "{}": r"line 2: the keys are none; expected exactly one of",
    '{"txt": "a"}': r"line 2: the keys are 'txt'; expected exactly one of",
    '{"prompt": "a"}': r"line 2: the keys are 'prompt'; expected",
    '{"completion": "a"}': r"line 2: the keys are 'completion'; expected",
    '{"text": "a", "prompt": "b", "completion": "c"}': r"line 2: the keys are 'text', 'prompt', 'completion'; expected",
    '{"text": ["a"]}': r"line 2: 'text' is \['a'\], a list; expected a string",
    '{"prompt": 3, "completion": "a"}': r"line 2: 'prompt' is 3, a int; expected a string",
    '{"prompt": "a", "completion": ""}': r"line 2: 'completion' is empty, so there is nothing to learn",
    '{"text": ""}': r"line 2: 'text' is empty",
    '{"prompt_ids": [1]}': r"line 2: the keys are 'prompt_ids'; expected exactly one of",
    '{"prompt_ids": [1], "completion_ids": [2], "text": "a"}': r"line 2: the keys are .*'text'; expected exactly",
    '{"prompt_ids": "1 2", "completion_ids": [2]}': r"line 2: 'prompt_ids' is '1 2', a str; expected a list of",
    '{"prompt_ids": [1], "completion_ids": 3}': r"line 2: 'completion_ids' is 3, a int; expected a list of token ids",
    '{"prompt_ids": [1], "completion_ids": []}': r"line 2: 'completion_ids' is empty, so there is nothing to learn",
    '{"prompt_ids": [4, true], "completion_ids": [2]}': r"line 2: prompt_ids\[1\] is True; expected a token id",
    '{"prompt_ids": [], "completion_ids": [2, -1]}': r"line 2: completion_ids\[1\] is -1; expected a token id",
    '{"prompt_ids": [], "completion_ids": [1.0]}': r"line 2: completion_ids\[0\] is 1.0; expected a token id",
    '{"messages": []}': r"line 2: 'messages' is \[\]; expected a list",
    '{"messages": "hello"}': r"line 2: 'messages' is 'hello'; expected a list",
    '{"messages": [{"role": "user"}]}': r"line 2: messages\[0\] is {'role': 'user'}; expected",
    '{"messages": [{"role": 1, "content": "a"}]}': r"line 2: 'messages\[0\].role' is 1, a int",
    '{"messages": [{"role": "assistant", "content": ""}]}': r"line 2: 'messages\[0\].content' is empty",
    '{"messages": [{"role": "user", "content": "a"}]}': r"no turn has the role 'assistant' \(the roles are user\)",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line.encode("latin-1" if line == "\xff" else "utf-8") + b"\n")
    with pytest.raises(DataError, match=r"rows.jsonl, .*" + BAD_LINES[line]):
        read_rows(path, name="train")


def test_empty_prompts_and_system_texts_are_fine():
    empty = [{"role": "system", "content": ""}, {"role": "user", "content": ""}, CHAT[1]]
    rows = read_rows([{"prompt": "", "completion": "a"}, {"messages": empty}], name="train")
    assert rows[1].content["messages"] == empty


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ([], r"train holds no rows"),
        (3, r"train is a int: expected the path of a file"),
        ({"text": "a"}, r"train is a dict: expected"),
        ([GOOD, "b"], r"train\[1\]: expected an object, got str 'b'"),
        ("no/such.jsonl", r"no/such.jsonl cannot be read: No such file"),
    ],
)
def test_a_bad_source_is_named(source, match):
    with pytest.raises(DataError, match=match):
        read_rows(source, name="train")


def test_empty_files_and_plain_folders_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl holds no rows"):
        read_rows(tmp_path / "empty.jsonl", name="train")
    with pytest.raises(DataError, match=r"is a folder, but no dataset"):
        read_rows(tmp_path, name="train")
