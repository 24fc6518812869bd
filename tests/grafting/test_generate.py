"""Decode policies given as functions, and whole answers with their policy on every row."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.core.tokens.positions import FromBatch, Last, Span
from lightning_interp.errors import PositionError, RecipeError
from lightning_interp.grafting import Graft, GraftEvaluator, GraftPlan, GraftPrompt, PatchPlan
from lightning_interp.grafting.generate import complete, exact_match
from lightning_interp.testing import byte_tokenizer

NEW = 5
PLAN = GraftPlan.at(Span(1, 4) | Last())
PROMPTS = [
    GraftPrompt("Ann Lee stars with", "Bo", {"FE": "Ann Lee"}, unit="1"),
    GraftPrompt("A film by Cy has", "Di", {"FE": "Cy"}, unit="2"),
]


@torch.no_grad()
def generated(recipient, donor, decode, **options):
    ids = torch.tensor([[0, 0, 50, 60, 70, 80, 90], [51, 61, 71, 81, 91, 101, 111]])
    with Graft(donor, PLAN, decode=decode).attach(recipient):
        output = recipient.generate(
            ids,
            attention_mask=(ids > 0).long(),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize(
    ("family", "name"),  # with a cache that grows and one that slides
    [("llama", "recipient"), ("llama", "donor"), ("llama", "outside"), ("gemma2", "like_last")],
)
def test_a_function_that_names_a_policy_is_that_policy(family, name, pairs):
    seen = []

    def policy(step):
        seen.append((step.past, step.length))
        return name

    tokens, logits = generated(*pairs(family), policy)
    expected = generated(*pairs(family), name)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
    assert seen == [(7 + i, 1) for i in range(NEW - 1)]  # never asked about the prompt


def test_a_mask_chooses_the_donor_token_by_token(pairs):
    """Row 0 is all donor's, row 1 all recipient's: each is what that policy alone gives."""
    recipient, donor = pairs("llama")
    tokens, logits = generated(recipient, donor, lambda step: torch.tensor([[True], [False]]))
    for row, name in ((0, "donor"), (1, "recipient")):
        expected = generated(recipient, donor, name)
        assert torch.equal(tokens[row], expected[0][row])
        assert (logits[row] - expected[1][row]).abs().max() < 1e-5
    assert not torch.equal(generated(recipient, donor, "donor")[1], generated(recipient, donor, "recipient")[1])


def test_a_policy_may_change_on_the_way(pairs):
    recipient, donor = pairs("gpt2")
    _, logits = generated(recipient, donor, lambda step: "donor" if step.past < 9 else "recipient")
    _, first = generated(recipient, donor, "donor")
    assert torch.equal(logits[:, :3], first[:, :3])  # columns 7 and 8 are the donor's
    assert not torch.equal(logits[:, 3:], first[:, 3:])


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ("followers", r"gave 'followers'; expected a mask or one of recipient"),
        (torch.ones(2, 3, dtype=torch.bool), r"shape \(2, 3\); expected bool \[2, 1\]"),
        (torch.ones(2, 1), r"torch.float32 tensor"),
    ],
)
def test_what_a_function_may_not_give(gives, message, pairs, hook_count):
    recipient, donor = pairs("llama")
    with pytest.raises(PositionError, match=message):
        generated(recipient, donor, lambda step: gives)
    assert hook_count(recipient, donor) == 0


# Whole answers.


def evaluator(**plans):
    return GraftEvaluator(PROMPTS, byte_tokenizer(), plans={"FE": GraftPlan.at(FromBatch("FE")), **plans})


@pytest.mark.parametrize(("decode", "num_beams"), [("recipient", 2), ("donor", 1), ("like_last", 1), ("outside", 2)])
def test_answers_are_those_of_each_plan_alone(decode, num_beams, pairs):
    recipient, donor = pairs("llama")
    tokenizer, plans = byte_tokenizer(), {"last": GraftPlan.at(Last())}
    rows = complete(evaluator(**plans), recipient, donor, max_new_tokens=4, decode=decode, num_beams=num_beams)
    ends = {"PRE": "recipient", "SFT": "donor"}
    assert all(row["decode"] == ends.get(row["plan"], decode) for row in rows)
    assert len(rows) == 2 * 4
    for row in rows:
        prompt = PROMPTS[row["prompt"]]
        plan = evaluator(**plans).plans[row["plan"]]
        ids = torch.tensor([tokenizer(prompt.text).input_ids])
        begin = prompt.text.index(prompt.spans["FE"])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, begin : begin + len(prompt.spans["FE"])] = True
        with Graft(donor, plan, decode=row["decode"]).attach(recipient) as attachment, torch.no_grad():
            attachment.batch = {"FE": mask.repeat(num_beams, 1)}
            written = recipient.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, num_beams=num_beams
            )
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == row["completion"]


def beside(step):
    return torch.ones(step.batch_size, step.length, dtype=torch.bool)


@pytest.mark.parametrize("decode", ["recipient", "donor", "like_last", "outside", lambda step: "donor", beside])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_two_models_answer_as_they_do_without_a_graft(decode, num_beams, pairs):
    models = dict(zip(("PRE", "SFT"), pairs("gpt2"), strict=True))
    asking = evaluator(last=GraftPlan.at(Last()))
    rows = complete(asking, *models.values(), max_new_tokens=4, decode=decode, num_beams=num_beams)
    for row in (row for row in rows if row["plan"] in models):
        ids = torch.tensor([byte_tokenizer()(PROMPTS[row["prompt"]].text).input_ids])
        written = models[row["plan"]].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, num_beams=num_beams
        )
        assert byte_tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True) == row["completion"]


def test_an_answer_is_exact_when_it_begins_with_the_target(pairs):
    recipient, donor = pairs("llama")
    written = complete(evaluator(), recipient, donor, max_new_tokens=3)
    told = {(row["prompt"], row["plan"]): row["completion"] for row in written}
    prompts = [GraftPrompt(p.text, told[i, "SFT"].strip() or "x", p.spans, p.unit) for i, p in enumerate(PROMPTS)]
    again = GraftEvaluator(prompts, byte_tokenizer(), plans={"FE": GraftPlan.at(FromBatch("FE"))})
    rows = complete(again, recipient, donor, max_new_tokens=3)
    assert {row["exact"] for row in rows if row["plan"] == "SFT"} == {1.0}
    shares = exact_match(rows)
    assert (shares["SFT"].value, shares["SFT"].n) == (1.0, 2)
    assert shares["PRE"].value == sum(told[i, "PRE"].strip() == p.target for i, p in enumerate(prompts)) / 2


def test_patches_are_not_continued_and_the_rest_is_left_as_found(pairs, hook_count):
    recipient, donor = pairs("gpt2")
    rows = complete(evaluator(patch=PatchPlan(Last())), recipient, donor, max_new_tokens=2, decode=lambda step: "donor")
    assert {row["plan"] for row in rows} == {"PRE", "SFT", "FE"}
    assert [row["decode"] for row in rows[:3]] == ["recipient", "donor", "<lambda>"]
    assert hook_count(recipient, donor) == 0
    with pytest.raises(RecipeError, match=r"max_new_tokens=0"):
        complete(evaluator(), recipient, donor, max_new_tokens=0)
