"""Several adapters on one base as donors, against full-weight donors that each adapter was merged into."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import Oracle, Rule, assignment, cells_of
from peft import LoraConfig, inject_adapter_in_model

from lightning_interp.core.tokens.positions import All, Last, Span
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.grafting import Graft, GraftPlan, GraftRule
from lightning_interp.testing import tiny_model

NAMES = {"task": "first", "relation": "second"}
LINEAR = {"llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
KINDS = {
    "lora": ({}, {"r": 2}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 6}),
    "dora": ({"use_dora": True}, {}),
    "bias": ({"lora_bias": True}, {}),
    "elsewhere": ({"few": 1}, {"layers_to_transform": [1, 2]}),
}


# What kinds compute depends on the class of the layer; a bias can only be merged into a base that has one.
CASES = [*(("llama", kind) for kind in KINDS if kind != "bias"), ("gpt2", "bias"), ("gpt2", "lora")]


def config(family, few=None, **settings):
    targets = LINEAR[family][: few or None]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **settings}
    return LoraConfig(fan_in_fan_out=family == "gpt2", **options)


def with_adapters(family, settings, base=None):
    """The base with both adapters, and two plain models that one adapter each was merged into."""
    base = base or tiny_model(family)
    model, merged = copy.deepcopy(base), []
    for seed, (name, options) in enumerate(zip(NAMES.values(), settings, strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config(family, **options), model, adapter_name=name)
            shake(model, name)
    for name in NAMES.values():
        alone = copy.deepcopy(model)
        activate(alone, name)
        merged.append(plain(family, alone, name))
    return model.eval(), merged


def shake(model, name):
    """Saved copies and biases start as their originals: move them."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"modules_to_save.{name}" in path or (f".{name}." in path and path.endswith("bias")):
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(1.0).clamp(min=0.1))


def activate(model, *names):
    for module in model.modules():
        if hasattr(module, "set_adapter") and hasattr(module, "adapter_layer_names"):
            module._active_adapter = list(names)


def plain(family, model, name):
    """A model without PEFT layers that computes what this adapter makes of the base."""
    target = tiny_model(family)
    state = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            if name in module.lora_A or name in module.lora_embedding_A:
                module.merge(adapter_names=[name])
            for leaf, tensor in module.get_base_layer().named_parameters(recurse=False):
                state[f"{path}.{leaf}"] = tensor
        elif hasattr(module, "modules_to_save"):
            saved = dict(module.modules_to_save.items())
            chosen = saved.get(name, module.original_module)
            for leaf, tensor in chosen.named_parameters():
                state[f"{path}.{leaf}"] = tensor
    for path, parameter in target.named_parameters(remove_duplicate=False):
        source = state.get(path)
        parameter.data = (source if source is not None else model.get_parameter(path)).detach().clone()
    return target.eval()


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def grafted(model, donors, plan, ids, **kwargs):
    with Graft(donors, plan, **kwargs).attach(model):
        return model(ids).logits


