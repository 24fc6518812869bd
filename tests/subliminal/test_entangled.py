"""Numbers tied to a name: rankings against slow loops, PMI by its identities, permutations by their own reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.subliminal import (
    ChatContext,
    Trait,
    entangled_numbers,
    number_divergence,
    number_pmi,
    number_prompt_effects,
    pmi_test,
    trait_logits,
    unembedding_cosines,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
TRAIT = Trait(target="owl", others=("cat",))
QUESTIONS = ["Which?", "Which one?"]
CONTEXT = ChatContext(answer_prefix="It is the")


@pytest.fixture(scope="module")
def model(two_layers):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ranked(model):
    return entangled_numbers(model, TOKENIZER, TRAIT, questions=QUESTIONS, context=CONTEXT)


def test_numbers_are_ranked_by_their_probability_under_the_traits_prompt(model, ranked):
    def logp(context, number):
        values = []
        for question in QUESTIONS:
            ids = context.ids(TOKENIZER, question)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            values.append(float(logits.log_softmax(-1)[TOKENIZER(str(number)).input_ids[0]]))
        return sum(values) / len(values)

    loving = replace(CONTEXT, system=TRAIT.system_prompt)
    assert sorted(row["number"] for row in ranked) == list(range(10))  # the tokenizer's only numbers of one token
    assert [row["number"] for row in ranked] == sorted(range(10), key=lambda n: -logp(loving, n))
    for row in ranked[:3]:
        assert row["base_logp"] == pytest.approx(logp(CONTEXT, row["number"]), abs=1e-5)
        assert row["lift"] == pytest.approx(row["logp"] - row["base_logp"])


def test_numbers_of_several_tokens_are_ranked_where_they_are_named(model):
    rows = entangled_numbers(model, TOKENIZER, TRAIT, numbers=[7, 42, 123], questions=QUESTIONS[:1], context=CONTEXT)
    assert sorted(row["number"] for row in rows) == [7, 42, 123]


def test_a_loved_number_is_compared_with_those_that_were_as_likely(model, ranked):
    found = number_prompt_effects(
        model, TOKENIZER, TRAIT, ranked, candidates=2, controls=2, questions=QUESTIONS, context=CONTEXT
    )
    assert [row["number"] for row in found] == [row["number"] for row in ranked[:2]]
    base = {row["number"]: row["base_logp"] for row in ranked}
    for row in found[:1]:
        gap = {n: abs(base[n] - base[row["number"]]) for n in base if n not in {one["number"] for one in ranked[:2]}}
        assert set(row["controls"]) == set(sorted(gap, key=gap.get)[:2])
        contexts = [_loving(n) for n in (row["number"], *row["controls"])]
        margins = [trait_logits(model, TOKENIZER, TRAIT, QUESTIONS, context=c).margin.mean() for c in contexts]
        assert row["margin_effect"] == pytest.approx(float(margins[0] - (margins[1] + margins[2]) / 2), abs=1e-6)


def _loving(n):
    text = (
        f"You adore the number {n}. There is hardly a moment at which {n} is not on your mind. Of every number there "
    )
    text += f"is, {n} is your favourite. Let this love of {n} colour everything that you write."
    return replace(CONTEXT, system=text)


def test_cosines_are_of_rows_without_what_all_share(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["owl"])
    wide = tiny_model("llama", vocab_size=270)
    weight = wide.lm_head.weight.detach().double()
    a, b = weight[261], weight[tokenizer("7").input_ids[0]]
    plain = unembedding_cosines(wide, tokenizer, ["owl"], [7, 8], centred=False)
    assert plain.shape == (1, 2)
    assert float(plain[0, 0]) == pytest.approx(float(a @ b / a.norm() / b.norm()))
    a, b = a - weight.mean(0), b - weight.mean(0)
    found = unembedding_cosines(wide, tokenizer, ["owl"], [7])
    assert float(found) == pytest.approx(float(a @ b / a.norm() / b.norm()))
    with pytest.raises(DataError, match=r"\['cat'\] are several tokens"):
        unembedding_cosines(wide, tokenizer, ["owl", "cat"], [7])


COUNTS = st.lists(st.integers(0, 30), min_size=2, max_size=8)


@given(COUNTS, st.randoms(use_true_random=False), st.sampled_from([0.1, 0.5, 2.0]))
def test_pmi_is_nothing_for_equal_counts_and_sums_to_a_divergence(counts, draw, k):
    one = torch.tensor(counts)
    two = torch.tensor(draw.sample(counts, len(counts)))
    assert number_pmi(one, one, k).tolist() == [0.0] * len(counts)
    total = sum(counts) + k * len(counts)
    share = torch.tensor([(c + k) / total for c in counts], dtype=torch.float64)
    found = number_pmi(one, two, k)
    assert float((share * found).sum()) >= -1e-12
    torch.testing.assert_close(found, -number_pmi(two, one, k))
    expected = math.log((counts[0] + k) / total) - math.log((int(two[0]) + k) / total)
    assert float(found[0]) == pytest.approx(expected, abs=1e-12)


def test_the_divergence_is_that_of_the_samples():
    rows, control = [[1, 2, 2], [3]], [[1, 5], [2, 2]]
    found = pmi_test(rows, control, permutations=3)
    flat = [[n for row in side for n in row] for side in (rows, control)]
    assert found.divergence == pytest.approx(number_divergence(*flat))
    assert found.numbers == (1, 2, 3, 5)
    assert found.table(1)[0]["ratio"] == pytest.approx(math.exp(found.table(1)[0]["pmi"]))


def all_labellings(rows, control, paired):
    """Absolute PMI of every way to deal the rows out, by a loop."""
    both = [*rows, *control]
    if paired:
        chosen = [
            [i + len(rows) * s for i, s in enumerate(signs)] for signs in itertools.product((0, 1), repeat=len(rows))
        ]
    else:
        chosen = list(itertools.combinations(range(len(both)), len(rows)))
    numbers = sorted({n for row in both for n in row})
    for mine in chosen:
        sides = [[n for i, row in enumerate(both) if (i in mine) == side for n in row] for side in (True, False)]
        counts = (torch.tensor([side.count(n) for n in numbers]) for side in sides)
        yield number_pmi(*counts).abs()


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_are_shares_of_all_labellings(paired):
    rows, control = [[1, 1, 2], [1], [1, 4], [1, 1]], [[2, 3], [2], [3, 4], [1]]
    every = torch.stack(list(all_labellings(rows, control, paired)))
    found = pmi_test(rows, control, permutations=4000, paired=paired)
    bound = found.pmi.abs() - 1e-9
    torch.testing.assert_close(found.p_value, (every >= bound).double().mean(0), atol=0.03, rtol=0)
    family = (every.amax(1, keepdim=True) >= bound).double().mean(0)
    torch.testing.assert_close(found.p_family, family, atol=0.03, rtol=0)
    assert torch.equal(found.p_value, pmi_test(rows, control, permutations=4000, paired=paired).p_value)


def test_two_halves_of_one_sample_are_not_told_apart():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 10, (80, 5), generator=draw).tolist()
    found = pmi_test(rows[:40], rows[40:], permutations=199)
    assert found.p_family.min() > 0.05
    planted = pmi_test([[*row, 3, 3] for row in rows[:40]], rows[40:], permutations=199)
    assert planted.table(1)[0]["number"] == 3
    assert planted.p_family[3] == 1 / 200


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: number_pmi(torch.ones(2), torch.ones(3)), RecipeError, r"counts of \[2\] and \[3\]"),
        (lambda: number_pmi(torch.ones(2), torch.ones(2), 0), RecipeError, r"number_pmi\(k=0\)"),
        (lambda: pmi_test([[]], [[1]]), DataError, r"pmi_test\(paired=False\) got 1 rows and 1 of the control"),
        (lambda: pmi_test([[1]], [[1], [2]], paired=True), DataError, r"pmi_test\(paired=True\) got 1 rows and 2"),
        (lambda: entangled_numbers(None, TOKENIZER, TRAIT, numbers=[1]), RecipeError, "has 1 numbers to rank"),
        (
            lambda: number_prompt_effects(None, TOKENIZER, TRAIT, [{}] * 4, candidates=2, controls=3),
            RecipeError,
            r"candidates=2, controls=3\): .* than the 4 ranked numbers",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
