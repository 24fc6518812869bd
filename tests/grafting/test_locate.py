"""Tokens of entities and targets, with one token a byte and with a trained vocabulary."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from lightning_interp.errors import PositionError
from lightning_interp.grafting.prompts import encode_prompt, first_target_token, locate_entity
from lightning_interp.testing import byte_tokenizer

BYTES = byte_tokenizer()


class Slow:
    """Gives no offsets, as Python tokenizers do."""

    is_fast = False


@pytest.fixture(scope="module")
def trained():
    from lightning_interp.models.sources.bundled import ALIASES, bundled_folder

    return AutoTokenizer.from_pretrained(bundled_folder(ALIASES["smollm2-135m-instruct"])[0])


def of_bytes(text, begin, end):
    """Which bytes spell characters ``begin`` to ``end``."""
    return list(range(len(text[:begin].encode()), len(text[:end].encode())))


@pytest.mark.parametrize(
    ("text", "entity", "which", "places"),
    [
        ("Ann met Bo and Ann left", "Ann", "first", [(0, 3)]),
        ("Ann met Bo and Ann left", "Ann", "last", [(15, 18)]),
        ("Ann met Bo and Ann left", "Ann", "all", [(0, 3), (15, 18)]),
        ("met Ann", "Ann", "first", [(4, 7)]),
        ("aaa", "aa", "all", [(0, 3)]),
        ("Zoë Çelik, 東京, 🙂 end", "Çelik", "first", [(4, 9)]),
        ("Zoë Çelik, 東京, 🙂 end", "東京", "first", [(11, 13)]),
        ("Zoë Çelik, 東京, 🙂 end", "🙂", "first", [(15, 16)]),
        ("é and é", "é", "last", [(6, 7)]),
        ("<bos>Ann", "Ann", "first", None),
        ("Anna met Ann", "Ann", "first", [(9, 12)]),
        ("Ann met Anna", "Ann", "last", [(0, 3)]),
        ("Alien, Al and Alan saw Al", "Al", "all", [(7, 9), (23, 25)]),
        ("東京都", "東京", "first", [(0, 2)]),
        ("Bo2 Bo", "Bo", "first", [(4, 6)]),
    ],
)
def test_an_entity_is_where_its_bytes_are(text, entity, which, places):
    expected = [1, 2, 3] if places is None else [i for a, b in places for i in of_bytes(text, a, b)]
    assert locate_entity(BYTES, text, entity, which=which) == expected


def test_ids_and_characters_of_a_prompt():
    ids, spans = encode_prompt(BYTES, "aé")
    assert BYTES.decode(ids) == "aé"
    assert spans == [(0, 1), (1, 2), (1, 2)]


def smallest(tokenizer, text, entity, begin):
    """Tokens that hold a character of the entity, by decoding longer and longer prefixes of the ids."""
    ids = tokenizer(text)["input_ids"]
    held, end, at = [], begin + len(entity), 0
    for i in range(len(ids)):
        after = len(tokenizer.decode(ids[: i + 1]))
        if at < end and after > begin:
            held.append(i)
        at = after
    return held


@pytest.mark.bundled
@pytest.mark.parametrize(
    ("text", "entity", "which"),
    [
        ("Alaric Brandabury stars in a new film alongside", "Alaric Brandabury", "first"),
        ("The director cast Alaric Brandabury together with", "Alaric Brandabury", "first"),
        ("Praise for Ann; Ann said that Bo", "Ann", "last"),
        ("In Tokyo (Tokyo!) they met", "Tokyo", "last"),
        ("unbelievable Xanthe Underthorne's co-star", "Xanthe Underthorne", "first"),
    ],
)
def test_an_entity_in_a_trained_vocabulary(trained, text, entity, which):
    begin = text.rfind(entity) if which == "last" else text.find(entity)
    found = locate_entity(trained, text, entity, which=which)
    assert found == smallest(trained, text, entity, begin)
    assert entity in trained.decode([trained(text)["input_ids"][i] for i in found])


@pytest.mark.bundled
def test_every_byte_of_an_unusual_character_is_found(trained):
    text = "🜚🜛 met Ann"
    tokens = trained(text)["input_ids"]
    found = locate_entity(trained, text, "🜚🜛")
    assert found == list(range(len(found)))
    assert trained.decode([tokens[i] for i in found]).strip() == "🜚🜛"


@pytest.mark.bundled
@pytest.mark.parametrize(
    ("text", "entity", "tokens"),
    [("Annabel met Ann", "Ann", [" Ann"]), ("Alien and Al", "Al", [" Al"]), ("He met Tokyoites", "Tokyo", [" Tokyo"])],
)
def test_whole_words_go_before_pieces_of_others(trained, text, entity, tokens):
    ids = trained(text)["input_ids"]
    assert [trained.decode([ids[i]]) for i in locate_entity(trained, text, entity)] == tokens


@pytest.mark.bundled
def test_a_piece_of_a_token_is_no_entity(trained):
    with pytest.raises(PositionError, match=r"Entity 'oky' is only a piece of other words in the prompt 'In Tokyo'"):
        locate_entity(trained, "In Tokyo", "oky")


@pytest.mark.parametrize("target", ["Bo", "Zoë", "東"])
def test_the_target_starts_behind_a_space(target):
    assert first_target_token(BYTES, "Ann met", target) == BYTES(" ")["input_ids"][0]


@pytest.mark.bundled
@pytest.mark.parametrize(("text", "target"), [("Ann met", "Robert Brown"), ("Answer:", "Yorick"), ("2+2=", "4")])
def test_the_first_token_of_the_target_is_what_a_model_would_write(trained, text, target):
    token = first_target_token(trained, text, target)
    together = trained(f"{text} {target}")["input_ids"]
    assert token == together[len(trained(text)["input_ids"])]
    assert f" {target}".startswith(trained.decode([token]))


@pytest.mark.bundled
def test_a_prompt_whose_end_would_merge_with_the_target(trained):
    """The double space would be one token with what follows or before; the target's own first token is scored."""
    text = "Ann met "
    joined = trained(f"{text} Bo")["input_ids"]
    ids = trained(text)["input_ids"]
    expected = joined[len(ids)] if joined[: len(ids)] == ids else trained(" Bo", add_special_tokens=False).input_ids[0]
    assert first_target_token(trained, text, "Bo") == expected


