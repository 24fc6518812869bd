from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from rewriting import ATTR, store_of

from lightning_interp.errors import InterpError, RecipeError
from lightning_interp.generation.endpoint import parse_answer
from lightning_interp.generation.pacing import Backoff
from lightning_interp.generation.work import Prices
from lightning_interp.rate.rewriting.chat_rewriters import OpenAICompatibleRewriter
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.export import export_records
from lightning_interp.rate.rewriting.records import as_result
from lightning_interp.rate.rewriting.rewriters import rewriter_id
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.rewriting.templates import RewriteTemplate, rewrite_template

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from served import completion, echo, serving

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the extra [endpoint] is not installed")

PLAIN = RewriteTemplate(name="plain", version=1, body="{phrase}: {text}", phrases=("no", "yes"))


class Time:
    """A clock that only waiting moves forward."""

    def __init__(self):
        self.now, self.waits = 0.0, []
        self._lock = threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self._lock:
            self.waits.append(seconds)
            self.now += seconds


def rewriter_of(served, *, clock=None, template=PLAIN, **options):
    clock = clock or Time()
    options = {"backoff": Backoff(first=1.0, most=60.0), "sleep": clock.sleep, "clock": clock, **options}
    return OpenAICompatibleRewriter("m", template, base_url=served.url, **options)


def ask(rewriter, *texts, target=1, **more):
    return rewriter.rewrite(list(texts), [""] * len(texts), [target] * len(texts), **more)


class TestAnswers:
    def test_a_good_one(self):
        with serving() as served:
            (result,) = ask(rewriter_of(served), "a film")
        assert (result.text, result.status, result.error) == ("YES: A FILM", "ok", None)
        assert (result.tokens_in, result.tokens_out) == (7, 5)
        assert served.bodies == [
            {"model": "m", "messages": [{"role": "user", "content": "yes: a film"}], "temperature": 0.7}
        ]

    def test_many_come_back_in_their_order(self):
        with serving(hold=lambda: time.sleep(0.002)) as served:
            results = ask(rewriter_of(served), *(f"text {i}" for i in range(12)), target=0)
        assert [result.text for result in results] == [f"NO: TEXT {i}" for i in range(12)]
        assert len(served.bodies) == 12

    def test_every_setting_is_sent(self):
        options = {"temperature": 0.2, "max_tokens": 9, "system_prompt": "Be brief.", "extra": {"top_k": 4, "top_p": 1}}
        with serving() as served:
            ask(rewriter_of(served, seed=3, **options), "a", "b")
        (body, other) = sorted(served.bodies, key=lambda body: body["messages"][-1]["content"])
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert {key: body[key] for key in ("temperature", "max_tokens", "top_k", "top_p")} == {
            "temperature": 0.2, "max_tokens": 9, "top_k": 4, "top_p": 1,
        }  # fmt: skip
        assert body["seed"] != other["seed"]
        assert 0 <= body["seed"] < 2**31

    def test_the_seed_belongs_to_text_prompt_target_and_draw(self):
        rewriter = OpenAICompatibleRewriter("m", PLAIN, base_url="http://x", seed=0)
        other = OpenAICompatibleRewriter("m", PLAIN, base_url="http://x", seed=1)
        ways = [{}, {"prompt": "p"}, {"w_target": 0}, {"draw": 1}]
        seeds = [rewriter.body("a", **{"w_target": 1, **way})["seed"] for way in ways]
        seeds += [rewriter.body("b", w_target=1)["seed"], other.body("a", w_target=1)["seed"]]
        assert len(set(seeds)) == 6
        assert rewriter.body("a", w_target=1)["seed"] == seeds[0]
        assert "seed" not in OpenAICompatibleRewriter("m", PLAIN, base_url="http://x").body("a", w_target=1)

    @pytest.mark.parametrize(
        ("body", "status", "text", "error"),
        [
            (completion("  a \n"), "ok", "a", None),
            (completion(None), "empty", "", None),
            (completion("   "), "empty", "", None),
            (completion("cut o", reason="length"), "truncated", "cut o", "ran into the limit of tokens"),
            (completion("x", reason="content_filter"), "refused", "x", "content_filter"),
            (completion(None, refusal="I will not."), "refused", None, "I will not."),
            ({"choices": []}, "error", None, "an answer without choices: {'choices': []}"),
            ({"detail": "odd"}, "error", None, "an answer without choices: {'detail': 'odd'}"),
            ([1], "error", None, r"an answer without choices: [1]"),
            ({"choices": [{"message": None}]}, "empty", "", None),
        ],
    )
    def test_other_ones(self, body, status, text, error):
        result = as_result(parse_answer(body))
        assert (result.status, result.text, result.error) == (status, text, error)
        with serving(answer=lambda _: body) as served:
            assert ask(rewriter_of(served), "a") == [result]


