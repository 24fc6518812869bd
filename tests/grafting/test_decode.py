"""Generation with a cache equals one pass over prompt and answer, with the plan carried on as the policy says."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, Rule, all_cells, assignment, cells_of

from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.positions import All, FromBatch, Last, Span
from lightning_interp.errors import PositionError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan, GraftRule
from lightning_interp.testing import FAMILIES

LENGTHS = (11, 6)
WIDTH, NEW = max(LENGTHS), 4
ENTITY = Span(1, 4)


def prompts(lengths=LENGTHS, seed=0):
    """Left-padded prompts."""
    ids = torch.randint(5, 261, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def answer(model, batch, **kwargs):
    settings = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "num_beams": 1} | kwargs
    return model.generate(**batch, output_logits=True, return_dict_in_generate=True, **settings)


def logits_of(output):
    return torch.stack(output.logits, dim=1)


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(ids, **kwargs).logits


# Each case: a plan, its policy, and what both mean. ``rules`` are those of the prompt, ``later`` what the policy makes
# of generated tokens: None for the recipient, "all" for the whole donor, or the index of the rule that goes on.
LOCATED = (("entity", ("PAPER_ALL",)), ("last", ("ATTN", "O")))
ELSEWHERE = (("elsewhere", ("PAPER_ALL",)),)
CASES = {
    "recipient": (LOCATED, "recipient", None),
    "donor": (LOCATED, "donor", "all"),
    "like_last": (LOCATED, "like_last", 1),
    "like_last of a complement": (ELSEWHERE, "like_last", None),
    "outside": (LOCATED, "outside", None),
    "outside of a complement": (ELSEWHERE, "outside", 0),
}
SELECTORS = {"entity": ENTITY, "last": Last(), "elsewhere": ~(ENTITY | Last())}


def indices(site, length):
    entity, last = set(range(1, 4)), {length - 1}
    return {"entity": entity, "last": last, "elsewhere": set(range(length)) - entity - last}[site]


def extended_table(family, rules, later, length, **switches):
    """The oracle's table for prompt and generated tokens."""
    generated = set(range(length, length + NEW))
    meant = [
        Rule(
            frozenset(indices(site, length) | (generated if later == i else set())),
            frozenset(cells_of(family, names, range(4), 4)),
        )
        for i, (site, names) in enumerate(rules)
    ]
    if later == "all":
        meant.append(Rule(frozenset(generated), frozenset(all_cells(family, 4))))
    return assignment(length + NEW, meant, **switches)


def extended_plan(rules, later, **switches):
    """One mask a rule, over prompt and generated tokens, and the plan that reads them."""
    made, masks = [], {}
    for i, (site, names) in enumerate(rules):
        made.append(GraftRule(FromBatch(site), names))
        masks[site] = torch.zeros(len(LENGTHS), WIDTH + NEW, dtype=torch.bool)
        for row, length in enumerate(LENGTHS):
            masks[site][row, [WIDTH - length + t for t in indices(site, length)]] = True
        masks[site][:, WIDTH:] = later == i
    if later == "all":
        made.append(GraftRule(FromBatch("generated"), "PAPER_ALL", "none", others=True))
        masks["generated"] = (torch.arange(WIDTH + NEW) >= WIDTH).expand(len(LENGTHS), -1)
    return GraftPlan(tuple(made), **switches), masks


