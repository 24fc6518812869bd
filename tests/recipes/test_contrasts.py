"""Contrast sets: what is in ours, how a user's file is read and divided, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import DataError, RecipeError
from lightning_interp_recipes.steering._contrasts import (
    NEUTRAL,
    OPENINGS,
    SETS,
    ContrastItem,
    read_contrasts,
    split_contrasts,
)

GOOD = {"prompt": "The day was", "positive": " good.", "negative": " bad."}


def write(folder, *lines):
    path = folder / "mine.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", SETS)
def test_our_sets_are_contrasts_after_one_prompt(name):
    items = read_contrasts(name)
    assert len(items) >= 36
    assert len({item.prompt for item in items}) > 0.8 * len(items)
    assert len(set(items)) == len(items)
    for item in items:
        assert item.positive != item.negative
        assert item.positive.startswith(" ")
        assert item.negative.startswith(" ")
        assert item.prompt == item.prompt.strip()
        assert all(text.endswith((".", "?")) for text in item.texts), item
    assert len(set(NEUTRAL)) == len(NEUTRAL)
    assert len(set(OPENINGS)) == len(OPENINGS)


def test_a_users_file(tmp_path):
    path = write(tmp_path, GOOD, "", {"positive": "Yes!", "negative": "No!"})
    assert read_contrasts(path) == [ContrastItem(" good.", " bad.", "The day was"), ContrastItem("Yes!", "No!")]
    assert read_contrasts(path)[0].texts == ("The day was good.", "The day was bad.")


@given(st.integers(6, 60), st.integers(0, 2**20))
def test_parts_share_nothing_and_lose_nothing(n, seed):
    items = [ContrastItem(f" yes {i}", f" no {i}") for i in range(n)]
    parts = split_contrasts(items, seed=seed)
    together = [*parts.train, *parts.choose, *parts.report]
    assert sorted(together, key=str) == sorted(items, key=str)
    assert min(len(parts.train), len(parts.choose), len(parts.report)) >= 1
    random.seed(seed)
    state = random.getstate()
    assert split_contrasts(items, seed=seed) == parts
    assert random.getstate() == state


def test_another_seed_divides_otherwise():
    items = read_contrasts("mood")
    assert split_contrasts(items, seed=0).train != split_contrasts(items, seed=1).train


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"mine.jsonl, line 2: no valid JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ({"positive": " good."}, "line 2: 'negative' is missing"),
        ({**GOOD, "positive": " "}, "line 2: 'positive' is missing or empty"),
        ({**GOOD, "prompt": 3}, "line 2: 'prompt' is 3"),
        ({**GOOD, "mood": "x"}, "line 2: 'mood' is 'x'"),
        ({**GOOD, "negative": " good."}, "both ' good.'"),
    ],
)
def test_lines_that_are_no_contrasts(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read_contrasts(write(tmp_path, GOOD, line))


def test_what_is_no_set(tmp_path):
    with pytest.raises(RecipeError, match=r"no contrast set 'moody'. Name one of mood, formal, past"):
        read_contrasts("moody")
    (tmp_path / "mine.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"mine.jsonl, line 1: no valid JSON"):
        read_contrasts(str(tmp_path / "mine.jsonl"))
    with pytest.raises(DataError, match="There are 3 contrast items"):
        split_contrasts([ContrastItem("a", "b")] * 3, seed=0)