def test_an_end_token_that_the_tokenizer_adds_is_not_the_target():
    class Closing:
        """Puts <eos> behind every text, as some tokenizers are set up to do."""

        def __call__(self, text, add_special_tokens=True):
            ids = BYTES(text)["input_ids"]
            return {"input_ids": [*ids, BYTES.eos_token_id] if add_special_tokens else ids}

    assert first_target_token(Closing(), "Ann met", "Bo") == BYTES(" ")["input_ids"][0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: locate_entity(BYTES, "Ann met", "Bo"), "Entity 'Bo' does not occur in the prompt 'Ann met'"),
        (lambda: locate_entity(BYTES, "Ann met", "ann"), "Entity 'ann' does not occur"),
        (lambda: locate_entity(BYTES, "Ann met", ""), "Entity '' does not occur"),
        (lambda: locate_entity(BYTES, "Ann met", "Ann", which="second"), "which='second'"),
        (lambda: locate_entity(Slow(), "Ann met", "Ann"), "Slow gives no character offsets"),
        (lambda: encode_prompt(Slow(), "Ann met"), "Slow gives no character offsets"),
        (lambda: first_target_token(BYTES, "Ann met", "  "), "target '  ' of the prompt 'Ann met' is empty"),
    ],
)
def test_what_cannot_be_found(call, match):
    with pytest.raises(PositionError, match=match):
        call()
