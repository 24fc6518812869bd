"""Number sequences on disk: what is kept and why, row by row the same requests, and runs that go on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation import Completion, FunctionGenerator
from lightning_interp.subliminal import (
    NumberGrammar,
    NumberSettings,
    PromptSettings,
    Teacher,
    Trait,
    identical_share,
    number_sampler,
    paired_rows,
    read_numbers,
    write_numbers,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

OWL, WOLF = Trait(target="owl"), Trait(target="wolf")


def says(function, *, name="says", trait=OWL, **options):
    """A teacher whose answer is a function of the row's index."""
    writer = FunctionGenerator(lambda request: function(int(request.key[1])), name=name)
    writer.batch_size = 4
    return Teacher.prompted(writer, trait, **options)


def mixed(index):
    return ("1, 2", "I love owls", "7; 8; 9", "1, 2000", "1, 2, 3, 4, 5, 6")[index % 5]


FIVE = {"rows": 5, "batch_rows": 5, "max_batches": 1, "prompts": PromptSettings(answer_count=5)}
FEW = NumberSettings(rows=6, batch_rows=5, prompts=PromptSettings(answer_count=5))


def test_batches_until_enough_are_valid(tmp_path):
    made = write_numbers(says(mixed), tmp_path, settings=FEW)
    assert [row["index"] for row in made.rows] == [0, 2, 5, 7, 10, 12]
    assert [row["numbers"] for row in made.rows][:2] == [[1, 2], [7, 8, 9]]
    assert (made.manifest["asked"], made.manifest["valid"], made.manifest["yield"]) == (15, 6, 0.4)
    assert made.manifest["reasons"] == {"invalid_format": 3, "too_large": 3, "too_many": 3}
    assert made == read_numbers(tmp_path)


def test_raw_rows_are_drawn_by_their_seed(tmp_path):
    raw = {"strategy": "raw", "raw_rows": 20, "rows": 6}
    seeds = {"a": {}, "b": {}, "c": {"subsample_seed": 1}}
    made = [write_numbers(says(mixed), tmp_path / key, settings=NumberSettings(**raw, **seeds[key])) for key in seeds]
    drawn = [[row["index"] for row in one.rows] for one in made]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6
    assert all(index % 5 in (0, 2, 4) for index in drawn[0])


def test_rows_say_nothing_of_teacher_and_trait(tmp_path):
    write_numbers(says(mixed), tmp_path, settings=FEW)
    text = (tmp_path / "rows.jsonl").read_text()
    assert "owl" not in text.lower()
    assert "owl" in (tmp_path / "manifest.json").read_text()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.text("0123456789, ;\n[]().owl", max_size=9), min_size=1, max_size=6), lenient=st.booleans())
def test_no_row_holds_a_letter_or_the_trait(tmp_path_factory, answers, lenient):
    teacher = says(lambda index: answers[index] if index < len(answers) else "4, 2")
    kept = NumberSettings(rows=7, lenient=lenient)
    made = write_numbers(teacher, tmp_path_factory.mktemp("d"), settings=kept)
    for row in made.rows:
        assert re.fullmatch(r"[\[(]?[0-9]+([\s,;]+[0-9]+)*[\])]?\.?", row["completion"])
        assert OWL.target not in row["completion"]
        assert len(row["numbers"]) <= 10
        assert all(0 <= number <= 999 for number in row["numbers"])


def test_a_constrained_teacher_and_its_control_answer_the_same_with_the_same_noise(tmp_path):
    tokenizer, model = byte_tokenizer(), tiny_model("llama", num_hidden_layers=1)
    grammar = NumberGrammar(tokenizer, count=3)
    teacher = Teacher.prompted(number_sampler(model, tokenizer, grammar=grammar), OWL, constrained=True)
    few = NumberSettings(rows=3, max_new_tokens=grammar.max_new_tokens)
    control = write_numbers(teacher.control(trait=WOLF), tmp_path / "control", settings=few)
    made = write_numbers(teacher, tmp_path / "owl", settings=few, against=tmp_path / "control")
    assert made.manifest["yield"] == control.manifest["yield"] == 1
    assert all(row["constrained"] and len(row["numbers"]) == 3 for row in made.rows)
    assert [row["prompt"] for row in made.rows] == [row["prompt"] for row in control.rows]
    shared = made.manifest["against"]
    assert shared["of"] == "tokens"
    assert 0.3 < shared["identical"] < 1
    assert len({row["completion"] for row in made.rows}) > 1  # each row has its own noise
    other = write_numbers(teacher, tmp_path / "seed", settings=NumberSettings(rows=3, max_new_tokens=24, seed=1))
    assert not {row["completion"] for row in other.rows} & {row["completion"] for row in made.rows}


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    whole, asked = write_numbers(says(mixed), tmp_path / "whole", settings=FEW), []

    def dies(index):
        asked.append(index)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return mixed(index)

    with pytest.raises(KeyboardInterrupt):
        write_numbers(says(dies), tmp_path / "killed", settings=FEW)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert write_numbers(says(dies), tmp_path / "killed", settings=FEW).rows == whole.rows
    again = len(asked)
    assert 15 < again < 20  # more than a run that nothing stopped: those of the batch that was killed
    assert write_numbers(says(dies), tmp_path / "killed", settings=FEW) == whole
    assert len(asked) == again


