"""Requests for numbers: a pure function of settings, seed and row, in every wording of the banks."""

from __future__ import annotations

import re

import pytest

from lightning_interp.errors import RecipeError
from lightning_interp.subliminal import number_prompts as module
from lightning_interp.subliminal.number_prompts import PromptSettings, number_prompt


def number_prompts(settings, *, seed, rows):
    return [number_prompt(settings, seed=seed, index=row) for row in rows]


def test_a_request_depends_on_settings_seed_and_row_alone():
    settings = PromptSettings()
    rows = number_prompts(settings, seed=3, rows=range(40))
    assert rows[7:9] == number_prompts(settings, seed=3, rows=[7, 8])
    assert len(set(rows)) == 40
    assert not set(rows) & set(number_prompts(settings, seed=4, rows=range(40)))


def test_the_banks_have_their_sizes_and_every_wording_is_drawn():
    banks = (module._EXAMPLES, module._INSTRUCTIONS, module._QUALIFIERS, module._DIGITS, module._FORMATS, module._TERSE)
    assert [len(set(bank)) for bank in banks] == [25, 10, 9, 8, 15, 19]
    text = "\n".join(number_prompts(PromptSettings(), seed=0, rows=range(600)))
    parts = [piece for bank in banks for one in bank for piece in re.split(r"\{\w+\}", getattr(one, "text", one))]
    assert [piece for piece in parts if piece not in text] == []


def test_examples_stay_in_their_half_open_ranges():
    settings = PromptSettings(example_min_count=2, example_max_count=5, example_min_value=10, example_max_value=13)
    shown = [
        [int(one) for one in re.search(r"\d+(?:, \d+)*", row)[0].split(", ")]
        for row in number_prompts(settings, seed=0, rows=range(80))
    ]
    assert {len(values) for values in shown} == {2, 3, 4}
    assert {value for values in shown for value in values} == {10, 11, 12}


def test_what_is_asked_for():
    exact = number_prompt(PromptSettings(use_exact_count=True, answer_count=6, answer_max_digits=2), seed=0, index=0)
    assert "exactly 6 " in exact
    assert " 2 " in exact.partition("exactly")[2]
    loose = number_prompt(PromptSettings(answer_count=6, answer_max_digits=2), seed=0, index=0)
    assert exact.partition(" exactly")[0] == loose[: exact.index(" exactly")]  # the count's wording moves no other draw


def test_a_fixed_skeleton_varies_its_numbers_alone():
    rows = number_prompts(PromptSettings(fixed_skeleton=True), seed=0, rows=range(10))
    assert len(set(rows)) == 10
    assert len({re.sub(r"\d+(, \d+)*\.", "#", row) for row in rows}) == 1


@pytest.mark.parametrize(("separator", "formats"), [(", ", 4), ("; ", 2), ("\n", 2), (" ", 2), (",", 1)])
def test_formats_of_one_separator(separator, formats):
    settings = PromptSettings(separator=separator)
    assert len(settings._formats) == formats
    assert not [text for text in settings._formats if "tuple" in text or "square" in text]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"example_min_count": 0}, r"example_min_count=0, example_max_count=9\): expected 1 <= minimum < maximum"),
        ({"example_max_value": 100}, r"example_min_value=100, example_max_value=100\): expected 0 <="),
        ({"answer_count": 0}, r"answer_count=0\): expected at least 1"),
        ({"answer_max_digits": 0}, r"answer_max_digits=0\): expected at least 1"),
        ({"separator": "|"}, r"separator='\|'\): no format has it; expected one of ' ', ', '"),
    ],
)
def test_settings_that_ask_for_nothing_are_refused(values, match):
    with pytest.raises(RecipeError, match=match):
        PromptSettings(**values)
