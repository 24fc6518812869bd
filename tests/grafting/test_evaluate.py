"""Batched scores of many plans against one prompt, one plan, one pass at a time."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lightning_interp import All, FromBatch, Graft, GraftPlan, Last, Span, Substring, paper_plans
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError
from lightning_interp.grafting import GraftEvaluator, GraftPrompt, GraftResult, PatchPlan
from lightning_interp.grafting.metrics import METRICS, score_logits
from lightning_interp.models import LoraSettings
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.testing import byte_tokenizer, tiny_model, tiny_pair

TOKENIZER = byte_tokenizer()
PROMPTS = [
    GraftPrompt("Ann Lee met", "Bo", {"FE": "Ann Lee"}, unit="1", form="plain"),
    GraftPrompt("The film cast Zoë", "Al", {"FE": "Zoë"}, unit="1", form="cast"),
    GraftPrompt("Al!", "Ann", {"FE": "Al"}, unit="2", form="plain"),
    GraftPrompt("Who acts beside Al? Answer:", "Ann", {"FE": "Al"}, unit="2", form="cast"),
]
PLANS = {
    **paper_plans(),
    "donor head": GraftPlan.at(FromBatch("FE"), head="donor"),
    "follow": GraftPlan.at(Last(), "ALL", head="follow", final_norm="follow"),
    "Q": GraftPlan.at(Span(1, 3), "BLOCK", "Q4"),
}


def evaluator(prompts=PROMPTS, **options):
    return GraftEvaluator(prompts, TOKENIZER, **options)


def alone(model, ids, plan, donor, entity):
    """Logits behind one unpadded prompt under one plan."""
    batch = torch.tensor([ids])
    mask = torch.zeros_like(batch, dtype=torch.bool)
    mask[0, entity] = True
    with torch.no_grad(), Graft(donor, plan).attach(model) as attachment:
        attachment.batch = {"FE": mask}
        return model(batch).logits[0, -1]


def bytes_of(prompt):
    """Ids and, without the package, where the entity's bytes are."""
    begin = prompt.text.encode().find(prompt.spans["FE"].encode())
    entity = list(range(begin, begin + len(prompt.spans["FE"].encode())))
    return TOKENIZER(prompt.text)["input_ids"], entity


@torch.no_grad()
def slow(model, donor, prompts, plans, top_k=5):
    table = {}
    for i, prompt in enumerate(prompts):
        ids, entity = bytes_of(prompt)
        target = torch.tensor(TOKENIZER(" " + prompt.target)["input_ids"][:1])
        logits = {name: alone(model, ids, plan, donor, entity) for name, plan in plans.items()}
        for name, row in logits.items():
            scores = score_logits(row[None], target, logits["PRE"][None], logits["SFT"][None], top_k=top_k)[0]
            table[i, name] = (scores, TOKENIZER.decode([int(row.argmax())]))
    return table


def check(result, expected, tolerance=1e-5):
    assert len(result.rows) == len(expected)
    for row in result.rows:
        scores, favourite = expected[row["prompt"], row["plan"]]
        found = torch.tensor([row[metric] for metric in METRICS])
        assert row["predicted"] == favourite
        torch.testing.assert_close(found, scores.float(), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_scores_equal_one_prompt_and_one_plan_at_a_time(family, pairs):
    recipient, donor = pairs(family)
    plans = PLANS if family == "gpt2" else {n: PLANS[n] for n in ("PRE", "SFT", "FE+LT", "donor head", "Q")}
    result = evaluator(plans=plans, top_k=3).evaluate(recipient, donor)
    check(result, slow(recipient, donor, PROMPTS, plans, top_k=3))
    changed = [row for row in result.rows if row["kl_to_recipient"] > 1e-3]
    assert {row["plan"] for row in changed} >= {"SFT", "FE+LT", "donor head", "Q"}


@pytest.mark.parametrize("family", ["opt"])
def test_the_plain_models_are_in_the_table(family, pairs):
    recipient, donor = pairs(family)
    result = evaluator(plans={"LT": paper_plans()["LT"]}).evaluate(recipient, donor)
    assert result.plans == ["PRE", "SFT", "LT"]
    for name, model in (("PRE", recipient), ("SFT", donor)):
        for row in (row for row in result.rows if row["plan"] == name):
            ids, _ = bytes_of(PROMPTS[row["prompt"]])
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            token = TOKENIZER(" ")["input_ids"][0]
            assert row["target_logprob"] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=2e-5)
            assert row["kl_to_recipient" if name == "PRE" else "kl_to_donor"] == pytest.approx(0.0, abs=1e-6)