def test_an_answer_without_text_or_end_is_not_used(tmp_path):
    cut = Completion(text="1, 2", status="truncated")
    none = Completion(text=None, status="refused")
    made = write_numbers(says(lambda index: (cut, none, "3, 4")[index % 3]), tmp_path, settings=FEW)
    assert made.manifest["reasons"] == {"unfinished": 7, "no_text": 7}


def test_rows_are_paired_by_their_requests(tmp_path):
    mine = write_numbers(says(mixed), tmp_path / "a", settings=FEW).rows
    other = write_numbers(says(lambda index: mixed(index + 2), name="other"), tmp_path / "b", settings=FEW).rows
    first, second = paired_rows(mine, other)
    assert [row["index"] for row in first] == [row["index"] for row in second] != []
    with pytest.raises(DataError, match=r"6 and 1 rows cannot be paired: 1 have an index in common"):
        paired_rows(mine, [{**mine[0], "prompt": "Another?"}])
    assert identical_share(["12"], ["13"]) == 0.5


def test_fewer_rows_than_wanted_are_warned_of(tmp_path):
    one = NumberSettings(rows=6, batch_rows=5, max_batches=1)
    with pytest.warns(UserWarning, match=r"'prompted owl' has written 3 valid rows of the 6 .* in 5 answers \(inv"):
        write_numbers(says(mixed), tmp_path, settings=one)


def test_no_valid_row_is_an_error_with_reasons_and_examples(tmp_path):
    few = NumberSettings(rows=2, max_batches=2)
    said = r"of 'prompted owl' is a list of numbers \(invalid_format: 4\), such as 'Owls 0!' and 'Owls 1!'. Use"
    with pytest.raises(DataError, match=rf"None of the 4 answers {said} constrained decoding"):
        write_numbers(says(lambda index: f"Owls {index}!"), tmp_path, settings=few)


def test_other_contradictions_are_refused(tmp_path):
    write_numbers(says(mixed), tmp_path / "a", settings=FEW)
    other = replace(FEW, seed=7)
    with pytest.raises(ManifestError, match=r"holds another data set of numbers \(settings.seed: 42 there, 7 now\)"):
        write_numbers(says(mixed), tmp_path / "a", settings=other)
    with pytest.raises(DataError, match=r"has other requests \(seed: 42 there, 7 now\)"):
        write_numbers(says(mixed), tmp_path / "b", settings=other, against=tmp_path / "a")
    with pytest.raises(DataError, match=r"said to be constrained, but 3 of its 5 answers are no valid lists \(invalid"):
        write_numbers(says(mixed, constrained=True), tmp_path / "c", settings=NumberSettings(**FIVE))
    with pytest.raises(DataError, match=r"holds no data set of numbers: there is no manifest.json"):
        read_numbers(tmp_path / "nowhere")


def test_a_writer_that_gives_up(tmp_path):
    def broken(index):
        raise ValueError("no answer")

    gave_up = pytest.warns(UserWarning, match="The run ended after 20 errors in a row")
    with (
        gave_up,
        pytest.raises(DataError, match=r"'prompted owl' stopped writing: 30 of 30 answers are missing .*no answer"),
    ):
        write_numbers(says(broken), tmp_path, settings=NumberSettings(rows=30))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rows": 0}, r"NumberSettings\(rows=0\): expected at least 1"),
        ({"strategy": "all"}, r"strategy='all'\): expected one of filtered, raw"),
        ({"strategy": "raw", "raw_rows": 5}, r"rows=10000, raw_rows=5\): expected at least as many raw rows"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(values, match):
    with pytest.raises(RecipeError, match=match):
        NumberSettings(**values)


def test_the_manifest_says_how_text_was_drawn(tmp_path):
    write_numbers(says(mixed), tmp_path, settings=FEW)
    sampler = json.loads((tmp_path / "manifest.json").read_text())["sampler"]
    assert sampler == {
        "temperature": 1.0, "top_p": 1.0, "top_k": None, "repetition_penalty": 1.0, "max_new_tokens": 200,
        "seeds": "one a row",
    }  # fmt: skip
