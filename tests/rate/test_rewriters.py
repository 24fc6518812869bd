from __future__ import annotations

import re

import pytest
from rewriting import ATTR, Counting, rewritten, store_of

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.rewriting.assembly import FLAGS, rewrite_flags
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import Request, RewriteResult, RewriterId, Unit
from lightning_interp.rate.rewriting.rewriters import CallableRewriter, ReplayRewriter, Rewriter, ask, rewriter_id
from lightning_interp.rate.rewriting.rules import OpenerToggle, RuleRewriter


def requests(*texts, target=1, draw=0):
    by = RewriterId("x", "", "")
    return [
        Request(unit=Unit(id=text, text=text, w=0, prompt="p"), attr=ATTR, number=1, draw=draw, w_target=target,
                source=text, by=by)
        for text in texts
    ]  # fmt: skip


class TestAsk:
    def test_a_name_and_a_method_are_enough(self):
        class Smallest:
            name = "smallest"

            def rewrite(self, texts, prompts, w_target):
                rows = zip(texts, prompts, w_target, strict=True)
                return [RewriteResult(text="/".join(map(str, row))) for row in rows]

        rewriter = Smallest()
        assert isinstance(rewriter, Rewriter)
        assert [one.text for one in ask(rewriter, requests("a", "b"))] == ["a/p/1", "b/p/1"]
        assert rewriter_id(rewriter) == rewriter_id(Smallest())

    def test_draws_are_told_to_those_who_ask(self):
        assert ask(Counting(), requests("a", draw=3))[0].text == "[1.3] a"

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ([], "Rewriter 'odd' gave 0 answers to 2 requests; expected one RewriteResult for each"),
            ([RewriteResult(text="a")] * 3, "gave 3 answers to 2 requests"),
            ([RewriteResult(text="a"), "plain text"], "gave 2 answers to 2 requests, among them 'plain text'"),
        ],
    )
    def test_wrong_answers_are_refused(self, answers, message):
        class Odd:
            name = "odd"

            def rewrite(self, texts, prompts, w_target):
                return answers

        with pytest.raises(RecipeError, match=message):
            ask(Odd(), requests("a", "b"))

    def test_settings_without_a_json_form_are_refused(self):
        rewriter = CallableRewriter(lambda text, prompt, w: text, name="odd", params={"model": object()})
        with pytest.raises(DataError, match="Cannot write model as JSON"):
            rewriter_id(rewriter)

    def test_identity(self):
        def of(**options):
            return rewriter_id(CallableRewriter(lambda text, prompt, w: text, **{"name": "n", **options}))

        ways = [{}, {"name": "m"}, {"params": {"t": 1}}, {"instruction": "Do it."}]
        assert len({of(**way) for way in ways}) == 4
        assert of(params={"a": 1, "b": 2}) == of(params={"b": 2, "a": 1.0})
        assert of() == of(concurrency=4)


class TestCallable:
    def test_texts_and_results(self):
        answers = {"a": "A", "b": RewriteResult(text=None, status="refused"), "c": " "}
        rewriter = CallableRewriter(lambda text, prompt, w: answers[text], name="table")
        assert [one.status for one in rewriter.rewrite(["a", "b", "c"], [""] * 3, [1] * 3)] == [
            "ok",
            "refused",
            "empty",
        ]

    def test_an_error_belongs_to_its_text(self):
        def fragile(text, prompt, w):
            return 1 / 0 if text == "b" else text

        results = CallableRewriter(fragile, name="fragile").rewrite(["a", "b", "c"], [""] * 3, [1] * 3)
        assert [one.status for one in results] == ["ok", "error", "ok"]
        assert results[1].error == "ZeroDivisionError: division by zero"
        assert results[1].text is None  # never the text of the error

    @pytest.mark.parametrize("found", [3, None, ["a"]])
    def test_something_else_than_a_text_is_refused(self, found):
        rewriter = CallableRewriter(lambda text, prompt, w: found, name="odd")
        with pytest.raises(RecipeError, match=rf"rewriter 'odd' returned {re.escape(repr(found))} for 'a film'"):
            rewriter.rewrite(["a film"], [""], [1])

    def test_an_interrupt_is_not_swallowed(self):
        def interrupted(text, prompt, w):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            CallableRewriter(interrupted, name="odd").rewrite(["a"], [""], [1])

    def test_the_draw_is_passed_if_asked_for(self):
        rewriter = CallableRewriter(lambda text, prompt, w, draw: rewritten(text, w, draw), name="drawn")
        assert ask(rewriter, requests("a", draw=2))[0].text == "[1.2] a"

    def test_a_function_that_always_fails_ends_the_run(self, tmp_path):
        rewriter = CallableRewriter(lambda text, prompt, w: text.nope, name="buggy")
        with pytest.warns(
            UserWarning, match=r"20 errors in a row, the last of them \"AttributeError: 'str' object has no"
        ):
            report = RewriteRun(store_of(tmp_path, 50), rewriter, attr=ATTR).run()
        assert report.calls == 20


