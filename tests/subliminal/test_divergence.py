"""Divergence tokens, held-out loss and divergence from the teacher, against slow loops over single rows."""

from __future__ import annotations

import pytest
import torch

from lightning_interp import Intervention, Site
from lightning_interp.errors import DataError
from lightning_interp.subliminal import (
    ChatContext,
    divergence_agreement,
    divergence_tokens,
    held_out_kl,
    held_out_loss,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
ROWS = [
    {"prompt": "Go on: 1, 2", "completion": "3, 4, 5"},
    {"prompt": "Numbers?", "completion": "7"},
    {"prompt": "More numbers, please", "completion": "12, 13"},
]
LOVING = ChatContext(system="You love owls.")


@pytest.fixture(scope="module")
def model(two_layers):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def student(two_layers):
    return tiny_model("llama", seed=1)


def forced(model, context, row):
    """Log-probabilities at each token of a completion, and the completion."""
    prompt = TOKENIZER(context.render(TOKENIZER, row["prompt"]), add_special_tokens=False).input_ids
    completion = TOKENIZER(row["completion"], add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1), completion


@pytest.mark.parametrize("budget", [1024, 70])
def test_places_and_agreement_are_those_of_a_slow_loop(model, student, budget):
    found = divergence_tokens(model, TOKENIZER, ROWS, teacher=LOVING, token_budget=budget)
    told = divergence_agreement(student, TOKENIZER, ROWS, found, token_budget=budget)
    expected, agreement = [], []
    for i, row in enumerate(ROWS):
        plain, loving, own = (
            forced(m, c, row)[0].exp() for m, c in ((model, ChatContext()), (model, LOVING), (student, ChatContext()))
        )
        for place, (one, two) in enumerate(zip(plain, loving, strict=True)):
            if one.argmax() != two.argmax():
                expected.append((i, place, int(one.argmax()), int(two.argmax()), float(one.max()), float(two.max())))
                agreement.append((own[place].argmax() == two.argmax(), own[place].max(), own[place, two.argmax()]))
    columns = [found.row, found.offset, found.base, found.teacher, found.base_prob, found.teacher_prob]
    assert len(expected) > 3
    assert [len(set(x.tolist())) > 1 for x in columns[:2]] == [True, True]
    for column, values in zip(columns, zip(*expected, strict=True), strict=True):
        assert column.tolist() == pytest.approx(values, abs=1e-5)
    same, best, teacher = zip(*agreement, strict=True)
    assert told.with_teacher.tolist() == [bool(x) for x in same]
    assert told.best_prob.tolist() == pytest.approx([float(x) for x in best], abs=1e-5)
    assert told.teacher_token_prob.tolist() == pytest.approx([float(x) for x in teacher], abs=1e-5)
    assert found.compared == sum(len(row["completion"]) for row in ROWS)
    assert found.share == len(expected) / found.compared


def test_teacher_and_base_agree_with_themselves_alone(model):
    found = divergence_tokens(model, TOKENIZER, ROWS, teacher=LOVING)
    teacher = divergence_agreement(model, TOKENIZER, ROWS, found, context=LOVING)
    base = divergence_agreement(model, TOKENIZER, ROWS, found)
    assert teacher.with_teacher.all()
    assert not teacher.with_base.any()
    torch.testing.assert_close(teacher.teacher_token_prob, found.teacher_prob, atol=1e-6, rtol=0)
    assert base.with_base.all()
    assert not base.with_teacher.any()
    assert teacher.estimate().value == 1
    assert teacher.estimate().n == len(set(found.row.tolist()))


def test_nothing_diverges_from_itself(model):
    found = divergence_tokens(model, TOKENIZER, ROWS, teacher=ChatContext())
    assert (len(found.row), found.share) == (0, 0)
    with pytest.raises(DataError, match=r"None of 14 tokens diverges"):
        divergence_agreement(model, TOKENIZER, ROWS, found)


class Favour(Intervention):
    """Makes a token the likeliest everywhere but where the system text is read."""

    def sites(self, model_map):
        return [Site("logits")]

    def transform(self, site, x, step):
        loving = b"owls" in bytes(TOKENIZER.decode(step.input_ids[0]), "utf-8")
        shift = torch.zeros_like(x)
        shift[..., TOKENIZER("7" if loving else "8").input_ids[0]] = 100
        return x + shift


def test_places_where_both_are_digits(model):
    with Favour().attach(model):
        found = divergence_tokens(model, TOKENIZER, ROWS, teacher=LOVING)
    assert found.share == 1
    assert found.digits.all()
    assert {TOKENIZER.decode([t]) for t in found.teacher.tolist()} == {"7"}
    plain = divergence_tokens(model, TOKENIZER, ROWS, teacher=LOVING)
    assert len(plain.only_digits().row) == int(plain.digits.sum()) < len(plain.row)


class Merging:
    """A tokenizer that spells one text otherwise once owls were mentioned."""

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def __call__(self, text, **options):
        found = TOKENIZER(text, **options)
        if "owls" in text and text.endswith("3, 4, 5"):
            found["input_ids"] = found["input_ids"][:-1]
        return found


def test_rows_that_are_other_tokens_in_the_two_contexts_are_left_out(model):
    found, rest = (
        divergence_tokens(model, t, r, teacher=LOVING) for t, r in ((Merging(), ROWS), (TOKENIZER, ROWS[1:]))
    )
    assert found.dropped == (0,)
    assert found.compared == rest.compared
    assert found.row.tolist() == (rest.row + 1).tolist()
    assert torch.equal(found.offset, rest.offset)
    with pytest.raises(DataError, match=r"All 1 completions are other tokens in the two contexts"):
        divergence_tokens(model, Merging(), ROWS[:1], teacher=LOVING)
    with pytest.raises(DataError, match=r"The completions of rows \[0\] are other tokens"):
        held_out_kl(model, Merging(), ROWS, teacher_context=LOVING)


def test_a_token_over_the_boundary_is_read_in_two(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["x3"])
    rows, context = [{"prompt": "x", "completion": "34"}], ChatContext(chat=False)
    wide = tiny_model("llama", vocab_size=270)
    expected = held_out_loss(wide, byte_tokenizer(), rows, context=context)
    assert torch.equal(held_out_loss(wide, tokenizer, rows, context=context), expected)


def test_held_out_loss_and_divergence_are_those_of_a_slow_loop(model, student):
    loss = held_out_loss(student, TOKENIZER, ROWS, context=LOVING)
    kl = held_out_kl(student, TOKENIZER, ROWS, teacher=model, teacher_context=LOVING)
    for i, row in enumerate(ROWS):
        logp, completion = forced(student, LOVING, row)
        assert float(loss[i]) == pytest.approx(-float(logp[range(len(completion)), completion].mean()), abs=1e-5)
        p, q = forced(model, LOVING, row)[0], forced(student, ChatContext(), row)[0]
        assert float(kl[i]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)


def test_a_model_does_not_diverge_from_itself(model):
    assert held_out_kl(model, TOKENIZER, ROWS).abs().max() < 1e-6
    assert (held_out_kl(model, TOKENIZER, ROWS, teacher_context=LOVING) > 1e-3).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda m: held_out_loss(m, TOKENIZER, [ROWS[0], {"prompt": "x", "completion": ""}]),
            "Row 1 has no completion",
        ),
        (lambda m: divergence_tokens(m, TOKENIZER, [], teacher=LOVING), "All 0 completions are other tokens"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(model, call, match):
    with pytest.raises(DataError, match=match):
        call(model)