def test_the_size_of_a_pass_changes_nothing(pairs):
    recipient, donor = pairs("gpt2")
    reference = evaluator().evaluate(recipient, donor)
    for budget, least, most in ((1, 25, 10**6), (120, 4, 24), (10**6, 1, 3)):
        widths = []
        handle = recipient.register_forward_pre_hook(
            lambda _m, _a, kwargs, widths=widths: widths.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        result = evaluator(token_budget=budget).evaluate(recipient, donor)
        handle.remove()
        for ours, theirs in zip(result.rows, reference.rows, strict=True):
            assert {k: v for k, v in ours.items() if k not in METRICS} == {
                k: v for k, v in theirs.items() if k not in METRICS
            }
            assert [ours[m] for m in METRICS] == pytest.approx([theirs[m] for m in METRICS], abs=1e-5)
        assert least <= len(widths) <= most
        assert all(rows * columns <= max(budget, columns) for rows, columns in widths)


def test_shares_of_processes_make_up_the_whole(pairs):
    recipient, donor = pairs("llama")
    whole = evaluator()

    def table(rank, size):
        found = {}
        for index, scores, top in whole.scores(recipient, donor, rank=rank, world_size=size):
            found |= {int(i): (row, top[int(i)]) for i, row in zip(index, scores, strict=True)}
        return found

    one, shares = table(0, 1), [table(rank, 3) for rank in range(3)]
    assert [sorted(share) for share in shares] == [[0, 3], [1], [2]]
    for share in shares:
        for i, (row, top) in share.items():
            torch.testing.assert_close(row, one[i][0], rtol=1e-4, atol=1e-5)
            assert top == one[i][1]
    assert table(4, 5) == {}


def test_an_adapter_is_a_donor():
    model = tiny_model("gpt2")
    inject_lora(model, LoraSettings(r=4), seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    result = evaluator(PROMPTS[:2]).evaluate(model, "default")
    check(result, slow(model, "default", PROMPTS[:2], paper_plans()))
    base = tiny_model("gpt2")
    for row in (row for row in result.rows if row["plan"] == "PRE"):
        ids, _ = bytes_of(PROMPTS[row["prompt"]])
        with torch.no_grad():
            log_p = base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert row["target_logprob"] == pytest.approx(float(log_p[TOKENIZER(" ")["input_ids"][0]]), abs=2e-5)
    assert max(row["kl_to_recipient"] for row in result.rows if row["plan"] == "SFT") > 1e-2


def test_plans_that_read_text_use_the_evaluators_tokenizer(pairs):
    recipient, donor = pairs("llama")
    plans = {"named": GraftPlan.at(Substring("Al")), "marked": GraftPlan.at(FromBatch("FE"))}
    rows = evaluator(PROMPTS[2:], plans=plans).evaluate(recipient, donor).rows
    named, marked = ([row["target_logprob"] for row in rows if row["plan"] == plan] for plan in plans)
    assert named == pytest.approx(marked, abs=1e-6)


def test_rows_say_how_they_were_made(pairs):
    result = evaluator(plans=PLANS).evaluate(*pairs("llama"))
    rows = {row["plan"]: row for row in result.rows if row["prompt"] == 1}
    assert [row["prompt"] for row in result.rows] == sorted(list(range(4)) * len(PLANS))
    assert (rows["donor head"]["head"], rows["donor head"]["final_norm"]) == ("donor", "recipient")
    assert (rows["follow"]["head"], rows["follow"]["final_norm"]) == ("follow", "follow")
    assert (rows["PRE"]["head"], rows["SFT"]["head"]) == ("recipient", "follow")
    expected = {"unit": "1", "form": "cast", "text": PROMPTS[1].text, "target": "Al"}
    assert {key: rows["LT"][key] for key in expected} == expected
    assert rows["PRE"]["kl_to_recipient"] == 0.0
    assert (
        GraftEvaluator([GraftPrompt("x", "y", {"FE": "x"})], TOKENIZER).evaluate(*pairs("llama")).rows[0]["unit"] == "0"
    )


def test_the_result_lists_the_tokens_of_every_span(pairs):
    prompts = [GraftPrompt("Anna met Ann", "Bo", {"FE": "Ann"}), GraftPrompt("Bo", "Al", {"FE": "Bo"})]
    result = evaluator(prompts).evaluate(*pairs("llama"))
    assert result.located == [
        {"prompt": 0, "span": "FE", "text": "Ann", "columns": [9, 10, 11], "tokens": ["A", "n", "n"]},
        {"prompt": 1, "span": "FE", "text": "Bo", "columns": [0, 1], "tokens": ["B", "o"]},
    ]
    assert GraftResult(**asdict(result)) == result


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("PRE", GraftPlan.at(Last())),
        ("SFT", GraftPlan.at(All())),
        ("SFT", PatchPlan(Last())),
        ("PRE", GraftPlan.whole()),
    ],
)
def test_the_names_of_the_two_models_are_taken(name, plan):
    with pytest.raises(RecipeError, match=rf"plans=\{{'{name}': ...\}} is another plan than the \w+ itself"):
        evaluator(plans={name: plan})


