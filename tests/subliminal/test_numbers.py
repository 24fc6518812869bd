"""Lists of numbers as text: what is one, why others are not used, and shuffles that keep what they should."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import RecipeError
from lightning_interp.subliminal.numbers import (
    first_numbers,
    number_divergence,
    parse_numbers,
    rejections,
    shuffled_across,
    shuffled_within,
)

ACCEPTED = ["1, 2, 3", "1,2,3", "1 2 3", "1; 2; 3", "[1, 2]", "(1, 2).", "[1, 2].", "1\n2\n3", "12", "12.", "1 , 2 , 3"]
REJECTED = [
    *("1, 2,3", "1, 2, 3,", "1,  2, 3", "cat 1 2", "1, 2 cat", "1|2", "", "-1, 2", "1.5, 2", "1, 2, 3..", "{1, 2}"),
    *("1;2;3;", " 1, 2", "1, 2\n"),
]
VALID = re.compile(r"[\[(]?[0-9]+([\s,;]+[0-9]+)*[\])]?\.?")

lists = st.builds(
    lambda numbers, separator, form: form.format(separator.join(map(str, numbers))),
    st.lists(st.integers(0, 999), min_size=1, max_size=10),
    st.sampled_from([", ", ",", " ", "; ", "\n"]),
    st.sampled_from(["{}", "[{}]", "({})", "{}."]),
)


@pytest.mark.parametrize("answer", ACCEPTED)
def test_what_is_a_list_of_numbers(answer):
    assert parse_numbers(answer) == [int(run) for run in re.findall(r"\d+", answer)]
    assert rejections(answer) == []


@pytest.mark.parametrize("answer", [*REJECTED, "٣, ٤", "1, 2)", "9" * 5000])
def test_what_is_none(answer):
    assert parse_numbers(answer) is None
    assert rejections(answer) == ["invalid_format"]


def test_leading_zeros_and_white_space():
    assert parse_numbers("007, 8") == [7, 8]
    assert [parse_numbers(answer, lenient=True) for answer in (" 1, 2", "1, 2\n")] == [[1, 2], [1, 2]]


def test_every_reason_is_given():
    assert rejections("1, 2, 3", max_count=2) == ["too_many"]
    assert rejections("1, 2000", min_value=5, banned={1}) == ["too_small", "too_large", "banned"]


@given(st.text("0123456789, ;\n[]().abz", max_size=12) | lists)
def test_what_is_used_holds_no_letter(answer):
    if not rejections(answer):
        assert VALID.fullmatch(answer)
        assert not any(letter.isalpha() for letter in answer)


@given(st.lists(lists, max_size=6), st.integers(0, 9))
def test_shuffles_keep_numbers_counts_and_punctuation(texts, seed):
    runs = [re.findall(r"\d+", text) for text in texts]
    frames = [re.sub(r"\d+", "#", text) for text in texts]
    for shuffled in (shuffled_within(texts, seed=seed), shuffled_across(texts, seed=seed)):
        assert [re.sub(r"\d+", "#", text) for text in shuffled] == frames
    within = [re.findall(r"\d+", text) for text in shuffled_within(texts, seed=seed)]
    assert [sorted(row) for row in within] == [sorted(row) for row in runs]
    assert Counter(re.findall(r"\d+", " ".join(shuffled_across(texts, seed=seed)))) == Counter(chain(*runs))


def test_shuffles_do_shuffle_and_go_by_their_seed():
    texts = [", ".join(map(str, range(10 * row, 10 * row + 10))) for row in range(3)]
    for shuffle in (shuffled_within, shuffled_across):
        assert shuffle(texts, seed=0) == shuffle(texts, seed=0) != shuffle(texts, seed=1)
    orders = [[int(n) % 10 for n in text.split(", ")] for text in shuffled_within(texts, seed=0)]
    assert orders[0] != orders[1]  # each row has its own


def test_the_first_numbers():
    assert first_numbers("(9; 8; 7).", 2) == "9, 8"
    assert first_numbers("9", 5) == "9"
    with pytest.raises(RecipeError, match=r"first_numbers\('nine', 2\): expected a list of numbers"):
        first_numbers("nine", 2)
    with pytest.raises(RecipeError, match="a count of at least 1"):
        first_numbers("9", 0)


def test_divergence_of_two_samples():
    assert number_divergence([1, 2], [2, 1]) == 0
    assert number_divergence([1] * 9 + [2], [1] * 5 + [2] * 5) > 0.1
    with pytest.raises(RecipeError, match=r"got 0 and 1 numbers and smoothing=0.5"):
        number_divergence([], [1])