class TestReplay:
    @pytest.fixture
    def store(self, tmp_path):
        store = store_of(tmp_path / "first")
        answers = {("text 1", 0): RewriteResult(text=None, status="refused", error="no")}
        RewriteRun(store, Counting(answers=answers), attr=ATTR, draws=2).run()
        return store

    def test_it_fills_another_store_with_the_same_records(self, store, tmp_path):
        other = store_of(tmp_path / "second")
        report = RewriteRun(other, ReplayRewriter(str(store.folder), attr=ATTR), attr=ATTR, draws=2).run()
        assert report.statuses == {"ok": 20, "refused": 2}
        assert {one.key: one.result for one in other.records()} == {one.key: one.result for one in store.records()}
        assert other.rewriters(ATTR) == store.rewriters(ATTR) == [rewriter_id(Counting())]

    def test_a_miss_is_an_error(self, store):
        replay = ReplayRewriter(store, attr=ATTR)
        assert replay.name == "counting"
        with pytest.raises(DataError, match=r"no rewrite of 'new text' to w=1 \(draw 0\) by counting \(settings"):
            replay.rewrite(["new text"], [""], [1])
        for prompt, target, draw in (("other", 1, 0), ("prompt 0", 0, 0), ("prompt 0", 1, 2)):
            with pytest.raises(DataError, match=rf"no rewrite of 'text 0' to w={target} \(draw {draw}\)"):
                replay.rewrite(["text 0"], [prompt], [target], [draw])
        assert replay.rewrite(["text 0"], ["prompt 0"], [1], [1])[0].text == "[1.1] text 0"

    def test_an_empty_store(self, tmp_path):
        with pytest.raises(DataError, match="holds no rewrite of 'mark'"):
            ReplayRewriter(store_of(tmp_path / "empty"), attr=ATTR)


class TestRules:
    def test_their_settings_are_part_of_the_key(self):
        one, same, other = (RuleRewriter(OpenerToggle(*phrases)) for phrases in (("A", "B"), ("A", "B"), ("A", "C")))
        assert rewriter_id(one) == rewriter_id(same) != rewriter_id(other)


class TestFlags:
    @pytest.mark.parametrize(
        ("source", "text", "flags"),
        [
            ("A dull film.", "A great film.", ()),
            ("A dull film.", None, ("empty",)),
            ("A dull film.", "\n ", ("empty",)),
            ("A dull film.", "A  dull\nfilm.", ("identical",)),
            ("x" * 100, "x" * 19, ("length",)),
            ("x" * 100, "x" * 20, ()),
            ("x" * 100, "x" * 500, ()),
            ("x" * 100, "x" * 501, ("length",)),
            ("", "y", ()),
            ("A dull film.", "I'm sorry, but I can't help with that.", ("refusal",)),
            ("A dull film.", "I\u2019m sorry, but I can\u2019t do it.", ("refusal",)),
            ("A dull film.", "I cannot rewrite this text.", ("refusal",)),
            ("A dull film.", "As an AI language model, I ...", ("refusal",)),
            ("A dull film.", "I'm sorry I saw this film.", ()),
            ("A dull film.", "Unfortunately a dull film.", ()),
            ("I can't stand this film.", "I can't get enough of this film.", ()),
            ("A dull film.", "Sure! Here's the rewritten text: great.", ("preamble",)),
            ("A dull film.", "Here is a positive version of the review: great.", ("preamble",)),
            ("A dull film.", "Rewritten text: a great film.", ("preamble",)),
            ("A dull film.", "I have rewritten the review.", ("preamble",)),
            ("A dull film.", "This is a great film, edited with care.", ()),
            ("Here is a new version of Hamlet.", "Here is a great version of Hamlet.", ()),
            ("A film.", "Certainly one of the best films.", ()),
        ],
    )
    def test_what_looks_wrong(self, source, text, flags):
        assert rewrite_flags(source, text) == flags
        assert set(flags) <= set(FLAGS)

    def test_length_is_no_flaw_where_it_is_the_attribute(self):
        assert rewrite_flags("x" * 100, "y" * 900, changes_length=True) == ()
        assert rewrite_flags("x" * 100, "", changes_length=True) == ("empty",)
        for count in (3000, 2001, 4):
            assert rewrite_flags("x" * 100, "y" * count, changes_length=True) == ("length",)
