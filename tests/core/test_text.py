"""Which token spells which characters: against the tokenizers' own offsets, and templates laid out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_interp.core.tokens.text import find_mention, find_occurrence, template_mask, token_spans
from lightning_interp.errors import PositionError
from lightning_interp.testing import byte_tokenizer

UNKNOWN = "<unk>"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12)
WORDS = st.lists(
    st.sampled_from(["Zoë", "naïve", "日本", "fox", " ", "  ", "😀", "🏳️‍🌈", "e\u0301", "¿", "\n", "the"]), max_size=8
)
CORPUS = ["the naïve fox Zoë jumps 日本語 the fox 😀 the 🏳️‍🌈 naïve Zoë 日本 ¿qué? the fox"] * 20

BYTES = byte_tokenizer()


def trained_tokenizer():
    """Merges as a real byte-level vocabulary has them: whole words, and parts of characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def sentencepiece_like_tokenizer():
    """Spaces as a leading mark, unknown characters as single bytes: the layout of Llama 2 and Gemma."""
    pieces = [f"<0x{i:02X}>" for i in range(256)] + list("▁thefoxnaiv") + ["▁t", "▁th", "▁the", "▁f", "▁fo", "▁fox"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "f"), ("▁f", "o"), ("▁fo", "x")]
    vocabulary = {piece: i for i, piece in enumerate([UNKNOWN, *pieces])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=UNKNOWN, clean_up_tokenization_spaces=False)


TRAINED, FALLBACK = trained_tokenizer(), sentencepiece_like_tokenizer()


def spans_of_bytes(tokenizer, text, ids):
    """The independent reference for byte-level vocabularies: count bytes, then find their characters."""
    owner = [i for i, character in enumerate(text) for _ in character.encode()]
    spans, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        here = owner[at : at + len(token)]  # one printable stand-in a byte
        spans.append((here[0], here[-1] + 1))
        at += len(token)
    assert at == len(owner)
    return spans


@given(TEXT | st.builds("".join, WORDS))
@example("a\ufffdb")
@example("\ufffd\ufffd")
def test_spans_of_single_bytes(text):
    encoded = BYTES(text, return_offsets_mapping=True)
    found, spans = token_spans(BYTES, encoded.input_ids)
    assert found == text
    assert spans == encoded.offset_mapping
    assert spans == [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]


@given(TEXT | st.builds("".join, WORDS))
@example("\U0001f44d\U0001f000")  # one token ends the first character and begins the second
def test_spans_of_merged_bytes(text):
    ids = TRAINED(text).input_ids
    found, spans = token_spans(TRAINED, ids)
    assert found == text
    assert spans == spans_of_bytes(TRAINED, text, ids)


def test_the_trained_vocabulary_splits_and_merges():
    ids = TRAINED("the 日本 🤖 fox").input_ids
    lengths = [len(token) for token in TRAINED.convert_ids_to_tokens(ids)]
    spans = token_spans(TRAINED, ids)[1]
    assert max(lengths) > 3
    assert len(set(spans)) < len(spans), "no character is shared by two tokens"


@given(st.builds("".join, WORDS).map(str.strip))
def test_spans_with_byte_fallback(text):
    encoded = FALLBACK(text, return_offsets_mapping=True)
    found, spans = token_spans(FALLBACK, encoded.input_ids)
    assert found == text
    expected = list(encoded.offset_mapping)
    if FALLBACK.convert_ids_to_tokens(encoded.input_ids)[:1] == ["▁"]:
        expected[0] = (0, 0)  # the mark at the start stands for a space that the text does not have
    assert spans == expected


def test_a_prefix_of_a_character_is_its_own_text():
    ids = BYTES("é").input_ids[:1]
    assert token_spans(BYTES, ids) == ("\ufffd", [(0, 1)])
    assert token_spans(BYTES, []) == ("", [])


def test_long_texts_are_read_in_linear_time(monkeypatch):
    ids, lengths = BYTES("The naïve fox 😀. " * 100).input_ids, []
    decode = type(BYTES).decode
    monkeypatch.setattr(
        type(BYTES), "decode", lambda self, part, **kw: lengths.append(len(part)) or decode(self, part, **kw)
    )
    token_spans(BYTES, ids)
    assert sum(lengths) < 12 * len(ids)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=3))
def test_mentions(text, part):
    every = [(i, i + len(part)) for i in range(len(text)) if text[i:].startswith(part)]
    assert find_occurrence(text, part, "all") == every
    assert find_occurrence(text, part, "first") == every[:1]
    assert find_occurrence(text, part, "last") == every[-1:]


