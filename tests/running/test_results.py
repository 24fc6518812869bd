import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.running.results import (
    check_output_name,
    read_run,
    read_table,
    write_figure,
    write_results,
    write_table,
)

cells = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(
        lambda text: read_back(text) == text
    )
)


def read_back(text):
    """Whether a text cell stays a text: those that look like a number or a word of ours become that."""
    from lightning_interp.running.results import _value

    return _value(text)


@given(st.lists(st.fixed_dictionaries({"a": cells, "b c": cells}), max_size=4))
def test_tables_read_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(path, rows)
    assert read_table(path) == rows


@pytest.mark.parametrize("text", ["\r", "a\rb", "\r\n", "\n", "a\n\rb"])
def test_every_kind_of_line_end_in_a_cell_reads_back(tmp_path, text):
    write_table(tmp_path / "t.csv", [{"a": None, "b": text}, {"a": text, "b": 1}])
    assert read_table(tmp_path / "t.csv") == [{"a": None, "b": text}, {"a": text, "b": 1}]


def test_tables_are_plain_csv_for_others(tmp_path):
    rows = [{"plan": 'a "quoted", one', "p": 1 / 3}, {"plan": "two\nlines", "n": [1, 2], "p": math.nan}]
    write_table(tmp_path / "t.csv", rows)
    code = "import csv, sys; print(list(csv.reader(open(sys.argv[1], newline=''))))"
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "t.csv"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(
        [["plan", "p", "n"], ['a "quoted", one', "0.3333333333333333", ""], ["two\nlines", "nan", "[1, 2]"]]
    )
    assert math.isnan(read_table(tmp_path / "t.csv")[1]["p"])


def test_a_long_text_in_a_cell_reads_back(tmp_path):
    write_table(tmp_path / "t.csv", [{"text": "x" * 300_000}])
    assert len(read_table(tmp_path / "t.csv")[0]["text"]) == 300_000


def test_damaged_and_missing_tables_are_named(tmp_path):
    with pytest.raises(ManifestError, match=r"Cannot read the table '.*/gone\.csv'.*start the run again"):
        read_table(tmp_path / "gone.csv")
    (tmp_path / "bad.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(ManifestError, match=r"bad\.csv"):
        read_table(tmp_path / "bad.csv")
    (tmp_path / "wide.csv").write_text("a\n1,2,3\n")
    with pytest.raises(ManifestError, match=r"wide\.csv': a row has more cells than the header: \['2', '3'\]"):
        read_table(tmp_path / "wide.csv")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a b", "x\n"])
def test_names_that_are_no_file_names_are_refused(name):
    with pytest.raises(RecipeError, match="cannot name a table"):
        check_output_name(name, "table")


def test_figures_are_png_or_refused(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    write_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_figure(tmp_path / "b.png", tmp_path / "a.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(RecipeError, match=r"Figure 'c' is 3: expected a matplotlib figure"):
        write_figure(tmp_path / "c.png", 3)
    with pytest.raises(RecipeError, match=r"Figure 'c' is '/nowhere\.png': expected"):
        write_figure(tmp_path / "c.png", "/nowhere.png")
    text = atomic_write_text(tmp_path / "text.png", "no picture")
    with pytest.raises(RecipeError, match=r"Figure 'c': '.*text\.png' is no PNG file"):
        write_figure(tmp_path / "c.png", text)


def test_metrics_are_strict_json(tmp_path):
    write_results(tmp_path, metrics={"a": math.nan, "b": {"c": 1}}, tables={}, figures={})
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail) == {"a": None, "b": {"c": 1}}
    with pytest.raises(DataError, match=r"table 't'\[0\]\.x as JSON"):
        write_results(tmp_path, metrics={}, tables={"t": [{"x": object()}]}, figures={})


def test_a_run_is_read_before_and_after_it_is_finished(tmp_path):
    with RunManifest.open(tmp_path, config={}, name="demo") as run:
        before = read_run(tmp_path)
        assert (before.status, before.tables, before.outcome) == ("running", {}, {})
        write_results(tmp_path, metrics={"m": 1}, tables={"z": [{"a": 1}], "b": []}, figures={})
        run.record_outcome({"tables": ["z", "b"], "figures": [], "summary": "z"})
    after = read_run(tmp_path)
    assert (after.status, after.metrics, after.tables) == ("finished", {"m": 1}, {"z": [{"a": 1}], "b": []})
    assert after.seconds >= 0
    assert after.children == {}
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ManifestError, match=r"metrics\.json' is no valid JSON"):
        read_run(tmp_path)


def test_children_and_results_of_phases_are_read(tmp_path):
    with RunManifest.open(tmp_path, config={}, name="demo") as run:
        run.phase("texts", lambda folder: {"n": (1, 2)})
        with run.child("a", config={}) as child:
            child.phase("fit", lambda folder: 0.5)
            with child.child("inner", config={}) as inner, pytest.raises(ZeroDivisionError):
                inner.phase("fit", lambda folder: 1 / 0)
        child = run.child("b", config={})
        assert read_run(tmp_path).children["b"].state == "running"
        child.close("failed", "no more disk")
    found = read_run(tmp_path)
    assert found.result("texts") == {"n": [1, 2]}
    with pytest.raises(ManifestError, match=r"has no phase 'text'; it has texts\."):
        found.result("text")
    assert {name: (child.state, child.message) for name, child in found.children.items()} == {
        "a": ("finished", None),
        "b": ("failed", "no more disk"),
    }
    assert found.children["a"].result("fit") == 0.5
    assert found.children["a"].children["inner"].result("fit") is None
