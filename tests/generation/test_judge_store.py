"""Results of a judge are asked for once, whatever kills the run, and those that went wrong again."""

from __future__ import annotations

import pytest

from lightning_interp.errors import DataError
from lightning_interp.generation import JudgeResult, KeptJudge, TraitJudge


class Counting(TraitJudge):
    """Counts what it is asked, and breaks off or errs where it is told to."""

    name = "counting"

    def __init__(self, *, stop_at="", err_at="", version="1"):
        self.asked, self.stop_at, self.err_at, self.version = [], stop_at, err_at, version

    def judged(self, texts, prompts):
        if self.stop_at in texts:
            raise KeyboardInterrupt
        self.asked += texts
        return [
            JudgeResult(None, "error") if text == self.err_at else JudgeResult(float(len(text + prompt)))
            for text, prompt in zip(texts, prompts, strict=True)
        ]


TEXTS = ["a", "bb", "ccc", "dddd", "bb"]


def test_each_text_is_asked_for_once(tmp_path):
    judge = Counting()
    kept = KeptJudge(judge, tmp_path)
    assert kept.score(TEXTS).tolist() == [1, 2, 3, 4, 2]
    assert judge.asked == TEXTS[:4]
    again = KeptJudge(Counting(), tmp_path)
    assert again.results([*TEXTS, " "]) == [*kept.results(TEXTS), JudgeResult(None, "empty")]
    assert again.judge.asked == []
    assert again.score(["a"], ["why"]).tolist() == [4]  # another question is another thing
    assert KeptJudge(Counting(version="2"), tmp_path).judge.identity() == Counting(version="2").identity()
    newer = KeptJudge(Counting(version="2"), tmp_path)
    newer.score(["a"])
    assert newer.judge.asked == ["a"]
    assert kept.identity() == judge.identity()


def test_a_run_that_breaks_off_keeps_the_batches_that_were_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        KeptJudge(Counting(stop_at="dddd"), tmp_path, batch_size=2).score(["a", "bb", "ccc", "dddd"])
    again = KeptJudge(Counting(), tmp_path, batch_size=2)
    assert again.score(["a", "bb", "ccc", "dddd"]).tolist() == [1, 2, 3, 4]
    assert again.judge.asked == ["ccc", "dddd"]


def test_what_went_wrong_is_asked_again(tmp_path):
    assert KeptJudge(Counting(err_at="bb"), tmp_path).results(["a", "bb"])[1].status == "error"
    again = KeptJudge(Counting(), tmp_path)
    assert again.score(["a", "bb"]).tolist() == [1, 2]
    assert again.judge.asked == ["bb"]
    assert KeptJudge(Counting(), tmp_path).score(["bb"]).tolist() == [2]


def test_a_line_that_is_no_result_is_named(tmp_path):
    (tmp_path / "judged.jsonl").write_text('{"key": "k", "score": 3}\n')
    with pytest.raises(DataError, match=r"judged.jsonl, line 1: no result of a judge \(KeyError\('status'\)\)"):
        KeptJudge(Counting(), tmp_path)
    (tmp_path / "judged.jsonl").write_text('{"key": "k", "score": 300, "status": "ok", "detail": {}}\n')
    with pytest.raises(DataError, match="score=300, status='ok'"):
        KeptJudge(Counting(), tmp_path)
