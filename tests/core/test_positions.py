"""Selectors of tokens, each against a loop that is written out by hand, padded and not, in one pass and decoding."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import (
    All,
    And,
    ChatTemplate,
    FromBatch,
    Last,
    Not,
    Or,
    Positions,
    Span,
    StepContext,
    Substring,
    Tokens,
)
from lightning_interp.errors import PositionError
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


def batch_of(texts, side="left"):
    encoded = TOKENIZER(list(texts), return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def step_of(ids, mask=None, *, past=0, batch=None, rolling=True):
    """One pass of a sequence whose first ``past`` columns are in the cache."""
    ids = torch.as_tensor(ids)
    mask = None if mask is None else torch.as_tensor(mask)
    return StepContext(
        ids.shape[0],
        ids.shape[1] - past,
        past,
        input_ids=ids[:, past:],
        attention_mask=mask,
        find_tokenizer=lambda: TOKENIZER,
        batch=batch,
        rolling=rolling,
    )


# What each selector means, said slowly: of the real tokens of one row (their ids), which are chosen while the first
# `past` of them are in the cache and the prompt had `prompt` of them?


def chosen_by_hand(selector, ids, past, prompt):
    seen = range(len(ids))
    match selector:
        case All():
            picked = set(seen)
        case Last(n):
            picked = set(seen[-n:])
        case Span(start, stop):
            stop = start + 1 if stop is None else stop
            relative = start < 0 or stop < 0 or (stop == 0 and start < 0)
            every = list(range(prompt if past == 0 or relative else len(ids)))
            end = len(every) if stop == 0 and start < 0 else stop
            picked = set(every[start:end]) if past == 0 or not relative else set()
        case Tokens(wanted):
            picked = {i for i in seen if ids[i] in wanted}
        case And(left, right):
            picked = chosen_by_hand(left, ids, past, prompt) & chosen_by_hand(right, ids, past, prompt)
        case Or(left, right):
            picked = chosen_by_hand(left, ids, past, prompt) | chosen_by_hand(right, ids, past, prompt)
        case Not(inner):
            picked = set(seen) - chosen_by_hand(inner, ids, past, prompt)
        case _:
            raise TypeError(selector)
    return {i for i in picked if i >= past}


SIMPLE = st.one_of(
    st.builds(All),
    st.builds(Last, st.integers(1, 4)),
    st.builds(Span, st.integers(-4, 4), st.none() | st.integers(-4, 6), st.just(False)),
    st.builds(Tokens, st.lists(st.integers(5, 9), max_size=3).map(tuple)),
)
PLAIN = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner)),
    max_leaves=4,
)
EVERY = st.recursive(
    st.one_of(
        SIMPLE,
        st.builds(Substring, st.text(min_size=1), st.sampled_from(["first", "last", "all"]), st.just("ignore")),
        st.builds(ChatTemplate, st.sampled_from(["user", "assistant", "system", "template"])),
        st.builds(FromBatch, st.text()),
    ),
    lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner)),
    max_leaves=6,
)
ROWS = st.lists(st.lists(st.integers(5, 9), min_size=1, max_size=6), min_size=1, max_size=3)


def padded(rows, side):
    """Ids and mask of a padded batch, and the columns of each row's real tokens."""
    width = max(map(len, rows))
    ids, mask, columns = [], [], []
    for row in rows:
        gap = [0] * (width - len(row))
        ids.append(gap + row if side == "left" else row + gap)
        mask.append([*gap, *[1] * len(row)] if side == "left" else [*[1] * len(row), *gap])
        columns.append([i + len(gap) * (side == "left") for i in range(len(row))])
    return ids, mask, columns


@given(PLAIN, ROWS, st.sampled_from(["left", "right"]))
def test_a_prompt_against_a_loop(selector, rows, side):
    ids, mask, columns = padded(rows, side)
    found = selector.mask(step_of(ids, mask))
    expected = torch.zeros_like(found)
    for row, real in enumerate(rows):
        for i in chosen_by_hand(selector, real, 0, len(real)):
            expected[row, columns[row][i]] = True
    assert torch.equal(found, expected)


