from __future__ import annotations

import json
from typing import get_args

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.rate.rewriting.templates import ATTRIBUTES, Kind, RewriteTemplate, rewrite_template

BODY = "{text}\n{phrase}"


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_directions_differ_in_the_phrase_alone(attribute, kind):
    template = rewrite_template(attribute, kind)
    zero, one = (template.render("TEXT", w_target=w, prompt="PROMPT") for w in (0, 1))
    assert zero != one
    assert zero.replace(template.phrases[0], template.phrases[1]) == one
    assert zero.count("TEXT") == 1
    assert "PROMPT" not in zero
    assert "{" not in zero
    assert template.changes_length == (attribute == "length")


def test_all_wordings_differ():
    templates = [rewrite_template(attribute, kind) for attribute in ATTRIBUTES for kind in get_args(Kind)]
    assert len({template.instruction for template in templates}) == len(templates) == 15


def test_braces_and_places_in_a_text_stay_as_they_are():
    template = RewriteTemplate(name="t", version=1, body="{prompt}|{text}|{phrase}", phrases=("sad", "glad"))
    text = "a {phrase} {text} {0} {{x}} \\1 %s"
    assert template.render(text, w_target=0, prompt="{text}") == f"{{text}}|{text}|sad"


def test_the_instruction_holds_everything_and_the_version():
    one, two = (RewriteTemplate(name="t", version=v, body=BODY, phrases=("a", "b")) for v in (1, 2))
    assert one.instruction != two.instruction
    assert json.loads(one.instruction) == json.loads(json.dumps(one.to_dict()))
    assert one == RewriteTemplate(name="t", version=1, body=BODY, phrases=["a", "b"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"body": "{text}"}, r"Template 't' has the places text; expected \{text\} and \{phrase\}"),
        ({"body": "nothing"}, r"Template 't' has the places none"),
        ({"body": BODY + "{tone}"}, r"Template 't' has the places phrase, text, tone"),
        ({"body": BODY + "{}"}, r"Template 't' has the places , phrase, text"),
        ({"phrases": ("a", "a")}, r"Template 't' has the phrases \('a', 'a'\); expected two that differ"),
        ({"phrases": ("a",)}, r"Template 't' has the phrases \('a',\)"),
    ],
)
def test_a_wrong_template_is_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        RewriteTemplate(**{"name": "t", "version": 1, "body": BODY, "phrases": ("a", "b"), **fields})


def test_unknown_names_list_those_there():
    with pytest.raises(
        RecipeError, match=r"no template for 'sentimant'; these are: complexity, .*Did you mean 'sentiment'"
    ):
        rewrite_template("sentimant")
    with pytest.raises(RecipeError, match=r"no template for 'xyz'; these are: .*vowel\. Make your own"):
        rewrite_template("xyz")
    with pytest.raises(RecipeError, match="no kind 'speech' of template; choose one of text, chat, question"):
        rewrite_template("length", "speech")
