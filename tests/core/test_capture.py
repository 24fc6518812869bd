"""What a capture keeps, against Hugging Face's own hidden states and hooks put on by hand."""

from __future__ import annotations

import pytest
import torch
from changes import IDS, Add, close, logits

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import Compose
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Last, Span
from lightning_interp.errors import RecipeError
from lightning_interp.testing import FAMILIES, tiny_model

POST = Site("resid_post", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_columns_or_the_chosen_tokens(family):
    model = tiny_model(family)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    whole, chosen = ActivationCapture([POST]), ActivationCapture([POST], positions=Span(0, 2) | Last())
    with Compose(whole, chosen).attach(model), torch.no_grad():
        hidden = model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    assert torch.equal(whole.activations[POST], hidden)
    by_hand = torch.stack([hidden[0, 2], hidden[0, 3], hidden[0, 4], hidden[1, 0], hidden[1, 1], hidden[1, 4]])
    assert torch.equal(chosen.activations[POST], by_hand)


def test_every_pass_of_a_generation():
    model, reader = tiny_model("gpt2"), ActivationCapture([POST, Site("logits")], keep="all", positions=Last())
    with reader.attach(model):
        out = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    assert [x.shape for x in reader.history[POST]] == [(2, 32)] * 3
    close(reader.activations[POST], reader.history[POST][-1])
    new = torch.stack([x.argmax(-1) for x in reader.history[Site("logits")]], dim=1)
    assert torch.equal(new, out[:, 5:])
    reader.clear()
    assert reader.activations == reader.history == {}


def test_the_last_pass_is_kept_unless_all_are_wanted():
    model, reader = tiny_model("llama"), ActivationCapture([POST])
    with reader.attach(model):
        logits(model)
        logits(model, IDS[:, :2])
    assert reader.activations[POST].shape == (2, 2, 32)
    assert reader.history == {}


def test_logits_of_the_last_columns_only():
    model, reader = tiny_model("llama"), ActivationCapture([Site("logits")], positions=Span(3, 5))
    with reader.attach(model), torch.no_grad():
        whole = model(IDS).logits
        model(IDS, logits_to_keep=1)
    close(reader.activations[Site("logits")], whole[:, 4])


def test_copies_are_detached_and_nobody_elses():
    model, reader = tiny_model("llama"), ActivationCapture([POST])
    with reader.attach(model):
        out = model(IDS).logits
        kept = reader.activations[POST]
        assert not kept.requires_grad
        before = kept.clone()
        kept.zero_()
        again = model(IDS).logits
    assert torch.equal(out, again)
    assert torch.equal(reader.activations[POST], before)
    out.sum().backward()  # the graph is whole


def test_what_inference_mode_gave_can_be_trained_on():
    model, reader = tiny_model("llama"), ActivationCapture([POST, Site("attn_in", 0)])
    with reader.attach(model), torch.inference_mode():
        model(IDS)
    for kept in reader.activations.values():
        assert not kept.is_inference()
        weight = torch.ones(32, requires_grad=True)
        (kept * weight).sum().backward()
        assert weight.grad is not None


def test_what_another_part_wrote_is_seen_in_order():
    model = tiny_model("llama")
    before, after = ActivationCapture([POST]), ActivationCapture([POST])
    change = Add(POST)
    with Compose(before, change, after).attach(model):
        logits(model)
    close(after.activations[POST], before.activations[POST] + change.vector)


def test_gradient_checkpointing_is_one_pass():
    sites = [Site("attn_in", 1), Site("linear:up", 1), POST]
    reader, model = ActivationCapture(sites, keep="all"), tiny_model("llama").train()
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on({"use_reentrant": False})
    with reader.attach(model):
        first = model(IDS, use_cache=False).logits.sum()
        model(IDS[:, :3], use_cache=False).logits.sum().backward()
        first.backward()
    for site in sites:
        assert [x.shape[1] for x in reader.history[site]] == [5, 3]


def test_copies_can_go_elsewhere():
    model, reader = tiny_model("llama"), ActivationCapture([POST], device="meta")
    with reader.attach(model):
        logits(model)
    assert reader.activations[POST].device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": []}, r"ActivationCapture\(sites=\[\]\) reads nothing"),
        ({"sites": [POST], "keep": "first"}, r"ActivationCapture\(keep='first'\) is unknown; expected 'last' or 'all'"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        ActivationCapture(**arguments)