@pytest.mark.parametrize(
    ("text", "part", "places"),
    [
        ("Anna saw Ann and Ann-Lou", "Ann", [(9, 12), (17, 20)]),
        ("Alien, (Al)", "Al", [(8, 10)]),
        ("Hanna", "Ann", []),
        ("Hanna Annas", "ann", [(1, 4)]),
        ("_Bo Bo2 Bo's", "Bo", [(8, 10)]),
        ("東京都と東京", "東京", [(0, 2), (4, 6)]),
        ("서울은 서울", "서울", [(0, 2), (4, 6)]),
        ("Zoë Zo", "Zo", [(4, 6)]),
        ("Zoe\u0308 Zoe", "Zoe", [(5, 8)]),
        ("a+b +b", "+b", [(1, 3), (4, 6)]),
    ],
)
def test_mentions_are_words_of_their_own_where_there_are_any(text, part, places):
    assert find_mention(text, part, "all") == places
    assert find_mention(text, part, "first") == places[:1]
    assert find_mention(text, part, "last") == places[-1:]


# Chat templates, and the same conversation laid out by hand: pieces of (who, text)


def chatml(turns, ask):
    for role, content in turns:
        yield from ((None, f"<|im_start|>{role}\n"), (role, content), (None, "<|im_end|>\n"))
    if ask:
        yield None, "<|im_start|>assistant\n"


def headers(turns, ask):  # as Llama 3
    yield None, "<|begin|>"
    for role, content in turns:
        yield from ((None, f"<|h|>{role}<|/h|>\n\n"), (role, content), (None, "<|eot|>"))
    if ask:
        yield None, "<|h|>assistant<|/h|>\n\n"


def no_system(turns, ask):  # as Gemma: another name for the assistant, and system turns are refused
    yield None, "<bos>"
    for role, content in turns:
        name = "model" if role == "assistant" else role
        yield from ((None, f"<turn>{name}\n"), (role, content), (None, "<end>\n"))
    if ask:
        yield None, "<turn>model\n"


def brackets(turns, ask):  # as Mistral: nothing opens the assistant's turn but the end of the user's
    yield None, "<s>"
    for role, content in turns:
        around = ("[INST] ", " [/INST]") if role == "user" else ("", "</s>")
        yield from ((None, around[0]), (role, content), (None, around[1]))


def implicit(turns, ask):  # as SmolLM2: a system text of its own where none is given
    if turns[0][0] != "system":
        yield from ((None, "<|im_start|>system\n"), ("system", "Be good."), (None, "<|im_end|>\n"))
    yield from chatml(turns, ask)


def nested(turns, ask):  # as Llama 2: the system text stands inside the first user turn
    system = turns[0][1] if turns[0][0] == "system" else None
    for role, content in turns[1:] if system else turns:
        if role == "assistant":
            yield from ((None, " "), (role, content), (None, " </s>"))
            continue
        yield None, "<s>[INST] "
        if system:
            yield from ((None, "<<SYS>>\n"), ("system", system), (None, "\n<</SYS>>\n\n"))
        yield from ((role, content), (None, " [/INST]"))
        system = None


def plain(turns, ask):  # words instead of marks
    for role, content in turns:
        yield from ((None, f"{role.title()}: "), (role, content), (None, "\n\n"))
    if ask:
        yield None, "Assistant: "


def unannounced(turns, ask):  # as Vicuna: nothing stands before the system text
    if turns[0][0] == "system":
        yield from (("system", turns[0][1]), (None, " "))
        turns = turns[1:]
    for role, content in turns:
        around = ("USER: ", " ") if role == "user" else ("ASSISTANT: ", "</s>")
        yield from ((None, around[0]), (role, content), (None, around[1]))
    if ask:
        yield None, "ASSISTANT:"


def announced_by_bos(turns, ask):  # the same behind a mark of the beginning, with a text of its own where none is given
    yield None, "<s>"
    yield from unannounced(turns if turns[0][0] == "system" else [("system", "Be good."), *turns], ask)


_EACH = "{% for m in messages %}"
_ASK = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    chatml: BYTES.chat_template,
    headers: "<|begin|>" + _EACH + "<|h|>{{ m.role }}<|/h|>\n\n{{ m.content }}<|eot|>" + _ASK
    + "<|h|>assistant<|/h|>\n\n{% endif %}",
    no_system: "<bos>" + _EACH + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n" + _ASK
    + "<turn>model\n{% endif %}",
    brackets: "<s>" + _EACH + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}",
    implicit: "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + BYTES.chat_template,
    nested: "{% set all = messages %}{% if messages[0].role == 'system' %}{% set all = messages[1:] %}{% endif %}"
    "{% for m in all %}{% if m.role == 'user' %}<s>[INST] "
    "{% if loop.first and messages[0].role == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}",
    unannounced: _EACH + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}" + _ASK
    + "ASSISTANT:{% endif %}",
    plain: _EACH + "{{ m.role.title() + ': ' + m.content + '\n\n' }}" + _ASK + "Assistant: {% endif %}",
}  # fmt: skip
TEMPLATES[announced_by_bos] = "<s>{% if messages[0].role != 'system' %}Be good. {% endif %}" + TEMPLATES[unannounced]
ROLES = {layout: layout not in (no_system, brackets) for layout in TEMPLATES}

SAYING = st.text("abcé 😀?'", min_size=1, max_size=8)


