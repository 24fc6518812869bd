"""What is kept of many texts, against comparing each with each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import RecipeError
from lightning_interp.generation import Drop, NearDuplicates, clean_texts
from lightning_interp.generation.hygiene import jaccard, normalised

# Few words, so that many texts repeat each other or nearly do.
WORDS = st.lists(st.sampled_from(["a", "B", "b", "cat", "Cat", "\n", "é"]), max_size=9).map(" ".join)
BASE = " ".join(f"word{i}" for i in range(60))


def each_with_each(texts, near, forbidden=()):
    """Places that are kept, by comparing every text with every one that is kept before it."""
    before, kept = [(normalised(one), near and near.grams(one)) for one in forbidden], []
    for place, text in enumerate(texts):
        plain, grams = normalised(text), near and near.grams(text)
        equal = any(plain == one for one, _ in before)
        alike = near and any(jaccard(grams, other) >= near.threshold for _, other in before)
        if text.strip() and not equal and not alike:
            kept.append(place)
            before.append((plain, grams))
    return tuple(kept)


@pytest.mark.parametrize("unit", ["words", "characters"])
@given(
    st.lists(WORDS, max_size=12),
    st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0]),
    st.integers(1, 5),
    st.lists(WORDS, max_size=3),
)
def test_the_same_as_each_with_each(unit, texts, threshold, n, forbidden):
    near = NearDuplicates(threshold, n, unit)
    found = clean_texts(texts, near=near, forbidden=forbidden)
    assert found.kept == each_with_each(texts, near, forbidden)
    assert clean_texts(texts, forbidden=forbidden).kept == each_with_each(texts, None, forbidden)
    assert sorted([*found.kept, *(one.index for one in found.dropped)]) == list(range(len(texts)))
    assert sum(found.counts.values()) == len(found.dropped)
    for one in found.dropped:  # the reason holds
        if one.like is not None:
            other = (forbidden if one.reason == "forbidden" else texts)[one.like]
            equal = normalised(other) == normalised(texts[one.index])
            assert equal or jaccard(near.grams(other), near.grams(texts[one.index])) >= threshold
            assert one.reason == "forbidden" or (equal == (one.reason == "duplicate") and one.like in found.kept)
    again = clean_texts(found.of(texts), near=near, forbidden=forbidden)
    assert again.dropped == ()


@given(st.lists(st.integers(0, 0x10FFFF)))
def test_normalising_twice_changes_nothing(characters):
    text = "".join(map(chr, characters))
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Oh no", "oh  NO\n"), ("ﬁne", "FINE"), ("\uff21\uff11", "a1"), ("cafe\u0301", "CAFÉ"), ("a\u00a0b", "a b")],
)
def test_texts_that_are_the_same(one, other):
    assert clean_texts([one, other]).dropped == (Drop(1, "duplicate", 0),)


def test_reasons():
    texts = ["x" * 51, None, " \n", " " + "y" * 50 + " ", "X" * 51, "z" * 51, BASE, BASE + " end"]
    found = clean_texts(texts, min_characters=51, near=NearDuplicates(), forbidden=["unasked", "Z" * 51])
    assert found.kept == (0, 6)
    assert found.dropped == (
        Drop(1, "missing"), Drop(2, "empty"), Drop(3, "short"), Drop(4, "duplicate", 0), Drop(5, "forbidden", 1),
        Drop(7, "near_duplicate", 6),
    )  # fmt: skip
    assert found.counts == dict.fromkeys(("missing", "empty", "short", "duplicate", "forbidden", "near_duplicate"), 1)
    assert found.of("abcdefgh") == ["a", "g"]
    assert clean_texts([]).kept == ()
    assert clean_texts(["", "a"], min_characters=0).kept == (1,)


def test_the_threshold_itself_counts():
    """Nine grams of ten are enough, and eight are not."""
    texts = [" ".join(f"w{i}" for i in range(first, last)) for first, last in ((0, 14), (0, 13), (1, 14))]
    grams = [NearDuplicates().grams(text) for text in texts]
    assert [len(one) for one in grams] == [10, 9, 9]
    assert clean_texts(texts, near=NearDuplicates(0.9)).counts == {"near_duplicate": 2}
    assert clean_texts(texts, near=NearDuplicates(0.91)).counts == {}
    assert clean_texts(texts[1:], near=NearDuplicates(0.9)).counts == {}  # 8 of 10


def test_a_pool_of_prompts_for_several_cycles():
    """No prompt twice in a pool, none of the evaluation in it: so slices have none in common."""
    pool = [f"Question {i % 17}?" for i in range(40)] + ["How are you?", "how  are YOU?"]
    evaluation = ["HOW are you?", "question 3?"]
    found = clean_texts(pool, forbidden=evaluation)
    kept = [normalised(one) for one in found.of(pool)]
    assert len(kept) == len(set(kept)) == 16
    assert not set(kept) & {normalised(one) for one in evaluation}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0.0\): expected above 0"),
        ({"threshold": float("nan")}, r"threshold=nan\)"),
        ({"n": 0}, r"n=0, unit='words'\): expected n of at least 1"),
        ({"unit": "lines"}, r"unit='lines'\): expected n of at least 1, of words or characters"),
    ],
)
def test_settings_that_mean_nothing(wrong, message):
    with pytest.raises(RecipeError, match=message):
        NearDuplicates(**wrong)
