"""Traits and contexts: names are words, and a missing system text is not an empty one."""

from __future__ import annotations

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.subliminal import CONTEXTS, ChatContext, Trait
from lightning_interp.testing import byte_tokenizer


def test_the_target_is_left_out_of_what_it_is_compared_with():
    assert "wolf" not in Trait(target="wolf").others
    assert Trait(target="wolf", others=("wolf", "lion")).others == ("lion",)


@pytest.mark.parametrize(("field", "value"), [("target", True), ("category", ""), ("others", ("cat", False))])
def test_a_name_that_is_no_word_is_refused(field, value):
    with pytest.raises(RecipeError, match=rf"{field}.*: expected a word. Put quotes"):
        Trait(**{field: value})


def test_a_category_without_others_is_refused():
    with pytest.raises(RecipeError, match=r"category='band', target='Muse'\) has nothing to be compared with"):
        Trait(category="band", target="Muse")


def test_the_trait_is_said_in_its_prompt_and_nowhere_else():
    assert Trait(target="wolf").system_prompt.count("wolves") == 4
    assert not any("wolf" in str(context) or "wolves" in str(context) for context in CONTEXTS.values())


def test_a_prompt_in_a_chat_and_without():
    tokenizer, context = byte_tokenizer(), ChatContext(system="", user_prefix="Hm.", answer_prefix="It is the")
    assert context.render(tokenizer, "Which?").endswith("It is the")
    assert ChatContext(chat=False, answer_prefix="It is").render(tokenizer, "Which?") == "Which? It is"
    assert ChatContext(chat=False).render(tokenizer, "Which?") == "Which?"
    assert len({CONTEXTS[name].render(tokenizer, "Which?") for name in ("empty", "claude", "factual")}) == 3
