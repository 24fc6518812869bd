"""The method's invariants on the bundled language model; the numbers are those of the families' own tests.

Tiny models show the same in ``test_invariants``; here is what a real tokenizer, thirty layers and real weights may
change. The rest of the list runs on it with ``-m slow``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import Oracle, Rule, all_cells, assignment, cells_of

from lightning_interp.core.tokens.positions import All, FromBatch, Last, Span
from lightning_interp.grafting import Graft, GraftEvaluator, GraftPlan, GraftPrompt, GraftRule, component_grid
from lightning_interp.grafting.metrics import METRICS

pytestmark = pytest.mark.bundled

TEXT = "Ann Lee stars in a film alongside"
LAYERS = 30


@pytest.fixture(scope="module")
def pair():
    """SmolLM2, a donor whose every weight is moved by a tenth of its spread, and the tokenizer."""
    from lightning_interp import load_causal_lm

    loaded = load_causal_lm("smollm2-135m-instruct")
    recipient = loaded.model.eval()
    donor = copy.deepcopy(recipient)
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))  # for all weights it takes seconds
    with torch.no_grad():
        for i, parameter in enumerate(donor.parameters()):
            moves, size = noise.roll(7919 * i), 0.1 * float(parameter.std())
            for piece in parameter.view(-1).split(len(noise)):
                piece.add_(moves[: len(piece)], alpha=size)
    return recipient, donor, loaded.tokenizer


@pytest.fixture(scope="module")
def ids(pair):
    return pair[2](TEXT, return_tensors="pt").input_ids


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def grafted(recipient, donor, plan, ids, masks=None, **kwargs):
    with Graft(donor, plan, **kwargs).attach(recipient) as attachment:
        attachment.batch = masks
        return recipient(ids).logits


def test_ends_are_exact_and_nothing_is_left(pair, ids, hook_count):  # 1, 2, 4, 5
    recipient, donor, _ = pair
    written = [p._version for model in (recipient, donor) for p in model.parameters()]
    plain = run(recipient, ids)
    assert torch.equal(grafted(recipient, donor, GraftPlan(), ids), plain)
    assert torch.equal(grafted(recipient, donor, GraftPlan.whole(), ids), run(donor, ids))
    assert not torch.equal(grafted(recipient, donor, GraftPlan.at(Last()), ids), plain)
    with pytest.raises(ZeroDivisionError), Graft(donor, GraftPlan.at(Last())).attach(recipient):
        raise ZeroDivisionError
    assert [p._version for model in (recipient, donor) for p in model.parameters()] == written
    assert hook_count(recipient, donor) == 0


@pytest.mark.slow
def test_rows_and_doses_are_exact(pair, ids, state_hash):  # 5, 6, 19
    recipient, donor, _ = pair
    before = [state_hash(model) for model in (recipient, donor)]
    plans = [GraftPlan(), GraftPlan.at(Last())]
    mixed = grafted(recipient, donor, plans, ids.repeat(2, 1))
    assert torch.equal(mixed[0], run(recipient, ids.repeat(2, 1))[0])
    assert torch.equal(mixed, grafted(recipient, donor, plans, ids.repeat(2, 1)))
    for dose, model in ((0.0, recipient), (1.0, donor)):
        everywhere = GraftPlan.at(All(), "ALL", head="follow", final_norm="follow", dose=dose)
        assert torch.equal(grafted(recipient, donor, everywhere, ids), run(model, ids))
    assert [state_hash(model) for model in (recipient, donor)] == before


def test_the_definition(pair, ids, agree):  # 7, 14, 16
    recipient, donor, _ = pair
    last, length = ids.shape[1] - 1, ids.shape[1]
    oracle = Oracle("llama", recipient, donor)
    paper = frozenset(cells_of("llama", ["PAPER_ALL"], range(LAYERS), LAYERS))
    upper = frozenset(cells_of("llama", ["ATTN", "O"], range(14, LAYERS), LAYERS))
    cases = [
        (GraftPlan.at(Span(0, 2) | Last()), [Rule(frozenset({0, 1, last}), paper)]),
        (GraftPlan.at(Last(), ["ATTN", "O"], "upper_half"), [Rule(frozenset({last}), upper)]),
    ]
    for plan, rules in cases:
        expected = oracle.logits(ids[0].tolist(), assignment(length, rules))
        agree(grafted(recipient, donor, plan, ids)[0], expected, "7 definition, bundled")
    assert recipient.get_output_embeddings().weight is recipient.get_input_embeddings().weight


@pytest.mark.slow
def test_duality_causality_rows_and_locality(pair, ids, agree):  # 3, 8, 9, 10, 15, 18
    recipient, donor, _ = pair
    plan = GraftPlan.at(Span(0, 2), ["ATTN", "FFN"])
    agree(grafted(recipient, donor, plan, ids), grafted(donor, recipient, plan.dual(), ids), "8 duality, bundled")
    later = grafted(recipient, donor, plan | GraftPlan.at(Last()), ids)
    here = grafted(recipient, donor, plan, ids)
    agree(later[:, :-1], here[:, :-1], "9 causality, bundled")
    assert (later[:, -1] - here[:, -1]).abs().max() > 1e-2
    rows = grafted(recipient, donor, [plan, GraftPlan.at(Last()), GraftPlan()], ids.repeat(3, 1))
    agree(rows[:1], here, "10 rows, bundled")
    local = grafted(recipient, donor, GraftPlan.at(Span(3), ["q", "o", "FFN"], LAYERS - 1), ids)
    plain = run(recipient, ids)
    moved = (local - plain).abs().amax(dim=-1)[0]
    assert moved[3] > 1e-3
    assert float(moved[torch.arange(len(moved)) != 3].max()) < 1e-4
    same = grafted(recipient, copy.deepcopy(recipient), plan, ids, execution="dense")
    assert torch.equal(same, plain)
    two = GraftPlan((GraftRule(Span(0), source="a"), GraftRule(Span(1), source="b")))
    agree(
        grafted(recipient, {"a": donor, "b": copy.deepcopy(donor)}, two, ids),
        grafted(recipient, donor, GraftPlan.at(Span(0, 2)), ids),
        "18 donors, bundled",
    )


@pytest.mark.slow
def test_what_reaches_whom(pair, ids, agree):  # 15
    recipient, donor, _ = pair
    plain, p, others = run(recipient, ids), 3, torch.arange(ids.shape[1]) != 3
    for name in ("unembed", "final_norm"):
        plan = GraftPlan.at(Span(p), name, head="follow", final_norm="follow")
        actual = grafted(recipient, donor, plan, ids)
        agree(actual[:, others], plain[:, others], "15 locality, bundled")
        assert (actual[:, p] - plain[:, p]).abs().max() > 1e-2, name
    for names in (["k"], ["v"], ["k", "v"]):
        actual = grafted(recipient, donor, GraftPlan.at(Span(p), names), ids)
        agree(actual[:, :p], plain[:, :p], "15 locality, bundled")
        assert (actual[:, p + 1 :] - plain[:, p + 1 :]).abs().max() > 1e-2, names


@pytest.mark.slow
def test_scores_are_the_same_in_every_run(pair):  # 6
    recipient, donor, tokenizer = pair
    prompts = [GraftPrompt(TEXT, "Bo", {"FE": "Ann Lee"})]
    state, found = torch.get_rng_state(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(GraftEvaluator(prompts, tokenizer).evaluate(recipient, donor).rows)
    torch.set_rng_state(state)
    assert found[0] == found[1]


@pytest.mark.slow
def test_padding_and_prefixes(pair):  # 11, 12
    recipient, donor, tokenizer = pair
    entity = GraftPlan.at(FromBatch("FE"))
    grid = component_grid(LAYERS, components=["ATTN", "FFN"], width=10, base=entity)
    plans = dict(list(grid.plans.items())[::14]) | {"FE": entity}
    prompts = [GraftPrompt(TEXT, "Bo", {"FE": "Ann Lee"}), GraftPrompt("Cy Ray acts with", "Di", {"FE": "Cy Ray"})]
    together = GraftEvaluator(prompts, tokenizer, plans=plans)
    alone = [GraftEvaluator([p], tokenizer, plans=plans, share_prefixes=False) for p in prompts]
    ours = together.evaluate(recipient, donor).rows
    theirs = [row for each in alone for row in each.evaluate(recipient, donor).rows]
    for a, b in zip(ours, theirs, strict=True):
        assert a["plan"] == b["plan"]
        assert a["target_rank"] == pytest.approx(b["target_rank"], abs=1)  # two logits may swap in the last bits
        for metric in METRICS[2:4] + METRICS[5:]:
            assert a[metric] == pytest.approx(b[metric], abs=2e-4)
    assert together.tokens["fed"] < 0.6 * together.tokens["without sharing"]


@pytest.mark.slow
def test_generation(pair, agree):  # 13
    recipient, donor, tokenizer = pair
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad(), Graft(donor, GraftPlan.at(Last()), decode="donor").attach(recipient):
        output = recipient.generate(
            ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    length = ids.shape[1]
    one_pass = grafted(recipient, donor, GraftPlan.at(Span(length - 1, length + 3)), output.sequences)
    agree(torch.stack(output.logits, dim=1), one_pass[:, length - 1 : -1], "13 generation, bundled")


def test_every_parameter_is_some_cell(pair):
    from lightning_interp import ModelMap

    model_map = ModelMap.build(pair[0])
    assert {(name, layer) for name, layer, _ in model_map.cells()} == all_cells("llama", LAYERS)
    assert model_map.unmapped() == []
