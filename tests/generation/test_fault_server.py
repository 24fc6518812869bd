"""A server with every fault, and runs that are killed in the middle: what was paid for is kept, and asked for once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

import pytest
from served import Bad, completion, serving

from lightning_interp.core.storage.files import digest
from lightning_interp.generation.completion_store import CompletionStore, write_all
from lightning_interp.generation.endpoint import EndpointGenerator
from lightning_interp.generation.keyed_store import KeyedWriter
from lightning_interp.generation.pacing import LONGEST_WAIT, Backoff, Pace
from lightning_interp.generation.requests import TextRequest, completion_key

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the extra [endpoint] is not installed")

AT_ONCE, COUNT = 8, 200
REQUESTS = [TextRequest.chat(f"text {number}", key=("n", number)) for number in range(COUNT)]


class KilledError(BaseException):
    """Stands for a kill: nothing may catch it."""


def writer_of(served, *, waits=None, **more):
    wait = (lambda seconds: None) if waits is None else waits.append
    pace = {"max_concurrency": AT_ONCE, "sleep": wait, "backoff": Backoff(first=0, most=0), **more}
    return EndpointGenerator("m", base_url=served.url, pace=Pace(**pace))


def check(bad, folder, writer, lost, count=COUNT):
    """Everything is there and right, and asked for no more often than answers were lost."""
    store = CompletionStore(folder)
    for request in REQUESTS[:count]:
        found = store.find(completion_key(digest(writer.identity()), request))
        assert (found.status, found.text) == ("complete", f"answer to {request.messages[-1]['content']}")
    assert len(bad.paid) == count
    assert sum(bad.paid.values()) - count == lost


@pytest.mark.parametrize("count", [50, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_two_kills_among_all_faults(tmp_path, monkeypatch, count):
    bad, append, left = Bad(), KeyedWriter.append, [0]

    def dying(self, items):
        append(self, items)
        left[0] -= len(items)
        if left[0] <= 0:
            raise KilledError

    with serving(script=bad) as served, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of long waits
        writer, lost = writer_of(served), 0
        monkeypatch.setattr(KeyedWriter, "append", dying)
        for _ in range(2):
            left[0] = count // 3
            with pytest.raises(KilledError):
                write_all(writer, REQUESTS[:count], CompletionStore(tmp_path))
            there = sum(not one.failed for _, _, one in CompletionStore(tmp_path).rows())
            lost, before = sum(bad.paid.values()) - there, lost
            assert lost - before <= AT_ONCE
        monkeypatch.setattr(KeyedWriter, "append", append)
        for _ in range(9):
            if write_all(writer, REQUESTS[:count], CompletionStore(tmp_path)).complete:
                break
        check(bad, tmp_path, writer, lost, count)


PROGRAM = """
import sys
from lightning_interp.generation.completion_store import CompletionStore, write_all
from lightning_interp.generation.endpoint import EndpointGenerator
from lightning_interp.generation.pacing import Backoff, Pace
from lightning_interp.generation.requests import TextRequest
pace = Pace(max_concurrency=8, sleep=lambda seconds: None, backoff=Backoff(first=0, most=0))
requests = [TextRequest.chat(f"text {number}", key=("n", number)) for number in range(200)]
write_all(EndpointGenerator("m", base_url=sys.argv[1], pace=pace), requests, CompletionStore(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_kills_of_a_process(tmp_path):
    bad = Bad()
    with serving(script=bad) as served:
        lost = 0
        for stop_at in (70, 140):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, served.url, str(tmp_path)], stderr=subprocess.PIPE, env=os.environ
            )
            while sum(bad.paid.values()) < stop_at:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.2)  # the server's threads end
            there = sum(not one.failed for _, _, one in CompletionStore(tmp_path).rows())
            lost, before = sum(bad.paid.values()) - there, lost
            assert lost - before <= AT_ONCE
        writer = writer_of(served)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while not write_all(writer, REQUESTS, CompletionStore(tmp_path)).complete:
                pass
        check(bad, tmp_path, writer, lost)


@pytest.mark.parametrize("asked", ["inf", "1e12", "86400", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_no_server_is_waited_for_without_end(asked):
    waits = []
    with serving(script=[(429, {"Retry-After": asked})]) as served:
        writer = writer_of(served, waits=waits)
        with pytest.warns(UserWarning, match=r"asks to be left alone for .* seconds; it is called again after 600"):
            (found,) = writer.generate(REQUESTS[:1])
    assert found.text == "TEXT 0"
    assert waits == [LONGEST_WAIT]


@pytest.mark.parametrize("asked", ["nan", "-1", "soon", "Fri, 99 Dec 2026", "600"])
def test_other_times_are_taken_as_they_are(asked):
    waits = []
    with serving(script=[(429, {"Retry-After": asked})]) as served:
        writer_of(served, waits=waits).generate(REQUESTS[:1])
    assert waits == ([600.0] if asked == "600" else [])


def test_counts_that_lie_do_not_stop_the_run():
    waits = []
    with serving(answer=lambda body: completion("a", usage=(9_999_999_999_999, 5))) as served:
        writer_of(served, waits=waits, tokens_per_minute=60_000).generate(REQUESTS[:20])
    assert sum(waits) < 60


def test_a_request_that_cannot_be_sent_is_not():
    with serving() as served:
        (found,) = writer_of(served).generate([TextRequest.chat("a \ud83d")])
    assert (found.status, found.error) == ("failed", "the request holds half of a character; not sent")
    assert served.bodies == []


def test_an_answer_nested_too_deeply():
    deep = b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with serving(script=[deep]) as served:
        (found,) = writer_of(served).generate(REQUESTS[:1])
    assert (found.status, found.error) == ("failed", "an answer nested too deeply")


@pytest.mark.parametrize(
    "told", [None, {}, [], {"content": []}, {"content": [{}]}, {"content": [{"top_logprobs": [{"token": "1"}]}]},
             {"content": [{"top_logprobs": [{"token": "1", "logprob": "x"}]}]},
             {"content": [{"top_logprobs": [{"token": "1", "logprob": 1e9}]}]}],
)  # fmt: skip
def test_probabilities_that_are_none(told):
    body = completion("1")
    body["choices"][0]["logprobs"] = told
    with serving(answer=lambda _: body) as served:
        assert writer_of(served).next_token_probs(REQUESTS[:1], ["1", "2"]).isnan().all()