# What no graft reaches


def moved_tables(recipient, donor):
    donor.model.rotary_emb.inv_freq.mul_(1.5)


def scaled_attention(recipient, donor):
    donor.model.layers[2].self_attn.scaling *= 3


@pytest.mark.parametrize("how", [moved_tables, scaled_attention])
def test_a_whole_graft_that_is_not_the_donor_is_refused(how, hook_count):
    recipient, donor = tiny_pair("llama")
    evaluator().evaluate(recipient, donor)
    how(recipient, donor)
    evaluator().evaluate(recipient, donor)  # each pair is asked once
    again = copy.deepcopy(donor)
    with pytest.raises(
        IncompatibleModelError, match=r"GraftPlan.whole\('donor'\) on LlamaForCausalLM is not the donor"
    ):
        evaluator().evaluate(recipient, again)
    assert hook_count(recipient, donor, again) == 0


def in_a_list(model):
    for block in model.model.layers:
        block.__dict__["input_layernorm"] = block._modules.pop("input_layernorm")
        block.norms = [block.__dict__["input_layernorm"]]


def in_a_dict(model):
    block = model.model.layers[2].mlp
    block.__dict__["down_proj"] = block._modules.pop("down_proj")
    block.maps = {"down": block.__dict__["down_proj"]}


def a_parameter(model):
    block = model.model.layers[1].self_attn
    block.scales = (nn.Parameter(torch.ones(2)),)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (in_a_list, r"Block 0 .* plain list \(LlamaDecoderLayer\.norms\)"),
        (in_a_dict, r"Block 2 .* plain dict \(LlamaMLP\.maps\)"),
        (a_parameter, r"Block 1 .* plain tuple \(LlamaAttention\.scales\)"),
    ],
)
def test_weights_in_plain_containers_are_refused(how, named, hook_count):
    recipient, donor = tiny_pair("llama")
    how(recipient)
    how(donor)
    with pytest.raises(IncompatibleModelError, match=named):
        Graft(donor, GraftPlan.at(Last())).attach(recipient)
    assert hook_count(recipient, donor) == 0


def test_progress_counts_prompts(pairs):
    seen = []
    evaluator(token_budget=1).evaluate(*pairs("llama"), advance=seen.append)
    assert seen == [1, 1, 1, 1]
    seen.clear()
    evaluator().evaluate(*pairs("llama"), advance=seen.append)
    assert sum(seen) == 4 == len(evaluator())


def test_modes_weights_hooks_and_the_random_state_are_left_as_found(pairs, hook_count, state_hash):
    recipient, donor = (copy.deepcopy(model) for model in pairs("gpt2"))
    for model in (recipient, donor):
        model.train()
        model.transformer.h[1].eval()
    before = [[m.training for m in model.modules()] for model in (recipient, donor)]
    hashes, state = [state_hash(m) for m in (recipient, donor)], torch.get_rng_state()
    seen = []
    handle = recipient.register_forward_hook(lambda module, *_: seen.append(module.transformer.drop.training))
    result = evaluator().evaluate(recipient, donor)
    handle.remove()
    assert set(seen) == {False}
    assert [[m.training for m in model.modules()] for model in (recipient, donor)] == before
    assert [state_hash(m) for m in (recipient, donor)] == hashes
    assert torch.equal(state, torch.get_rng_state())
    assert hook_count(recipient, donor) == 0
    assert result.rows == evaluator().evaluate(*pairs("gpt2")).rows