def prompts(rows=1, length=9):
    return torch.randint(5, 261, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_two_adapters_are_two_donors(family, kind, agree):
    base, ids = tiny_model(family), prompts()
    model, merged = with_adapters(family, KINDS[kind], base)
    whole = frozenset(cells_of(family, ["PAPER_ALL"], range(4), 4))
    attention = frozenset(cells_of(family, ["ATTN", "O"], (2, 3), 4))
    plan = GraftPlan(
        (
            GraftRule(Span(1, 4), source="task"),
            GraftRule(Span(3, 6), source="relation"),
            GraftRule(Last(), ("ATTN", "O"), "upper_half", source="task"),
        )
    )
    table = assignment(
        9, [Rule(frozenset({1, 2, 3}), whole), Rule(frozenset({3, 4, 5}), whole, 2), Rule(frozenset({8}), attention)]
    )
    expected = Oracle(family, base, *merged).logits(ids[0].tolist(), table)
    rest = ("overwrite", "partition") if (family, kind) == ("llama", "lora") else ()
    for execution in ("auto", "dense", *rest):
        agree(grafted(model, NAMES, plan, ids, execution=execution)[0], expected, f"two adapters, {kind}")
    # Each alone is its model, and none is the base.
    ids = prompts(2)
    assert torch.equal(grafted(model, NAMES, GraftPlan(), ids), run(base, ids))
    for (source, name), alone in zip(NAMES.items(), merged, strict=True):
        whole = grafted(model, NAMES, GraftPlan.whole(source), ids)
        agree(whole, run(alone, ids), f"whole adapter, {kind}")
        activate(model, name)
        agree(whole, run(model, ids), f"whole adapter, {kind}")
    assert (run(merged[0], ids) - run(merged[1], ids)).abs().max() > 0.1


@pytest.mark.parametrize("saved", [["lm_head"], ["norm", "lm_head", "embed_tokens"]])
def test_saved_copies_are_full_weights(saved, agree):
    settings = ({"modules_to_save": saved}, {})
    model, merged = with_adapters("llama", settings)
    ids = prompts(2)
    agree(grafted(model, NAMES, GraftPlan.whole("task"), ids), run(merged[0], ids), "modules_to_save")
    assert torch.equal(grafted(model, NAMES, GraftPlan(), ids), run(tiny_model("llama"), ids))
    plan = GraftPlan((GraftRule(All(), ("ALL",), source="task"), GraftRule(Last(), ("ALL",), source="relation")),
                     "follow", "follow")  # fmt: skip
    dense = {"task": merged[0], "relation": merged[1]}
    agree(grafted(model, NAMES, plan, ids), grafted(tiny_model("llama"), dense, plan, ids), "modules_to_save")


def test_an_adapter_on_the_embedding(agree):
    model, merged = with_adapters("llama", ({"target_modules": ["embed_tokens", "q_proj"]}, {}))
    ids = prompts(2)
    plan = GraftPlan((GraftRule(Span(0, 3), source="task"), GraftRule(Last(), source="relation")))
    dense = {"task": merged[0], "relation": merged[1]}
    agree(grafted(model, NAMES, plan, ids), grafted(tiny_model("llama"), dense, plan, ids), "embedding LoRA")


@pytest.mark.parametrize("active", [["second"], ["first", "second"]])
def test_what_is_active_neither_matters_nor_changes(active, state_hash, hook_count):
    model, _ = with_adapters("llama", KINDS["lora"])
    ids, plan = prompts(), GraftPlan((GraftRule(Span(1), source="task"), GraftRule(Last(), source="relation")))
    expected = grafted(model, NAMES, plan, ids)
    activate(model, *active)
    before = (state_hash(model), {n: p.requires_grad for n, p in model.named_parameters()})
    assert torch.equal(grafted(model, NAMES, plan, ids), expected)
    handle = model.model.layers[3].mlp.up_proj.lora_A["second"].register_forward_pre_hook(_stop)
    with pytest.raises(RuntimeError, match="stop"):
        grafted(model, NAMES, plan, ids)
    handle.remove()
    assert {tuple(m.active_adapters) for m in model.modules() if hasattr(m, "lora_A")} == {tuple(active)}
    assert (state_hash(model), {n: p.requires_grad for n, p in model.named_parameters()}) == before
    assert hook_count(model) == 0


def _stop(*_):
    raise RuntimeError("stop")


def test_an_active_adapter_that_is_no_donor_is_refused(hook_count):
    model, _ = with_adapters("llama", KINDS["lora"])
    inject_adapter_in_model(config("llama"), model, adapter_name="third")
    activate(model, "first", "third")
    with pytest.raises(IncompatibleModelError, match=r"\['first', 'third'\], expected only 'first' and 'second'"):
        Graft(NAMES, GraftPlan.at(Last(), source="task")).attach(model)
    assert hook_count(model) == 0


def test_an_adapter_beside_a_full_model(agree, pairs):
    """The other donor is a model of its own."""
    model, merged = with_adapters("llama", KINDS["lora"])
    activate(model, "first")
    _, donor = pairs("llama")
    plan = GraftPlan((GraftRule(Span(1, 4), source="a"), GraftRule(Last(), source="b")))
    ids = prompts(2)
    actual = grafted(model, {"a": "first", "b": donor}, plan, ids)
    agree(actual, grafted(tiny_model("llama"), {"a": merged[0], "b": donor}, plan, ids), "adapter and model")
