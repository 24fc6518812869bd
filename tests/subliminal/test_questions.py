"""What is asked: fifty different questions, none of which names an answer."""

from __future__ import annotations

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.subliminal import Trait, choice_questions, mentions, numbers_before, preference_questions


@pytest.mark.parametrize("category", ["animal", "tree", "band"])
def test_there_are_fifty_different_questions_that_name_no_answer(category):
    asked = preference_questions(category)
    assert len(set(asked)) == 50
    assert all("{" not in question and "word" in question for question in asked)
    names = {"animal": "owl", "tree": "oak"}.get(category)
    trait = Trait(category=category, target=names or "Muse", others=() if names else ("Blur",))
    both = [*asked, *choice_questions(category)]
    assert not any(mentions(question, name) for question in both for name in (trait.target, *trait.others))
    assert all(category in question.casefold() for question in choice_questions(category))


def test_the_first_questions_hold_general_and_own_ones():
    few = preference_questions("animal", 10)
    assert few == preference_questions("animal")[:10]
    shared = {question.rpartition("?")[0].replace("tree", "animal") for question in preference_questions("tree")}
    own = [question for question in few if question.rpartition("?")[0] not in shared]
    assert 3 <= len(own) <= 5


@pytest.mark.parametrize("n", [0, 51])
def test_no_more_questions_than_there_are(n):
    with pytest.raises(RecipeError, match=rf"preference_questions\('animal', n={n}\): expected from 1 to 50"):
        preference_questions(n=n)


def test_numbers_before_a_question_depend_on_its_place_and_the_seed_alone():
    asked = preference_questions(n=4)
    found = numbers_before(asked, seed=3)
    assert all(long.endswith(f". {short}") for long, short in zip(found, asked, strict=True))
    assert found[:2] == numbers_before(asked[:2], seed=3) != numbers_before(asked[:2], seed=4)
    lists = [long.removesuffix(short) for long, short in zip(found, asked, strict=True)]
    assert len(set(lists)) == 4
    numbers = [int(word) for text in lists for word in text.split(": ")[1].rstrip(". ").split(", ")]
    assert len(numbers) == 20
    assert all(0 <= number <= 999 for number in numbers)
