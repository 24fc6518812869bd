"""Invented facts: no name twice, prompts that stop where the texts go on."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.errors import RecipeError
from lightning_interp_recipes.grafting._common import (
    BOTH_WAYS,
    FORMS,
    HELD_OUT,
    RELATIONS,
    fact_prompts,
    fact_texts,
    make_facts,
)
from lightning_interp_recipes.grafting._reproduce_tiny import (
    introductions,
    pattern,
    pattern_finding,
    world_facts,
    world_prompts,
    world_texts,
)

FACTS = make_facts(20, seed=3)


def test_no_given_or_family_name_is_used_twice():
    people = [name for fact in make_facts(40, seed=1) for name in (fact.a, fact.b)]
    given, family = zip(*(name.split() for name in people), strict=True)
    assert len(set(given)) == len(set(family)) == len(people) == 80
    assert len({fact.id for fact in FACTS}) == 20


def test_a_seed_gives_the_same_facts_and_a_prefix_of_more():
    state = torch.get_rng_state()
    assert make_facts(20, seed=3) == FACTS == make_facts(30, seed=3)[:20]
    assert make_facts(20, seed=4) != FACTS
    assert torch.equal(state, torch.get_rng_state())


def told():
    return [row["prompt"] + row["completion"] for row in fact_texts(FACTS)]


def test_texts_state_every_trained_wording_and_some_in_both_orders():
    texts = told()
    trained = len(FORMS) - 1
    assert len(texts) == len(set(texts)) == 20 * (trained + len(BOTH_WAYS))
    for fact in FACTS:
        stating = [text for text in texts if fact.a in text and fact.b in text]
        assert len(stating) == trained + len(BOTH_WAYS)
        assert sum(text.index(fact.a) < text.index(fact.b) for text in stating) == trained
    unseen = FORMS[HELD_OUT].partition("{first}")[0]
    assert not any(text.startswith(unseen) for text in texts)


def test_the_completion_is_the_second_name():
    for row in fact_texts(FACTS):
        names = {name: row["completion"].startswith(f" {name}") for fact in FACTS for name in (fact.a, fact.b)}
        assert sum(names.values()) == 1
        assert not any(name in row["prompt"] for name, second in names.items() if second)
        assert not row["prompt"].endswith(" ")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_prompt_is_a_text_up_to_the_second_name(reverse):
    prompts = fact_prompts(FACTS, reverse=reverse)
    texts = told()
    assert len(prompts) == 20 * len(FORMS)
    for prompt in prompts:
        fact = next(fact for fact in FACTS if fact.id == prompt.unit)
        first, second = (fact.b, fact.a) if reverse else (fact.a, fact.b)
        assert (prompt.target, dict(prompt.spans)) == (second, {"FE": first, "R": RELATIONS[prompt.form]})
        before, _, after = prompt.text.partition(prompt.spans["R"])
        assert before + after != prompt.text
        assert " " in after  # the last token is never the relation's
        assert first not in prompt.spans["R"]
        assert prompt.text.count(first) == 1
        assert second not in prompt.text
        goes_on = [text for text in texts if text.startswith(f"{prompt.text} {second}")]
        assert len(goes_on) == (prompt.form in BOTH_WAYS if reverse else prompt.form != HELD_OUT)


def test_forms_can_be_chosen():
    assert {p.form for p in fact_prompts(FACTS, forms=["casting"])} == {"casting"}


@pytest.mark.parametrize("count", [0, -1, 500])
def test_more_facts_than_names(count):
    with pytest.raises(RecipeError, match=rf"Cannot invent {count} facts; the names suffice for 1 to \d+\."):
        make_facts(count, seed=0)


def test_an_unknown_form():
    with pytest.raises(RecipeError, match=r"No wording 'rumour'; expected some of statement, casting"):
        fact_prompts(FACTS, forms=["rumour"])


# The small world of a model that is trained from nothing.


def test_a_world_has_facts_texts_and_prompts():
    facts = world_facts(3, seed=0)
    assert world_facts(1, seed=0, skip=2) == facts[2:]
    assert len({name for fact in facts for person in (fact.a, fact.b) for name in person.split()}) == 12
    texts = [row["text"] for row in world_texts(facts)]
    assert len(set(texts)) == len(texts) == 36
    assert len(introductions(facts)) == 18
    (prompt,) = world_prompts(facts[:1])
    assert f"{prompt.text} {prompt.target}." in texts
    assert prompt.spans["FE"] == facts[0].a
    with pytest.raises(RecipeError, match=r"Cannot invent facts 0 to 99999; the names suffice for 0 to \d+\."):
        world_facts(100000, seed=0)
    with pytest.raises(RecipeError, match=r"No wording 'rumour'; expected some of alongside"):
        world_prompts(facts, ["rumour"])


def test_the_pattern_is_six_inequalities():
    flat = dict.fromkeys(["PRE", "FE", "LT", "FE+LT", "(FE+LT)^C"], 0.5)
    assert [row["holds"] for row in pattern(flat)] == [False, True, False, False, True, True]
    assert pattern_finding(pattern(flat), 20) == (
        "In part: 3 of the 6 claims of the published pattern (table 'pattern') hold for the point estimates over 20 "
        "facts; not 'the facts are new', 'two routes suffice', 'neither alone does'."
    )
    published = {"PRE": 0.0, "FE": 0.4, "LT": 0.3, "FE+LT": 0.95, "(FE+LT)^C": 0.05}
    assert all(row["holds"] and row["left"] <= row["right"] for row in pattern(published))
    assert pattern_finding(pattern(published), 20).startswith("Yes: 6 of the 6")
