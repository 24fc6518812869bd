from __future__ import annotations

import json
import warnings

import pytest
from rewriting import Counting

from lightning_interp.errors import DataError
from lightning_interp.rate.estimators.effects import rate_effects
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import RewriteResult, Unit
from lightning_interp.rate.rewriting.rewriters import ReplayRewriter
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.texts.readers import read_batch, read_effects, read_rewrites

STAGES = ("original", "rewrite", "rewritten rewrite")
ARMO = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
# Rewards that the authors print for two movie reviews.
PRINTED = {"12": (True, (0.09682, 0.08516, 0.09681)), "7": (False, (0.05350, 0.05375, 0.05139))}


def row(w, texts=("a fine film", "a bad film", "a good film"), question="Write a movie review.", **more):
    return {"w_original": w, "completions": dict(zip(STAGES, texts, strict=False)), "reward_question": question, **more}


def printed():
    return {
        name: row(
            w, (f"original {name}", f"rewrite {name}", f"rewritten {name}"), **{ARMO: dict(zip(STAGES, r, strict=True))}
        )
        for name, (w, r) in PRINTED.items()
    }


def write(path, content):
    if path.suffix == ".jsonl":
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestRewrites:
    def test_json_by_id(self, tmp_path):
        found = read_rewrites(write(tmp_path / "rewrites.json", {"12": row(True), "7": row(False, question=None)}))
        assert found.units == [
            Unit(id="12", text="a fine film", w=1, prompt="Write a movie review."),
            Unit(id="7", text="a fine film", w=0),
        ]
        assert found.texts == dict.fromkeys(("12", "7"), ("a bad film", "a good film"))
        assert found.rewards == {}
        triples = found.triples("sentiment")
        assert (triples.ids, triples.w, triples.original) == (["12", "7"], [1, 0], ["a fine film"] * 2)
        assert (triples.rewrite, triples.rewrite2) == (["a bad film"] * 2, ["a good film"] * 2)

    def test_scored_json(self, tmp_path):
        found = read_rewrites(write(tmp_path / "scored.json", printed()))
        triples = found.triples("sentiment")
        scores = found.scores(ARMO, triples)
        assert scores["original"] == [0.09682, 0.05350]
        assert scores["rewrite2"] == [0.09681, 0.05139]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = rate_effects(triples.w, scores["original"], scores["rewrite"], scores["rewrite2"], ids=triples.ids)
        assert result.rate.att.value == pytest.approx(0.09681 - 0.08516)
        assert result.rate.atu.value == pytest.approx(0.05375 - 0.05139)

    def test_scored_lines_without_ids(self, tmp_path):
        lines = [{**one, "ArmoRM": one.pop(ARMO)} for one in printed().values()]
        found = read_rewrites(write(tmp_path / "scored.jsonl", [lines[0], "", lines[1]]))
        assert [unit.id for unit in found.units] == ["1", "3"]
        assert found.scores("ArmoRM", found.triples("s"))["rewrite"] == [0.08516, 0.05375]

    def test_several_models_and_other_keys(self, tmp_path):
        scores = dict.fromkeys(STAGES, 1)
        content = {"a": row(1, A=scores, B=dict.fromkeys(STAGES, 2.5), note="x", meta={"k": 1}), "b": row(0, A=scores)}
        found = read_rewrites(write(tmp_path / "s.json", content))
        assert set(found.rewards) == {"A", "B"}
        triples = found.triples("s")
        assert found.scores("A", triples)["original"] == [1, 1]
        with pytest.raises(DataError, match=r"s\.json: 'B' has no reward of unit 'b' for original, rewrite, rewrite2"):
            found.scores("B", triples)
        with pytest.raises(DataError, match=r"s\.json has no rewards of 'C'; it has those of A, B"):
            found.scores("C", triples)

    def test_a_reward_that_is_missing_or_null(self, tmp_path):
        content = {"a": row(1, A={"original": 1.0, "rewrite": None}), "b": row(0)}
        found = read_rewrites(write(tmp_path / "s.json", content))
        for kind in (KeyError, DataError):
            with pytest.raises(kind, match="'A' has no reward of unit 'a' for rewrite, rewrite2"):
                found.scores("A", found.triples("s"))

    def test_rewards_that_are_not_finite_are_left_to_the_estimator(self, tmp_path):
        path = tmp_path / "s.json"
        write(path, json.dumps({"a": row(1, A=dict.fromkeys(STAGES, float("nan"))), "b": row(0)}))
        found = read_rewrites(path)
        assert str(found.rewards["A"]["a"]["original"]) == "nan"

    @pytest.mark.parametrize(
        ("texts", "reason"),
        [
            (("o",), "rewrite_absent"),
            (("o", "r"), "rewrite2_absent"),
            (("o", None, "rr"), "rewrite_absent"),
            (("o", "r", None), "rewrite2_absent"),
            (("o", "", "rr"), "rewrite_empty"),
            (("o", "r", " \n"), "rewrite2_empty"),
        ],
    )
    def test_a_missing_text(self, tmp_path, texts, reason):
        found = read_rewrites(write(tmp_path / "r.json", {"bad": row(1, texts), "a": row(1), "b": row(0)}))
        with pytest.raises(DataError, match=f"1 with '{reason}'. Their ids: 'bad'"):
            found.triples("s")
        with pytest.warns(UserWarning, match="1 of 3 labelled units are left out"):
            assert found.triples("s", missing="drop").dropped == {reason: {"w1": 1}}

    def test_unlabelled_units(self, tmp_path):
        found = read_rewrites(write(tmp_path / "r.json", {"x": row(None), "a": row(1), "b": row(0)}))
        assert found.triples("s").dropped_ids == {"unlabelled": ["x"]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", r"bad\.json: no valid JSON"),
            ("[]", r"bad\.json: expected an object, got list \[\]"),
            ("{}", r"bad\.json holds no units"),
            ({"a": 3}, r"bad\.json, id 'a': 3; expected an object with w_original"),
            ({"a": {"w_original": 1}}, r"id 'a': the keys are w_original; expected w_original and completions"),
            ({"a": {"completions": {}}}, r"id 'a': the keys are completions; expected"),
            ({"a": row(1, ())}, r"id 'a': completions has no 'original'"),
            ({"a": row(1, ("o", 3))}, r"id 'a': completions\['rewrite'\] is 3; expected a string"),
            ({"a": row("yes")}, r"id 'a': Unit 'a': w is 'yes'; expected 0 or 1"),
            ({"a": row(0.5)}, r"id 'a': Unit 'a': w is 0.5; expected 0 or 1"),
            (
                {"a": row(1, A={"original": "high"})},
                r"id 'a': the reward of 'A' for original is 'high'; expected",
            ),
            ({"a": row(1, A={"rewrite": True})}, r"id 'a': the reward of 'A' for rewrite is True"),
        ],
    )
    def test_a_broken_file(self, tmp_path, content, message):
        with pytest.raises(DataError, match=message):
            read_rewrites(write(tmp_path / "bad.json", content))

    def test_a_broken_line(self, tmp_path):
        for line, message in (
            ("{", "no valid JSON"),
            ("3", "expected an object"),
            ('{"w_original": 1}', "the keys are"),
        ):
            path = write(tmp_path / "bad.jsonl", [row(1), row(0), line])
            with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: {message}"):
                read_rewrites(path)

    @pytest.mark.parametrize("name", ["no.json", "no.jsonl"])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(DataError, match=rf"{name} cannot be read: No such file"):
            read_rewrites(tmp_path / name)


