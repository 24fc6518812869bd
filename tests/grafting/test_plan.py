"""Graft plans as data: layers, groups, the algebra of plans, JSON and digests."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import all_cells, cells_of

from lightning_interp.core.model.components import BLOCK_COMPONENTS
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import resolve_layers
from lightning_interp.core.tokens.positions import All, ChatTemplate, FromBatch, Last, Span, Substring, Tokens
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError, RecipeError, SiteError
from lightning_interp.grafting.experiments import paper_plans
from lightning_interp.grafting.plan import GROUPS, GraftPlan, GraftRule
from lightning_interp.testing import EXTRA_FAMILIES, FAMILIES, tiny_model

LENGTH = 6
STEP = StepContext(
    1,
    LENGTH,
    input_ids=torch.tensor([[5, 6, 7, 5, 8, 9]]),
    batch={"FE": torch.tensor([[0, 1, 1, 0, 0, 0]]), "M": torch.tensor([[0, 0, 0, 0, 1, 0]])},
)


@pytest.fixture(scope="module")
def model_map():
    return ModelMap.build(tiny_model("llama"))


def meaning(plan, model_map, step=STEP):
    """What a plan says, token by token: the source of each cell that does not come from the recipient."""
    tokens = [{} for _ in range(step.length)]
    for rule in plan.rules:
        cells = dict.fromkeys(rule.cells(model_map), rule.source)
        for t in rule.positions.mask(step)[0].nonzero().flatten().tolist():
            tokens[t] = cells
    return tokens


located = st.one_of(
    st.just(All()),
    st.integers(1, 3).map(Last),
    st.sampled_from(["FE", "M"]).map(FromBatch),
    st.lists(st.integers(5, 9), min_size=1, max_size=3).map(lambda ids: Tokens(tuple(ids))),
    st.tuples(st.integers(-3, 5), st.sampled_from([None, 2, 6, 40])).map(lambda ends: Span(*ends, strict=False)),
)
written = st.one_of(
    located,
    st.tuples(st.text(min_size=1), st.sampled_from(["first", "last", "all"]), st.sampled_from(["raise", "ignore"])).map(
        lambda arguments: Substring(*arguments)
    ),
    st.sampled_from(["user", "assistant", "system", "template"]).map(ChatTemplate),
)


def combined(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            inner.map(lambda a: ~a),
            st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        ),
        max_leaves=4,
    )


layer_choice = st.one_of(
    st.sampled_from(["all", "none", "Q1", "Q4", "upper_half", "lower_half", "0.5-1.0", "1-2"]),
    st.integers(-4, 3),
    st.lists(st.one_of(st.integers(0, 3), st.just("Q2")), min_size=1, max_size=3).map(tuple),
)
component_names = st.lists(
    st.sampled_from(["embed", "q", "k", "o", "down", "ln_mlp", "ATTN", "FFN", "NORMS", "BLOCK", "PAPER_ALL"]),
    min_size=1,
    max_size=3,
)


donor = st.just("donor")


def rules(positions, source=donor):
    return st.builds(
        GraftRule,
        positions,
        components=component_names,
        layers=layer_choice,
        source=source,
        others=st.booleans(),
    )


def plans(positions, source=donor):
    switches = st.sampled_from(["recipient", "donor", "follow"])
    return st.builds(GraftPlan, st.lists(rules(positions, source), max_size=4), head=switches, final_norm=switches)


# JSON and digests.


@given(plans(combined(written), st.text(min_size=1)))
def test_a_plan_survives_json(plan):
    again = GraftPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)
    assert json.loads(plan.to_json())["head"] == plan.head


@given(plans(combined(written)), plans(combined(written)))
def test_equal_digests_are_equal_plans(left, right):
    assert (left.digest == right.digest) == (left == right)


def test_json_is_canonical_and_the_digest_is_its_sha256():
    plan = GraftPlan.at(Last(), ["q", "o"], (1, "Q4"), source="task", head="donor")
    text = (
        '{"final_norm":"recipient","head":"donor","rules":[{"components":["q","o"],"layers":[1,"Q4"],"others":false,'
        '"positions":{"kind":"Last","n":1},"source":"task"}]}'
    )
    assert plan.to_json() == text
    assert plan.digest == hashlib.sha256(text.encode()).hexdigest()
    assert GraftPlan.from_json(json.dumps(json.loads(text), indent=2)) == plan


def test_the_digest_is_the_same_in_every_process():
    assert paper_plans()["(FE+LT)^C"].digest == "c017775d54ffcfc3c3ff7f268d25161ea0316d3dbf4e6e68549be15e7e31268a"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not json", "'not json'"),
        ("[]", r"'\[\]'"),
        ('{"head": "recipient"}', "rules"),
        ('{"rules": [], "heads": "donor"}', "heads"),
        ('{"rules": [{"components": ["q"]}]}', "no 'positions'"),
        ('{"rules": [{"positions": {"kind": "All"}, "layer": 3}]}', "graft rule: layer"),
        ('{"rules": [], "head": "mine"}', "head='mine'"),
        ('{"rules": 7}', "'{\"rules\": 7}'"),
    ],
)
def test_what_is_no_plan_is_refused(text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        GraftPlan.from_json(text)


def test_unknown_positions_in_json_are_refused():
    with pytest.raises(PositionError, match="'Everywhere'"):
        GraftPlan.from_json('{"rules": [{"positions": {"kind": "Everywhere"}}]}')


# Layers.


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 18, range(18)),
        ("none", 18, []),
        ("Q1", 18, [0, 1, 2, 3]),
        ("Q2", 18, [4, 5, 6, 7]),
        ("Q3", 18, [8, 9, 10, 11]),
        ("Q4", 18, [12, 13, 14, 15, 16, 17]),  # the remainder goes to the last quarter
        ("upper_half", 18, range(8, 18)),  # quarters 3 and 4, not 9 to 17
        ("lower_half", 18, range(8)),
        ("upper_half", 16, range(8, 16)),
        ("upper_half", 32, range(16, 32)),
        ("upper_half", 48, range(24, 48)),
        (3, 18, [3]),
        ("3", 18, [3]),
        (-1, 18, [17]),
        ("-18", 18, [0]),
        ("4-7", 18, [4, 5, 6, 7]),
        ("17-17", 18, [17]),
        ("0.0-1.0", 18, range(18)),
        ("0.5-1.0", 18, range(9, 18)),
        ("0.25-0.5", 16, [4, 5, 6, 7]),
        (["Q1", 9, "12-13"], 18, [0, 1, 2, 3, 9, 12, 13]),
        ((), 18, []),
    ],
)
def test_layers(layers, count, expected):
    assert resolve_layers(layers, count) == frozenset(expected)


ABSENT = [18, -19, "18", "4-18", "7-4", "0.5-1.5", "0.5-0.5", "middle", "Q5", "", "0.5", "nan-1.0", ["Q1", "x"], True]


@pytest.mark.parametrize("layers", ABSENT)
def test_layers_that_are_not_there_are_refused(layers):
    value = "x" if isinstance(layers, list) else layers
    with pytest.raises(SiteError, match=f"layers {value!r} of a model with layers 0 to 17"):
        resolve_layers(layers, 18)


def test_a_named_range_without_layers_is_refused():
    with pytest.raises(SiteError, match="'Q1' of a model with layers 0 to 2"):
        resolve_layers("Q1", 3)


# Components.


@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES)
def test_groups_hold_what_the_specification_says(family):
    found = ModelMap.build(tiny_model(family))
    for group in GROUPS:
        for layers, indices in (("all", range(4)), ("upper_half", (2, 3)), (1, (1,)), ("none", ())):
            rule, expected = GraftRule(All(), (group,), layers), cells_of(family, [group], indices, 4)
            if not expected and indices:  # never silently nothing
                with pytest.raises(SiteError, match=f"no component '{group}'"):
                    rule.cells(found)
                continue
            assert rule.cells(found) == expected, (group, layers)
            turned = GraftRule(All(), (group,), layers, others=True)
            assert turned.cells(found) == all_cells(family, 4) - expected


def test_a_named_embedding_is_grafted_whatever_the_layers(model_map):
    assert GraftRule(All(), ("embed", "q"), 2).cells(model_map) == {("embed", None), ("q", 2)}
    assert ("embed", None) not in GraftRule(All(), "PAPER_ALL", "0-2").cells(model_map)
    assert ("embed", None) in GraftRule(All(), "PAPER_ALL", "0-3").cells(model_map)


def test_groups_name_components_that_exist():
    known = {*BLOCK_COMPONENTS, "embed", "pos_embed", "final_norm", "unembed"}
    assert {name for members in GROUPS.values() for name in members} <= known
    assert set(GROUPS["ALL"]) == known


# Algebra.


@given(plan=plans(combined(located)))
def test_the_cell_complement_is_the_other_cells_at_the_same_positions(model_map, plan):
    everything, turned = all_cells("llama", 4), plan.cell_complement()
    owned = [False] * LENGTH
    for rule in plan.rules:
        owned = [a or b for a, b in zip(owned, rule.positions.mask(STEP)[0].tolist(), strict=True)]
    pairs = zip(meaning(plan, model_map), meaning(turned, model_map), owned, strict=True)
    for cells, rest, has_rule in pairs:
        assert set(rest) == (everything - set(cells) if has_rule else set())
    assert turned.cell_complement() == plan
    assert (turned.head, turned.final_norm) == (plan.head, plan.final_norm)


@given(plan=plans(combined(located)))
def test_the_dual_is_everything_else(model_map, plan):
    everything, dual = all_cells("llama", 4), plan.dual()
    for cells, rest in zip(meaning(plan, model_map), meaning(dual, model_map), strict=True):
        assert set(rest) == everything - set(cells)
    swapped = {"recipient": "donor", "donor": "recipient", "follow": "follow"}
    assert (dual.head, dual.final_norm) == (swapped[plan.head], swapped[plan.final_norm])
    assert meaning(dual.dual(), model_map) == meaning(plan, model_map)


@given(
    spots=st.lists(st.tuples(combined(located), st.booleans()), min_size=1, max_size=4).filter(
        lambda spots: any(grafts for _, grafts in spots)
    ),
    components=component_names,
    layers=layer_choice.filter(lambda layers: layers != "none"),
    others=st.booleans(),
)
def test_the_complement_is_the_same_cells_elsewhere(model_map, spots, components, layers, others):
    made = [GraftRule(p, components, layers, others=others) if on else GraftRule(p, layers="none") for p, on in spots]
    plan = GraftPlan(made)
    cells = next(rule for rule in made if not rule.is_empty).cells(model_map)
    there = [bool(found) for found in meaning(plan, model_map)] if cells else None
    elsewhere = meaning(plan.complement(), model_map)
    if there is not None:
        assert [set(found) for found in elsewhere] == [set() if on else cells for on in there]
    assert meaning(plan.complement().complement(), model_map) == meaning(plan, model_map)


def test_the_complement_of_rules_that_differ_is_refused():
    plan = GraftPlan((GraftRule(Last(), "q"), GraftRule(All(), "o")))
    with pytest.raises(RecipeError, match="2 kinds"):
        plan.complement()
    with pytest.raises(RecipeError, match="0 kinds"):
        GraftPlan().complement()


def test_a_rule_for_everything_is_not_taken_for_an_empty_one(model_map):
    everything = GraftPlan((GraftRule(Last(), "PAPER_ALL", "none", others=True),), "follow", "follow")
    expected = [all_cells("llama", 4)] * (LENGTH - 1) + [set()]
    assert [set(found) for found in meaning(everything.complement(), model_map)] == expected


def test_joining_plans_lets_the_later_rules_win(model_map):
    first = GraftPlan.at(All(), "q", source="a", head="donor")
    second = GraftPlan.at(Last(), "o", source="b", final_norm="donor")
    both = first | second
    assert both.rules == first.rules + second.rules
    assert (both.head, both.final_norm) == ("recipient", "donor")
    assert both.sources == ("a", "b")
    assert set(meaning(both, model_map)[-1].values()) == {"b"}
    assert {name for name, _ in meaning(both, model_map)[-1]} == {"o"}
    assert {name for name, _ in meaning(both, model_map)[0]} == {"q"}


def test_the_dual_keeps_the_name_of_the_donor():
    plan = GraftPlan((GraftRule(All(), "BLOCK", source="task"), GraftRule(Last(), layers="none")))
    assert plan.sources == ("task",)
    assert plan.dual().sources == ("task",)
    assert plan.cell_complement().sources == ("task",)
    assert GraftPlan().dual().sources == ("donor",)
    with pytest.raises(RecipeError, match="donors a, b"):
        GraftPlan((GraftRule(All(), source="a"), GraftRule(Last(), source="b"))).dual()


def test_plans_with_lists_are_equal_and_hashable():
    listed = GraftPlan.at(Tokens([5, 6]), ["q"], layers=[0, 1])
    assert listed == GraftPlan.at(Tokens((5, 6)), ("q",), layers=(0, 1))
    assert len({listed, GraftPlan.from_json(listed.to_json())}) == 1


# The standard plans.


def test_paper_plans(model_map):
    plans = paper_plans(head="donor")
    everything = all_cells("llama", 4)
    paper = everything - {("final_norm", None), ("unembed", None)}
    entity, last = {1, 2}, {5}
    expected = {
        "FE": entity,
        "LT": last,
        "FE+LT": entity | last,
        "(FE+LT)^C": {0, 3, 4},
        "FE^C": {0, 3, 4, 5},
        "LT^C": {0, 1, 2, 3, 4},
    }
    assert list(plans) == ["PRE", "SFT", *expected]
    for name, positions in expected.items():
        found = meaning(plans[name], model_map)
        assert [set(cells) for cells in found] == [paper if t in positions else set() for t in range(LENGTH)], name
        assert (plans[name].head, plans[name].final_norm) == ("donor", "recipient")
    assert plans["PRE"] == GraftPlan()
    assert meaning(plans["SFT"], model_map) == [dict.fromkeys(everything, "donor")] * LENGTH
    assert (plans["SFT"].head, plans["SFT"].final_norm) == ("follow", "follow")
    assert len({plan.digest for plan in plans.values()}) == 8


def test_paper_plans_with_other_sites(model_map):
    plans = paper_plans(FromBatch("M"), Last(2), components=("ATTN", "O"), layers="upper_half", final_norm="donor")
    cells = {(name, layer) for name in ("q", "k", "v", "o") for layer in (2, 3)}
    assert [set(found) for found in meaning(plans["FE+LT"], model_map)] == [set(), set(), set(), set(), cells, cells]
    assert [set(found) for found in meaning(plans["LT^C"], model_map)] == [cells] * 4 + [set()] * 2


# Wrong plans.


@pytest.mark.parametrize("name", ["qq", "attn", "Q", "mlp", "lm_head"])
def test_an_unknown_component_is_refused(name):
    with pytest.raises(SiteError, match=f"Unknown component {name!r}"):
        GraftPlan.at(All(), ["q", name])


@pytest.mark.parametrize("switch", ["head", "final_norm"])
def test_an_unknown_switch_is_refused(switch):
    with pytest.raises(RecipeError, match=f"{switch}='last_token'"):
        GraftPlan(**{switch: "last_token"})


@pytest.mark.parametrize(
    ("components", "head", "final_norm", "named", "switch"),
    [
        ("ALL", "recipient", "recipient", "unembed", "head='recipient'"),
        ("ALL", "follow", "donor", "final_norm", "final_norm='donor'"),
        (("q", "unembed"), "donor", "follow", "unembed", "head='donor'"),
        (("final_norm",), "follow", "recipient", "final_norm", "final_norm='recipient'"),
    ],
)
def test_a_rule_for_the_head_needs_the_switch_to_follow(components, head, final_norm, named, switch):
    with pytest.raises(RecipeError, match=f"names '{named}'.*{switch}.*follow"):
        GraftPlan.at(All(), components, head=head, final_norm=final_norm)
