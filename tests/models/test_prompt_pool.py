"""Prompts are read once each, cut into slices, and drawn by a seed."""

from __future__ import annotations

import pytest

from lightning_interp.errors import DataError
from lightning_interp.models.data.prompt_pool import Pool, drawn, order, read_prompts, title_prompts


def test_files_and_lists_are_the_same_pool(tmp_path):
    rows = ['{"prompt": "One?"}', '{"text": "Two?"}', '{"messages": [{"role": "user", "content": "one? "}]}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.txt").write_text("One?\nTwo?\nTWO?\n")
    wanted = ([{"prompt": "One?"}, {"prompt": "Two?"}], 1)
    assert read_prompts(tmp_path / "a.jsonl") == read_prompts(str(tmp_path / "a.txt")) == wanted
    turns = [{"role": "user", "content": "x"}]
    assert read_prompts([{"messages": turns}]) == ([{"messages": turns}], 0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["x", " "], r"prompts\[1\]: 'prompt' is ' '"),
        ([{"prompt": 3}], r"prompts\[0\]: 'prompt' is 3"),
        ([{"prompd": "x"}], r"prompts\[0\]: the keys are 'prompd'"),
        ([], "prompts holds no rows"),
    ],
)
def test_what_is_no_prompt_is_named(rows, said):
    with pytest.raises(DataError, match=said):
        read_prompts(rows)


def test_titles_of_what_the_seed_does_not_use():
    rows = [{"text": f"Title {i}\nand text"} for i in range(3)]
    assert title_prompts(rows, 1) == ([{"prompt": "Title 1"}, {"prompt": "Title 2"}], 0)


def test_draws_are_whole_passes_and_a_rest():
    assert sorted(drawn(5, 2, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert sorted(order(7, 3)) == list(range(7))
    assert order(7, 3) != order(7, 4)
    assert drawn(0, 3, 0) == []
    pool = Pool([{}] * 5, [(0, 2), (2, 5)])
    assert sorted(pool.drawn(1, seed=0, passes=2)) == [2, 2, 3, 3, 4, 4]
    assert sorted(Pool([{}] * 5, []).drawn(3, seed=0)) == list(range(5))