class TestToStore:
    def test_the_store_holds_the_same_texts(self, tmp_path):
        found = read_rewrites(write(tmp_path / "r.json", printed()))
        made = {"attr": "sentiment", "rewriter": "gpt-4o-2024-08-06", "params": {"temperature": 0.7}}
        store = found.to_store(tmp_path / "store", **made)
        triples = RewriteStore.open(store.folder).triples("sentiment")
        assert triples == found.triples("sentiment")
        assert [by.rewriter for by in store.rewriters("sentiment")] == ["gpt-4o-2024-08-06"]
        before = (store.folder / "rewrites.jsonl").read_bytes()
        found.to_store(tmp_path / "store", **made)
        assert (store.folder / "rewrites.jsonl").read_bytes() == before
        replay = ReplayRewriter(store, attr="sentiment")
        assert replay.rewrite(["original 12"], ["Write a movie review."], [0])[0].text == "rewrite 12"
        assert RewriteRun(store, replay, attr="sentiment").plan().total_calls == 0

    def test_what_is_missing_stays_missing(self, tmp_path):
        content = {"a": row(1, ("oa", "ra")), "b": row(0, ("ob", "", "rrb")), "c": row(None, ("oc", "rc", "rrc"))}
        store = read_rewrites(write(tmp_path / "r.json", content)).to_store(tmp_path / "s", attr="x", rewriter="gpt")
        assert [(one.id, one.number, one.result.status) for one in store.records()] == [
            ("a", 1, "ok"),
            ("b", 1, "empty"),
        ]
        with pytest.raises(DataError, match="1 with 'rewrite2_absent', 1 with 'rewrite_empty'"):
            store.triples("x")
        plan = RewriteRun(store, Counting(), attr="x").plan()
        assert plan.calls == {1: 2, 2: 2}  # another rewriter's texts are no answer for this one

    def test_one_rewrite_for_equal_texts(self, tmp_path):
        content = {
            "a": row(1, ("same", "r1", "rr1")),
            "b": row(1, ("same", "r2", "rr2")),
            "c": row(0, ("o", "r", "rr")),
        }
        found = read_rewrites(write(tmp_path / "r.json", content))
        with pytest.warns(UserWarning, match=r"1 rewrites of a text that occurs twice differ, such as of unit 'b'"):
            store = found.to_store(tmp_path / "s", attr="x", rewriter="gpt")
        assert store.triples("x").rewrite == ["r1", "r1", "r"]
        assert found.triples("x").rewrite == ["r1", "r2", "r"]

    def test_other_texts_under_the_same_keys_are_refused(self, tmp_path):
        for texts in (("o", "r", "rr"), ("o", "other", "rr")):
            found = read_rewrites(write(tmp_path / "r.json", {"a": row(1, texts), "b": row(0, ("p", "q", "q"))}))
            if texts[1] == "r":
                found.to_store(tmp_path / "s", attr="x", rewriter="gpt")
        with pytest.raises(DataError, match=r"two texts for one key.*'r' and 'other'"):
            found.to_store(tmp_path / "s", attr="x", rewriter="gpt")


