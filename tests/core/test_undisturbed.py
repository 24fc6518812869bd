"""A block in the middle of a run leaves modes, random states and gradients as they were, also when it fails."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from lightning_interp.core.measure.undisturbed import evaluating, undisturbed


def model():
    made = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 1))
    made[1].eval()
    made[2].requires_grad_(False)
    made(torch.ones(1, 2)).sum().backward()
    return made


def state(made):
    modes = [part.training for part in made.modules()]
    gradients = [None if p.grad is None else p.grad.tolist() for p in made.parameters()]
    draws = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return modes, [p.requires_grad for p in made.parameters()], gradients, draws


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_everything_is_as_before(gradients, error):
    made = model()
    before = state(made)
    with suppress(ZeroDivisionError, KeyboardInterrupt), undisturbed(made, gradients=gradients):
        assert not any(part.training for part in made.modules())
        assert torch.is_grad_enabled() == gradients
        made.train().requires_grad_(True)
        torch.rand(3), random.random(), np.random.rand(3)  # noqa: S311
        if gradients:
            assert made[0].weight.grad is None
            made(torch.ones(1, 2)).sum().backward()
        if error:
            raise error
    assert state(made) == before


def test_several_models_are_evaluated_and_nothing_else_changes():
    one, other = model(), model().eval()
    with evaluating(one, other):
        assert not one.training
        assert torch.is_grad_enabled()
    assert (one.training, one[1].training, other.training) == (True, False, False)