# Caches differ by family, policies do not: every family with one policy that goes on, llama with all.
@pytest.mark.parametrize(
    ("family", "case"),
    [(f, c) for f in FAMILIES for c in CASES if f == "llama" or c == "like_last"],
)
def test_cached_generation_is_one_pass_with_the_extended_mask(family, case, pairs, agree):
    recipient, donor = pairs(family)
    rules, decode, later = CASES[case]
    switches = {"head": "donor"} if case == "recipient" else {}
    plan = GraftPlan(tuple(GraftRule(SELECTORS[site], names) for site, names in rules), **switches)
    batch = prompts()
    with Graft(donor, plan, decode=decode).attach(recipient):
        output = answer(recipient, batch)
    cached, sequences = logits_of(output), output.sequences

    # By definition: token by token, row by row.
    oracle = Oracle(family, recipient, donor)
    for row, length in enumerate(LENGTHS):
        ids = sequences[row, WIDTH - length :].tolist()
        table = extended_table(family, rules, later, length, **switches)
        expected = oracle.logits(ids, table)[length - 1 : -1]
        agree(cached[row], expected, f"13 decode, {family}")

    # By one uncached pass over everything, whose masks are spelt out.
    mask = torch.cat([batch["attention_mask"], torch.ones(len(LENGTHS), NEW, dtype=torch.long)], dim=1)
    where = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    whole, masks = extended_plan(rules, later, **switches)
    with Graft(donor, whole).attach(recipient) as attachment:
        attachment.batch = masks
        once = run(recipient, sequences, attention_mask=mask, **where)[:, WIDTH - 1 : -1]
    agree(cached, once, f"13 decode, {family}")
    once[..., recipient.config.eos_token_id] = float("-inf")  # as min_new_tokens does
    assert torch.equal(once.argmax(-1), sequences[:, WIDTH:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_policies_differ(family, pairs):
    recipient, donor = pairs(family)
    plan = GraftPlan((GraftRule(ENTITY), GraftRule(Last(), ("ATTN", "O"))))
    steps = []
    for decode in ("recipient", "donor", "like_last"):
        with Graft(donor, plan, decode=decode).attach(recipient):
            steps.append(logits_of(answer(recipient, prompts())))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert torch.equal(steps[left][:, 0], steps[right][:, 0])  # the prompt's own answer knows no policy
        assert (steps[left][:, 1] - steps[right][:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe"])
def test_the_ends_generate_as_the_plain_models(family, pairs):
    recipient, donor = pairs(family)
    batch = prompts()
    with Graft(donor, GraftPlan.whole(), decode="donor").attach(recipient):
        grafted = answer(recipient, batch)
    expected = answer(donor, batch)
    assert torch.equal(grafted.sequences, expected.sequences)
    assert torch.equal(logits_of(grafted), logits_of(expected))
    with Graft(donor, GraftPlan()).attach(recipient):
        grafted = answer(recipient, batch)
    assert torch.equal(logits_of(grafted), logits_of(answer(recipient, batch)))


@pytest.mark.parametrize("decode", ["recipient", "donor", "like_last", "outside"])
def test_a_switch_that_is_the_recipients_stays_so_while_decoding(decode, pairs):
    # The policy speaks of what the plan grafts: head and final norm keep their own switches.
    recipient, donor = pairs("llama")
    states = []
    handle = recipient.model.norm.register_forward_hook(lambda _, args, out: states.append((args[0], out)))
    with Graft(donor, GraftPlan.at(All()), decode=decode).attach(recipient):
        output = answer(recipient, prompts())
    handle.remove()
    with torch.no_grad():
        for (x, normed), logits in zip(states, output.logits, strict=True):
            assert torch.equal(recipient.model.norm(x), normed)
            assert torch.allclose(recipient.lm_head(normed[:, -1]), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "decode"),
    [("llama", "recipient"), ("llama", "outside"), ("gpt2", "like_last"), ("gemma2", "donor")],
)
def test_plans_follow_their_rows_through_beams(family, decode, pairs, agree):
    recipient, donor = pairs(family)
    batch = prompts()
    plans = [GraftPlan.at(ENTITY), GraftPlan((GraftRule(~Last(), "BLOCK"), GraftRule(Last(), "ATTN", "upper_half")))]
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with Graft(donor, plans, decode=decode).attach(recipient):
        together = answer(recipient, batch, **beams)
    for row, (plan, length) in enumerate(zip(plans, LENGTHS, strict=True)):
        single = {name: tensor[row : row + 1, WIDTH - length :] for name, tensor in batch.items()}
        with Graft(donor, plan, decode=decode).attach(recipient):
            alone = answer(recipient, single, **beams)
        mine = slice(2 * row, 2 * row + 2)
        assert torch.equal(together.sequences[mine, WIDTH:], alone.sequences[:, length:])
        agree(together.sequences_scores[mine], alone.sequences_scores, f"13 beams, {family}")


def test_an_attachment_starts_anew_with_each_prompt(pairs):
    recipient, donor = pairs("llama")
    plan = GraftPlan((GraftRule(All(), "BLOCK", "Q1"), GraftRule(Last(), ("ATTN", "O"))))
    first, second = prompts(), prompts((7, 11), seed=1)
    graft = Graft(donor, plan, decode="like_last")
    with graft.attach(recipient):
        answer(recipient, first)
        again = logits_of(answer(recipient, second))
    with graft.attach(recipient):
        assert torch.equal(logits_of(answer(recipient, second)), again)


def test_a_prompt_of_one_token_is_a_prompt(pairs, agree):
    recipient, donor = pairs("llama")
    ids = torch.tensor([[70]])
    with Graft(donor, GraftPlan.at(Last())).attach(recipient):
        output = answer(recipient, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    paper = dict.fromkeys(cells_of("llama", ["PAPER_ALL"], range(4), 4), 1)
    table = [paper] + [{}] * NEW
    expected = Oracle("llama", recipient, donor).logits(output.sequences[0].tolist(), table)[:-1]
    agree(logits_of(output)[0], expected, "13 decode, llama")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_a_prompt_in_two_pieces(family, pairs, agree):
    recipient, donor = pairs(family)
    ids = prompts((12, 12))["input_ids"]
    plan = GraftPlan((GraftRule(~Span(2, 8, strict=False), "ATTN"), GraftRule(Span(9, 11, strict=False), "BLOCK")))
    with Graft(donor, plan).attach(recipient) as attachment, torch.no_grad():
        attachment.prompt_lengths = torch.tensor([12, 12])
        once = run(recipient, ids)
        first = recipient(ids[:, :5], use_cache=True)
        rest = recipient(ids[:, 5:], **cache_argument(recipient, cache_of(first))).logits
    agree(torch.cat([first.logits, rest], dim=1), once, f"13 pieces, {family}")


def test_a_prompt_in_pieces_of_which_nobody_told_is_refused(pairs):
    recipient, donor = pairs("llama")
    ids = prompts((12, 12))["input_ids"]
    with Graft(donor, GraftPlan.at(Last())).attach(recipient), torch.no_grad():
        first = recipient(ids[:, :5], use_cache=True)
        with pytest.raises(PositionError, match=r"7 tokens came in one pass after 5 that were cached.*prompt_lengths"):
            recipient(ids[:, 5:], **cache_argument(recipient, cache_of(first)))
