from __future__ import annotations

import math

import pytest
import torch

from lightning_interp.errors import RecipeError
from lightning_interp.models.training.optimisation import Optimisation, adamw, schedule_of


def rates(schedule, warmup, total, steps):
    settings = Optimisation(lr=2.0, schedule=schedule, warmup_steps=warmup)
    optimizer = adamw([torch.nn.Parameter(torch.zeros(2, 2))], settings)
    scheduler = schedule_of(optimizer, settings, total_steps=total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return seen


def test_learning_rates():
    assert rates("constant", 0, math.inf, 3) == [2, 2, 2]
    assert rates("constant", 4, math.inf, 6) == [0, 0.5, 1, 1.5, 2, 2]
    assert rates("linear", 2, 6, 7) == [0, 1, 2, 1.5, 1, 0.5, 0]
    assert rates("linear", 0, 4, 5) == [2, 1.5, 1, 0.5, 0]
    assert rates("cosine", 0, 4, 5) == pytest.approx([1 + math.cos(math.pi * step / 4) for step in range(5)])


def test_a_run_without_end_has_no_schedule_that_falls():
    with pytest.raises(RecipeError, match=r"schedule='cosine' falls to zero by the last step, but this run has none"):
        rates("cosine", 0, math.inf, 1)


def test_matrices_decay_and_vectors_do_not():
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    settings = Optimisation(lr=1.0, weight_decay=0.3, betas=(0.5, 0.6))
    groups = adamw([matrix, frozen, vector], settings).param_groups
    assert [
        (len(g["params"]), g["params"][0] is p, g["weight_decay"])
        for g, p in zip(groups, (matrix, vector), strict=True)
    ] == [
        (1, True, 0.3),
        (1, True, 0.0),
    ]
    assert groups[0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"lr": 0.0}, "lr=0.0: expected a number above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1: expected at least 0"),
        ({"schedule": "step"}, "schedule='step': expected one of constant, linear, cosine"),
    ],
)
def test_wrong_settings_are_refused(setting, match):
    with pytest.raises(RecipeError, match=match):
        Optimisation(**{"lr": 1e-3} | setting)
