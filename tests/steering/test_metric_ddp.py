"""SteeringMetrics on one process and on two."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest
import torch

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.effects.metrics import SCORES
from lightning_interp.steering.effects.path_scores import SteeringMetrics

METHODS = ["euclidean", "dual"]


def scores(context, method, n=None):
    """A made-up path; its numbers say whose it is."""
    n = n or 3 + context % 4
    x = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return {"target_prob": x, "off_target_kl": x * (context + 1), "hvps": torch.full((n,), METHODS.index(method) + 0.0)}


def fill(metrics, contexts):
    for context in contexts:
        for method in METHODS:
            metrics.update(context, method, scores(context, method))
    return metrics


def check(result, contexts):
    assert result.methods == tuple(METHODS)
    for method in METHODS:
        assert list(result.paths[method]) == sorted(contexts)
        for context, path in result.paths[method].items():
            expected = scores(context, method)
            assert set(path) == set(expected)
            for name, values in expected.items():
                assert torch.equal(path[name], values)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_one_process():
    metrics = fill(SteeringMetrics(METHODS), [5, 0, 3])
    check(metrics.compute(), [0, 3, 5])
    fill(metrics, [3, 9])
    check(metrics.compute(), [0, 3, 5, 9])  # 3 counts once
    metrics.reset()
    with pytest.raises(DataError, match=r"SteeringMetrics\(\['euclidean', 'dual'\]\) has no path"):
        metrics.compute()


def test_a_method_may_be_missing_and_scores_too():
    metrics = SteeringMetrics(METHODS)
    metrics.update(1, "dual", {"target_prob": torch.tensor([0.1])})
    result = metrics.compute()
    assert result.methods == ("dual",)
    assert set(result.paths["dual"][1]) == {"target_prob"}


def test_all_scores_fit():
    metrics = SteeringMetrics(METHODS)
    metrics.update(1, "dual", {name: torch.rand(4, dtype=torch.float64) for name in SCORES})
    assert metrics.compute().scores == SCORES


def test_it_pickles_with_what_it_holds():
    metrics = pickle.loads(pickle.dumps(fill(SteeringMetrics(METHODS), [2, 1])))  # noqa: S301
    check(metrics.compute(), [1, 2])


def _rank(rank, port, share, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        metrics = fill(SteeringMetrics(METHODS), share[rank])
        first = metrics.compute()
        again = metrics.compute()
        results.put((rank, first.rows(), again.rows() == first.rows(), len(metrics.rows)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("share", "contexts"),
    [
        (([0, 2, 4], [1, 3]), [0, 1, 2, 3, 4]),
        (([0, 2], [1, 0]), [0, 1, 2]),  # what a sampler pads
        (([7], []), [7]),  # a process without any
    ],
)
def test_two_processes(share, contexts):
    found = two_ranks(_rank, share)
    alone = fill(SteeringMetrics(METHODS), contexts).compute().rows()
    assert [rows for _, rows, _, _ in found] == [alone, alone]
    assert all(same for *_, same, _ in found)
    assert [kept for *_, kept in found] == [2 * len(part) for part in share]  # each keeps its own


def _empty_rank(rank, port, share, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        SteeringMetrics(METHODS).compute()
    except DataError as error:
        results.put((rank, str(error)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_processes_without_any_context():
    assert all("has no path" in message for _, message in two_ranks(_empty_rank, None))


def two_ranks(work, share):
    """What two processes put, by rank."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=work, args=(r, os.environ["MASTER_PORT"], share, results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    return found


class TestErrors:
    @pytest.mark.parametrize("methods", [[], ["dual", "dual"]])
    def test_methods(self, methods):
        with pytest.raises(RecipeError, match=rf"methods={methods}".replace("[", r"\[").replace("]", r"\]")):
            SteeringMetrics(methods)

    def test_an_unknown_method(self):
        with pytest.raises(RecipeError, match="Unknown method 'oracle'; this metric collects euclidean, dual"):
            SteeringMetrics(METHODS).update(0, "oracle", scores(0, "dual"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"loss": torch.ones(3)}, "method 'dual' in context 0 has an unknown score 'loss'"),
            ({"hvps": torch.ones(2)}, r"has hvps of shape \[2\] beside target_prob of \[3\]"),
            ({"target_prob": torch.ones(3, 1)}, r"has no target_prob \[n\]"),
            ({"target_prob": torch.ones(0)}, r"has no target_prob \[n\]"),
        ],
    )
    def test_scores_that_do_not_fit(self, change, message):
        metrics = SteeringMetrics(METHODS)
        with pytest.raises(DataError, match=message):
            metrics.update(0, "dual", {**scores(0, "dual"), **change})
        with pytest.raises(DataError, match=r"has no target_prob"):
            metrics.update(0, "dual", {"entropy": torch.ones(3)})
        assert metrics.rows == []
