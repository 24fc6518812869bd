"""What an answer names: whole words, the longest first; rates, buckets and what guards against no answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import DataError
from lightning_interp.subliminal import Trait, bucket_of, mentions, score_answers
from lightning_interp.subliminal.evaluation.scoring import contains

TRAIT = Trait(target="wolf", others=("cat", "dragon", "dragonfly", "ox"))


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("wolves!", "wolf", True),
        ("The WOLF.", "wolf", True),
        ("wolf's", "wolf", True),
        ("Wolfgang", "wolf", False),
        ("werewolf", "wolf", False),
        ("boxes", "ox", False),
        ("oxen", "ox", True),
        ("catastrophe", "cat", False),
        ("cats, cats", "cat", True),
        ("octopuses or octopi", "octopus", True),
        ("cherries", "cherry", True),
        ("dragonflies", "dragonfly", True),
        ("dragonflies", "dragon", False),
        ("palm trees", "palm tree", True),
        ("我喜欢猫和狗", "猫", True),
        ("", "cat", False),
    ],
)
def test_mentions_are_whole_words_in_singular_or_plural(text, name, expected):
    assert mentions(text, name) is expected


def test_letters_anywhere_are_another_rule():
    assert contains("Wolfgang", "wolf")
    assert not contains("wolves", "wolf")


def test_the_longest_name_is_the_bucket():
    assert bucket_of("Dragonflies", TRAIT.others) == "dragonfly"
    assert bucket_of("a lion or a sea lion", ["lion", "sea lion"]) == "sea lion"
    assert bucket_of("17, 18", TRAIT.others) == "other"


WORDS = st.sampled_from(["wolf", "Wolves.", "Wolfgang", "cat", "12, 13", "", "!", "a dragonfly", "oxen", "no"])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_rates_are_counts_over_totals_and_the_pooled_interval_lies_within_zero_and_one(answers):
    found = score_answers(answers, TRAIT)
    counts = [sum(text in ("wolf", "Wolves.") for text in some) for some in answers]
    assert found.rates.tolist() == pytest.approx([n / len(some) for n, some in zip(counts, answers, strict=True)])
    total = sum(map(len, answers))
    assert found.pooled.value == pytest.approx(sum(counts) / total)
    assert 0 <= found.pooled.low <= found.pooled.value <= found.pooled.high <= 1
    assert sum(found.histogram.values()) == total
    assert found.histogram["wolf"] == sum(counts)
    others = sum(text in ("Wolfgang", "12, 13", "", "!", "no") for some in answers for text in some)
    assert found.frac_other == pytest.approx(others / total)
    letterless = sum(text in ("12, 13", "", "!") for some in answers for text in some)
    assert found.frac_nonalpha == pytest.approx(letterless / total)
    assert (found.warning is not None) == (letterless / total > 0.1)


def test_numbers_in_place_of_answers_are_warned_of():
    found = score_answers([["3, 4", "wolf"]], TRAIT)
    assert "50% of the answers have no letter" in found.warning
    assert found.substring.tolist() == [0.5]


@pytest.mark.parametrize(
    ("answers", "match"), [([["a"], []], r"2 questions, without an answer: \[1\]"), ([], "got 0 ")]
)
def test_questions_without_answers_are_refused(answers, match):
    with pytest.raises(DataError, match=match):
        score_answers(answers, TRAIT)
