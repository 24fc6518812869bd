from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rewriting import ATTR, Counting, store_of

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.work import Prices
from lightning_interp.rate.rewriting.chat_rewriters import OpenAICompatibleRewriter
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.export import export_batch, import_batch
from lightning_interp.rate.rewriting.templates import RewriteTemplate

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from served import completion

PLAIN = RewriteTemplate(name="plain", version=1, body="{phrase}: {text}", phrases=("no", "yes"))


def run_of(folder, n=6, **options):
    return RewriteRun(store_of(folder, n), OpenAICompatibleRewriter("m", PLAIN, seed=1), attr=ATTR, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(request, **body):
    """What a batch service makes of a request."""
    text = request["body"]["messages"][-1]["content"].upper()
    response = {"status_code": 200, "request_id": "r", "body": completion(text, **body)}
    return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}


def answered(requests, path, make=answer):
    path.write_text("".join(json.dumps(make(request)) + "\n" for request in reversed(lines(requests))))
    return path


def test_two_passes_of_batches_make_complete_units(tmp_path):
    run = run_of(tmp_path / "s")
    for number in (1, 2):
        (requests,) = export_batch(run, tmp_path / f"pass{number}.jsonl")
        assert len(lines(requests)) == 6
        report = import_batch(run, answered(requests, tmp_path / f"answers{number}.jsonl"))
        assert (report.calls, report.statuses) == (6, {"ok": 6})
        assert report.missing == (6 if number == 1 else 0)
    assert export_batch(run, tmp_path / "pass3.jsonl") == []
    assert not (tmp_path / "pass3.jsonl").exists()
    triples = run.store.triples(ATTR)
    assert triples.rewrite2[:2] == ["NO: YES: TEXT 0", "YES: NO: TEXT 1"]


def test_a_request_is_what_the_endpoint_would_be_sent(tmp_path):
    run = run_of(tmp_path / "s", 1)
    (requests,) = export_batch(run, tmp_path / "q.jsonl")
    (line,) = lines(requests)
    (request,) = run.pending()
    assert line == {
        "custom_id": request.key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": run.rewriter.body("text 0", w_target=1, prompt="prompt 0"),
    }


def test_files_are_split_by_lines_and_by_size(tmp_path):
    run = run_of(tmp_path / "s", 7)
    files = export_batch(run, tmp_path / "q.jsonl", max_requests=3)
    assert [file.name for file in files] == ["q.jsonl", "q-2.jsonl", "q-3.jsonl"]
    assert [len(lines(file)) for file in files] == [3, 3, 1]
    size = max(len(line) for file in files for line in file.read_bytes().splitlines(keepends=True))
    assert [len(lines(file)) for file in export_batch(run, tmp_path / "r.jsonl", max_bytes=2 * size)] == [2, 2, 2, 1]
    report = import_batch(run, *(answered(file, tmp_path / f"a-{file.name}") for file in files))
    assert report.calls == 7


def test_a_budget_holds(tmp_path):
    (requests,) = export_batch(run_of(tmp_path / "s", max_calls=2), tmp_path / "q.jsonl")
    assert len(lines(requests)) == 2
    prices = Prices(1e6, 1e6)
    calls = run_of(tmp_path / "s", prices=prices)
    one = prices.cost(*calls.rewriter.estimate_tokens("text 0", "", 1))
    (requests,) = export_batch(run_of(tmp_path / "s", prices=prices, max_cost=3.5 * one), tmp_path / "r.jsonl")
    assert len(lines(requests)) == 3
    assert export_batch(run_of(tmp_path / "s", prices=prices, max_cost=0.5 * one), tmp_path / "n.jsonl") == []


def test_missing_and_failed_answers_are_in_the_next_batch(tmp_path):
    run = run_of(tmp_path / "s")
    (requests,) = export_batch(run, tmp_path / "q.jsonl")
    made = [answer(request) for request in lines(requests)]
    made[0]["response"]["status_code"] = 500
    made[1] = {"custom_id": made[1]["custom_id"], "response": None, "error": {"code": "batch_expired"}}
    made[3]["response"]["body"] = completion(None, refusal="No.")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (made[0], *made[3:])))
    (tmp_path / "e.jsonl").write_text(json.dumps(made[1]) + "\n")
    report = import_batch(run, tmp_path / "a.jsonl", tmp_path / "e.jsonl")
    assert report.statuses == {"error": 2, "ok": 2, "refused": 1}
    assert "batch_expired" in "".join(str(record.result.error) for record in run.store.records())
    again = [line["custom_id"] for line in lines(export_batch(run, tmp_path / "q2.jsonl")[0])]
    assert again[:3] == [one["custom_id"] for one in made[:3]]
    assert len(again) == 5  # three once more, and the second pass of two; what was refused is final


def test_reading_a_file_twice_changes_nothing(tmp_path):
    run = run_of(tmp_path / "s")
    (requests,) = export_batch(run, tmp_path / "q.jsonl")
    answers = answered(requests, tmp_path / "a.jsonl")
    import_batch(run, answers)
    before = (tmp_path / "s" / "rewrites.jsonl").read_bytes()
    assert import_batch(run, answers).calls == 0
    assert import_batch(run, answers, answers).calls == 0
    assert (tmp_path / "s" / "rewrites.jsonl").read_bytes() == before


def test_answers_of_another_run_are_refused(tmp_path):
    (requests,) = export_batch(run_of(tmp_path / "s"), tmp_path / "q.jsonl")
    answers = answered(requests, tmp_path / "a.jsonl")
    other = OpenAICompatibleRewriter("m", PLAIN, seed=2)
    run = RewriteRun(store_of(tmp_path / "s"), other, attr=ATTR)
    with pytest.raises(DataError, match=r"6 of 6 answers belong to none of the requests, such as '[0-9a-f]{64}'"):
        import_batch(run, answers)
    assert run.store.records() == []


def test_two_answers_to_one_request_are_refused(tmp_path):
    run = run_of(tmp_path / "s", 1)
    (requests,) = export_batch(run, tmp_path / "q.jsonl")
    one = answered(requests, tmp_path / "a.jsonl")
    two = answered(
        requests, tmp_path / "b.jsonl", lambda request: answer({**request, "body": {"messages": [{"content": "x"}]}})
    )
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: custom_id '[0-9a-f]{64}' has another answer in another f"):
        import_batch(run, one, two)


def test_a_rewriter_without_requests_is_refused(tmp_path):
    run = RewriteRun(store_of(tmp_path / "s"), Counting(), attr=ATTR)
    with pytest.raises(RecipeError, match=r"Rewriter 'counting' \(Counting\) makes no requests"):
        export_batch(run, tmp_path / "q.jsonl")


@pytest.mark.parametrize("limits", [{"max_requests": 0}, {"max_bytes": 100}])
def test_a_limit_below_one_line_is_refused(tmp_path, limits):
    name, value = next(iter(limits.items()))
    with pytest.raises(RecipeError, match=rf"{name}={value}.*the longest line has [0-9]+ bytes"):
        export_batch(run_of(tmp_path / "s"), tmp_path / "q.jsonl", **limits)
