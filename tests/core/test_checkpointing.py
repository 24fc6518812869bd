"""Gradient checkpointing: a block that is run again must see the tokens of its own pass."""

from __future__ import annotations

import pytest
import torch
from changes import IDS, Add, close, logits

from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Last, Span
from lightning_interp.errors import PositionError, UnsupportedStrategyError
from lightning_interp.testing import tiny_model


def checkpointed(family="llama", **settings):
    model = tiny_model(family).train()
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on(settings)
    return model


def gradients(model, batches, intervention, between=()):
    model.zero_grad()
    with intervention.attach(model):
        losses = [model(ids, labels=ids, use_cache=False).loss for ids in batches]
        for ids in between:
            logits(model, ids)
        torch.autograd.backward([(i + 1) * loss for i, loss in enumerate(losses)])
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_each_replay_sees_its_own_pass(reentrant, order):
    """Passes of other lengths and a pass without gradients lie between forward and backward."""
    batches = [IDS[:, :4], IDS, IDS[:1, :3]][::order]
    change = Compose(Add(Site("attn_in", 1), positions=Last(2)), Add(Site("linear:up", 2), torch.ones(64), Span(1)))
    plain = gradients(tiny_model().train(), batches, change)
    replayed = gradients(checkpointed(use_reentrant=reentrant), batches, change, between=[IDS[:, :2]])
    for name, value in plain.items():
        close(replayed[name], value)


def test_a_pass_within_a_backward_is_its_own():
    model = tiny_model("llama").train()
    seen = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            logits(model, IDS[:, :2])
            return grad

    class Probe(Add):
        def transform(self, site, x, step):
            seen.append(step.length)
            return x

    with Probe(Site("resid_post", 0)).attach(model):
        Nested.apply(model(IDS).logits).sum().backward()
    assert seen == [5, 2]


def test_replays_of_passes_that_are_not_known():
    change = Add(Site("attn_in", 1))
    model = checkpointed(use_reentrant=False)
    before = model(IDS, use_cache=False).logits.sum()
    with change.attach(model):
        with pytest.raises(PositionError, match="ran outside of LlamaModel"):
            before.backward()
        first = model(IDS, use_cache=False).logits.sum()
        for _ in range(32):
            model(IDS[:1, :1], use_cache=False)
        with pytest.raises(UnsupportedStrategyError, match=r"replays a forward pass of LlamaModel .* 32 passes ago"):
            first.backward()


def test_nothing_is_remembered_without_checkpointing():
    model = tiny_model("llama").train()
    with Add(Site("attn_in", 1)).attach(model) as attachment:
        for _ in range(3):
            model(IDS)
        assert len(attachment._passes) == 0
    model = checkpointed(use_reentrant=False)
    with Add(Site("attn_in", 1)).attach(model) as attachment:
        model(IDS, use_cache=False)
        logits(model)
        assert len(attachment._passes) == 1
    assert len(attachment._passes) == 0
