"""Decoding within a grammar: every text is a list of so many numbers, whatever the model and the tokenizer."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation import LocalSampler, TextRequest
from lightning_interp.subliminal import NumberGrammar, rejections
from lightning_interp.testing import byte_tokenizer, tiny_model


def tokenizer_of(tokens, *, spiece=False):
    """A tokenizer of given tokens, ``_`` for a leading space; of two families."""
    space, specials = "▁" if spiece else "Ġ", {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*specials.values(), *(token.replace("_", space) for token in tokens)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, specials["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(pieces) if spiece else decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


def walk(grammar, tokenizer, seed, *, steps=200):
    """Tokens drawn evenly from those that are allowed."""
    (held,), draw = grammar.processors(TextRequest(prompt="x")), torch.Generator().manual_seed(seed)
    ids = torch.tensor([[3, 3]])
    while ids[0, -1] != tokenizer.eos_token_id and len(ids[0]) < steps:
        scores = held(ids, torch.zeros(1, len(tokenizer)))
        token = torch.multinomial(scores.softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, token], 1)
    return ids[0, 2:].tolist()


@settings(max_examples=8)
@given(
    count=st.integers(1, 5),
    digits=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    separator=st.sampled_from([", ", ",", " ", "; ", "\n"]),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_every_text_is_a_list(model, count, digits, separator, temperature, seed):
    tokenizer, (least, more) = byte_tokenizer(), digits
    grammar = NumberGrammar(tokenizer, count=count, min_digits=least, max_digits=least + more, separator=separator)
    sampler = LocalSampler(model, tokenizer, logits_processors=grammar.processors, name=grammar.name)
    wanted = re.compile(rf"\d{{{least},{least + more}}}({separator}\d{{{least},{least + more}}}){{{count - 1}}}")
    asked = [
        TextRequest.chat("Hm" * i, seed=seed, key=(i,), temperature=temperature, max_new_tokens=grammar.max_new_tokens)
        for i in range(2)
    ]
    for written in sampler.generate(asked):
        assert written.status == "complete"
        assert wanted.fullmatch(written.text)
        assert rejections(written.text, max_value=10**6) == []


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=1)


@pytest.mark.parametrize("spiece", [False, True])
@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_tokens_of_several_digits_and_with_a_space(spiece, seed):
    tokens = [*"0123456789,_x", *"12 345 6789 _7 _89 _123 ,_ 1, 2,_3 _x 1x ,, <0x31>".split()]
    tokenizer = tokenizer_of(tokens, spiece=spiece)
    grammar = NumberGrammar(tokenizer, count=4, min_digits=1, max_digits=3)
    ids = walk(grammar, tokenizer, seed)
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert re.fullmatch(r"\d{1,3}(, \d{1,3}){3}", text)
    assert len(ids) <= grammar.max_new_tokens


def test_all_that_fits_is_allowed():
    tokenizer = tokenizer_of([*"0123456789", "12", "345", "6789", ",", "_7", "_", "2,_3"])
    grammar = NumberGrammar(tokenizer, count=2, min_digits=2, max_digits=3)
    (held,) = grammar.processors(TextRequest(prompt="x"))

    def allowed(*after):
        scores = held(torch.tensor([[*after]]), torch.zeros(1, len(tokenizer)))
        return set(tokenizer.convert_ids_to_tokens(scores.isfinite()[0].nonzero()[:, 0].tolist()))

    one, comma = tokenizer.convert_tokens_to_ids(["1", ","])
    assert allowed(5, 5) == {*"0123456789", "12", "345"}  # two digits at least, and not four
    assert allowed(5, 5, one) == {*"0123456789", "12", "2,Ġ3"}
    assert allowed(5, 5, one, one) == {*"0123456789", ",", "2,Ġ3"}
    assert allowed(5, 5, one, one, comma) == {"Ġ", "Ġ7"}


def test_a_token_without_a_way_on_is_never_taken():
    tokenizer = tokenizer_of([*"01", ",", ",_0"])  # behind a bare comma no space could follow
    grammar = NumberGrammar(tokenizer, count=2, max_digits=1)
    assert tokenizer.convert_tokens_to_ids(",") not in grammar.tables(torch.device("cpu"))[0].tolist()
    assert {len(walk(grammar, tokenizer, seed)) for seed in range(5)} == {3}


def test_probabilities_are_the_models_own_among_what_is_allowed(model):
    tokenizer = byte_tokenizer()
    (held,) = NumberGrammar(tokenizer, count=1).processors(TextRequest(prompt="x"))
    ids = tokenizer("Numbers: ", return_tensors="pt").input_ids
    logits = model(ids).logits[:, -1].detach()
    digits = tokenizer("0123456789").input_ids
    torch.testing.assert_close(held(ids, logits).softmax(-1)[:, digits], logits[:, digits].softmax(-1))


def test_lists_that_do_not_exist_are_refused():
    with pytest.raises(RecipeError, match=r"count=0, min_digits=1, max_digits=3\): expected at least one number"):
        NumberGrammar(byte_tokenizer(), count=0)
    with pytest.raises(RecipeError, match="expected at least one number, and 1 <= min_digits <= max_digits"):
        NumberGrammar(byte_tokenizer(), min_digits=4)
    with pytest.raises(RecipeError, match=r"separator=' and '\): expected white space, a comma"):
        NumberGrammar(byte_tokenizer(), separator=" and ")


def test_a_tokenizer_that_cannot_write_them_is_refused():
    with pytest.raises(DataError, match=r"has no tokens to write 10 numbers of 1 to 3 digits with '; ': 10 of its"):
        NumberGrammar(tokenizer_of([*"0123456789", ","]), separator="; ")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"has no end token, so no list of numbers would end"):
        NumberGrammar(tokenizer)
