"""An endpoint as a writer of texts; how it waits, retries and fails is tested with the rewriter that stands on it."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
from served import completion, serving

from lightning_interp.errors import RecipeError
from lightning_interp.generation import CompletionStore, EndpointGenerator, Pace, TextRequest, write_all

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the extra [endpoint] is not installed")

REQUESTS = [TextRequest.chat(f"text {i}") for i in range(12)]


def writer_of(served, **options):
    return EndpointGenerator("m", base_url=served.url, **{"pace": Pace(sleep=lambda seconds: None), **options})


def test_everything_that_is_asked_is_sent():
    request = TextRequest.chat(
        "Hi", system="", temperature=0.2, top_p=0.9, stop=["\n", "."], max_new_tokens=9, seed=3
    )  # fmt: skip
    with serving() as served:
        (found,) = writer_of(served, extra={"top_k": 4}).generate([request])
    assert served.bodies == [
        {
            "model": "m", "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
            "temperature": 0.2, "top_p": 0.9, "stop": ["\n", "."], "max_tokens": 9, "top_k": 4,
            "seed": request.row_seed >> 32,
        }
    ]  # fmt: skip
    assert (found.text, found.status, found.tokens_in, found.tokens_out) == ("HI", "complete", 7, 5)
    assert found.request == request.digest
    body = EndpointGenerator("m", send_seed=False).body(TextRequest.chat("Hi", max_new_tokens=None))
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0}


def test_a_raw_prompt_is_completed():
    def answer(body):
        return {"choices": [{"text": f"{body['prompt']}!", "finish_reason": "length"}], "usage": {"prompt_tokens": 2}}

    with serving(answer=answer) as served:
        found = writer_of(served).generate([TextRequest(prompt="raw"), TextRequest(prompt=[5, 6])])
    assert [(one.text, one.status, one.tokens_in) for one in found] == [
        ("raw!", "truncated", 2), ("[5, 6]!", "truncated", 2)
    ]  # fmt: skip


def test_refusals_and_failures_are_told_apart():
    def answer(body):
        text = body["messages"][-1]["content"]
        return completion(None, refusal="No.") if text == "text 0" else completion("x", reason="content_filter")

    with serving(answer=answer, script=lambda body: 400 if body["messages"][-1]["content"] == "text 2" else None) as s:
        found = writer_of(s).generate(REQUESTS[:3])
    assert [one.status for one in found] == ["refused", "refused", "failed"]
    assert [one.error for one in found[:2]] == ["No.", "content_filter"]


def test_a_store_is_filled_by_several_calls_at_once(tmp_path):
    with serving(script=lambda body: 503 if len(served.bodies) % 3 == 0 else None) as served:
        store, writer = CompletionStore(tmp_path), writer_of(served)
        report = write_all(writer, REQUESTS, store)
        assert (report.calls, report.statuses, report.tokens_out) == (12, {"complete": 12}, 60)
        assert write_all(writer, REQUESTS, CompletionStore(tmp_path)).calls == 0
    assert [one.text for one in store.completions(writer, REQUESTS)] == [f"TEXT {i}" for i in range(12)]


def test_chances_of_the_first_token():
    def answer(body):
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
        likely = [("7", 0.5), (" 8", 0.25), ("8", 0.125), ("no", 0.1)]
        rows = [{"token": token, "logprob": math.log(p)} for token, p in likely]
        told = {"content": [{"token": "7", "top_logprobs": rows}]}
        chosen = completion("7")
        if body["messages"][-1]["content"] == "text 0":
            chosen["choices"][0]["logprobs"] = told
        return chosen

    with serving(answer=answer, script=lambda body: 400 if "2" in body["messages"][-1]["content"] else None) as served:
        found = writer_of(served).next_token_probs(REQUESTS[:3], ["7", "8", "9"])
    assert found[0].tolist() == pytest.approx([0.5, 0.375, 0.0])
    assert found[1:].isnan().all()  # one that tells nothing, and a failure


def test_answers_with_their_likeliest_first_tokens():
    def answer(body):
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (256, True, 20)
        rows = [{"token": " 70", "logprob": math.log(0.75)}, {"token": "no", "logprob": math.log(0.25)}]
        chosen = completion("70")
        if body["messages"][-1]["content"] == "text 0":
            chosen["choices"][0]["logprobs"] = {"content": [{"token": " 70", "top_logprobs": rows}]}
        return chosen

    with serving(answer=answer, script=lambda body: 400 if "2" in body["messages"][-1]["content"] else None) as served:
        found = writer_of(served).first_tokens(REQUESTS[:3])
    assert [(one.text, one.status) for one, _ in found] == [("70", "complete")] * 2 + [(None, "failed")]
    assert [one.request for one, _ in found] == [request.digest for request in REQUESTS[:3]]
    assert [likely for _, likely in found] == [[(" 70", pytest.approx(0.75)), ("no", pytest.approx(0.25))], [], []]


def test_identity():
    ways = [{}, {"name": "b"}, {"extra": {"a": 1}}, {"send_seed": False}]
    assert len({str(EndpointGenerator("m", **way).identity()) for way in ways}) == len(ways)
    paced = EndpointGenerator("m", base_url="http://x", pace=replace(Pace(), max_concurrency=2))
    assert paced.identity() == EndpointGenerator("m").identity()
    assert paced.concurrency == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0; expected at least 1"),
        ({"max_retries": -1}, "max_retries=-1; expected at least 0"),
        ({"timeout": 0}, "timeout=0; expected seconds"),
    ],
)
def test_wrong_paces(options, message):
    with pytest.raises(RecipeError, match=message):
        Pace(**options)


class TestSecrets:
    KEY = "sk-secret-of-mine"

    @pytest.fixture(autouse=True)
    def _key(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", self.KEY)

    @pytest.mark.parametrize(
        "body",
        [
            completion(f"Your key is {KEY}."),
            completion(None, refusal=f"No, {KEY}."),
            {"error": f"odd: {KEY}"},
            {"choices": [], KEY: [KEY]},
            {"choices": [{"text": KEY, "finish_reason": KEY}]},
            [KEY],
        ],
        ids=["text", "refusal", "error", "no choices", "raw", "list"],
    )
    def test_a_key_that_an_answer_quotes_back_is_written_nowhere(self, tmp_path, body):
        with serving(answer=lambda asked: body) as served:
            write_all(writer_of(served), REQUESTS[:1], CompletionStore(tmp_path))
        assert served.headers[0]["authorization"] == f"Bearer {self.KEY}"
        written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert self.KEY.encode() not in written
        assert b"***" in written

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_an_endpoint_that_sends_on_to_another_host_gets_its_texts_nowhere(self, status):
        with serving() as other:
            location = {"Location": f"{other.url}/chat/completions"}
            with (
                serving(script=[(status, location)]) as served,
                pytest.raises(RecipeError, match="which gets no texts"),
            ):
                writer_of(served).generate(REQUESTS[:1])
            assert other.bodies == []

    def test_the_same_host_may_send_on(self):
        with serving(script=[(307, {"Location": "/v1/chat/completions/"})]) as served:
            assert writer_of(served).generate(REQUESTS[:1])[0].text == "TEXT 0"

    def test_addresses_and_settings_hold_no_secret(self):
        with pytest.raises(RecipeError, match="base_url holds a user, a password or a key"):
            EndpointGenerator("m", base_url="http://user:word@localhost/v1")
        with pytest.raises(RecipeError, match="extra holds a key or a password"):
            EndpointGenerator("m", extra={"api_key": "x"})
        with pytest.raises(RecipeError, match="api_key_env is no name"):
            EndpointGenerator("m", api_key_env="sk-secret-of-mine-and-long")
