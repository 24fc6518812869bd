from __future__ import annotations

import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import Completion, FunctionGenerator, TextGenerator, TextRequest
from lightning_interp.generation.requests import ask, completion_key, estimate_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"messages=\(\), prompt=None\): give one of the two"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, r"prompt='a'\): give one"),
        ({"messages": [{"role": "user"}]}, r"the message \{'role': 'user'\} has no text"),
        ({"prompt": "a", "stop": [""]}, r"stop=\(''"),
        ({"prompt": "a", "temperature": -1}, "temperature=-1; expected at least 0"),
        ({"prompt": "a", "top_p": 0}, "top_p=0; expected a share"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0; expected at least 1"),
    ],
)
def test_wrong_requests(options, message):
    with pytest.raises(RecipeError, match=message):
        TextRequest(**options)


def test_everything_that_is_asked_is_in_the_digest_and_comes_back():
    ways = [
        {}, {"prompt": "b"}, {"prompt": (5, 6)}, {"max_new_tokens": None}, {"temperature": 0.0}, {"top_p": 0.5},
        {"stop": ["x"]}, {"seed": 1}, {"key": ("draw", 0)}, {"key": ("draw", 1)},
    ]  # fmt: skip
    made = [TextRequest(**{"prompt": "a", **way}) for way in ways]
    made += [TextRequest.chat("a"), TextRequest.chat("a", system=""), TextRequest.chat("a", system="b")]
    assert len({one.digest for one in made}) == len(made)
    for one in made:
        again = TextRequest.from_dict(one.to_dict())
        assert (again, again.digest, again.row_seed) == (one, one.digest, one.row_seed)


def test_the_seed_of_a_row_is_of_its_content_or_its_key_alone():
    a, warm, b = (TextRequest(prompt=p, temperature=t) for p, t in (("a", 1.0), ("a", 0.5), ("b", 1.0)))
    assert a.row_seed == warm.row_seed != b.row_seed
    assert TextRequest(prompt="a", seed=1).row_seed != a.row_seed
    keyed = [TextRequest(prompt=p, key=key).row_seed for p, key in (("a", ("k", 1)), ("b", ("k", 1)), ("a", ("k", 2)))]
    assert keyed[0] == keyed[1] != keyed[2]


def test_wrong_completions():
    with pytest.raises(DataError, match="status 'done'; expected one of complete, truncated, refused, failed"):
        Completion(text="a", status="done")
    with pytest.raises(DataError, match="status 'complete' is None; expected a string"):
        Completion(text=None)
    with pytest.raises(DataError, match="status 'truncated' has the end token 2; expected none"):
        Completion(text="a", status="truncated", end_id=2)
    half = Completion(text="a\ud83d", end_id=2)
    assert (half.status, half.end_id) == ("truncated", None)
    assert Completion(text=None, status="failed").failed


def test_a_writer_answers_each_request_once():
    requests = [TextRequest(prompt="a")] * 2
    shout = FunctionGenerator(lambda one: one.text, name="same")
    assert isinstance(shout, TextGenerator)
    shout.generate = lambda asked: [Completion(text="a")]
    with pytest.raises(RecipeError, match="FunctionGenerator gave 1 answers to 2 requests; expected one"):
        ask(shout, requests)
    shout.generate = lambda asked: ["a", "b"]
    with pytest.raises(RecipeError, match="among them 'a'; expected one Completion"):
        ask(shout, requests)


def test_keys_and_estimates():
    one = TextRequest(prompt=(1, 2, 3), max_new_tokens=None)
    assert completion_key("w", one) == f"w/{one.digest}"
    assert estimate_tokens(one) == (3, 3)
    assert estimate_tokens(TextRequest(prompt="x" * 40, max_new_tokens=4)) == (10, 4)
