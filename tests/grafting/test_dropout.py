"""Graft dropout: seeded draws, exact counts, and grafts that are those of the cells that are left."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, Rule, assignment

from lightning_interp import ModelMap
from lightning_interp.core.tokens.positions import All, Span
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import Graft, GraftDropout, GraftPlan, GraftRule, dropout_plans
from lightning_interp.grafting.dropout import DRAWS
from lightning_interp.testing import tiny_model

CELLS = {(name, layer) for name in ("q", "o", "down") for layer in range(10)} | {("embed", None)}


def layers(cells):
    return {layer for _, layer in cells if layer is not None}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99, 1.0])
def test_counts_are_exact(share):
    for draw in range(20):
        by_layer = GraftDropout(share).keep(CELLS, draw)
        assert len(layers(by_layer)) == 10 - int(share * 10)
        assert by_layer == {cell for cell in CELLS if cell[1] in layers(by_layer) or cell[1] is None}
        by_module = GraftDropout(share, unit="module").keep(CELLS, draw)
        assert len(by_module) == 31 - int(share * 30)
        assert ("embed", None) in by_layer & by_module


def test_coins_fall_as_often_as_they_should():
    for unit, n in (("layer", 10), ("module", 30)):
        kept = [
            len(GraftDropout(0.3, "random", unit, seed).keep(CELLS, draw) - {("embed", None)}) * n / 30
            for seed in range(10)
            for draw in range(DRAWS)
        ]
        trials = n * len(kept)
        assert abs(sum(kept) / trials - 0.7) < 4 * (0.3 * 0.7 / trials) ** 0.5
        assert len(set(kept)) > 3


def test_draws_differ_and_repeat():
    half = GraftDropout(0.5)
    draws = [frozenset(half.keep(CELLS, draw)) for draw in range(DRAWS)]
    assert len(set(draws)) > 40
    assert draws == [frozenset(GraftDropout(0.5).keep(CELLS, draw)) for draw in range(DRAWS)]
    assert draws != [frozenset(GraftDropout(0.5, seed=1).keep(CELLS, draw)) for draw in range(DRAWS)]
    state = torch.get_rng_state()
    half.keep(CELLS, 0)
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def grafted(recipient, donor, plan, ids):
    with Graft(donor, plan).attach(recipient):
        return recipient(ids).logits


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("mode", ["count", "random"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])  # separate, fused and routed maps
def test_against_the_definition(family, mode, unit, pairs, agree):
    recipient, donor = pairs(family)
    ids = torch.randint(5, 261, (1, 9), generator=torch.Generator().manual_seed(4))
    dropout = GraftDropout(0.5, mode, unit, seed=3)
    rule = GraftRule(Span(2, 8))
    cells = rule.cells(ModelMap.build(recipient))
    rules = [Rule(frozenset({t}), frozenset(dropout.keep(cells, t))) for t in range(2, 8)]
    expected = Oracle(family, recipient, donor).logits(ids[0].tolist(), assignment(9, rules))
    actual = grafted(recipient, donor, GraftPlan.at(Span(2, 8), dropout=dropout), ids)
    agree(actual[0], expected, f"graft dropout, {family}")
    # A row alone is the row in a batch, wherever its padding puts it.
    batch = grafted(recipient, donor, [GraftPlan(), GraftPlan.at(Span(2, 8), dropout=dropout)], ids.repeat(2, 1))
    agree(batch[1], actual[0], f"graft dropout, {family}")


def test_the_ends(pairs):
    recipient, donor = pairs("llama")
    ids = torch.arange(10, 20)[None]
    none, all_of_it = (GraftPlan.at(All(), "BLOCK", dropout=GraftDropout(share)) for share in (0.0, 1.0))
    assert torch.equal(
        grafted(recipient, donor, none, ids), grafted(recipient, donor, GraftPlan.at(All(), "BLOCK"), ids)
    )
    with torch.no_grad():
        assert torch.equal(grafted(recipient, donor, all_of_it, ids), recipient(ids).logits)


def test_too_many_rules_that_add():
    many = GraftPlan(tuple(GraftRule(Span(t), ("q",), adds=True) for t in range(30)))
    with pytest.raises(RecipeError, match=r"more than 4096 sets of its 30 rules"):
        Graft("default", many).compiled(ModelMap.build(tiny_model("llama")))


def test_as_data():
    plans = dropout_plans(shares=[0.2], seeds=[0, 5], mode="random", unit="module")
    for plan in plans.values():
        assert GraftPlan.from_json(plan.to_json()) == plan
    assert len({plan.digest for plan in plans.values()}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.1}, r"share=1.1\) is outside of \[0, 1\]"),
        ({"share": float("nan")}, r"share=nan"),
        ({"share": 0.5, "mode": "some"}, r"mode='some'"),
        ({"share": 0.5, "unit": "matrix"}, r"unit='matrix'"),
        ({"shares": 0.5}, r"Cannot read graft dropout from \{'shares': 0.5\}"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(RecipeError, match=message):
        GraftDropout.from_dict(settings)
