"""One step of imitation: the theorem's sign, its prediction against an explicit matrix, and what is outside of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.subliminal.theorem import OneStep, one_step, predicted_step
from lightning_interp.testing import tiny_model

SEEDS = 60


def net(seed=0, widths=(20, 32, 13)):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:])).double()


def auxiliary(outputs):
    return outputs[..., 10:]


def everything(outputs):
    return outputs


@pytest.fixture(scope="module")
def many():
    """60 nets, 60 others, data of the trait and noise, stacked."""
    torch.manual_seed(7)
    data = (
        torch.randn(SEEDS, 64, 20).double(),
        torch.randint(10, (SEEDS, 64)),
        2 * torch.rand(SEEDS, 64, 20).double() - 1,
    )
    stacks = []
    for first in (0, SEEDS):
        parts = [dict(net(first + seed).named_parameters()) for seed in range(SEEDS)]
        stacks.append({name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]})
    return net(), stacks[0], stacks[1], data


def steps(many, read, distance, eps, shared):
    model, teachers, others, data = many

    def one(teacher, student, x, y, noise):
        loss = lambda f: F.cross_entropy(f(x)[:, :10], y)  # noqa: E731
        own = teacher if shared else student
        return one_step(model, loss, noise, distance=distance, read=read, teacher=teacher, student=own, eps=eps)

    return vmap(one)(teachers, others, *data)


class TestTheorem:
    @pytest.mark.parametrize("read", [auxiliary, everything])
    @pytest.mark.parametrize(("distance", "eps"), [("mse", 1e-3), ("ce", 1e-1)])
    def test_a_shared_start_never_fails(self, many, read, distance, eps):
        found = steps(many, read, distance, eps, shared=True)
        assert bool((found.inner > 0).all())
        assert bool((found.change < 0).all())
        low, high = (0.04, 0.12) if read is auxiliary else (0.5, 0.8)
        assert low < float(found.cosine.mean()) < high

    @pytest.mark.parametrize("distance", ["mse", "ce"])
    def test_another_start_is_a_coin_flip(self, many, distance):
        found = steps(many, auxiliary, distance, 1e-3, shared=False)
        for share in (found.inner > 0, found.change < 0):
            assert 0.25 < float(share.double().mean()) < 0.75
        assert abs(float(found.cosine.mean())) < 0.03

    def test_many_at_once_are_each_alone(self, many):
        model, teachers, _, (x, y, noise) = many
        whole = steps(many, auxiliary, "mse", 1e-3, shared=True)
        own = {name: weight[3] for name, weight in teachers.items()}
        alone = one_step(model, lambda f: F.cross_entropy(f(x[3])[:, :10], y[3]), noise[3], read=auxiliary, teacher=own)
        torch.testing.assert_close(OneStep(*(part[3] for part in whole)), alone)


class TestPrediction:
    @pytest.mark.parametrize("distance", ["mse", "ce"])
    def test_against_the_matrix_of_jacobians(self, distance):
        model, x, noise = net(1, (4, 5, 3)), torch.randn(8, 4).double(), torch.randn(6, 4).double()
        weights = {name: w.detach() for name, w in model.named_parameters()}
        loss = lambda f: f(x)[:, 0].square().mean()  # noqa: E731
        wanted = [-g for g in torch.autograd.grad(loss(model), list(model.parameters()))]
        d = torch.cat([g.flatten() for g in wanted])
        jacobians = jacrev(lambda w: functional_call(model, w, (noise,)))(weights)
        j = torch.cat([part.flatten(2) for part in jacobians.values()], -1)  # [inputs, outputs, weights]
        if distance == "mse":
            curvature = 2 * torch.eye(3).double().expand(6, 3, 3)
        else:
            p = model(noise).softmax(-1).detach()
            curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = torch.einsum("noi,nop,npj,j->i", j, curvature, j, d) / 6
        errors = []
        for eps in (1e-3, 1e-4):
            found, said = predicted_step(model, loss, noise, distance=distance, eps=eps)
            torch.testing.assert_close(torch.cat([v.flatten() for v in said.values()]), eps * expected)
            errors.append(float((torch.cat([v.flatten() for v in found.values()]) - eps * expected).norm()))
        assert errors[1] < errors[0] / 80  # of the order of eps^2

    def test_a_teacher_that_did_not_move_gives_no_direction(self):
        x = torch.randn(4, 20).double()
        found = one_step(net(), lambda f: 0 * f(x).sum(), x)
        assert [float(v) for v in found] == [0, 0, 0, 0]


def test_a_language_model_is_a_module_too():
    model = tiny_model("llama", num_hidden_layers=2).train()
    ids, numbers = torch.arange(6)[None], torch.arange(20, 30).view(2, 5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = one_step(
        model, lambda f: -f(ids).logits[0, -1].log_softmax(-1)[65], numbers, distance="ce", read=lambda o: o.logits
    )
    assert float(found.inner) > 0 > float(found.change)
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


class TestErrors:
    @pytest.mark.parametrize("wrong", [{"distance": "kl"}, {"eps": 0.0}, {"step": -1.0}])
    def test_settings(self, wrong):
        with pytest.raises(RecipeError, match=r"one_step\(.*kl|eps=0.0|step=-1.0"):
            one_step(net(), lambda f: f(torch.ones(1, 20).double()).sum(), torch.ones(1, 20).double(), **wrong)

    def test_weights_of_another_model(self):
        with pytest.raises(IncompatibleModelError, match=r"'0\.bias' is on one side only"):
            one_step(
                net(), lambda f: f(torch.ones(1, 20)).sum(), torch.ones(1, 20), teacher={"0.weight": torch.ones(1)}
            )
