"""Files of the user's own: what is read, and what is said of a line that cannot be used."""

from __future__ import annotations

import json

import pytest

from lightning_interp.errors import DataError
from lightning_interp.rate.texts.readers import OWN_REWARDS, read_own


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_with_labels_and_without(tmp_path):
    found = read_own(
        write(tmp_path / "m.jsonl", {"text": "a", "w": 1}, {"text": "b", "w": None, "id": 7, "title": "x"})
    )
    assert [(unit.id, unit.text, unit.w, unit.prompt) for unit in found.units] == [
        ("1", "a", 1, ""),
        ("7", "b", None, ""),
    ]
    assert found.texts == {"1": (None, None), "7": (None, None)}
    assert found.rewards == {}


def test_finished_rewrites_and_rewards(tmp_path):
    row = {"original": "a!", "rewrite": "a", "rewrite2": "a!", "w": 1, "prompt": "p", "cluster": 3}
    scores = {"reward": 1, "reward_rewrite": 0.5, "reward_rewrite2": 2.0}
    path = write(tmp_path / "m.jsonl", {**row, **scores, "id": "x"}, {**row, **scores, "id": "y", "w": 0})
    found = read_own(path)
    triples = found.triples("mark")
    assert (triples.ids, triples.original, triples.rewrite, triples.cluster) == (
        ["x", "y"],
        ["a!"] * 2,
        ["a"] * 2,
        ["3"] * 2,
    )
    assert found.scores(OWN_REWARDS, triples)["rewrite2"] == [2.0, 2.0]


def test_a_missing_reward_names_its_unit(tmp_path):
    row = {"text": "a", "rewrite": "b", "rewrite2": "c", "w": 1, "reward": 1.0, "reward_rewrite": 2.0}
    found = read_own(write(tmp_path / "m.jsonl", row))
    with pytest.raises(DataError, match="'columns' has no reward of unit '1' for rewrite2"):
        found.scores(OWN_REWARDS, found.triples("mark"))


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "p"}, r"line 2: the keys are prompt; expected 'text' or 'original'"),
        ({"text": "a", "original": "a"}, r"line 2: the keys are text, original; expected"),
        ({"text": " "}, r"line 2: 'text' is ' '; expected a text"),
        ({"text": 3}, r"line 2: 'text' is 3; expected a string"),
        ({"text": "a", "w": 2}, r"line 2: Unit '2': w is 2; expected 0 or 1"),
        ({"text": "a", "w": "1"}, r"line 2: Unit '2': w is '1'"),
        ({"text": "a", "id": 1.5}, r"line 2: Unit 1\.5: id is 1\.5; expected a string"),
        ({"text": "a", "rewrite": ["b"]}, r"line 2: 'rewrite' is \['b'\]; expected a string"),
        ({"text": "a", "reward": "high"}, r"line 2: 'reward' is 'high'; expected a number"),
        ({"text": "a", "reward": True}, r"line 2: 'reward' is True; expected a number"),
        ({"text": "a", "rewrites": "b"}, r"line 2: there is a key 'rewrites'; is 'rewrite' meant\?"),
        ({"text": "a", "prompts": "b"}, r"line 2: there is a key 'prompts'; is 'prompt' meant\?"),
    ],
)
def test_a_broken_line(tmp_path, row, match):
    with pytest.raises(DataError, match=match):
        read_own(write(tmp_path / "m.jsonl", {"text": "fine"}, row))


def test_a_broken_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl cannot be read"):
        read_own(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="holds no units"):
        read_own(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="1 ids occur more than once, such as '1'"):
        read_own(write(tmp_path / "twice.jsonl", {"text": "a"}, {"text": "b", "id": 1}))
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match=r"torn\.jsonl, line 2: no valid JSON"):
        read_own(tmp_path / "torn.jsonl")
