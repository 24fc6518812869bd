"""What a graft must satisfy on every family; the numbers are those of section 9 of the method's specification."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from draws import batch_masks, draw
from oracle import FUSED, TIED, Oracle, Rule, all_cells, assignment, cells_of, layer_components, shared_components

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.kv_cache import cache_of
from lightning_interp.core.tokens.positions import All, FromBatch, Last, Span
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan, GraftRule
from lightning_interp.testing import EXTRA_FAMILIES, FAMILIES, tiny_pair

pytestmark = pytest.mark.kernels

EVERY = FAMILIES + EXTRA_FAMILIES
TWO = ("llama", "gpt2")  # rotary and learnt positions, plain and fused maps, untied and tied ends
THREE = (*TWO, "qwen2_moe")
EXECUTIONS = ("auto", "overwrite", "partition", "dense")
# Every layout of modules once, and every execution where layouts are plain, fused and of experts.
CASES = [(family, how) for family in EVERY for how in EXECUTIONS if family in THREE or how == "auto"]
LENGTH = 12


def prompts(rows=2, length=LENGTH, seed=0):
    return torch.randint(5, 261, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, lengths):
    """Left-padded batch with explicit positions: ids, mask and position ids."""
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def with_positions(family, batch):
    if family == "bloom":  # reads positions off the mask
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def grafted(recipient, donor, plan, ids, *, masks=None, execution="auto", **kwargs):
    with Graft(donor, plan, execution=execution).attach(recipient) as attachment:
        attachment.batch = masks
        return recipient(ids, **kwargs).logits


def caches(output):
    return [(layer.keys, layer.values) for layer in cache_of(output).layers]


@pytest.mark.parametrize("family", EVERY)
def test_the_oracles_table_covers_every_weight_once(family, pairs):
    recipient, donor = pairs(family)
    oracle = Oracle(family, recipient, donor)
    count = {name: torch.zeros_like(p, dtype=torch.int) for name, p in oracle.target.items()}
    for cell in all_cells(family, 4):
        found = oracle.tensors_of(cell)
        assert found, cell
        for name, index in found:
            axis = count[name].dim() - 1 if family == "gpt2" else 0
            every = torch.arange(count[name].shape[axis])
            index = every if index is None else index
            count[name].index_add_(axis, index, torch.ones_like(count[name]).index_select(axis, index))
    assert {name for name, times in count.items() if not torch.equal(times, torch.ones_like(times))} == set()


@pytest.mark.parametrize("family", EVERY)
def test_the_packages_components_are_the_oracles(family, pairs):
    model_map = ModelMap.build(pairs(family)[0])
    assert {(name, layer) for name, layer, _ in model_map.cells()} == all_cells(family, 4)
    assert model_map.unmapped() == []


# 1 and 2: the two ends are bit-equal to the plain models, logits and cache alike.


@pytest.mark.parametrize(("family", "execution"), CASES)
def test_an_empty_plan_is_the_recipient(family, execution, pairs):
    recipient, donor = pairs(family)
    ids = prompts()
    expected = run(recipient, ids)
    nothing = {"m": torch.zeros_like(ids, dtype=torch.bool)}
    removed = GraftPlan((GraftRule(All(), "BLOCK"), GraftRule(All(), layers="none")))
    assert torch.equal(grafted(recipient, donor, GraftPlan(), ids, execution=execution), expected)
    assert torch.equal(grafted(recipient, donor, removed, ids, execution=execution), expected)
    at_nothing = GraftPlan.at(FromBatch("m"), "ALL", head="follow", final_norm="follow")
    assert torch.equal(grafted(recipient, donor, at_nothing, ids, masks=nothing, execution=execution), expected)


@pytest.mark.parametrize(("family", "execution"), CASES)
def test_the_whole_plan_is_the_donor(family, execution, pairs):
    recipient, donor = pairs(family)
    ids = prompts()
    assert not torch.allclose(run(recipient, ids), run(donor, ids), atol=0.1)
    assert torch.equal(grafted(recipient, donor, GraftPlan.whole(), ids, execution=execution), run(donor, ids))
    batch = padded(ids, [LENGTH, 7])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    actual = grafted(recipient, donor, GraftPlan.whole(), ids, execution=execution, attention_mask=mask)
    assert torch.equal(actual, run(donor, ids, attention_mask=mask))


@pytest.mark.parametrize("family", THREE)
def test_the_cache_of_a_whole_graft_is_the_donors(family, pairs):
    recipient, donor = pairs(family)
    ids = prompts()
    with torch.no_grad(), Graft(donor, GraftPlan.whole()).attach(recipient):
        actual = recipient(ids, use_cache=True)
    with torch.no_grad():
        expected = donor(ids, use_cache=True)
    for (k, v), (k_donor, v_donor) in zip(caches(actual), caches(expected), strict=True):
        assert torch.equal(k, k_donor)
        assert torch.equal(v, v_donor)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_ends_are_exact_in_bfloat16(family):
    recipient, donor = tiny_pair(family, dtype=torch.bfloat16)
    ids = prompts()
    assert torch.equal(grafted(recipient, donor, GraftPlan(), ids), run(recipient, ids))
    assert torch.equal(grafted(recipient, donor, GraftPlan.whole(), ids), run(donor, ids))


@pytest.mark.parametrize("family", ["opt", "bloom", "qwen2_moe"])
def test_the_ends_are_exact_under_autocast(family, pairs):
    recipient, donor = pairs(family)
    ids = prompts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grafted(recipient, donor, GraftPlan(), ids), run(recipient, ids))
        assert torch.equal(grafted(recipient, donor, GraftPlan.whole(), ids), run(donor, ids))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2_moe"])
def test_a_donor_of_another_dtype_keeps_the_recipients(family, pairs):
    _, donor = pairs(family)
    recipient, same = tiny_pair(family, dtype=torch.bfloat16)
    ids = prompts()
    whole = grafted(recipient, donor, GraftPlan.whole(), ids)
    assert whole.dtype == torch.bfloat16
    exact = run(donor, ids)
    error = (run(same, ids).float() - exact).abs().mean()
    assert (whole.float() - exact).abs().mean() < 1.5 * error
    with Graft(donor, GraftPlan.whole()).attach(recipient), torch.no_grad():
        assert {k.dtype for k, _ in caches(recipient(ids, use_cache=True))} == {torch.bfloat16}
    mixed = grafted(recipient, donor, GraftPlan.at(Span(2, 5), "PAPER_ALL"), ids)
    assert (mixed - grafted(recipient, same, GraftPlan.at(Span(2, 5), "PAPER_ALL"), ids)).abs().mean() < 3 * error


# 3: equal weights, any plan.


@pytest.mark.parametrize("family", THREE)
def test_equal_weights_change_nothing_under_dense_select(family, pairs):
    recipient, _ = pairs(family)
    twin = copy.deepcopy(recipient)
    draws = [draw(family, ("equal", i)) for i in range(4)]
    ids = torch.tensor([made.ids for made in draws])
    actual = grafted(recipient, twin, [made.plan for made in draws], ids, masks=batch_masks(draws), execution="dense")
    assert torch.equal(actual, run(recipient, ids))


# 4: no trace.


@pytest.mark.parametrize("family", TWO)
def test_no_trace_is_left(family, hook_count, state_hash):
    recipient, donor = tiny_pair(family)
    ids = prompts()
    before, hashes, plain = (
        hook_count(recipient, donor),
        (state_hash(recipient), state_hash(donor)),
        run(recipient, ids),
    )
    keys, learns = list(recipient.state_dict()), [p.requires_grad for p in recipient.parameters()]
    attachment = Graft(donor, GraftPlan.at(Last(), "BLOCK")).attach(recipient)
    assert hook_count(recipient) > before
    assert hook_count(donor) == 0
    assert list(recipient.state_dict()) == keys
    assert [p.requires_grad for p in recipient.parameters()] == learns
    assert not torch.equal(run(recipient, ids), plain)
    attachment.remove()
    attachment.remove()
    assert hook_count(recipient, donor) == before
    assert (state_hash(recipient), state_hash(donor)) == hashes
    assert torch.equal(run(recipient, ids), plain)


@pytest.mark.parametrize("family", TWO)
def test_no_trace_is_left_after_an_exception(family, hook_count, state_hash):
    recipient, donor = tiny_pair(family)
    ids = prompts()
    before, hashes, plain = (
        hook_count(recipient, donor),
        (state_hash(recipient), state_hash(donor)),
        run(recipient, ids),
    )
    plan = GraftPlan.at(Last(), "BLOCK")
    with contextlib.suppress(KeyboardInterrupt), Graft(donor, plan).attach(recipient):
        run(recipient, ids)
        raise KeyboardInterrupt
    assert hook_count(recipient, donor) == before

    def boom(*_):
        raise OSError("in the middle of a forward pass")

    handle = ModelMap.build(donor).blocks[2].register_forward_pre_hook(boom)
    inner = ModelMap.build(recipient).parts("o", 2)[0].module.register_forward_hook(boom)
    with pytest.raises(OSError, match="in the middle"), Graft(donor, plan).attach(recipient):
        run(recipient, ids)
    handle.remove()
    inner.remove()
    assert hook_count(recipient, donor) == before
    assert (state_hash(recipient), state_hash(donor)) == hashes
    assert torch.equal(run(recipient, ids), plain)
    assert torch.equal(grafted(recipient, donor, plan, ids), grafted(recipient, donor, plan, ids))


# 5: rows without a graft in a batch with grafts.


@pytest.mark.parametrize("family", THREE)
def test_an_ungrafted_row_of_a_mixed_batch_is_the_recipients(family, pairs, agree):
    recipient, donor = pairs(family)
    ids = prompts(4)
    plans = [GraftPlan(), GraftPlan.at(Last()), GraftPlan.whole(), GraftPlan.at(Span(2, 5), "ATTN", "upper_half")]
    expected = run(recipient, ids)
    actual = grafted(recipient, donor, plans, ids, execution="overwrite")
    assert (actual[1:] - expected[1:]).abs().amax(dim=(1, 2)).min() > 1e-2
    if family == "qwen2_moe":  # an expert multiplies the rows of the whole batch that were routed to it, at once
        agree(actual[0], expected[0], f"5 empty row, {family}")
    else:
        assert torch.equal(actual[0], expected[0])


# 6: no randomness.


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_the_same_graft_twice_is_the_same_to_the_bit(family, pairs):
    recipient, donor = pairs(family)
    made = draw(family, "twice")
    ids, masks = torch.tensor([made.ids]), batch_masks([made])
    state = torch.get_rng_state()
    first = grafted(recipient, donor, made.plan, ids, masks=masks)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(grafted(recipient, donor, made.plan, ids, masks=masks), first)
    torch.set_rng_state(state)


# 7: the sequential definition.


def check_draws(family, seeds, agree, models, sources, *, executions=EXECUTIONS, one_by_one=False):
    recipient, *donors = models
    oracle = Oracle(family, recipient, *donors, one_by_one=one_by_one)
    named = dict(zip(sources, donors, strict=True))
    draws = [draw(family, seed, sources={name: i + 1 for i, name in enumerate(sources)}) for seed in seeds]
    ids = torch.tensor([made.ids for made in draws])
    expected = torch.stack([oracle.logits(made.ids, made.table) for made in draws])
    for execution in executions:
        plans = [made.plan for made in draws]
        actual = grafted(recipient, named, plans, ids, masks=batch_masks(draws), execution=execution)
        agree(actual, expected, f"7 random plans, {family}")
    single = grafted(recipient, named, draws[0].plan, ids[:1], masks=batch_masks(draws[:1]))
    agree(single, expected[:1], f"7 random plans, {family}")


@pytest.mark.parametrize("family", EVERY)
def test_random_plans_follow_the_sequential_definition(family, pairs, agree):
    executions = EXECUTIONS if family in THREE else ("auto",)
    check_draws(family, range(4), agree, pairs(family), ["donor"], executions=executions)


@pytest.mark.parametrize("family", TWO)
def test_random_plans_with_two_donors_follow_the_definition(family, pairs, agree):
    recipient, donor = pairs(family)
    other = tiny_pair(family, seed=1)[1]
    check_draws(family, [("two", i) for i in range(4)], agree, (recipient, donor, other), ["task", "relation"])


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_many_random_plans_follow_the_sequential_definition(family, pairs, agree):
    for i in range(25):
        check_draws(family, range(100 + 8 * i, 108 + 8 * i), agree, pairs(family), ["donor"], one_by_one=True)


@pytest.mark.parametrize("family", EVERY)
def test_each_component_alone_follows_the_sequential_definition(family, pairs, agree):
    recipient, donor = pairs(family)
    oracle = Oracle(family, recipient, donor)
    names = [*layer_components(family), *shared_components(family)]
    ids = prompts(len(names), 7, seed=3)
    expected, plans = [], []
    for row, name in enumerate(names):
        cells = frozenset(cells_of(family, [name], [1, 3], 4))
        table = assignment(7, [Rule(frozenset({4, 5}), cells)], head="follow", final_norm="follow")
        expected.append(oracle.logits(ids[row].tolist(), table))
        plans.append(GraftPlan.at(FromBatch("m"), name, (1, 3), head="follow", final_norm="follow"))
    masks = {"m": torch.zeros(len(names), 7, dtype=torch.bool)}
    masks["m"][:, [4, 5]] = True
    plain = run(recipient, ids)
    for execution in ("auto", "partition"):
        actual = grafted(recipient, donor, plans, ids, masks=masks, execution=execution)
        agree(actual, torch.stack(expected), f"7 single components, {family}")
        assert (actual - plain).abs().amax(dim=(1, 2)).min() > 1e-3  # and each of them matters


@pytest.mark.parametrize(
    ("family", "head", "final_norm"),  # untied, tied, capped and biased ends; every pair of switches at one of them
    [
        ("llama", "recipient", "donor"), ("llama", "follow", "follow"), ("llama", "donor", "recipient"),
        ("gpt2", "recipient", "recipient"), ("gpt2", "donor", "follow"), ("gpt2", "follow", "donor"),
        ("gemma2", "donor", "donor"), ("gemma2", "follow", "recipient"),
        ("opt", "recipient", "follow"), ("opt", "follow", "donor"),
    ],
)  # fmt: skip
def test_head_and_final_norm_switches(family, head, final_norm, pairs, agree):
    recipient, donor = pairs(family)
    names = ["BLOCK", *(["unembed"] if head == "follow" else []), *(["final_norm"] if final_norm == "follow" else [])]
    ids = prompts(1, 6)
    cells = frozenset(cells_of(family, names, range(4), 4))
    table = assignment(6, [Rule(frozenset({0, 5}), cells)], head=head, final_norm=final_norm)
    plan = GraftPlan.at(Span(0) | Last(), names, head=head, final_norm=final_norm)
    expected = Oracle(family, recipient, donor).logits(ids[0].tolist(), table)[None]
    agree(grafted(recipient, donor, plan, ids), expected, f"7 head and final norm, {family}")
    kept = grafted(recipient, donor, plan, ids, logits_to_keep=2)
    agree(kept, expected[:, -2:], f"7 head and final norm, {family}")


# 8: duality.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_duality(family, pairs, agree):
    recipient, donor = pairs(family)
    draws = [draw(family, ("dual", i)) for i in range(5)]
    ids, masks = torch.tensor([made.ids for made in draws]), batch_masks(draws)
    forth = grafted(recipient, donor, [made.plan for made in draws], ids, masks=masks)
    back = grafted(donor, recipient, [made.plan.dual() for made in draws], ids, masks=masks)
    agree(back, forth, f"8 duality, {family}")
    assert torch.equal(grafted(donor, recipient, GraftPlan.whole().dual(), ids), run(donor, ids))
    assert torch.equal(grafted(donor, recipient, GraftPlan().dual(), ids), run(recipient, ids))


# 9: causality.


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_later_grafts_leave_earlier_logits(family, pairs, agree):
    recipient, donor = pairs(family)
    made = draw(family, "causal")
    ids, masks = torch.tensor([made.ids]), batch_masks([made])
    before = grafted(recipient, donor, made.plan, ids, masks=masks)
    later = GraftRule(Span(7, LENGTH), ("PAPER_ALL",), "none", others=True)
    changed = GraftPlan((*made.plan.rules, later), made.plan.head, made.plan.final_norm)
    after = grafted(recipient, donor, changed, ids, masks=masks)
    agree(after[:, :7], before[:, :7], f"9 causality, {family}")
    assert (after[:, 7:] - before[:, 7:]).abs().amax() > 1e-2


# 10 and 11: a row does not depend on its neighbours or on padding.


@pytest.mark.parametrize("family", THREE)
def test_a_row_alone_is_the_row_in_a_batch(family, pairs, agree):
    recipient, donor = pairs(family)
    draws = [draw(family, ("alone", i)) for i in range(4)]
    ids = torch.tensor([made.ids for made in draws])
    together = grafted(recipient, donor, [made.plan for made in draws], ids, masks=batch_masks(draws))
    for row, made in enumerate(draws):
        alone = grafted(recipient, donor, made.plan, ids[row : row + 1], masks=batch_masks([made]))
        agree(alone[0], together[row], f"10 rows, {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family, pairs, agree):
    recipient, donor = pairs(family)
    lengths = [LENGTH, 9, 5] if family in TWO else [9, 5]
    draws = [draw(family, ("padded", i), length=n) for i, n in enumerate(lengths)]
    width = max(lengths)
    rows = torch.stack([torch.nn.functional.pad(torch.tensor(d.ids), (width - len(d.ids), 0)) for d in draws])
    masks = {}
    for row, made in enumerate(draws):
        for key, mask in made.masks.items():
            masks[key] = torch.zeros(len(draws), width, dtype=torch.bool)
            masks[key][row, width - len(made.ids) :] = mask
    batch = with_positions(family, padded(rows, lengths))
    ids = batch.pop("input_ids")
    oracle = Oracle(family, recipient, donor)
    expected = [oracle.logits(made.ids, made.table) for made in draws]
    for execution in EXECUTIONS if family in TWO else ("auto",):
        plans = [made.plan for made in draws]
        together = grafted(recipient, donor, plans, ids, masks=masks, execution=execution, **batch)
        for row, logits in enumerate(expected):
            agree(together[row, width - len(logits) :], logits, f"11 padding, {family}")


# 14: precedence.


@pytest.mark.parametrize("family", TWO)
def test_the_last_matching_rule_decides(family, pairs):
    recipient, donor = pairs(family)
    ids = prompts()
    fe = Span(2, 5)
    other_then_none = GraftPlan((GraftRule(All()), GraftRule(fe, layers="none")))
    expected = grafted(recipient, donor, GraftPlan.at(~fe), ids)
    assert torch.equal(grafted(recipient, donor, other_then_none, ids), expected)
    assert torch.equal(grafted(recipient, donor, GraftPlan.at(fe).complement(), ids), expected)
    # A later rule replaces an earlier one at its positions; it is not merged into it.
    replaced = GraftPlan((GraftRule(fe, "ATTN"), GraftRule(fe, "O")))
    assert torch.equal(grafted(recipient, donor, replaced, ids), grafted(recipient, donor, GraftPlan.at(fe, "O"), ids))


# 15: locality.


@pytest.mark.parametrize("family", THREE)
def test_what_reaches_no_other_position_changes_only_its_own(family, pairs, agree):
    recipient, donor = pairs(family)
    ids, p = prompts(), 4
    plain = run(recipient, ids)
    own = [p == t for t in range(LENGTH)]
    cases = [("q", -1), ("o", -1), ("FFN", -1), ("ln_mlp", -1), ("unembed", "all"), ("final_norm", "all")]
    for name, layers in cases:
        plan = GraftPlan.at(Span(p), name, layers, head="follow", final_norm="follow")
        for execution in EXECUTIONS if family == "llama" else ("auto",):
            actual = grafted(recipient, donor, plan, ids, execution=execution)
            agree(actual[:, [not x for x in own]], plain[:, [not x for x in own]], f"15 locality, {family}")
            assert (actual[:, p] - plain[:, p]).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_keys_and_values_reach_only_their_own_and_later_positions(family, pairs, agree):
    recipient, donor = pairs(family)
    ids, p = prompts(), 4
    plain = run(recipient, ids)
    for names in (["k"], ["v"], ["k", "v"]):
        actual = grafted(recipient, donor, GraftPlan.at(Span(p), names), ids)
        agree(actual[:, :p], plain[:, :p], f"15 locality, {family}")
        assert (actual[:, p + 1 :] - plain[:, p + 1 :]).abs().max() > 1e-3, names


# 16: tied models.


@pytest.mark.parametrize("family", TIED)
def test_a_grafted_embedding_leaves_the_tied_head(family, agree, state_hash):
    recipient, donor = tiny_pair(family)
    before, ids = state_hash(recipient), prompts(1)
    plan = GraftPlan.at(Last(), "embed")
    rule = Rule(frozenset({LENGTH - 1}), frozenset({("embed", None)}))
    actual = grafted(recipient, donor, plan, ids)
    table = assignment(LENGTH, [rule])
    agree(actual[0], Oracle(family, recipient, donor).logits(ids[0].tolist(), table), f"16 tied, {family}")
    # Copying into the shared tensor (what the definition must not do) gives clearly other logits.
    leaked = Oracle(family, recipient, donor, untie=False).logits(ids[0].tolist(), table)
    assert (actual[0, -1] - leaked[-1]).abs().max() > 1e-2
    assert recipient.get_output_embeddings().weight is recipient.get_input_embeddings().weight
    assert state_hash(recipient) == before


# 17: fused projections.


@pytest.mark.parametrize("family", FUSED)
def test_query_key_and_value_together_are_the_fused_module(family, pairs, agree):
    recipient, donor = pairs(family)
    ids = prompts()
    name = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "bloom": "query_key_value", "phi3": "qkv_proj"}[family]
    fused = copy.deepcopy(recipient)
    for path, module in fused.named_modules():
        if path.endswith(name):
            module.load_state_dict(donor.get_submodule(path).state_dict())
    everywhere = grafted(recipient, donor, GraftPlan.at(All(), ["q", "k", "v"]), ids)
    assert torch.equal(everywhere, run(fused, ids))
    # Pieces and whole in rows of one batch, at some positions.
    plans = [GraftPlan.at(Span(3, 6), names) for names in (["q"], ["k"], ["v"], ["q", "k", "v"], ["q", "v"])]
    rows = ids[:1].expand(len(plans), -1)
    alone = torch.cat([grafted(recipient, donor, plan, ids[:1]) for plan in plans])
    for execution in EXECUTIONS if family == "gpt2" else ("auto", "dense"):
        mixed = grafted(recipient, donor, plans, rows, execution=execution)
        whole = grafted(recipient, fused, GraftPlan.at(Span(3, 6), "ATTN"), rows, execution=execution)
        agree(mixed[3], whole[3], f"17 fused, {family}")
        agree(mixed, alone, f"17 fused, {family}")


def test_gate_and_up_together_are_the_fused_module(pairs, agree):
    recipient, donor = pairs("phi3")
    ids = prompts()
    fused = copy.deepcopy(recipient)
    for path, module in fused.named_modules():
        if path.endswith("gate_up_proj"):
            module.load_state_dict(donor.get_submodule(path).state_dict())
    assert torch.equal(grafted(recipient, donor, GraftPlan.at(All(), ["gate", "up"]), ids), run(fused, ids))
    for execution in EXECUTIONS:
        mixed = grafted(recipient, donor, GraftPlan.at(Span(3, 6), "FFN_UP"), ids, execution=execution)
        whole = grafted(recipient, fused, GraftPlan.at(Span(3, 6), "FFN"), ids, execution=execution)
        agree(mixed, whole, "17 fused, phi3")
    assert not torch.allclose(run(fused, ids), grafted(recipient, donor, GraftPlan.at(All(), "gate"), ids), atol=1e-3)


# 18: several donors.


@pytest.mark.parametrize("family", TWO)
def test_two_equal_donors_are_one(family, pairs, agree):
    recipient, donor = pairs(family)
    ids = prompts()
    pieces = GraftPlan((GraftRule(Span(0, 5), source="a"), GraftRule(Span(5, 9), source="b")))
    one = GraftPlan.at(Span(0, 9))
    twins = {"a": donor, "b": copy.deepcopy(donor)}
    for execution in EXECUTIONS if family == "gpt2" else ("auto", "partition"):
        expected = grafted(recipient, donor, one, ids, execution=execution)
        agree(grafted(recipient, twins, pieces, ids, execution=execution), expected, f"18 donors, {family}")
    dense = grafted(recipient, twins, pieces, ids, execution="dense")
    assert torch.equal(dense, grafted(recipient, donor, one, ids, execution="dense"))
    first, second = (GraftRule(span, "ALL", source=name) for span, name in ((Span(0, 5), "a"), (Span(5, LENGTH), "b")))
    halves = GraftPlan((first, second), "follow", "follow")
    agree(grafted(recipient, twins, halves, ids), run(donor, ids), f"18 donors, {family}")


# In every mode of autograd.


@pytest.mark.parametrize(
    ("family", "execution"),
    [*(("llama", execution) for execution in EXECUTIONS), ("gpt2", "auto"), ("qwen2_moe", "partition")],
)
def test_gradients_reach_both_models_through_their_own_rows(family, execution):
    recipient, donor = tiny_pair(family)
    made = draw(family, "gradient", switches=False)
    ids, masks = torch.tensor([made.ids]), batch_masks([made])
    weights = torch.randn(1, LENGTH, 261, generator=torch.Generator().manual_seed(0))
    expected = grafted(recipient, donor, made.plan, ids, masks=masks, execution=execution)
    with Graft(donor, made.plan, execution=execution).attach(recipient) as attachment:
        attachment.batch = masks
        with torch.inference_mode():
            assert torch.equal(recipient(ids).logits, expected)
        logits = recipient(ids).logits
        assert torch.equal(logits, expected)
        (logits * weights).sum().backward()
    # A small step along the gradient changes the sum by its squared length: so the gradient is the graft's own.
    parameters = [p for model in (recipient, donor) for p in model.parameters() if p.grad is not None]
    assert any(p.grad.abs().max() > 0 for p in donor.parameters() if p.grad is not None)
    square = sum(float(p.grad.double().square().sum()) for p in parameters)
    step = 1e-3 / square**0.5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=sign * step)
        moved = grafted(recipient, donor, made.plan, ids, masks=masks, execution=execution)
        ends.append(float((moved * weights).double().sum()))
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=-sign * step)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(square, rel=0.02)
