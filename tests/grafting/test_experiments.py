"""Every experiment's plans, cell by cell, as they are written in the method's description."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, cells_of

from lightning_interp import ModelMap
from lightning_interp.core.tokens.positions import FromBatch, Last, Span
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import (
    EXPERIMENTS,
    Graft,
    GraftEvaluator,
    GraftPlan,
    GraftPrompt,
    carrier_plans,
    component_plans,
    head_plans,
    hybrid_plans,
    layer_plans,
    paper_plans,
    reverse_plans,
    static_plans,
)
from lightning_interp.testing import FAMILIES, byte_tokenizer, tiny_model

ATTN, FFN = {"q", "k", "v"}, {"gate", "up", "down"}
BLOCK = ATTN | FFN | {"o", "ln_attn", "ln_mlp"}


@pytest.fixture(scope="module")
def deep():
    return ModelMap.build(tiny_model("llama", num_hidden_layers=18))


def cells(rule, model_map):
    """Components by the set of layers that they are grafted in."""
    found = {}
    for name, layer in rule.cells(model_map):
        found.setdefault(name, set()).add(layer)
    return found


def everywhere(names, layers):
    return {name: set(layers) for name in names}


def test_quarters_and_halves(deep):
    wanted = {
        "Q1": range(4),
        "Q2": range(4, 8),
        "Q3": range(8, 12),
        "Q4": range(12, 18),
        "lower_half": range(8),
        "upper_half": range(8, 18),
    }
    plans = layer_plans()
    assert len(plans) == 4 * len(wanted)
    for name, layers in wanted.items():
        for place in ("FE", "LT"):
            (rule,) = plans[f"{place}[{name}]"].rules
            assert cells(rule, deep) == everywhere(BLOCK, layers)
        first, last = plans[f"FE[{name}]+LT"].rules
        assert (cells(first, deep), cells(last, deep)) == (everywhere(BLOCK, layers), everywhere(BLOCK, range(18)))
        first, last = plans[f"FE+LT[{name}]"].rules
        assert (cells(first, deep), cells(last, deep)) == (everywhere(BLOCK, range(18)), everywhere(BLOCK, layers))


def test_component_sets(deep):
    wanted = {
        "ATTN+O+FFN": ATTN | {"o"} | FFN,
        "ATTN+FFN": ATTN | FFN,
        "ATTN+O": ATTN | {"o"},
        "O+FFN": {"o"} | FFN,
        "FFN": FFN,
        "O": {"o"},
        "O+FFN-DOWN": {"o", "down"},
        "O+FFN-UP": {"o", "gate", "up"},
    }
    plans = component_plans()
    assert list(plans) == list(wanted)
    for name, plan in plans.items():
        (rule,) = plan.rules
        assert rule.positions == Last()
        assert cells(rule, deep) == everywhere(wanted[name], range(8, 18))


def test_the_hybrids(deep):
    for construction, layers in (("intended", range(8, 18)), ("literal", range(9, 18))):
        plans = hybrid_plans(construction=construction)
        assert list(plans) == ["LT only", "FE task ATTN", "FE task FFN", "FE task O+FFN", "FE task FULL"]
        base, over = plans["LT only"].rules
        assert (base.source, over.source, over.adds) == ("task", "relation", True)
        if construction == "intended":
            assert cells(base, deep) == everywhere(ATTN, range(8, 18))
            assert cells(over, deep) == everywhere({"o"} | FFN, layers)
        else:  # the gate stays the task's, and so does all of layer 8
            assert cells(base, deep) == everywhere(ATTN | {"o"} | FFN, range(8, 18))
            assert cells(over, deep) == everywhere({"o", "up", "down"}, layers)
        parts = {"ATTN": ATTN, "FFN": FFN, "O+FFN": {"o"} | FFN, "FULL": BLOCK}
        for name, components in parts.items():
            rule = plans[f"FE task {name}"].rules[0]
            assert (rule.positions, rule.source) == (FromBatch("FE"), "task")
            full = everywhere(components, range(18)) | ({"embed": {None}} if name == "FULL" else {})
            assert cells(rule, deep) == full
    with pytest.raises(RecipeError, match=r"construction='loose'"):
        hybrid_plans(construction="loose")


@pytest.mark.parametrize("construction", ["intended", "literal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_hybrids_against_the_definition(family, construction, pairs, agree):
    recipient, task = pairs(family)
    relation = tiny_model(family, seed=9)
    ids = torch.randint(5, 261, (1, 8), generator=torch.Generator().manual_seed(6))
    oracle = Oracle(family, recipient, task, relation)
    some = ["ATTN"] if construction == "intended" else ["ATTN", "O", "FFN"]
    over = ["O", "FFN"] if construction == "intended" else ["o", "up", "down"]
    last = dict.fromkeys(cells_of(family, some, (2, 3), 4), 1) | dict.fromkeys(cells_of(family, over, (2, 3), 4), 2)
    for name, parts in (("LT only", []), ("FE task O+FFN", ["O", "FFN"]), ("FE task FULL", ["PAPER_ALL"])):
        entity = dict.fromkeys(cells_of(family, parts, range(4), 4) if parts else (), 1)
        table = [{}, entity, entity, {}, {}, {}, {}, last]
        plan = hybrid_plans(Span(1, 3), construction=construction)[name]
        with Graft({"task": task, "relation": relation}, plan).attach(recipient), torch.no_grad():
            actual = recipient(ids).logits
        agree(actual[0], oracle.logits(ids[0].tolist(), table), f"hybrid, {family}")


PROMPTS = [
    GraftPrompt("In Up, Ann stars with", "Bo", {"FE": "Ann", "R": "stars", "M": "Up"}, unit="1"),
    GraftPrompt("In Go, Cy Ray acts by", "Di", {"FE": "Cy Ray", "R": "acts", "M": "Go"}, unit="2"),
]


def positions_of(plan, prompt):
    """Characters that a plan of one rule grafts (one byte is one token)."""
    from lightning_interp.grafting.prompts import PromptBatch, encode

    encoded = encode(prompt, 0, byte_tokenizer(), list(prompt.spans))
    mask = plan.rules[0].positions.mask(PromptBatch.of([encoded]).step(byte_tokenizer()))
    return {i for i, on in enumerate(mask[0].tolist()) if on}


def test_carriers():
    prompt = PROMPTS[0]
    text = prompt.text
    span = {k: set(range(text.index(v), text.index(v) + len(v))) for k, v in prompt.spans.items()}
    last, every = {len(text) - 1}, set(range(len(text)))
    wanted = {
        "R": span["R"],
        "FE+R": span["FE"] | span["R"],
        "R+LT": span["R"] | last,
        "FE+R+LT": span["FE"] | span["R"] | last,
        "M": span["M"],
        "FE+M": span["FE"] | span["M"],
        "M+LT": span["M"] | last,
        "FE+M+LT": span["FE"] | span["M"] | last,
        "(FE+M)^C": every - span["FE"] - span["M"],
        "(FE+M+LT)^C": every - span["FE"] - span["M"] - last,
    }
    plans = carrier_plans()
    assert {name: positions_of(plan, prompt) for name, plan in plans.items()} == wanted
    assert list(carrier_plans(relation=None)) == [name for name in wanted if "M" in name]


def test_heads(pairs):
    """Only ``donor`` and, where the last token is grafted, ``follow`` change the head; all differ from one another."""
    recipient, donor = pairs("gpt2")  # tied: grafting the embedding must not leak into the head
    plans = head_plans({name: paper_plans()[name] for name in ("FE", "LT")})
    rows = GraftEvaluator(PROMPTS[:1], byte_tokenizer(), plans=plans).evaluate(recipient, donor).rows
    p = {row["plan"]: row["target_prob"] for row in rows}
    assert p["FE, head recipient"] == p["FE, head follow"] != p["FE, head donor"]
    assert p["LT, head recipient"] != p["LT, head follow"] == p["LT, head donor"]
    assert set(head_plans()) == {
        f"{plan}, head {head}"
        for plan in paper_plans()
        if plan not in ("PRE", "SFT")
        for head in ("recipient", "donor", "follow")
    }


def test_static_plans_are_copied_weights(pairs, agree):
    import copy

    recipient, donor = pairs("llama")
    ids = torch.arange(10, 18)[None]
    copied = copy.deepcopy(recipient)
    for mine, other in zip(copied.model.layers, donor.model.layers, strict=True):
        mine.mlp.load_state_dict(other.mlp.state_dict())
    with Graft(donor, static_plans(["FFN"])["static FFN"]).attach(recipient), torch.no_grad():
        assert torch.equal(recipient(ids).logits, copied(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reverse_is_the_swapped_pair(family, pairs):
    recipient, donor = pairs(family)
    plans = {
        **paper_plans(head="follow", final_norm="follow"),
        **paper_plans(head="donor"),
        "some": GraftPlan.at(Last(), ["ATTN"], "upper_half"),
    }
    tokenizer = byte_tokenizer()
    there = GraftEvaluator(PROMPTS, tokenizer, plans=reverse_plans(plans)).evaluate(recipient, donor).rows
    swapped = GraftEvaluator(PROMPTS, tokenizer, plans=plans).evaluate(donor, recipient).rows
    for ours, theirs in zip(there, swapped, strict=True):
        if ours["plan"] not in ("PRE", "SFT"):
            assert ours["target_logprob"] == pytest.approx(theirs["target_logprob"], abs=2e-5)


def test_every_experiment_has_a_name():
    assert list(EXPERIMENTS) == [f"E{n}" for n in range(1, 10)]
    for make in EXPERIMENTS.values():
        assert all(isinstance(plan, GraftPlan) for plan in make().values())
