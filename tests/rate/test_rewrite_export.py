from __future__ import annotations

import json

import pytest
from rewriting import ATTR, Counting, store_of, units

from lightning_interp.errors import DataError
from lightning_interp.models.data.rows import read_rows
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.export import export_records, export_units, to_dataset, unit_rows
from lightning_interp.rate.rewriting.records import RewriteResult, Unit
from lightning_interp.rate.rewriting.store import RewriteStore


@pytest.fixture
def store(tmp_path):
    """One complete unit of each arm, one refused, one whose second pass is missing, one unlabelled."""
    given = [*units(3), Unit(id="x", text="x", w=None), Unit(id="late", text="late", w=1)]
    store = RewriteStore.create(tmp_path / "s", given, attr=ATTR)
    answers = {("text 2", 1): RewriteResult(text="I won't.", status="refused"), ("late", 0): None}
    RewriteRun(store, Counting(answers=answers), attr=ATTR, max_calls=6).run()
    return store


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_unit_with_its_state(store, tmp_path):
    rows = lines(export_units(store, tmp_path / "units.jsonl", attr=ATTR))
    assert rows == list(unit_rows(store, ATTR))
    assert rows[0] == {
        "id": "u0", "attr": ATTR, "draw": 0, "w": 0, "cluster": None, "prompt": "prompt 0", "original": "text 0",
        "rewrite": "[1.0] text 0", "rewrite2": "[0.0] text 0", "status": "ok",
    }  # fmt: skip
    assert [(row["id"], row["status"]) for row in rows] == [
        ("u0", "ok"), ("u1", "ok"), ("u2", "rewrite_refused"), ("x", "unlabelled"), ("late", "rewrite2_absent"),
    ]  # fmt: skip
    assert rows[2]["rewrite"] is None  # a refusal is no rewrite
    assert rows[4]["rewrite"] == "[0.0] late"


def test_draws_and_third_rewrites(tmp_path):
    store = store_of(tmp_path, 1)
    RewriteRun(store, Counting(), attr=ATTR, draws=2, passes=3).run()
    rows = list(unit_rows(store, ATTR, draws=3, passes=3))
    assert [(row["draw"], row["rewrite3"], row["status"]) for row in rows] == [
        (0, "[1.0] text 0", "ok"), (1, "[1.1] text 0", "ok"), (2, None, "rewrite_absent"),
    ]  # fmt: skip


def test_records_without_circumstances(store, tmp_path):
    rows = lines(export_records(store, tmp_path / "records.jsonl"))
    assert [row["key"] for row in rows] == sorted(record.key for record in store.records())
    assert len(rows) == 6
    assert all({"t", "id", "pass"}.isdisjoint(row) for row in rows)
    assert lines(export_records(store, tmp_path / "none.jsonl", attr="other")) == []


def test_two_units_that_meet_in_one_text_leave_no_trace_of_who_was_first(tmp_path):
    """Both first rewrites read the same; whichever is asked for first, the export is the same."""
    exports = []
    for order in (1, -1):
        given = [Unit(id="a", text="one", w=1), Unit(id="b", text="two", w=1)][::order]
        store = RewriteStore.create(tmp_path / str(order), given, attr=ATTR)
        answers = dict.fromkeys((("one", 0), ("two", 0)), RewriteResult(text="same"))
        RewriteRun(store, Counting(answers=answers), attr=ATTR).run()
        exports.append(export_records(store, tmp_path / f"{order}.jsonl").read_bytes())
    assert exports[0] == exports[1]
    assert exports[0].count(b"\n") == 3


def test_arrow(store, tmp_path):
    table = to_dataset(store, attr=ATTR)
    assert table.column_names == list(next(iter(unit_rows(store, ATTR))))
    assert table.features["w"].dtype == "int64"
    assert table[3]["w"] is None
    table.save_to_disk(tmp_path / "arrow")
    import datasets

    assert datasets.load_from_disk(str(tmp_path / "arrow")).to_list() == list(unit_rows(store, ATTR))
    table.to_json(tmp_path / "table.jsonl")
    assert lines(tmp_path / "table.jsonl") == list(unit_rows(store, ATTR))


@pytest.mark.filterwarnings("ignore:.*are left out:UserWarning")
def test_arrow_of_complete_units(store):
    triples = store.triples(ATTR, missing="drop")
    assert to_dataset(triples).to_list() == triples.rows()
    assert to_dataset(triples).num_rows == 2
    empty = store.triples(ATTR, missing="drop", draws=[7])
    assert to_dataset(empty).num_rows == 0


def test_the_table_can_be_trained_on(store, tmp_path):
    """Columns of the export are those of rows for training when they are called so."""
    table = to_dataset(store, attr=ATTR).rename_column("original", "completion")
    assert len(read_rows(table.select_columns(["prompt", "completion"]), name="units")) == 5


def test_an_unknown_attribute(store, tmp_path):
    for action in (
        lambda: list(unit_rows(store, "long")),
        lambda: to_dataset(store),
        lambda: to_dataset(store, attr="x"),
    ):
        with pytest.raises(DataError, match="has no attribute"):
            action()
    with pytest.raises(DataError, match="has no attribute 'long'"):
        export_units(store, tmp_path / "no.jsonl", attr="long")
    assert not (tmp_path / "no.jsonl").exists()
