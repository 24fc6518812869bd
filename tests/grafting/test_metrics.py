"""Scores against slow loops, and their reduction over processes."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_interp.grafting.metrics import METRICS, GraftScores, score_logits, target_rank

V, N = 11, 40
COLUMN = {name: i for i, name in enumerate(METRICS)}


def draw(seed=0, *, ties=False):
    generator = torch.Generator().manual_seed(seed)
    models = [3 * torch.randn(N, V, generator=generator) for _ in range(3)]
    if ties:
        models = [x.round() for x in models]
    return (*models, torch.randint(V, (N,), generator=generator))


def slow_scores(graft, target, recipient, donor, top_k):
    """One prompt and one token at a time, in float64."""
    table = []
    for row in range(len(target)):
        x, r, d = (m[row].double().numpy() for m in (graft, recipient, donor))
        t = int(target[row])
        p, p_r, p_d = (np.exp(y - y.max()) / np.exp(y - y.max()).sum() for y in (x, r, d))
        rank = 1
        for token in range(len(x)):
            rank += bool(x[token] > x[t])
        favourite = 0
        for token in range(len(r)):
            favourite = token if r[token] > r[favourite] else favourite
        table.append(
            {
                "top1": float(rank == 1),
                "top5": float(rank <= top_k),
                "target_prob": p[t],
                "target_logprob": math.log(p[t]),
                "target_rank": rank,
                "logit_diff": x[t] - x[favourite],
                "kl_to_recipient": sum(p_r[i] * math.log(p_r[i] / p[i]) for i in range(len(x))),
                "kl_to_donor": sum(p_d[i] * math.log(p_d[i] / p[i]) for i in range(len(x))),
            }
        )
    return table


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("top_k", [1, 3, 5, V])
def test_scores_equal_a_slow_loop(ties, top_k):
    graft, recipient, donor, target = draw(ties=ties)
    fast = score_logits(graft, target, recipient, donor, top_k=top_k)
    assert fast.shape == (N, len(METRICS))
    for row, expected in enumerate(slow_scores(graft, target, recipient, donor, top_k)):
        assert dict(zip(METRICS, fast[row].tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)


def test_ties_favour_the_target():
    logits = torch.tensor([[2.0, 5.0, 5.0, 5.0, 1.0]]).expand(5, 5)
    assert target_rank(logits, torch.arange(5)).tolist() == [4, 1, 1, 1, 5]


def test_a_plain_model_is_at_no_distance_from_itself():
    graft, recipient, _, target = draw()
    scores = score_logits(recipient, target, recipient, graft)
    assert torch.equal(scores[:, COLUMN["kl_to_recipient"]], torch.zeros(N))
    assert (scores[:, COLUMN["kl_to_donor"]] > 0).all()
    assert (scores[:, COLUMN["logit_diff"]] <= 0).all()


def test_a_token_that_the_reference_excludes_costs_nothing():
    graft, recipient, donor, target = draw()
    wide = [torch.cat([x, torch.full((N, 1), -math.inf)], dim=1) for x in (graft, recipient, donor)]
    expected = score_logits(graft, target, recipient, donor)
    torch.testing.assert_close(score_logits(wide[0], target, *wide[1:]), expected)


def test_not_a_number_never_hits():
    logits = torch.full((1, V), math.nan)
    assert target_rank(logits, torch.tensor([3])).item() > V
    scores = score_logits(logits, torch.tensor([3]), torch.zeros(1, V), torch.zeros(1, V))
    assert scores[0, :2].tolist() == [0.0, 0.0]


def test_half_precision_is_scored_in_float32():
    graft, recipient, donor, target = (x.bfloat16() if x.is_floating_point() else x for x in draw())
    expected = score_logits(graft.float(), target, recipient.float(), donor.float())
    assert torch.equal(score_logits(graft, target, recipient, donor), expected)


# The metric over processes

PLANS = ["PRE", "SFT", "FE"]


def rows(indices):
    """Scores that can be told apart by prompt, plan and column."""
    index = torch.tensor(indices, dtype=torch.long)
    place = torch.arange(len(PLANS) * len(METRICS)).view(len(PLANS), len(METRICS))
    return index, (index[:, None, None] * 100 + place).float()


def test_a_prompt_counts_once_and_order_is_the_index():
    scores = GraftScores(PLANS)
    scores.update(*rows([7, 2]))
    scores.update(*rows([0, 2]))
    assert torch.equal(scores.compute(), rows([0, 2, 7])[1].double())
    scores.reset()
    scores.update(*rows([5]))
    assert torch.equal(scores.compute(), rows([5])[1].double())


SHARES = {
    "even": ([0, 2, 4], [1, 3, 5]),
    "uneven": ([0], [1, 2, 3, 4, 5]),
    "duplicates": ([0, 2, 4, 5], [1, 3, 5, 0]),
    "empty": ([0, 1, 2, 3, 4, 5], []),
    "empty first": ([], [5, 4, 3, 2, 1, 0]),
}


def _process(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        scores = GraftScores(PLANS)
        for index in shares[rank]:
            scores.update(*rows([index]))
        if not shares[rank]:
            scores.update(torch.zeros(0), torch.zeros(0, len(PLANS), len(METRICS)))
        torch.save(scores.compute(), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(_process, (os.environ["MASTER_PORT"], str(tmp_path)), nprocs=2, start_method="fork")
    expected = rows(range(6))[1].double()
    for name in SHARES:
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert torch.equal(found, expected), (name, rank)
