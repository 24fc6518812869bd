from __future__ import annotations

import json

import pytest
from served import completion, echo

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import Completion, CompletionStore, EndpointGenerator, TextRequest
from lightning_interp.generation.batch_files import export_requests, import_completions, read_answers

REQUESTS = [TextRequest.chat(f"text {i}", max_new_tokens=9) for i in range(5)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(requests, path, make=echo):
    """What a batch service makes of requests, in another order."""
    rows = [
        {"custom_id": one["custom_id"], "response": {"status_code": 200, "body": make(one["body"])}, "error": None}
        for one in lines(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return path


def test_requests_go_out_and_texts_come_back(tmp_path):
    writer, store = EndpointGenerator("m"), CompletionStore(tmp_path / "store")
    (file,) = export_requests(writer, REQUESTS, store, tmp_path / "q.jsonl")
    assert [row["body"] for row in lines(file)] == [writer.body(one) for one in REQUESTS]
    assert {row["url"] for row in lines(file)} == {"/v1/chat/completions"}
    answers = answered(file, tmp_path / "a.jsonl")
    assert import_completions(writer, REQUESTS, store, answers) == 5
    assert import_completions(writer, REQUESTS, store, answers) == 0
    found = CompletionStore(tmp_path / "store").completions(writer, REQUESTS)
    assert [one.text for one in found] == [f"TEXT {i}" for i in range(5)]
    assert export_requests(writer, REQUESTS, store, tmp_path / "r.jsonl") == []
    more = [*REQUESTS, TextRequest(prompt="raw")]
    (file,) = export_requests(writer, more, store, tmp_path / "r.jsonl")
    assert [(row["url"], row["body"]["prompt"]) for row in lines(file)] == [("/v1/completions", "raw")]


def test_answers_to_something_else(tmp_path):
    writer, store = EndpointGenerator("m"), CompletionStore(tmp_path / "store")
    (file,) = export_requests(writer, REQUESTS, store, tmp_path / "q.jsonl")
    answers = answered(file, tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"4 of 5 answers belong to none of the requests, such as '[0-9a-f]{64}'"):
        import_completions(writer, REQUESTS[:1], store, answers)
    other = answered(file, tmp_path / "b.jsonl", lambda body: completion("x"))
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: custom_id '[0-9a-f]{64}' has another answer in another"):
        read_answers(answers, other)
    both = tmp_path / "both.jsonl"
    both.write_text(answers.read_text() + other.read_text())
    with pytest.raises(DataError, match=r"both\.jsonl, line 6: custom_id '[0-9a-f]{64}' has another answer above"):
        read_answers(both)
    assert len(read_answers(answers, answers)) == 5


def test_files_are_split(tmp_path):
    writer, store = EndpointGenerator("m"), CompletionStore(tmp_path / "store")
    files = export_requests(writer, REQUESTS, store, tmp_path / "q.jsonl", max_requests=2)
    assert [(file.name, len(lines(file))) for file in files] == [("q.jsonl", 2), ("q-2.jsonl", 2), ("q-3.jsonl", 1)]
    with pytest.raises(RecipeError, match=r"max_bytes=9: the longest line has [0-9]+ bytes"):
        export_requests(writer, REQUESTS, store, tmp_path / "q.jsonl", max_bytes=9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 1: no valid JSON"),
        ('{"custom_id": "1"}', r"a\.jsonl, line 1: the keys are custom_id and custom_id is '1'; expected"),
        ('{"response": {}}', r"a\.jsonl, line 1: the keys are response and custom_id is None; expected"),
        ('{"custom_id": 1, "error": null}', r"custom_id is 1; expected"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "a.jsonl")


@pytest.mark.parametrize("response", ["text", {"status_code": 200}, {"status_code": 200, "body": "x"}, None])
def test_an_answer_without_a_body_is_an_error(tmp_path, response):
    (tmp_path / "a.jsonl").write_text(json.dumps({"custom_id": "1", "response": response, "error": None}) + "\n")
    assert read_answers(tmp_path / "a.jsonl")["1"].status == "failed"


def test_no_status_is_a_good_one(tmp_path):
    line = {"custom_id": "1", "response": {"body": completion("fine")}}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    assert read_answers(tmp_path / "a.jsonl") == {"1": Completion(text="fine", tokens_in=7, tokens_out=5)}