class TestFailures:
    @pytest.mark.parametrize("trouble", [429, 500, 502, 503, "drop", "half", "garbage"])
    def test_what_may_pass_is_tried_again(self, trouble):
        clock = Time()
        with serving(script=[trouble, trouble]) as served:
            (result,) = ask(rewriter_of(served, clock=clock), "a")
        assert result.text == "YES: A"
        assert len(served.bodies) == 3
        assert len(clock.waits) == 2
        assert clock.waits[0] <= 1
        assert clock.waits[1] <= 2

    @pytest.mark.parametrize("trouble", [429, 500, "half"])
    def test_six_further_attempts_and_then_an_error(self, trouble):
        clock = Time()
        with serving(script=[trouble] * 20) as served:
            (result,) = ask(rewriter_of(served, clock=clock), "a")
        assert (result.status, result.text) == ("error", None)
        assert result.error.startswith("7 attempts: ")
        assert len(served.bodies) == 7
        assert len(clock.waits) == 6
        assert all(wait <= 2**attempt for attempt, wait in enumerate(clock.waits))

    def test_the_server_says_how_long_to_wait(self):
        clock = Time()
        script = [(429, {"Retry-After": "17"}), (503, {"retry-after-ms": "30500"}), (429, {"Retry-After": "soon"})]
        with serving(script=script) as served:
            ask(rewriter_of(served, clock=clock), "a")
        assert clock.waits[:2] == [17.0, 30.5]
        assert clock.waits[2] <= 4

    @pytest.mark.parametrize("status", [400, 408, 409, 413, 422])
    def test_other_refusals_belong_to_the_text(self, status):
        clock = Time()
        with serving(script=[status]) as served:
            first, second = ask(rewriter_of(served, clock=clock, max_concurrency=1), "a", "b")
        assert (first.status, first.text) == ("error", None)
        assert first.error.startswith(f"{status}: ")
        assert second.text == "YES: B"
        assert len(served.bodies) == 2
        assert clock.waits == []

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_a_wrong_key_or_model_ends_the_run(self, tmp_path, monkeypatch, status):
        monkeypatch.setenv("MY_KEY", "sk-secret")
        with serving(script=[status] * 99) as served:
            rewriter = rewriter_of(served, api_key_env="MY_KEY", max_concurrency=2)
            with pytest.raises(
                RecipeError, match=rf"'http://127.*' refuses model 'm' \({status}: .*Check the key in \$MY_KEY"
            ) as caught:
                RewriteRun(store_of(tmp_path, 20), rewriter, attr=ATTR).run()
        assert len(served.bodies) <= 4
        assert "sk-secret" not in str(caught.value)
        assert RewriteStore.open(tmp_path).records() == []

    def test_nobody_listens(self):
        with serving() as served:
            pass
        (result,) = ask(rewriter_of(served, max_retries=1), "a")
        assert result.status == "error"
        assert "APIConnectionError" in result.error

    def test_a_server_that_is_too_slow(self):
        done = threading.Event()
        with serving(hold=lambda: done.wait(5)) as served:
            (result,) = ask(rewriter_of(served, timeout=0.05, max_retries=1), "a")
            done.set()
        assert "2 attempts: APITimeoutError" in result.error

    def test_the_key_comes_from_the_environment_and_goes_nowhere_else(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with serving(script=[400, 500, 500], answer=lambda body: completion("sk-public")) as served:
            rewriter = rewriter_of(served, max_retries=1, max_concurrency=1)
            RewriteRun(store_of(tmp_path, 4), rewriter, attr=ATTR).run()
        assert {headers["authorization"] for headers in served.headers} == {"Bearer sk-secret"}
        assert "sk-secret" not in json.dumps(rewriter.params)
        written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"status 400, key ***" in written
        assert b"status 500, key ***" in written
        assert b"sk-secret" not in written

    def test_no_key(self, monkeypatch):
        monkeypatch.delenv("MY_KEY", raising=False)
        rewriter = OpenAICompatibleRewriter("m", PLAIN, api_key_env="MY_KEY")
        with pytest.raises(RecipeError, match="environment variable MY_KEY is not set"):
            ask(rewriter, "a")
        with serving() as served:
            ask(rewriter_of(served, api_key_env="MY_KEY"), "a")
        assert served.headers[0]["authorization"] == "Bearer none"

    def test_no_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(RecipeError, match=r"needs the package openai.*pip install 'lightning-interp\[endpoint\]'"):
            ask(OpenAICompatibleRewriter("m", PLAIN, base_url="http://127.0.0.1:1/v1"), "a")

    def test_a_stop_ends_the_waiting(self):
        with serving(script=[500] * 20) as served:
            rewriter = OpenAICompatibleRewriter(
                "m", PLAIN, base_url=served.url, backoff=Backoff(first=1e4, most=1e4, seed=1)
            )
            threading.Timer(0.2, rewriter.stop).start()
            with pytest.raises(InterpError, match="The run was stopped while 'openai:m' waited"):
                ask(rewriter, "a")
            served.script.clear()
            assert ask(rewriter, "a")[0].text == "YES: A"  # the next run is not stopped

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1}, "temperature=-1; expected at least 0"),
            ({"max_concurrency": 0}, "max_concurrency=0; expected at least 1"),
            ({"max_retries": -1}, "max_retries=-1; expected at least 0"),
            ({"timeout": 0}, "timeout=0; expected seconds"),
            ({"requests_per_minute": 0}, "A limit of 0 a minute allows nothing"),
            ({"tokens_per_minute": -5}, "A limit of -5 a minute allows nothing"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(RecipeError, match=message):
            OpenAICompatibleRewriter("m", PLAIN, **options)


class TestLimits:
    @pytest.mark.parametrize("most", [1, 4])
    def test_calls_at_the_same_time(self, most):
        with serving(hold=lambda: time.sleep(0.05)) as served:
            ask(rewriter_of(served, max_concurrency=most), *(f"t{i}" for i in range(8)))
        assert served.most_at_once == most

    def test_calls_of_several_threads_share_the_limit(self):
        with serving(hold=lambda: time.sleep(0.005)) as served:
            rewriter = rewriter_of(served, max_concurrency=2)
            threads = [threading.Thread(target=ask, args=(rewriter, "a", "b", "c", "d")) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(served.bodies) == 16
        assert served.most_at_once <= 2

    def test_calls_a_minute(self):
        clock, times = Time(), []
        with serving(hold=lambda: times.append(clock.now)) as served:
            rewriter = rewriter_of(served, clock=clock, requests_per_minute=30, max_concurrency=1)
            ask(rewriter, *(f"t{i}" for i in range(20)))
        assert all(abs((b - a) - 2.0) < 1e-9 for a, b in pairwise(times))

    def test_tokens_a_minute(self):
        """One call is estimated at 24 tokens; the answers say 12, so the rest is given back."""
        clock, times = Time(), []
        text = "x" * 35  # with the phrase 40 characters, 10 tokens, 8 for the message; 9 written
        with serving(hold=lambda: times.append(clock.now)) as served:
            rewriter = rewriter_of(served, clock=clock, tokens_per_minute=60, max_concurrency=1)
            assert rewriter.estimate_tokens(text, "", 1) == (18, 9)
            ask(rewriter, *[text] * 25)
        assert len(served.bodies) == 25
        assert clock.now == pytest.approx(12 * 24, rel=0.05)  # 12 tokens a call at one a second

    def test_failed_attempts_count_too(self):
        clock = Time()
        with serving(script=[429] * 3) as served:
            ask(rewriter_of(served, clock=clock, requests_per_minute=1, backoff=Backoff(first=0, most=0)), "a")
        assert clock.now == pytest.approx(180)


class TestInARun:
    def test_dropped_connections_and_limits_leave_no_trace(self, tmp_path):
        """Every text is answered once, whatever goes wrong on the way; the store is that of a calm run."""
        kinds = [429, "half", "drop", (503, {"Retry-After": "3"}), "garbage", 500]
        seen = Counter()

        def trouble(body):
            text = body["messages"][-1]["content"]
            seen[text] += 1
            return kinds[(len(text) + ord(text[-1]) + seen[text]) % 6] if seen[text] < 5 else None

        with serving() as served:
            calm = store_of(tmp_path / "calm", 6)
            RewriteRun(calm, rewriter_of(served), attr=ATTR).run()
            served.script = trouble
            store = store_of(tmp_path / "wild", 6)
            report = RewriteRun(store, rewriter_of(served, max_concurrency=4), attr=ATTR).run()
        assert set(seen.values()) == {5}
        assert report.statuses == {"ok": 12}
        exported = [export_records(one, one.folder / "export.jsonl").read_bytes() for one in (calm, store)]
        assert exported[0] == exported[1]
        assert len(store.triples(ATTR)) == 6

    def test_an_interrupted_run_asks_for_no_text_twice(self, tmp_path):
        """The server goes away in the middle; what it had answered is not asked for again."""
        store = store_of(tmp_path, 12)

        def answer(body):
            answered.append(body["messages"][-1]["content"])
            return echo(body)

        answered = []
        with serving(answer=answer, script=lambda body: "drop" if len(answered) >= 9 else None) as served:
            run = RewriteRun(store, rewriter_of(served, max_retries=1, max_concurrency=3), attr=ATTR, give_up_after=5)
            with pytest.warns(UserWarning, match="ended after 5 errors in a row"):
                assert run.run().stopped == "errors"
            assert 9 <= len(answered) < 12
            served.script = []
            assert run.run().complete
        assert set(Counter(answered).values()) == {1}
        assert len(answered) == 24
        assert len(store.triples(ATTR)) == 12

    def test_pass_two_of_a_unit_does_not_wait_for_pass_one_of_others(self, tmp_path):
        order = []

        def answer(body):
            order.append(body["messages"][-1]["content"])
            return echo(body)

        with serving(answer=answer) as served:
            RewriteRun(store_of(tmp_path, 6), rewriter_of(served, max_concurrency=1), attr=ATTR).run()
        assert order[1] == "no: YES: TEXT 0"

    def test_cost_is_kept(self, tmp_path):
        with serving(
            answer=lambda body: completion("fine " + body["messages"][-1]["content"], usage=(15, 5))
        ) as served:
            rewriter = rewriter_of(served, max_concurrency=1)
            run = RewriteRun(store_of(tmp_path, 12), rewriter, attr=ATTR, prices=Prices(1e6, 1e6), max_cost=100)
            report = run.run()
        assert report.stopped == "max_cost"
        assert report.cost <= 100
        assert report.cost == 20 * report.calls
        assert len(served.bodies) == report.calls >= 3


class TestIdentity:
    def of(self, model="m", template=PLAIN, **options):
        return rewriter_id(OpenAICompatibleRewriter(model, template, **{"seed": 0, **options}))

    def test_what_changes_the_texts_changes_it(self):
        options = [
            {}, {"model": "n"}, {"temperature": 0.5}, {"max_tokens": 5}, {"seed": 1}, {"system_prompt": ""},
            {"extra": {"top_p": 0.5}}, {"name": "other"},
            {"template": RewriteTemplate(name="plain", version=2, body="{phrase}: {text}", phrases=("no", "yes"))},
        ]  # fmt: skip
        assert len({self.of(**one) for one in options}) == len(options)

    def test_what_does_not_does_not(self):
        options = [
            {}, {"base_url": "http://elsewhere/v1"}, {"max_concurrency": 1}, {"requests_per_minute": 3},
            {"timeout": 1}, {"api_key_env": "OTHER"}, {"max_retries": 0},
        ]  # fmt: skip
        assert len({self.of(**one) for one in options}) == 1

    def test_it_knows_whether_length_may_change(self):
        assert OpenAICompatibleRewriter("m", rewrite_template("length")).changes_length
        assert not OpenAICompatibleRewriter("m", rewrite_template("sentiment")).changes_length
