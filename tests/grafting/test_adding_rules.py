"""Rules that add: one token takes some cells from one donor and others from another."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, cells_of

from lightning_interp.core.tokens.positions import All, Last, Span
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import Graft, GraftPlan, GraftRule
from lightning_interp.testing import tiny_model

LENGTH = 9
IDS = torch.randint(5, 261, (1, LENGTH), generator=torch.Generator().manual_seed(2))


def rule(positions, components, source, layers="all", adds=False):
    return (positions, components, source, layers, adds)


PLANS = {
    "attention here, feed-forward there": [
        rule(range(8, 9), ["ATTN"], "a", "upper_half"),
        rule(range(8, 9), ["O", "FFN"], "b", "upper_half", adds=True),
    ],
    "adding where no rule owns": [rule(range(2, 5), ["BLOCK"], "a"), rule(range(4, 7), ["FFN"], "b", adds=True)],
    "replacing what was added": [
        rule(range(9), ["ATTN"], "a"),
        rule(range(3, 9), ["FFN"], "b", adds=True),
        rule(range(5, 6), ["O"], "b"),
        rule(range(5, 9), ["q"], "b", adds=True),
    ],
    "the later cell wins": [
        rule(range(9), ["BLOCK"], "a"),
        rule(range(4, 9), ["v", "down", "moe"], "b", "Q2", adds=True),
        rule(range(4, 9), ["v"], "a", adds=True),
    ],
    "a hole that is filled again": [
        rule(range(9), ["BLOCK"], "a"),
        rule(range(3, 5), [], "a", "none"),
        rule(range(4, 6), ["ATTN"], "b", adds=True),
    ],
}
LAYERS = {"all": range(4), "upper_half": range(2, 4), "Q2": range(1, 2), "none": ()}


def known(family, names):
    return [n for n in names if n not in ("down", "moe") or cells_of(family, [n], range(4), 4)]


def plan_of(family, rules):
    return GraftPlan(
        tuple(
            GraftRule(
                Span(where.start, where.stop),
                tuple(known(family, names) or ["BLOCK"]),
                layers,
                source,
                adds=adds,
            )
            for where, names, source, layers, adds in rules
        )
    )


def table_of(family, rules):
    """For each token, cell to donor: a rule begins anew, one that adds goes on."""
    table = []
    for t in range(LENGTH):
        row = {}
        for where, names, source, layers, adds in rules:
            if t in where:
                cells = cells_of(family, known(family, names), LAYERS[layers], 4)
                row = {**(row if adds else {}), **dict.fromkeys(cells, "ab".index(source) + 1)}
        table.append(row)
    return table


@pytest.fixture(scope="module")
def third():
    """A second donor of a family."""
    made = {}

    def get(family):
        return made.setdefault(family, tiny_model(family, seed=9))

    return get


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen2_moe", "phi3"]
)  # separate, fused, routed and half fused maps
def test_against_the_definition(family, name, pairs, third, agree):
    recipient, first = pairs(family)
    second = third(family)
    plan = plan_of(family, PLANS[name])
    expected = Oracle(family, recipient, first, second).logits(IDS[0].tolist(), table_of(family, PLANS[name]))
    for execution in ("auto", "overwrite", "partition", "dense") if family == "llama" else ("auto", "dense"):
        with Graft({"a": first, "b": second}, plan, execution=execution).attach(recipient), torch.no_grad():
            actual = recipient(IDS).logits
        agree(actual[0], expected, f"adding rules, {family}")


def test_adding_nothing_new_changes_nothing(pairs):
    recipient, donor = pairs("llama")
    once = GraftPlan.at(Last(), "BLOCK")
    twice = GraftPlan((*once.rules, GraftRule(Last(), ("ATTN",), adds=True)))
    logits = []
    for plan in (once, twice):
        with Graft(donor, plan).attach(recipient), torch.no_grad():
            logits.append(recipient(IDS).logits)
    assert torch.equal(*logits)


def test_as_data():
    plan = GraftPlan((GraftRule(All()), GraftRule(Last(), ("O",), adds=True)))
    assert GraftPlan.from_json(plan.to_json()) == plan
    assert plan.digest != GraftPlan((GraftRule(All()), GraftRule(Last(), ("O",)))).digest
    with pytest.raises(RecipeError, match=r"adds=True"):
        plan.dual()
    with pytest.raises(RecipeError, match=r"has 2 kinds"):
        plan.complement()