@st.composite
def conversations(draw):
    rounds = draw(st.integers(1, 3))
    turns = [(role, draw(SAYING)) for _ in range(rounds) for role in ("user", "assistant")]
    ask = draw(st.booleans())
    turns = turns[:-1] if ask else turns
    return ([("system", draw(SAYING))] if draw(st.booleans()) else []) + turns, ask


@pytest.mark.parametrize("layout", TEMPLATES, ids=lambda layout: layout.__name__)
@settings(max_examples=10)
@given(conversation=conversations())
def test_parts_of_a_conversation(layout, conversation):
    turns, ask = conversation
    if not ROLES[layout] and turns[0][0] == "system":
        turns = turns[1:]
    BYTES.chat_template = TEMPLATES[layout]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = BYTES.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    pieces = list(layout(turns, ask))
    assert text == "".join(piece for _, piece in pieces), "the hand-made layout is wrong"

    who = [role for role, piece in pieces for _ in BYTES(piece).input_ids]
    ids = BYTES(text).input_ids
    for part in ("user", "assistant", "system"):
        assert template_mask(BYTES, ids, part).tolist() == [role == part for role in who], part
    assert template_mask(BYTES, ids, "template").tolist() == [role is None for role in who]
    own = turns[0][0] != "system"
    assert template_mask(BYTES, ids, "inserted").tolist() == [own and role == "system" for role in who]

    said = len(pieces) if ask else max(i for i, (role, _) in enumerate(pieces) if role == "assistant")
    opening = [i for i in range(said) if pieces[i][1]][-2 if layout is nested and not ask else -1 :]
    place = [i for i, (_, piece) in enumerate(pieces) for _ in BYTES(piece).input_ids]
    assert template_mask(BYTES, ids, "generation_prompt").tolist() == [i in opening for i in place]


@pytest.fixture(autouse=True)
def _own_template():
    yield
    BYTES.chat_template = TEMPLATES[chatml]


@pytest.mark.parametrize(
    "template",
    [  # as Mistral and Gemma: the system text is the beginning of the user's
        "<s>" + _EACH + "{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        _EACH + "{% if m.role == 'system' %}{{ 'USER: ' + m.content + '\n' }}{% elif m.role == 'user' %}"
        "{{ ('' if loop.index0 == 1 and messages[0].role == 'system' else 'USER: ') + m.content + '\n' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + '\n' }}{% endif %}{% endfor %}",
    ],
)  # fmt: skip
def test_system_text_inside_of_the_users_is_refused(template):
    BYTES.chat_template = template
    text = BYTES.apply_chat_template([{"role": r, "content": r} for r in ("system", "user")], tokenize=False)
    with pytest.raises(PositionError, match=r"ChatTemplate\('system'\).* into the user's turn.*FromBatch"):
        template_mask(BYTES, BYTES(text).input_ids, "system")
    assert template_mask(BYTES, BYTES(text).input_ids, "user").any()


def test_a_template_is_rendered_once_for_many_rows_and_anew_when_it_changes():
    tokenizer, rendered = byte_tokenizer(), []

    def counted(*arguments, original=tokenizer.apply_chat_template, **options):
        rendered.append(tokenizer.chat_template)
        return original(*arguments, **options)

    tokenizer.apply_chat_template = counted
    for layout in (chatml, nested):
        tokenizer.chat_template = TEMPLATES[layout]
        ids = tokenizer("".join(piece for _, piece in layout([("user", "a"), ("assistant", "b")], False))).input_ids
        BYTES.chat_template = TEMPLATES[layout]
        for part in ("user", "inserted", "system"):
            assert template_mask(tokenizer, ids, part).equal(template_mask(BYTES, ids, part))
        assert template_mask(tokenizer, ids, "user").any()
        count = len(rendered)
        template_mask(tokenizer, ids, "user")
        assert len(rendered) == count
    assert set(rendered) == {TEMPLATES[chatml], TEMPLATES[nested]}
    tokenizer.add_special_tokens({"eos_token": "x"})  # templates write it
    template_mask(tokenizer, ids, "user")
    assert len(rendered) > count


def test_text_outside_of_any_turn_is_the_templates():
    ids = BYTES("no template at all").input_ids
    assert template_mask(BYTES, ids, "template").all()
    for part in ("user", "inserted", "generation_prompt"):
        assert not template_mask(BYTES, ids, part).any()
    assert template_mask(BYTES, [], "user").dtype == torch.bool


def test_refused():
    BYTES.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(PositionError, match=r"Cannot tell how this tokenizer's chat template .*only tools.*FromBatch"):
        template_mask(BYTES, [1], "user")
    with pytest.raises(PositionError, match="Unknown part 'usr' of a chat template; expected one of user, assistant"):
        template_mask(BYTES, [1], "usr")
    BYTES.chat_template = None
    with pytest.raises(PositionError, match=r"ChatTemplate\('system'\) needs a tokenizer with a chat template"):
        template_mask(BYTES, [1], "system")