def test_a_donor_in_training_has_its_dropout_off_too(pairs):
    """A donor that carries a LoRA of its own draws dropout inside of the modules that are grafted."""
    from peft import LoraConfig

    recipient, donor = pairs("llama")
    donor = copy.deepcopy(donor)
    config = LoraConfig(r=2, lora_dropout=0.9, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, donor)
    quiet = evaluator().evaluate(recipient, donor.eval())
    state = torch.get_rng_state()
    assert evaluator().evaluate(recipient, donor.train()).rows == quiet.rows
    assert torch.equal(state, torch.get_rng_state())
    assert donor.training


def test_an_error_in_a_pass_leaves_nothing_behind(pairs, hook_count):
    recipient, donor = pairs("llama")
    recipient.train()
    handle = donor.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluator().evaluate(recipient, donor)
    handle.remove()
    assert recipient.training
    assert hook_count(recipient, donor) == 0
    recipient.eval()


LOST = GraftPrompt("Nobody met", "Bo", {"FE": "Ann"}, unit="3")
UNMARKED = GraftPrompt("Ann met", "Bo", unit="4")


@pytest.mark.parametrize(("bad", "reason"), [(LOST, "Entity 'Ann'"), (UNMARKED, "has no span 'FE'")])
def test_prompts_without_their_entity_are_dropped_and_counted(bad, reason, pairs):
    prompts = [PROMPTS[0], bad, *PROMPTS[1:]]
    ours = evaluator(prompts, missing="drop")
    result = ours.evaluate(*pairs("gpt2"))
    assert len(ours) == 4
    assert [index for index, _ in result.dropped] == [1]
    assert reason in result.dropped[0][1]
    assert sorted({row["prompt"] for row in result.rows}) == [0, 2, 3, 4]
    kept = evaluator().evaluate(*pairs("gpt2"))
    assert [row["target_prob"] for row in result.rows] == [row["target_prob"] for row in kept.rows]


def test_a_span_that_no_plan_asks_for_may_be_missing(pairs):
    plans = {"LT": GraftPlan.at(Last())}
    assert len(evaluator([UNMARKED, *PROMPTS], plans=plans).evaluate(*pairs("llama")).rows) == 15


@pytest.mark.parametrize(
    ("prompts", "options", "error", "match"),
    [
        ([LOST], {}, PositionError, "Entity 'Ann' does not occur in the prompt 'Nobody met'"),
        ([*PROMPTS, UNMARKED], {}, PositionError, r"prompt 'Ann met' has no span 'FE', .* it has: none"),
        (
            [GraftPrompt("Ann met", "Bo", {"FE": "Ann"})],
            {"plans": {"M": GraftPlan.at(~(All() & FromBatch("M")))}},
            PositionError,
            "has no span 'M', which a plan selects; it has: FE",
        ),
        ([LOST, UNMARKED], {"missing": "drop"}, RecipeError, r"2 prompts, 2 dropped \(Entity 'Ann'"),
        ([], {}, RecipeError, "0 prompts, 0 dropped .no prompts were given"),
        (PROMPTS, {"missing": "skip"}, RecipeError, "missing='skip'"),
        (PROMPTS, {"top_k": 0}, RecipeError, "top_k=0"),
        (PROMPTS, {"token_budget": 0}, RecipeError, "token_budget=0"),
        ([GraftPrompt("Ann met", "", {"FE": "Ann"})], {}, PositionError, "target '' of the prompt 'Ann met' is empty"),
        ([GraftPrompt("", "Bo")], {"plans": {}}, PositionError, r"Prompt 0 \(''\) has no tokens"),
    ],
)
def test_what_cannot_be_evaluated(prompts, options, error, match):
    with pytest.raises(error, match=match):
        evaluator(prompts, **options)


def test_models_that_do_not_fit(pairs):
    with pytest.raises(IncompatibleModelError, match="'gpt2'"):
        evaluator().evaluate(pairs("llama")[0], pairs("gpt2")[1])
    with pytest.raises(IncompatibleModelError, match="has no adapter 'default'"):
        evaluator().evaluate(pairs("llama")[0], "default")


def test_a_reduced_precision_pair_is_scored_in_float32():
    recipient, donor = tiny_pair("llama", dtype=torch.bfloat16)
    result = evaluator(PROMPTS[:2]).evaluate(recipient, donor)
    assert all(row["kl_to_recipient"] == 0.0 for row in result.rows if row["plan"] == "PRE")
    check(result, slow(recipient, donor, PROMPTS[:2], paper_plans()), tolerance=5e-2)
