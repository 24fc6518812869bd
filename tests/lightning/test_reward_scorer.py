"""Bulk scoring by Trainer.predict: the same rewards on any number of processes, and none asked for twice."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch

from lightning_interp.errors import DataError, RecipeError, UnsupportedStrategyError
from lightning_interp.models import RewardModel
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.scoring.reward_scorer import RewardScorer
from lightning_interp.rate.scoring.rewards import MissingRewardError, read_rewards
from lightning_interp.rate.scoring.scores import CallableScorer, score_triples

pytestmark = pytest.mark.usefixtures("two_layers")

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def units(n=7, attr="marks"):
    """Rewrites that differ in length, some of which occur twice."""
    return RewriteTriples(
        attr=attr,
        ids=[f"u{i}" for i in range(n)],
        w=[i % 2 for i in range(n)],
        prompts=["say"] * n,
        original=["x" * (1 + 5 * i) for i in range(n)],
        rewrite=["y" * (1 + i % 3) for i in range(n)],
        rewrite2=["z!" * (1 + i) for i in range(n)],
        draw=[0] * n,
    )


class Counted:
    """A scorer that notes, in a file (processes are forked), what it is asked for, and breaks off if told to."""

    def __init__(self, file, stop_after=None):
        self.file, self.stop_after = file, stop_after

    def __call__(self, prompts, texts):
        with self.file.open("a") as out:
            for text in texts:
                out.write(text + "\n")
        if self.stop_after is not None and len(self.asked()) >= self.stop_after:
            raise ZeroDivisionError
        return [float(len(text)) for text in texts]

    def asked(self):
        return self.file.read_text().split() if self.file.exists() else []


def counted(folder, **options):
    function = Counted(folder / "asked", **options)
    return function, CallableScorer(function, name="length")


def equal(a, b):
    return all(torch.equal(a.reward[stage].double(), b.reward[stage].double()) for stage in a.reward)


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("options", [{}, {"devices": 2, "strategy": "ddp_fork"}], ids=["one", "two"])
def test_rewards_are_those_of_one_process(tmp_path, chunk, options):
    function, scorer = counted(tmp_path)
    path = tmp_path / "rewards.jsonl"
    scores = RewardScorer(scorer, units(), path, chunk=chunk).run(**{**QUIET, **options})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 21
    assert len({(line["id"], line["stage"]) for line in lines}) == 21
    assert [line["index"] for line in lines] == sorted(line["index"] for line in lines)
    assert not list(tmp_path.glob("*.part"))
    texts = {text for stage in units().stages for text in units().texts(stage)}
    assert sorted(function.asked()) == sorted(texts)  # each once, though some stand in several units
    assert equal(scores, score_triples(scorer, units()))


@pytest.mark.parametrize("options", [{}, {"devices": 2, "strategy": "ddp_fork"}], ids=["one", "two"])
def test_a_reward_model_scores_as_it_does_alone(tmp_path, options):
    module = RewardModel("tiny:llama", chat=False, max_length=20)
    modes = {name: part.training for name, part in module.named_modules()}
    expected = score_triples(module, units())
    scores = RewardScorer(module, units(), tmp_path / "rewards.jsonl", chunk=4).run(**{**QUIET, **options})
    for stage in units().stages:
        torch.testing.assert_close(scores.reward[stage].float(), expected.reward[stage], rtol=1e-4, atol=1e-5)
        assert torch.equal(scores.truncated[stage], expected.truncated[stage])
    assert scores.truncation()["original"] == 3 / 7
    assert {name: part.training for name, part in module.named_modules()} == modes


@pytest.mark.parametrize("options", [{}, {"devices": 2, "strategy": "ddp_fork"}], ids=["one", "two"])
def test_a_run_that_broke_off_goes_on_where_it_stopped(tmp_path, options):
    function, scorer = counted(tmp_path, stop_after=8)
    path = tmp_path / "rewards.jsonl"
    with pytest.raises(Exception):  # noqa: B017, PT011  a fork's error comes as one of the launcher's
        RewardScorer(scorer, units(), path, chunk=3).run(**{**QUIET, **options})
    parts = list(tmp_path.glob("rewards.jsonl.rank*.part"))
    assert parts
    kept = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert 0 < len(kept) < 21
    with parts[0].open("ab") as torn:
        torn.write(b'{"index": 12, "id": "u')
    (tmp_path / "asked").unlink()
    function.stop_after = None
    scores = RewardScorer(scorer, units(), path, chunk=3).run(**{**QUIET, **options})
    asked = function.asked()
    assert equal(scores, score_triples(scorer, units()))
    saved = {(line["id"], line["stage"]) for line in kept}
    rest = sorted(
        text
        for stage in units().stages
        for name, text in zip(units().ids, units().texts(stage), strict=True)
        if (name, stage) not in saved
    )
    assert set(asked) == set(rest)
    assert len(asked) == len(set(asked))


def test_nothing_is_scored_twice_and_changes_are_scored_anew(tmp_path):
    function, scorer = counted(tmp_path)
    path = tmp_path / "rewards.jsonl"

    def asked(triples, by=scorer):
        (tmp_path / "asked").unlink(missing_ok=True)
        scores = RewardScorer(by, triples, path).run(**QUIET)
        return function.asked(), scores

    first, scores = asked(units())
    assert len(first) == 17  # 21 texts, some of them equal
    again, same = asked(units())
    assert again == []
    assert equal(scores, same)
    more, _ = asked(units(8))
    assert sorted(more) == sorted(["x" * 36, "yy", "z!" * 8])
    changed = RewriteTriples(**{**vars(units()), "rewrite": ["new", *units().rewrite[1:]]})
    assert asked(changed)[0] == ["new"]
    assert len(asked(units(attr="other"))[0]) == 17
    assert len(asked(units(), CallableScorer(function, name="second"))[0]) == 17
    table = read_rewards(path)
    assert sorted(table.scorers.values()) == ["length", "second"]
    assert len(table) == 21 + 3 + 1 + 21 + 21
    assert equal(table.scores(units(), scorer), scores)


def test_a_model_that_was_trained_since_is_scored_anew(tmp_path):
    module, path = RewardModel("tiny:llama", chat=False), tmp_path / "rewards.jsonl"
    before = RewardScorer(module, units(), path).run(**QUIET)
    with torch.no_grad():
        module.model.score.weight.add_(0.1)
    after = RewardScorer(module, units(), path).run(**QUIET)
    assert not equal(before, after)
    assert equal(after, score_triples(module, units()))
    assert len(read_rewards(path)) == 42


def test_a_run_cut_short_says_so_and_can_be_finished(tmp_path):
    _, scorer = counted(tmp_path)
    job = RewardScorer(scorer, units(), tmp_path / "rewards.jsonl", chunk=4)
    with pytest.raises(MissingRewardError, match=r"scorer 'length' .* \(13 of 21 texts lack one\)"):
        job.run(**QUIET, limit_predict_batches=2)
    assert equal(job.run(**QUIET), score_triples(scorer, units()))


def test_predictions_carry_their_units(tmp_path):
    _, scorer = counted(tmp_path)
    job = RewardScorer(scorer, units(), tmp_path / "rewards.jsonl", chunk=10)
    steps = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, enable_model_summary=False).predict(job)
    found = {
        (name, stage): value
        for step in steps
        for name, stage, value in zip(step["id"], step["stage"], step["reward"], strict=True)
    }
    assert len(found) == 21
    assert found["u3", "original"] == 16.0
    lengths = [len(step["id"]) for step in steps]
    assert sum(lengths) == 21
    assert len(lengths) == 2  # 17 different texts
    assert steps[0]["reward"] == sorted(steps[0]["reward"], reverse=True)  # the longest first


def test_rewards_that_are_not_finite_are_kept_as_such(tmp_path):
    scorer = CallableScorer(lambda text: float("inf") if text == "x" else 1.0, name="s", each=True)
    scores = RewardScorer(scorer, units(), tmp_path / "rewards.jsonl").run(**QUIET)
    assert torch.isnan(scores.reward["original"]).tolist() == [True] + [False] * 6
    with pytest.raises(DataError, match="u0"):
        scores.effects(units())


def test_what_it_refuses(tmp_path):
    _, scorer = counted(tmp_path)
    with pytest.raises(RecipeError, match="chunk=0"):
        RewardScorer(scorer, units(), tmp_path / "r.jsonl", chunk=0)
    with pytest.raises(RecipeError, match="got a lambda"):
        RewardScorer(lambda prompts, texts: texts, units(), tmp_path / "r.jsonl")
    job = RewardScorer(scorer, units(), tmp_path / "r.jsonl")
    with pytest.raises(RecipeError, match=r"'length' cannot use Trainer\(precision='bf16-mixed'\)"):
        job.run(**QUIET, precision="bf16-mixed")
    with pytest.raises(DataError, match=r"'length' writes rewards in Trainer.predict only"):
        job.predict_step([], 0)
    with pytest.raises(DataError, match=r"r.jsonl cannot be read"):
        job.read()
    run = L.Trainer(**QUIET, logger=False, enable_checkpointing=False)
    run.strategy.__class__ = type("ModelParallelStrategy", (type(run.strategy),), {})
    with pytest.raises(UnsupportedStrategyError, match=r"RewardScorer of 'length' uses weight values"):
        run.predict(job)


class Dying:
    """A judge that dies at its n-th text, of many as of one."""

    def __init__(self, at, error=RuntimeError):
        self.at, self.error, self.asked = at, error, []

    def __call__(self, prompts, texts):
        for text in texts:
            if len(self.asked) == self.at:
                raise self.error("no more")
            self.asked.append(text)
        return [float(len(text)) for text in texts]


@pytest.mark.parametrize("at", [0, 186])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_function_that_dies_has_lost_nothing(tmp_path, at, error):
    """All that it was asked is kept, and asked for no more."""
    triples, path, judge = units(100), tmp_path / "rewards.jsonl", Dying(at, error)
    scorer = RewardScorer(judge, triples, path, name="judge")
    with pytest.raises((error, SystemExit)):
        scorer.run(**QUIET)
    judge.at = -1
    RewardScorer(judge, triples, path, name="judge").run(**QUIET)
    texts = {text for stage in triples.stages for text in triples.texts(stage)}
    assert sorted(judge.asked) == sorted(texts)


def test_a_function_of_one_text_that_dies_has_lost_nothing(tmp_path):
    triples, path, asked, left = units(50), tmp_path / "rewards.jsonl", [], [33]

    def judge(text):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError(text)
        asked.append(text)
        return float(len(text))

    scorer = CallableScorer(judge, name="judge", each=True)
    with pytest.raises(RuntimeError):
        RewardScorer(scorer, triples, path).run(**QUIET)
    assert len(asked) == 32
    RewardScorer(scorer, triples, path).run(**QUIET)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(("chunk", "own", "most"), [(None, None, 1), (None, 5, 5), (7, None, 7), (7, 5, 7)])
def test_how_many_texts_a_function_gets_at_once(tmp_path, chunk, own, most):
    sizes = []

    def judge(prompts, texts):
        sizes.append(len(texts))
        return [0.0] * len(texts)

    if own is not None:
        judge.batch_size = own
    RewardScorer(judge, units(), tmp_path / "rewards.jsonl", chunk=chunk).run(**QUIET)
    assert max(sizes) == most


def test_answers_of_a_slow_function_are_on_disk_within_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_interp.rate.scoring.reward_scorer._SECONDS", 0.0)
    path, there = tmp_path / "rewards.jsonl", []

    def judge(prompts, texts):
        there.append(sum(len(part.read_text().splitlines()) for part in tmp_path.glob("*.part")))
        return [0.0] * len(texts)

    RewardScorer(judge, units(), path).run(**QUIET)
    assert there == sorted(there)
    assert there[-1] >= len(there) - 1