def asked(name, text="Rewrite this."):
    body = {"model": "gpt-4o-2024-08-06", "messages": [{"role": "user", "content": text}], "temperature": 0.7}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def answered(name, text="Done."):
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return {"id": "b", "custom_id": name, "response": {"status_code": 200, "body": body}, "error": None}


class TestBatch:
    def test_requests_with_their_answers(self, tmp_path):
        requests = write(tmp_path / "q.jsonl", [asked("1", "Rewrite A."), asked("2"), asked("3")])
        failed = {"custom_id": "3", "response": {"status_code": 500, "body": {"error": "oh"}}, "error": None}
        answers = write(tmp_path / "a.jsonl", [answered("2"), answered("1", " B ")])
        errors = write(tmp_path / "e.jsonl", [failed])
        assert read_batch(requests, answers, errors) == {
            "1": ("Rewrite A.", RewriteResult(text="B")),
            "2": ("Rewrite this.", RewriteResult(text="Done.")),
            "3": ("Rewrite this.", RewriteResult(text=None, status="error", error="500: {'error': 'oh'}")),
        }

    def test_missing_answers_are_none(self, tmp_path):
        requests = write(tmp_path / "q.jsonl", [asked("1"), asked("2")])
        assert read_batch(requests, write(tmp_path / "a.jsonl", [answered("2")]))["1"] == ("Rewrite this.", None)
        assert read_batch(requests) == dict.fromkeys(("1", "2"), ("Rewrite this.", None))

    def test_strange_answers(self, tmp_path):
        requests = write(tmp_path / "q.jsonl", [asked("1")])
        with pytest.raises(DataError, match=r"1 answers belong to no request of .*q\.jsonl, such as '9'"):
            read_batch(requests, write(tmp_path / "a.jsonl", [answered("9")]))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (asked("1"), r"q\.jsonl, line 2: custom_id '1' occurs above"),
            ({"custom_id": 3}, r"q\.jsonl, line 2: custom_id is 3; expected a request"),
            ({"custom_id": "a", "body": {"messages": "hi"}}, r"line 2: custom_id is 'a'; expected a request"),
            ({"custom_id": "a", "body": {"messages": ["hi"]}}, r"line 2: custom_id is 'a'; expected a request"),
            ({"custom_id": "a", "body": {"messages": []}}, r"q\.jsonl, line 2: custom_id is 'a'; expected a request"),
            ("{", r"q\.jsonl, line 2: no valid JSON"),
        ],
    )
    def test_broken_requests(self, tmp_path, line, message):
        with pytest.raises(DataError, match=message):
            read_batch(write(tmp_path / "q.jsonl", [asked("1"), line]))


class TestEffects:
    FILE = {  # noqa: RUF012
        **{f"{name}{suffix}": value for suffix, value in (("", 2.0), ("_stderr", 0.5)) for name in (
            "naive_effect", "ATE_single_rewrite", "ATT_single_rewrite", "ATU_single_rewrite",
            "ATE_rewritten_rewrite", "ATT_rewritten_rewrite", "ATU_rewritten_rewrite",
        )},
        "reward_std": 1.5, "Y1_count": 12612, "Y0_count": 12389, "ATE_rewritten_rewrite": -1,
    }  # fmt: skip

    def test_all_numbers(self, tmp_path):
        found = read_effects(write(tmp_path / "e.json", self.FILE))
        assert found["naive"] == (2.0, 0.5)
        assert found["rate"] == {"ATE": (-1.0, 0.5), "ATT": (2.0, 0.5), "ATU": (2.0, 0.5)}
        assert found["single"] == dict.fromkeys(("ATE", "ATT", "ATU"), (2.0, 0.5))
        assert (found["reward_std"], found["n1"], found["n0"]) == (1.5, 12612, 12389)

    def test_missing_numbers_are_named(self, tmp_path):
        content = {**self.FILE, "reward_std": None, "Y1_count": True}
        del content["ATT_single_rewrite_stderr"]
        with pytest.raises(
            DataError, match=r"e\.json has no number for ATT_single_rewrite_stderr, reward_std, Y1_count"
        ):
            read_effects(write(tmp_path / "e.json", content))
        with pytest.raises(DataError, match=r"no\.json cannot be read: No such file"):
            read_effects(tmp_path / "no.json")
