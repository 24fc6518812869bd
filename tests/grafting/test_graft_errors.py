"""What a graft refuses, with the user's value in the message, and before a hook is registered where it can be known."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_interp.core.tokens.positions import FromBatch, Last, Span, Substring
from lightning_interp.errors import (
    CompiledModelError,
    IncompatibleModelError,
    PositionError,
    RecipeError,
    SiteError,
    UnsupportedStrategyError,
)
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan, GraftRule
from lightning_interp.testing import byte_tokenizer, tiny_model, tiny_pair

IDS = torch.arange(20, 28)[None]
LAST = GraftPlan.at(Last(), "BLOCK")


@torch.no_grad()
def run(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


@pytest.fixture
def refused(monkeypatch, hook_count):
    """``refused(graft, recipient, error, match)``: attaching raises, and not one hook was registered before."""

    def check(graft, recipient, error, match):
        registered, before = [], hook_count(recipient)
        for name in ("register_forward_pre_hook", "register_forward_hook"):
            monkeypatch.setattr(nn.Module, name, lambda module, *_, **__: registered.append(type(module).__name__))
        with pytest.raises(error, match=match):
            graft.attach(recipient)
        monkeypatch.undo()
        assert registered == []
        assert hook_count(recipient) == before

    return check


# Wrong arguments.


def test_unknown_decode(pairs):
    with pytest.raises(RecipeError, match=r"decode='rolling'.*like_last"):
        Graft(pairs("llama")[1], LAST, decode="rolling")


def test_unknown_execution(pairs):
    with pytest.raises(RecipeError, match=r"execution='fast'.*partition"):
        Graft(pairs("llama")[1], LAST, execution="fast")


def test_no_plan(pairs):
    with pytest.raises(RecipeError, match=r"plan=\[\]"):
        Graft(pairs("llama")[1], [])


def test_misspelt_source(pairs):
    plan = GraftPlan.at(Last(), "BLOCK", source="realtion")
    with pytest.raises(RecipeError, match="'realtion', but the donors are task, relation"):
        Graft({"task": pairs("llama")[1], "relation": pairs("llama")[1]}, [GraftPlan(), plan])


def test_a_rule_without_layers_needs_no_donor(pairs):
    recipient, donor = pairs("llama")
    plan = GraftPlan((GraftRule(Span(0, 4), "BLOCK", source="task"), GraftRule(Span(0), layers="none")))
    with Graft({"task": donor}, plan).attach(recipient):
        named = run(recipient)
    with Graft(donor, GraftPlan.at(Span(1, 4), "BLOCK")).attach(recipient):
        assert torch.equal(run(recipient), named)


@pytest.mark.parametrize(("donor", "kind"), [(3, "int"), (None, "NoneType"), (OrderedDict(sft=["x"]), "list")])
def test_what_is_no_donor(donor, kind):
    with pytest.raises(IncompatibleModelError, match=f"is a {kind}; expected a model"):
        Graft(donor, LAST)


def test_a_donor_without_a_decoder():
    with pytest.raises(SiteError, match="Sequential holds no Hugging Face model"):
        Graft(nn.Sequential(nn.Linear(2, 2)), LAST)


# Models that do not fit.


@pytest.mark.parametrize(
    ("family", "component"),
    [
        ("gpt2", "gate"),
        ("gpt_neox", "pos_embed"),
        ("opt", "gate"),
        ("llama", "qkv"),
        ("llama", "moe"),
        ("qwen2_moe", "up"),
    ],
)
def test_a_component_that_the_family_lacks(family, component, pairs, refused):
    recipient, donor = pairs(family)
    plan = GraftPlan((GraftRule(Last(), "o"), GraftRule(Last(), ("q", component))))
    refused(
        Graft(donor, plan), recipient, SiteError, f"no component '{component}' .* It has: embed, .*ln_attn, q, k, v"
    )


def test_a_layer_that_the_model_lacks(pairs, refused):
    recipient, donor = pairs("llama")
    refused(Graft(donor, GraftPlan.at(Last(), "q", "2-7")), recipient, SiteError, "'2-7' of a model with layers 0 to 3")


def test_a_donor_of_other_shapes(pairs, refused):
    wide = tiny_model("llama", intermediate_size=48)
    match = (
        r"12 tensors: model.layers.0.mlp.gate_proj.weight is \(64, 32\) in the recipient and \(48, 32\) in the donor"
    )
    refused(Graft(wide, LAST), pairs("llama")[0], IncompatibleModelError, match)


def test_a_donor_with_another_vocabulary(pairs, refused):
    resized = tiny_model("llama")
    resized.resize_token_embeddings(264, mean_resizing=False)
    match = r"embed_tokens.weight is \(261, 32\) in the recipient and \(264, 32\) in the donor.*resized in both"
    refused(Graft(resized, LAST), pairs("llama")[0], IncompatibleModelError, match)


def test_a_donor_with_more_layers(pairs, refused):
    match = "model.layers.4.self_attn.q_proj.weight is missing in the recipient"
    refused(Graft(tiny_model("llama", num_hidden_layers=5), LAST), pairs("llama")[0], IncompatibleModelError, match)


def test_a_donor_without_biases(pairs, refused):
    match = "self_attn.q_proj.bias is missing in the donor"
    donor = tiny_model("opt", enable_bias=False)
    refused(Graft(donor, LAST), pairs("opt")[0], IncompatibleModelError, match)


def test_a_donor_of_another_family(pairs, refused):
    match = "Recipient is a 'llama' and donor a 'qwen3' model"
    refused(Graft(pairs("qwen3")[1], LAST), pairs("llama")[0], IncompatibleModelError, match)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads=4 and donor .*=8"),
        ({"hidden_act": "gelu"}, "hidden_act='silu' and donor hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters=.*rope_theta': 5.0"),
    ],
)
def test_a_donor_whose_weightless_settings_differ(setting, value, pairs, refused):
    refused(Graft(tiny_model("llama", **setting), LAST), pairs("llama")[0], IncompatibleModelError, value)


def test_the_recipient_as_its_own_donor(refused):
    model = tiny_model("llama")
    refused(Graft(model, LAST), model, IncompatibleModelError, "same LlamaForCausalLM object")


def test_modules_that_two_models_share_stay_as_they_are(pairs):
    recipient, donor = tiny_pair("llama")
    donor.model.layers[1] = recipient.model.layers[1]
    with Graft(donor, GraftPlan.whole()).attach(recipient):
        grafted = run(recipient)
    assert torch.equal(grafted, run(donor))


def test_parameters_outside_of_every_component(refused):
    recipient, donor = tiny_pair("opt", word_embed_proj_dim=16)
    match = "OPTForCausalLM has parameters outside.*project_in.weight, .*project_out.weight"
    refused(Graft(donor, GraftPlan.whole()), recipient, SiteError, match)
    refused(Graft(donor, LAST.cell_complement()), recipient, SiteError, match)
    with Graft(donor, LAST).attach(recipient):
        assert run(recipient).shape == (1, 8, 261)


def test_compiled_recipients(refused):
    recipient, donor = tiny_pair("llama")
    refused(
        Graft(donor, LAST),
        torch.compile(recipient, backend="eager"),
        CompiledModelError,
        "'OptimizedModule' is compiled",
    )
    inside = copy.deepcopy(recipient)
    inside.model.layers[1].compile(backend="eager")
    refused(Graft(donor, LAST), inside, CompiledModelError, "'model.layers.1' is compiled")
    recipient.compile(backend="eager")
    refused(Graft(donor, LAST), recipient, CompiledModelError, "'LlamaForCausalLM' is compiled")


@pytest.mark.parametrize("which", ["recipient", "donor"])
def test_sharded_models(which, refused, tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    recipient, donor = tiny_pair("llama")
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = (recipient if which == "recipient" else donor).model.layers[1].mlp.up_proj
        module.weight = nn.Parameter(distribute_tensor(module.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
        match = "model.layers.1.mlp.up_proj.weight of LlamaForCausalLM is sharded"
        refused(Graft(donor, LAST), recipient, UnsupportedStrategyError, match)
    finally:
        destroy_process_group()


# Two grafts.


def test_two_grafts_that_contradict_each_other(hook_count):
    recipient, donor = tiny_pair("llama")
    _, other = tiny_pair("llama")
    with Graft({"one": donor}, GraftPlan.at(Last(), "BLOCK", source="one")).attach(recipient):
        before, first = hook_count(recipient), run(recipient)
        with Graft({"two": other}, GraftPlan.at(Span(7), "O", source="two")).attach(recipient):
            match = (
                r"Row 0, token 7 of model.layers.0.self_attn.o_proj belongs to two holders with different weights: "
                r"Graft\('one'\) claims it for 'one' and Graft\('two'\) claims it for 'two'"
            )
            with pytest.raises(RecipeError, match=match):
                run(recipient)
        assert hook_count(recipient) == before
        assert torch.equal(run(recipient), first)
    assert hook_count(recipient) == 0


def test_grafts_of_different_modules_add_up(pairs, hook_count):
    recipient, donor = pairs("llama")
    with Graft(donor, GraftPlan()).attach(recipient):  # nothing to graft: only the three that watch the pass
        assert hook_count(recipient) == 3
    queries, outputs = (GraftPlan.at(Last(2), name) for name in "qo")
    with Graft(donor, queries).attach(recipient), Graft(donor, outputs).attach(recipient):
        together = run(recipient)
    with Graft(donor, GraftPlan.at(Last(2), ["q", "o"])).attach(recipient):
        assert torch.equal(run(recipient), together)


# What only a forward pass can show.


@pytest.fixture
def fails(hook_count):
    """``fails(graft, error, match, ids, ...)``: the forward pass raises, and nothing stays behind."""

    def check(graft, error, match, ids=IDS, *, recipient, masks=None, tokenizer=None, **kwargs):
        plain = run(recipient, ids)
        with graft.attach(recipient, tokenizer=tokenizer) as attachment:
            attachment.batch = masks
            with pytest.raises(error, match=match):
                run(recipient, ids, **kwargs)
        assert hook_count(recipient) == 0
        assert torch.equal(run(recipient, ids), plain)

    return check


def test_logits_to_keep_as_indices(pairs, fails):
    recipient, donor = pairs("llama")
    keep = torch.tensor([7])
    fails(Graft(donor, LAST), PositionError, "logits_to_keep as a tensor", recipient=recipient, logits_to_keep=keep)


@pytest.mark.parametrize("rows", [1, 3])
def test_plans_for_another_number_of_rows(rows, pairs, fails):
    recipient, donor = pairs("llama")
    ids = IDS.expand(rows, -1)
    fails(Graft(donor, [LAST, LAST]), PositionError, f"for 2 rows, but the batch has {rows}", ids, recipient=recipient)


def test_a_position_outside_of_the_prompt(pairs, fails):
    recipient, donor = pairs("llama")
    plan = GraftPlan.at(Span(3, 9), "BLOCK")
    fails(Graft(donor, plan), PositionError, r"Span\(3, 9\) .*row 0, which has 8 tokens", recipient=recipient)


def test_a_plan_asks_its_own_rows_only(pairs, fails):
    recipient, donor = pairs("llama")
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[2, :5] = 0
    ids, near, far = IDS.expand(3, -1), GraftPlan.at(Span(1), "BLOCK"), GraftPlan.at(Span(5, 7), "BLOCK")
    with Graft(donor, [near, far, near]).attach(recipient):
        run(recipient, ids, attention_mask=mask)
    match = r"Span\(5, 7\) .*row 2, which has 3 tokens"
    fails(Graft(donor, [near, near, far]), PositionError, match, ids, recipient=recipient, attention_mask=mask)


def test_a_text_is_looked_for_in_its_own_rows_only(pairs, fails):
    recipient, donor = pairs("llama")
    tokenizer = byte_tokenizer()
    ids = tokenizer(["Ada met Bob", "Eve met Tom", "Sam met Kim"], return_tensors="pt").input_ids
    plans = [GraftPlan.at(Substring(name), "BLOCK") for name in ("Ada", "Tom", "Kim")]
    by_index = [GraftPlan.at(Span(start, start + 3), "BLOCK") for start in (0, 8, 8)]
    with Graft(donor, plans).attach(recipient, tokenizer=tokenizer):
        named = run(recipient, ids)
    with Graft(donor, by_index).attach(recipient):
        assert torch.equal(run(recipient, ids), named)
    match = re.escape("'Zoe' does not occur in row 2: 'Sam met Kim'")
    missing = [*plans[:2], GraftPlan.at(Substring("Zoe"), "BLOCK")]
    fails(Graft(donor, missing), PositionError, match, ids, recipient=recipient, tokenizer=tokenizer)


def test_text_without_a_tokenizer(pairs, fails):
    recipient, donor = pairs("llama")
    plan = GraftPlan.at(Substring("Ada"), "BLOCK")
    fails(Graft(donor, plan), PositionError, r"Substring\(text='Ada'.*tokenizer=", recipient=recipient)


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        (None, "no mask 'FE'; it holds: nothing"),
        ({"fe": torch.ones(2, 8)}, "no mask 'FE'; it holds: fe"),
        ({"FE": torch.ones(1, 8)}, r"Mask 'FE' is \(1, 8\); expected a tensor \[B, T\] with B=2"),
        ({"FE": torch.ones(2, 9)}, "Mask 'FE' covers 9 columns, but the prompt has 8"),
        ({"FE": torch.ones(2)}, r"Mask 'FE' is \([12],\); expected a tensor \[B, T\]"),
        ({"FE": "x"}, "Mask 'FE' is str; expected a tensor"),
    ],
)
@pytest.mark.parametrize("per_row", [False, True])
def test_masks_of_the_batch_that_do_not_fit(per_row, masks, match, pairs, fails):
    recipient, donor = pairs("llama")
    plan = GraftPlan.at(FromBatch("FE"), "BLOCK")
    graft = Graft(donor, [plan, LAST] if per_row else plan)
    fails(graft, PositionError, match, IDS.expand(2, -1), recipient=recipient, masks=masks)
