"""Whatever an endpoint answers becomes a completion with a status."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import completion

from lightning_interp.generation.answers import parse_answer, token_counts, without_reasoning
from lightning_interp.generation.judges import ChatJudge
from lightning_interp.generation.requests import Completion, FunctionGenerator
from lightning_interp.rate.rewriting.records import RewriteResult, as_result


def told(body):
    found = parse_answer(body)
    return found.status, found.text, found.error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "film"}], ("complete", "a film", None)),
        (["a ", "film"], ("complete", "a film", None)),
        ([{"type": "output_text", "text": {"value": "fine"}}], ("complete", "fine", None)),
        ([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "fine"}], ("complete", "fine", None)),
        ([{"type": "image_url", "image_url": "x"}], ("failed", None, "the content is no text: [{'type'")),
        ([], ("failed", None, "the content is no text: []")),
        ({"text": "a"}, ("failed", None, "the content is no text: {'text': 'a'}")),
        (7, ("failed", None, "the content is no text: 7")),
        (None, ("complete", "", None)),
    ],
)
def test_contents_of_other_shapes(content, expected):
    status, text, error = told(completion(content))
    assert (status, text) == expected[:2]
    assert error is expected[2] or error.startswith(expected[2])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>Is it?</think>\n\nA film.", "A film."),
        (" <thinking>a</thinking><reasoning>b\nc</reasoning> A film.", "A film."),
        ("It may be.\n</think>\nA film.", "A film."),
        ("<think>\n\n</think>\n\nA film.", "A film."),
        ("A film about <think>ing</think>.", "A film about <think>ing</think>."),
        ("A film.", "A film."),
        ("<think>It goes on and", None),
        ("<think>all of it</think>", ""),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert without_reasoning(text) == answer
    found = parse_answer(completion(text))
    assert (found.text, found.status) == ((answer, "complete") if answer is not None else (None, "truncated"))
    result = as_result(Completion(text=text))  # what a local model wrote
    assert (result.text, result.status) == (answer, {None: "truncated", "": "empty"}.get(answer, "ok"))


def test_a_mark_is_not_read_from_the_reasoning():
    judge = ChatJudge(FunctionGenerator(lambda _: "<think>Not a 9 at all</think> 3", name="r"), "Rate: {text}")
    assert judge.score(["a film"]).tolist() == [3.0]


@pytest.mark.parametrize(
    ("escaped", "text", "status"),
    [
        (r"a \ud83d", "a \ud83d", "truncated"),
        (r"\udc9d b", "\udc9d b", "truncated"),
        (r"\ud83d\ude00", "\U0001f600", "complete"),
        (r"\ufffd", "\ufffd", "complete"),
        (r"\ufeffa", "\ufeffa", "complete"),
    ],
)
def test_half_a_character(escaped, text, status):
    body = json.loads(json.dumps(completion("X")).replace('"X"', f'"{escaped}"'))
    found = parse_answer(body)
    assert (found.text, found.status) == (text, status)
    assert as_result(found).status == {"complete": "ok"}.get(status, status)
    for made in (Completion(text=text), RewriteResult(text=text), as_result(Completion(text=text))):
        assert made.status in ({"truncated"} if status == "truncated" else {"complete", "ok"})


@pytest.mark.parametrize(
    ("value", "count"),
    [(7, 7), ("7", 7), (7.0, 7), ("7.0", 7), (0, 0), (-1, None), (True, None), ("many", None), (None, None),
     ([7], None),     (math.nan, None),
     (math.inf, None), (1e12, None), (10**400, None), ("9" * 400, None), ({"n": 7}, None)],
)  # fmt: skip
def test_token_counts(value, count):
    assert token_counts({"usage": {"prompt_tokens": value, "completion_tokens": value}}) == (count, count)
    found = parse_answer(completion("a", usage=(value if not isinstance(value, dict | list | str | None) else 1, 1)))
    assert found.text == "a"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "prompt_tokens", "finish_reason", "refusal", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON, JSON, JSON)
def test_anything_at_all(body, message, reason, usage):
    for one in (body, {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}):
        found = parse_answer(one)
        assert found.status != "complete" or found.text.encode().decode() == found.text
        assert found.tokens_in is None or found.tokens_in >= 0
        as_result(found)


def test_nested_as_deep_as_can_be():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert parse_answer(deep).error == "an answer without choices: a list nested too deeply"
    assert parse_answer(completion({"a": deep})).status == "failed"
    while deep:  # or its end would take the interpreter's stack
        deep = deep.pop()