@given(PLAIN, ROWS, st.lists(st.integers(5, 9), min_size=3, max_size=3))
def test_decoding_steps_against_a_loop(selector, rows, new):
    ids, mask, _ = padded(rows, "left")
    width = len(ids[0])
    for steps in range(1, 4):
        longer = [row + new[:steps] for row in ids]
        step = step_of(longer, [row + [1] * steps for row in mask], past=width + steps - 1)
        found = selector.mask(step)
        assert found.shape == (len(rows), 1)
        for row, real in enumerate(rows):
            sequence = real + new[:steps]
            expected = chosen_by_hand(selector, sequence, len(sequence) - 1, len(real))
            assert found[row].tolist() == [bool(expected)]


@given(PLAIN, ROWS)
def test_never_on_padding(selector, rows):
    ids, mask, _ = padded(rows, "left")
    assert not (selector.mask(step_of(ids, mask)) & (torch.tensor(mask) == 0)).any()


@given(PLAIN, PLAIN, ROWS)
def test_algebra(one, other, rows):
    ids, mask, _ = padded(rows, "left")

    def of(selector):
        return selector.mask(step_of(ids, mask)).tolist()

    assert of(~~one) == of(one)
    assert of(~(one & other)) == of(~one | ~other)
    assert of(one & other) == of(other & one)
    assert of(one | ~one) == of(All())
    assert not torch.tensor(of(one & ~one)).any()


def test_last_can_stay_in_the_prompt():
    ids, mask = [[5, 6, 7]], [[1, 1, 1]]
    assert Last().mask(step_of(ids, mask, past=2)).tolist() == [[True]]
    assert Last().mask(step_of(ids, mask, past=2, rolling=False)).tolist() == [[False]]
    assert Last(2).mask(step_of(ids, mask, rolling=False)).tolist() == [[False, True, True]]


# Text


WORDS = ["Zoë", "naïve", "fox", "日本", "😀", " ", "a", "\n"]


@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join), min_size=1, max_size=3),
    st.sampled_from(["Zoë", "ï", "fox", "本", "😀 ", "a", "xyz"]),
    st.sampled_from(["first", "last", "all"]),
    st.sampled_from(["left", "right"]),
)
def test_substring_against_the_tokenizers_offsets(texts, part, which, side):
    batch = batch_of(texts, side)
    found = Substring(part, which, "ignore").mask(step_of(batch["input_ids"], batch["attention_mask"]))
    for row, text in enumerate(texts):
        starts = [i for i in range(len(text)) if text.startswith(part, i)]
        starts = {"first": starts[:1], "last": starts[-1:], "all": starts}[which]
        offsets = TOKENIZER(text, return_offsets_mapping=True).offset_mapping
        expected = [any(a < s + len(part) and b > s for s in starts) for a, b in offsets]
        assert found[row, batch["attention_mask"][row].bool()].tolist() == expected
    assert not found[batch["attention_mask"] == 0].any()


def test_text_is_read_in_the_prompt_only():
    batch = batch_of(["a fox"])
    for selector in (Substring("fox"), ChatTemplate("user")):
        assert not selector.mask(step_of(batch["input_ids"], batch["attention_mask"], past=4)).any()
        outside = (~selector).mask(step_of(batch["input_ids"], batch["attention_mask"], past=4))
        assert outside.all()  # generated tokens lie outside of what was found in the prompt


def test_text_is_read_once_a_pass():
    batch, calls = batch_of(["a fox", "the fox ran"]), []
    step = step_of(batch["input_ids"], batch["attention_mask"])
    step.find_tokenizer = lambda: calls.append(1) or TOKENIZER
    first = Substring("fox").mask(step)
    assert torch.equal(Substring("fox").mask(step), first)
    Substring("the", missing="ignore").mask(step)
    assert len(calls) == 2


