"""Attaching, what reaches a transform, what it changes (against edited weights), and what is taken off again."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from changes import IDS, VECTOR, Add, close, logits
from torch import nn

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import (
    Attachment,
    Compose,
    Hook,
    first_input,
    hook_site,
    join_output,
    split_output,
)
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Last, Span
from lightning_interp.errors import (
    IncompatibleModelError,
    PositionError,
    RecipeError,
    SiteError,
)
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import FAMILIES, tiny_model, tiny_pair
from lightning_interp.testing.snapshot import snapshot


class Scale(Add):
    def transform(self, site, x, step):
        return x * self.vector.to(x)


# What it changes: adding at a site equals adding to the bias of the module that writes there


BIASES = {
    "gpt2": {
        Site("attn_in", 1): "transformer.h.1.ln_1.bias",
        Site("attn_out", 1): "transformer.h.1.attn.c_proj.bias",
        Site("mlp_in", 2): "transformer.h.2.ln_2.bias",
        Site("mlp_out", 2): "transformer.h.2.mlp.c_proj.bias",
        Site("resid_post", 2): "transformer.h.2.mlp.c_proj.bias",
        Site("resid_pre", 3): "transformer.h.2.mlp.c_proj.bias",
        Site("final_norm"): "transformer.ln_f.bias",
        Site("linear:down", 0): "transformer.h.0.mlp.c_proj.bias",
    },
    "gpt_neox": {
        Site("attn_in", 1): "gpt_neox.layers.1.input_layernorm.bias",
        Site("attn_out", 1): "gpt_neox.layers.1.attention.dense.bias",
        Site("mlp_in", 1): "gpt_neox.layers.1.post_attention_layernorm.bias",
        Site("mlp_out", 0): "gpt_neox.layers.0.mlp.dense_4h_to_h.bias",
        Site("resid_post", 3): "gpt_neox.layers.3.attention.dense.bias",
    },
    "opt": {
        Site("attn_in", 2): "model.decoder.layers.2.self_attn_layer_norm.bias",
        Site("attn_out", 2): "model.decoder.layers.2.self_attn.out_proj.bias",
        Site("linear:q", 1): "model.decoder.layers.1.self_attn.q_proj.bias",
        Site("linear:down", 1): "model.decoder.layers.1.fc2.bias",
        Site("resid_post", 1): "model.decoder.layers.1.fc2.bias",
    },
    "bloom": {
        Site("linear:o", 1): "transformer.h.1.self_attention.dense.bias",
        Site("linear:embed"): "transformer.word_embeddings_layernorm.bias",
        Site("resid_pre", 0): "transformer.word_embeddings_layernorm.bias",
        Site("attn_in", 2): "transformer.h.2.input_layernorm.bias",
        Site("mlp_in", 2): "transformer.h.2.post_attention_layernorm.bias",
    },
}


@pytest.mark.parametrize(
    ("family", "site"), [(family, site) for family, sites in BIASES.items() for site in sites], ids=str
)
def test_adding_equals_a_changed_bias(family, site):
    model, edited = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        edited.get_parameter(BIASES[family][site]).add_(VECTOR)
    with Add(site).attach(model):
        found = logits(model)
    close(found, logits(edited), 2e-5)
    assert not torch.allclose(found, logits(model))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_gradients_of_an_added_vector_are_those_of_the_bias(family):
    site, name = next(iter(BIASES[family].items()))
    model, vector = tiny_model(family), VECTOR.clone().requires_grad_()
    with Add(site, vector).attach(model):
        model(IDS, labels=IDS).loss.backward()
    edited = tiny_model(family)
    with torch.no_grad():
        edited.get_parameter(name).add_(VECTOR)
    edited(IDS, labels=IDS).loss.backward()
    close(vector.grad, edited.get_parameter(name).grad)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and key != name:
            close(parameter.grad, edited.get_parameter(key).grad, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_change_at_one_token_reaches_only_what_follows(family):
    model = tiny_model(family)
    plain = logits(model)
    for at in (0, 3, 4):
        with Add(Site("resid_post", 1), positions=Span(at)).attach(model):
            moved = (logits(model) - plain).abs().amax(-1) > 1e-6
        assert moved.tolist() == [[column >= at for column in range(5)]] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["attn_in", "mlp_in", "resid_pre"])
def test_inputs_are_replaced_however_they_are_passed(family, kind):
    """Blocks hand inputs over by place or by name; what the module receives must be the new one."""
    model = tiny_model(family)
    model_map = ModelMap.build(model)
    try:
        point = model_map.module(Site(kind, 2))
    except SiteError:
        assert (family, kind) == ("opt", "mlp_in")
        return
    received = {}
    with Add(Site(kind, 2)).attach(model):
        handle = point.module.register_forward_hook(
            lambda _, args, kwargs, out: received.update(new=first_input(args, kwargs)[0]), with_kwargs=True
        )
        reader = ActivationCapture([Site(kind, 2)])
        logits(model)
    handle.remove()
    with reader.attach(model):
        logits(model)
    close(received["new"], reader.activations[Site(kind, 2)] + VECTOR)


def test_tuples_keep_what_came_with_the_activation():
    x = torch.ones(2)
    assert split_output(x) == (x, None)
    assert split_output((x, 1, None)) == (x, (1, None))
    assert join_output(x, None) is x
    assert join_output(x, (1, None)) == (x, 1, None)
    _, put = first_input((x, "mask"), {"scale": 2})
    assert put(0) == ((0, "mask"), {"scale": 2})
    found, put = first_input((), {"past": None, "hidden": x, "other": torch.zeros(1)})
    assert found is x
    assert put(0)[1] == {"past": None, "hidden": 0, "other": torch.zeros(1)}


def test_returning_the_same_tensor_changes_no_bit_and_no_object():
    class Same(Add):
        def transform(self, site, x, step):
            return x

    model, seen = tiny_model("bloom"), []
    model.transformer.h[1].register_forward_hook(lambda _, __, out: seen.append(out))
    with Same(Site("resid_post", 1)).attach(model):
        model.transformer.h[1].register_forward_hook(lambda _, __, out: seen.append(out))
        logits(model)
    assert seen[0] is seen[1]


# Composition


def test_parts_act_in_order():
    model = tiny_model("llama")
    site = Site("resid_post", 1)
    add, scale = Add(site), Scale(site, torch.full((32,), 3.0))
    reader = ActivationCapture([site])
    with reader.attach(model):
        logits(model)
    plain = reader.activations[site]
    for parts, expected in (((add, scale), (plain + VECTOR) * 3), ((scale, add), plain * 3 + VECTOR)):
        for together in (Compose(*parts, reader), Compose(Compose(*parts), reader)):
            with together.attach(model):
                logits(model)
            close(reader.activations[site], expected)
            x = torch.ones(1, 2, 32)
            assert list(together.sites(ModelMap.build(model))) == [site]
            direct = parts[1].transform(site, parts[0].transform(site, x, _step(x)), _step(x))
            close(together.transform(site, x, _step(x)), direct)


def _step(x):
    from lightning_interp.core.tokens.step import StepContext

    return StepContext(*x.shape[:2])


def test_a_part_acts_on_its_own_sites_only():
    both = Compose(Add(Site("resid_post", 0)), Add(Site("resid_post", 1), 10 * VECTOR))
    assert list(both.sites(ModelMap.build(tiny_model()))) == [Site("resid_post", 0), Site("resid_post", 1)]
    x = torch.zeros(1, 2, 32)
    close(both.transform(Site("resid_post", 1), x, _step(x)), (10 * VECTOR).expand(1, 2, 32))
    assert both.transform(Site("resid_post", 2), x, _step(x)) is x


def test_composition_reads_weights_if_a_part_does():
    recipient, donor = tiny_pair("llama")
    graft = Graft(donor, GraftPlan.at(Last()))
    assert Compose(Add(Site("logits")), graft).reads_weights
    assert not Compose(Add(Site("logits"))).reads_weights
    together = Compose(graft, Add(Site("resid_post", 0)))
    with graft.attach(recipient), Add(Site("resid_post", 0)).attach(recipient):
        expected = logits(recipient)
    with together.attach(recipient):
        assert torch.equal(logits(recipient), expected)


def test_refusals_of_parts_are_refusals_of_the_whole():
    model = tiny_model("bloom")
    before = snapshot(model)
    with pytest.raises(SiteError, match=r"BloomMLP .* mlp_out\.1"):
        Compose(Add(Site("resid_post", 0)), Add(Site("mlp_out", 1))).attach(model)
    assert snapshot(model) == before
    with pytest.raises(RecipeError, match=r"Compose\(\) got no interventions"):
        Compose()


@pytest.mark.parametrize("execution", ["auto", "overwrite", "partition", "dense"])
@pytest.mark.parametrize("site", [Site("mlp_in", 1), Site("mlp_out", 1), Site("linear:moe", 2)], ids=str)
def test_a_graft_and_a_change_on_one_module(site, execution):
    """The change acts on every row, whichever was attached first and whoever computed the row."""
    recipient, donor = tiny_pair("qwen2_moe")
    graft = Graft(donor, GraftPlan.at(Span(2, 5), components="moe"), execution=execution)
    results = []
    for parts in ((graft, Add(site)), (Add(site), graft), (graft,)):
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.attach(recipient))
            results.append(logits(recipient))
    close(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


# The attachment


def test_life_of_an_attachment():
    model, done = tiny_model("llama"), []
    attachment = Add(Site("resid_post", 0)).attach(model)
    attachment.on_remove(lambda: done.append(1))
    assert attachment.active
    attachment.remove()
    attachment.remove()
    assert not attachment.active
    assert done == [1]
    with pytest.raises(PositionError, match=r"ran outside of LlamaModel\.forward"):
        _ = attachment.step


def test_attach_takes_a_ready_map():
    model = tiny_model("gpt2")
    model_map = ModelMap.build(model)
    with Add(Site("resid_post", 0)).attach(model_map) as attachment:
        assert attachment.model_map is model_map
        changed = logits(model)
    with Add(Site("resid_post", 0)).attach(nn.ModuleList([model, tiny_model("llama")]), target="0"):
        assert torch.equal(logits(model), changed)


def test_blocks_of_an_old_family_that_are_named():
    """Blocks without gradient checkpointing, and one more output than the activation."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    site = Site("resid_post", 0)
    reader = ActivationCapture([site])
    with reader.attach(ModelMap.build(model, blocks="transformer.h")), torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(reader.activations[site], hidden)
    with Add(site).attach(ModelMap.build(model, blocks="transformer.h")):
        changed = model(IDS).logits
    assert not torch.allclose(changed, logits(model))


