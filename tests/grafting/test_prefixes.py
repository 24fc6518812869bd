"""Shared prefixes: the tree is the cheapest there is, and what it computes is what each row computes alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from lightning_interp.core.tokens.positions import All, FromBatch, Last
from lightning_interp.errors import UnsupportedStrategyError
from lightning_interp.grafting import (
    GraftEvaluator,
    GraftPlan,
    GraftPrompt,
    component_grid,
    layer_grid,
    paper_plans,
)
from lightning_interp.grafting.metrics import METRICS
from lightning_interp.grafting.prefixes import PASS_COST, PrefixTree
from lightning_interp.testing import byte_tokenizer, tiny_model

PROMPTS = [
    GraftPrompt("Ann Lee stars with", "Bo", {"FE": "Ann Lee"}, unit="1"),
    GraftPrompt("A film by Cy Ray has", "Di", {"FE": "Cy Ray"}, unit="2"),
    GraftPrompt("Ed", "Flo", {"FE": "Ed"}, unit="3"),
]


def evaluator(plans, *, prompts=PROMPTS, **options):
    return GraftEvaluator(prompts, byte_tokenizer(), plans=plans, **options)


def many_plans():
    entity = GraftPlan.at(FromBatch("FE"))
    return {
        **paper_plans(),
        **component_grid(4, components=["q", "v", "o"], base=entity).plans,
        **layer_grid(4, width=2).plans,
        "donor head": GraftPlan.at(Last(), head="donor"),
        "all with its head": GraftPlan.at(All(), "ALL", head="follow", final_norm="follow"),
    }


def apart(ours, theirs):
    """Largest difference of any metric but ranks, and whether ranks and favourites agree."""
    gaps, same = [], True
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        assert (a["prompt"], a["plan"]) == (b["prompt"], b["plan"])
        gaps += [abs(a[m] - b[m]) for m in METRICS if m not in ("target_rank", "top1", "top5")]
        same &= a["target_rank"] == b["target_rank"]
    return max(gaps), same


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "qwen2_moe"])
def test_shared_prefixes_change_nothing(family, pairs):
    """Ragged prompts, longer than the window of those families that have one."""
    recipient, donor = pairs(family)
    plans = many_plans()
    shared, alone = evaluator(plans), evaluator(plans, share_prefixes=False)
    gap, same = apart(shared.evaluate(recipient, donor), alone.evaluate(recipient, donor))
    assert gap < 2e-5
    assert same
    assert shared.tokens["fed"] < 0.8 * alone.tokens["fed"] <= shared.tokens["without sharing"]


def test_the_budget_splits_branches_and_changes_nothing(pairs):
    recipient, donor = pairs("gemma2")
    plans = dict(list(many_plans().items())[::3])
    whole = evaluator(plans).evaluate(recipient, donor)
    for budget in (1, 40):
        gap, same = apart(evaluator(plans, token_budget=budget).evaluate(recipient, donor), whole)
        assert gap < 2e-5
        assert same


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_an_adapter_as_donor(settings):
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
        model = inject_adapter_in_model(config, model).eval()
    shared = evaluator(many_plans()).evaluate(model, "default")
    gap, same = apart(shared, evaluator(many_plans(), share_prefixes=False).evaluate(model, "default"))
    assert gap < 2e-5
    assert same


def test_a_map_at_the_last_token_reads_the_prompt_once(pairs):
    recipient, donor = pairs("llama")
    grid = component_grid(4, components=["q", "k", "v", "o", "gate", "up", "down", "ln_attn", "ln_mlp"])
    prompt = [GraftPrompt("Ann Lee stars with", "Bo")]
    scores = evaluator(grid.plans, prompts=prompt)
    scores.evaluate(recipient, donor)
    length = len("Ann Lee stars with")
    # PRE and the 36 cells share all but the last token; SFT's weights differ from the first.
    assert scores.tokens["fed"] == 2 * (length - 1) + 36 + 2
    assert scores.tokens["without sharing"] == 38 * length


def test_plans_that_agree_on_a_prompt_are_one_row(pairs):
    recipient, donor = pairs("llama")
    plans = {"a": GraftPlan.at(Last()), "b": GraftPlan.at(Last(1)), "c": GraftPlan.at(~~Last())}
    scores = evaluator(plans, prompts=[GraftPrompt("Ann", "Bo")], share_prefixes=False)
    rows = scores.evaluate(recipient, donor).rows
    assert scores.tokens["fed"] == 3 * len("Ann")  # PRE, SFT and the three
    assert len({tuple(row[m] for m in METRICS) for row in rows if row["plan"] in plans}) == 1


def test_prompts_that_begin_alike_share_their_beginning(pairs):
    recipient, donor = pairs("llama")
    begin = "A very long beginning of a prompt that goes on and on, and on: "
    prompts = [GraftPrompt(begin + name, "x") for name in ("Ann", "Bob", "Cyd")]
    scores = evaluator({}, prompts=prompts)
    scores.evaluate(recipient, donor)
    assert scores.tokens["fed"] == 2 * (len(begin) + 3 * len("Ann"))


def test_a_model_without_a_cache_is_refused(pairs):
    recipient, donor = pairs("llama")

    def forget(_, __, output):
        for name in {"cache", "past_key_values"} & set(output.keys()):
            setattr(output, name, None)

    handle = recipient.register_forward_hook(forget)
    try:
        with pytest.raises(UnsupportedStrategyError, match=r"Llama.*NoneType.*share_prefixes=False"):
            evaluator(many_plans()).evaluate(recipient, donor)
        evaluator(many_plans(), share_prefixes=False).evaluate(recipient, donor)
    finally:
        handle.remove()


def test_an_error_on_the_way_leaves_nothing_behind(pairs, hook_count):
    recipient, donor = pairs("llama")
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    handle = donor.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        evaluator(many_plans()).evaluate(recipient, donor)
    handle.remove()
    assert hook_count(recipient, donor) == 0


# The tree itself.

tables = st.integers(2, 6).flatmap(
    lambda width: st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=width, max_size=width),
            st.lists(st.integers(0, 2), min_size=width, max_size=width),
            st.integers(0, width - 1),
        ),
        min_size=1,
        max_size=8,
    )
)


def tree_of(table, copies=1, **options):
    ids = torch.tensor([row[0] for row in table for _ in range(copies)])
    inner = torch.tensor([row[1] for row in table for _ in range(copies)])
    pads = torch.tensor([row[2] for row in table for _ in range(copies)])
    valid = torch.arange(ids.shape[1]) >= pads[:, None]
    full = inner * 3 + ids % 2
    return PrefixTree(ids, valid, inner, full, **options), ids, valid, inner, full


def key(t, width, ids, valid, inner, full):
    """What must agree at column t."""
    return (True, int(ids[t]), int((full if t == width - 1 else inner)[t])) if valid[t] else (False,)


@given(tables)
def test_every_row_is_computed_by_rows_that_agree_with_it(table):
    tree, *parts = tree_of(table)
    width = parts[0].shape[1]
    for row in range(len(parts[0])):
        mine = [key(t, width, *(part[row] for part in parts)) for t in range(width)]
        node, level = int(tree.row_of[row]), len(tree.intervals) - 1
        while level >= 0:
            interval = tree.intervals[level]
            stands = int(interval.rows[node])
            theirs = [key(t, width, *(part[stands] for part in parts)) for t in range(width)]
            assert theirs[: interval.stop] == mine[: interval.stop]
            node, level = int(interval.parents[node]), level - 1
        assert node == -1


@given(tables)
def test_no_prefix_is_computed_twice(table):
    tree, *parts = tree_of(table)
    width = parts[0].shape[1]
    for interval in tree.intervals:
        prefixes = [
            tuple(key(t, width, *(part[row] for part in parts)) for t in range(interval.stop))
            for row in interval.rows.tolist()
        ]
        assert len(set(prefixes)) == len(prefixes)


@given(tables)
def test_no_other_cuts_are_cheaper(table):
    tree, *parts = tree_of(table, copies=1)
    width = parts[0].shape[1]
    counts = [
        len({tuple(key(t, width, *(part[row] for part in parts)) for t in range(stop)) for row in range(len(parts[0]))})
        for stop in range(1, width + 1)
    ]

    def cost(cuts):
        places = [0, *cuts, width]
        return sum(counts[b - 1] * (b - a) + PASS_COST for a, b in itertools.pairwise(places))

    every = [cuts for n in range(width) for cuts in itertools.combinations(range(1, width), n)]
    ours = [interval.stop for interval in tree.intervals[:-1]]
    assert cost(ours) == min(cost(cuts) for cuts in every)
    assert tree.tokens + PASS_COST * len(tree.intervals) == cost(ours)


def test_without_sharing_each_different_row_is_whole():
    ids = torch.zeros(5, 4, dtype=torch.long)
    classes = torch.tensor([[0, 0, 0, k % 3] for k in range(5)])
    tree = PrefixTree(ids, ids == 0, classes, classes, share=False)
    assert [(i.start, i.stop, len(i.rows)) for i in tree.intervals] == [(0, 4, 3)]
    assert tree.row_of.tolist() == [0, 1, 2, 0, 1]