def test_chat_template_rows_of_a_padded_batch():
    chats = [
        [{"role": "user", "content": "hé"}],
        [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}],
    ]
    texts = [TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = batch_of(texts)
    step = step_of(batch["input_ids"], batch["attention_mask"])
    for row, chat in enumerate(chats):
        said = {turn["role"]: turn["content"] for turn in chat}
        for role in ("user", "system", "assistant"):
            ids = batch["input_ids"][row, ChatTemplate(role).mask(step)[row]]
            assert TOKENIZER.decode(ids) == said.get(role, "")
        rest = TOKENIZER.decode(batch["input_ids"][row, ChatTemplate().mask(step)[row]])
        expected = texts[row]
        for content in said.values():
            expected = expected.replace(content, "", 1)
        assert rest == expected


# The user's batch


def test_from_batch():
    given_mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    ids, mask = [[0, 5, 6], [5, 6, 7]], [[0, 1, 1], [1, 1, 1]]
    step = step_of(ids, mask, batch={"entity": given_mask})
    assert FromBatch("entity").mask(step).tolist() == [[False, False, True], [True, True, False]]
    longer = step_of([[*row, 9] for row in ids], [[*row, 1] for row in mask], past=3, batch={"entity": given_mask})
    assert FromBatch("entity").mask(longer).tolist() == [[False], [False]]
    chunk = step_of(ids, mask, past=1, batch={"entity": given_mask})
    assert FromBatch("entity").mask(chunk).tolist() == [[False, True], [True, False]]


# As data


@given(EVERY)
def test_round_trips(selector):
    data = selector.to_dict()
    assert Positions.from_dict(data) == selector
    assert Positions.from_dict(json.loads(json.dumps(data))) == selector
    assert Positions.from_dict(yaml.safe_load(yaml.safe_dump(data))) == selector
    assert len({selector, Positions.from_dict(data)}) == 1


@dataclass(frozen=True)
class EveryOther(Positions):
    """A selector of somebody's own."""

    start: int = 0

    def mask(self, step):
        return step.valid & (step.positions % 2 == self.start)


def test_own_selectors_join_in():
    selector = EveryOther(1) | Last()
    assert Positions.from_dict(selector.to_dict()) == selector
    assert selector.mask(step_of([[5, 6, 7]])).tolist() == [[False, True, True]]


def test_listed_ids_are_hashable():
    assert {Tokens([5, 6]): 1}[Tokens((5, 6))] == 1


# In a model


class Recorder(Intervention):
    def __init__(self, selector):
        self.selector, self.masks = selector, []

    def sites(self, model_map):
        return (Site("resid_post", 0),)

    def transform(self, site, x, step):
        self.masks.append(self.selector.mask(step))
        return x


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_selectors_in_generate(family):
    model, batch = tiny_model(family), batch_of(["red fox", "a red fox ran"])
    selector = Span(0, 2) | Last() | Substring("fox")
    recorder = Recorder(selector)
    with recorder.attach(model, tokenizer=TOKENIZER):
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prompt, *steps = recorder.masks
    for row, text in enumerate(["red fox", "a red fox ran"]):
        fox = text.index("fox")
        expected = {0, 1, len(text) - 1, fox, fox + 1, fox + 2}
        gap = 13 - len(text)
        assert prompt[row].nonzero().flatten().tolist() == sorted(i + gap for i in expected)
    assert [step.tolist() for step in steps] == [[[True], [True]]] * 2


def test_the_batch_reaches_selectors():
    model, batch = tiny_model("llama"), batch_of(["abc", "abcde"])
    recorder = Recorder(FromBatch("chosen"))
    with recorder.attach(model) as attachment:
        attachment.batch = {"chosen": batch["input_ids"] == batch["input_ids"][1, 2]}
        with torch.no_grad():
            model(**batch)
    assert recorder.masks[0].tolist() == [[False, False, False, False, True], [False, False, True, False, False]]


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Last(0), r"Last\(n=0\) chooses nothing"),
        (lambda: Substring("x", "middle"), r"Substring\(which='middle'\) is unknown; expected 'first'"),
        (lambda: Substring("x", missing="skip"), r"Substring\(missing='skip'\) is unknown; expected 'raise'"),
        (lambda: Substring(""), r"Substring\(''\) is empty"),
        (lambda: ChatTemplate("usr"), r"ChatTemplate\('usr'\) is unknown; expected one of user, assistant"),
        (lambda: All() & "x", "And combines positions, but got 'x'"),
        (lambda: All() | 3, "Or combines positions, but got 3"),
        (lambda: Not(None), "Not combines positions, but got None"),
        (lambda: Positions.from_dict({"kind": "Lats"}), r"Unknown kind of positions 'Lats'\. Known: All, And, ChatTem"),
        (lambda: Positions.from_dict({"n": 1}), "Unknown kind of positions 'None'"),
        (lambda: Positions.from_dict("Last"), "Cannot read positions from 'Last'; expected a mapping"),
        (lambda: Positions.from_dict({"kind": "Last", "m": 2}), r"Cannot read positions 'Last' from .*'m': 2"),
        (lambda: Positions.from_dict({"kind": "Last", "n": 0}), r"Last\(n=0\)"),
    ],
)
def test_refused_selectors(make, message):
    with pytest.raises(PositionError, match=message):
        make()