def test_a_module_that_runs_outside_of_its_model():
    model = tiny_model("llama")
    with Add(Site("linear:up", 0), torch.ones(64)).attach(model):
        with pytest.raises(PositionError, match=r"A hooked module ran outside of LlamaModel\.forward.*whole model"):
            model.model.layers[0].mlp(torch.zeros(1, 2, 32))
        logits(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), r"at mlp_out\.1 is torch\.float64 \[2, 5, 32\], but model\.layers\.1\.mlp of Llama"),
        (lambda x: x[:, 1:], r"is torch\.float32 \[2, 4, 32\], .* has torch\.float32 \[2, 5, 32\] there"),
        (lambda x: x[..., :1].expand(2, 5, 1), r"\[2, 5, 1\], but .*Keep the shape"),
    ],
)
def test_activations_of_another_kind(change, message):
    class Wrong(Add):
        def transform(self, site, x, step):
            return change(x)

    model = tiny_model("llama")
    with Wrong(Site("mlp_out", 1)).attach(model), pytest.raises(IncompatibleModelError, match=message):
        logits(model)


def test_autocast_keeps_the_type_of_each_site():
    model = tiny_model("llama")
    reader = ActivationCapture([Site("resid_post", 1), Site("linear:q", 1)])
    both = Compose(Add(Site("resid_post", 1)), Add(Site("linear:q", 1)), reader)
    with both.attach(model), torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert {site.kind: x.dtype for site, x in reader.activations.items()} == {
        "resid_post": torch.float32,
        "linear:q": torch.bfloat16,
    }


def test_hooks_of_one_attachment_do_not_travel():
    calls = []
    hook = Hook(lambda *args: calls.append(args) or "out")
    assert hook(1, 2) == "out"
    for twin in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook)), Hook()):  # noqa: S301
        assert twin(1, 2) is None
    assert calls == [(1, 2)]


def test_hook_site_hooks_one_site():
    model, seen = tiny_model("gpt2"), []
    attachment = Attachment(ModelMap.build(model))
    with attachment:
        hook_site(attachment, Site("logits"), lambda x, step: seen.append((x.shape, step.length)) or x)
        logits(model)
        with pytest.raises(SiteError, match="has layers 0 to 3, but got layer 7"):
            hook_site(attachment, Site("resid_pre", 7), lambda x, step: x)
    assert seen == [((2, 5, 261), 5)]