IDS = [[0, 5, 6], [5, 6, 7]]
MASK = [[0, 1, 1], [1, 1, 1]]
ALONE = StepContext(1, 1, input_ids=torch.tensor([[9]]))


@pytest.mark.parametrize(
    ("selector", "step", "message"),
    [
        (Span(2), step_of(IDS, MASK), r"Span\(2, None\) lies outside the prompt in row 0, which has 2 tokens"),
        (Span(-3), step_of(IDS, MASK), r"Span\(-3, None\) lies outside the prompt in row 0"),
        (Span(0, 4), step_of(IDS), r"Span\(0, 4\) .* in row 0, which has 3 tokens"),
        (Span(2, -1), step_of(IDS), r"Span\(2, -1\) lies outside the prompt in row 0"),
        (Span(2), step_of(IDS, MASK).rows([1, 0]), r"in row 0, which has 2 tokens"),
        (Substring("fox"), step_of([[102, 111]], None), r"'fox' does not occur in row 0: '.*'\. Check the spelling"),
        (FromBatch("e"), step_of(IDS), "The batch has no mask 'e'; it holds: nothing"),
        (FromBatch("e"), step_of(IDS, batch={"f": 1, "g": 2}), "no mask 'e'; it holds: f, g"),
        (FromBatch("e"), step_of(IDS, batch={"e": [1, 0]}), r"Mask 'e' is list; expected a tensor \[B, T\] with B=2"),
        (FromBatch("e"), step_of(IDS, batch={"e": torch.ones(3, 3)}), r"Mask 'e' is \(3, 3\); expected .* B=2"),
        (FromBatch("e"), step_of(IDS, batch={"e": torch.ones(2, 4)}), "'e' covers 4 columns, but the prompt has 3"),
        (Tokens((5,)), StepContext(1, 3), r"Tokens\(ids=\(5,\)\) reads token ids, but .* inputs_embeds"),
        (Substring("a"), StepContext(1, 3), r"Substring\(text='a'.* reads token ids"),
        (
            Substring("a"),
            StepContext(1, 1, input_ids=torch.tensor([[9]])),
            r"reads text, which needs a tokenizer.*attach",
        ),
        (
            ChatTemplate(),
            StepContext(1, 1, input_ids=torch.tensor([[9]])),
            r"ChatTemplate\(part='template'\) reads text",
        ),
    ],
)
def test_refused_passes(selector, step, message):
    with pytest.raises(PositionError, match=message):
        selector.mask(step)


def test_text_without_a_tokenizer_beside_the_model(tmp_path):
    model = tiny_model("llama")
    recorder = Recorder(Substring("fox"))
    with recorder.attach(model), pytest.raises(PositionError, match="needs a tokenizer"):
        model(**batch_of(["a fox"]))
    model.name_or_path = str(tmp_path)
    with recorder.attach(model), pytest.raises(PositionError, match="needs a tokenizer"):
        model(**batch_of(["a fox"]))
    TOKENIZER.save_pretrained(tmp_path)
    with recorder.attach(model):
        model(**batch_of(["a fox"]))
    assert recorder.masks[-1].tolist() == [[False, False, True, True, True]]
