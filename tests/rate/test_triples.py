from __future__ import annotations

import json
import random
import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewriting import ATTR, Counting, rewritten, store_of, units

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import TripleScores, read_own, read_triples, score_triples, write_triples
from lightning_interp.rate.estimators.triples import RewriteTriples, same_text
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import RewriteResult, Unit
from lightning_interp.rate.rewriting.store import RewriteStore

REFUSED = RewriteResult(text=None, status="refused")
SAME_FIRST = {("text 1", 0): RewriteResult(text="  text\n 1")}
SAME_SECOND = {("[1.0] text 2", 0): RewriteResult(text="[1.0]  text 2")}
FAILED = RewriteResult(text=None, status="error", error="no")


def filled(folder, given=None, *, passes=2, draws=1, **rewriter):
    store = RewriteStore.create(folder, units() if given is None else given, attr=ATTR)
    RewriteRun(store, Counting(**rewriter), attr=ATTR, passes=passes, draws=draws, give_up_after=None).run()
    return store


def quiet(store, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return store.triples(ATTR, **how)


class TestComplete:
    def test_texts_of_every_stage(self, tmp_path):
        triples = filled(tmp_path).triples(ATTR)
        assert triples.ids == [f"u{i}" for i in range(6)]
        assert triples.w == [0, 1, 0, 1, 0, 1]
        assert triples.prompts == [unit.prompt for unit in units()]
        assert triples.original == [f"text {i}" for i in range(6)]
        assert triples.rewrite == [f"[{1 - i % 2}.0] text {i}" for i in range(6)]
        assert triples.rewrite2 == [f"[{i % 2}.0] text {i}" for i in range(6)]
        assert (triples.rewrite3, triples.cluster, triples.draw, len(triples)) == (None, None, [0] * 6, 6)
        assert (triples.dropped, triples.dropped_ids) == ({}, {})
        assert triples.targets("original") == triples.w == triples.targets("rewrite2")
        assert triples.targets("rewrite") == [1 - w for w in triples.w]

    def test_third_rewrites(self, tmp_path):
        store = filled(tmp_path, passes=3)
        triples = store.triples(ATTR, passes=3)
        assert triples.stages == ("original", "rewrite", "rewrite2", "rewrite3")
        assert triples.texts("rewrite3") == triples.rewrite
        assert triples.targets("rewrite3") == triples.targets("rewrite")
        assert store.triples(ATTR).rewrite3 is None

    def test_draws_are_rows_of_their_own(self, tmp_path):
        store = filled(tmp_path, draws=3)
        triples = store.triples(ATTR)
        assert triples.ids[:4] == ["u0", "u0", "u0", "u1"]
        assert triples.draw == [0, 1, 2] * 6
        assert triples.rewrite2[:3] == ["[0.0] text 0", "[0.1] text 0", "[0.2] text 0"]
        assert store.triples(ATTR, draws=[1]).rewrite == [rewritten(f"text {i}", 1 - i % 2, 1) for i in range(6)]

    def test_clusters(self, tmp_path):
        given = [Unit(id=str(i), text=f"t{i}", w=i % 2, cluster=f"c{i // 2}") for i in range(4)]
        assert filled(tmp_path, given).triples(ATTR).cluster == ["c0", "c0", "c1", "c1"]

    def test_equal_texts_share_a_rewrite(self, tmp_path):
        given = [Unit(id=str(i), text="same", w=1) for i in range(3)]
        rewriter = Counting()
        store = RewriteStore.create(tmp_path, given, attr=ATTR)
        RewriteRun(store, rewriter, attr=ATTR).run()
        assert sum(rewriter.asked.values()) == 2
        assert store.triples(ATTR).rewrite == ["[0.0] same"] * 3

    def test_rows(self, tmp_path):
        rows = filled(tmp_path, passes=3).triples(ATTR, passes=3).rows()
        assert rows[1] == {
            "id": "u1", "attr": ATTR, "draw": 0, "w": 1, "cluster": None, "prompt": "prompt 1", "original": "text 1",
            "rewrite": "[0.0] text 1", "rewrite2": "[1.0] text 1", "rewrite3": "[0.0] text 1",
        }  # fmt: skip

    def test_an_unknown_stage_lists_those_there(self, tmp_path):
        with pytest.raises(DataError, match="no stage 'rewrite3' of 'mark'; these are: original, rewrite, rewrite2"):
            filled(tmp_path).triples(ATTR).texts("rewrite3")

    def test_a_changed_first_rewrite_invalidates_the_second(self, tmp_path):
        """The source of a pass is the text of the one before it."""
        store = filled(tmp_path, units(1))
        path = tmp_path / "rewrites.jsonl"
        first, second = path.read_text().splitlines()
        path.write_text(first.replace("[1.0] text 0", "[1.0] edited") + "\n" + second + "\n")
        with pytest.raises(DataError, match="1 with 'rewrite2_absent'"):
            RewriteStore.open(tmp_path).triples(ATTR)
        again = Counting()
        RewriteRun(RewriteStore.open(tmp_path), again, attr=ATTR).run()
        assert list(again.asked) == [("[1.0] edited", "prompt 0", 0, 0)]
        store.reload()
        assert store.triples(ATTR).rewrite2 == ["[0.0] edited"]


MISSING = {
    "rewrite_refused": ("text 1", 0, REFUSED),
    "rewrite2_refused": ("[0.0] text 1", 1, REFUSED),
    "rewrite_error": ("text 1", 0, FAILED),
    "rewrite2_error": ("[0.0] text 1", 1, FAILED),
    "rewrite_empty": ("text 1", 0, RewriteResult(text="")),
    "rewrite2_empty": ("[0.0] text 1", 1, RewriteResult(text=" \n\t")),
    "rewrite_truncated": ("text 1", 0, RewriteResult(text="tex", status="truncated")),
    "rewrite2_truncated": ("[0.0] text 1", 1, RewriteResult(text="tex", status="truncated")),
}


class TestMissing:
    @pytest.mark.parametrize("reason", MISSING)
    def test_an_incomplete_unit(self, tmp_path, reason):
        text, target, result = MISSING[reason]
        store = filled(tmp_path, answers={(text, target): result})
        with pytest.raises(DataError, match=rf"'mark': not every unit can be used: 1 with '{reason}'.*ids: 'u1'\."):
            store.triples(ATTR)
        triples = quiet(store, missing="drop")
        assert triples.ids == ["u0", "u2", "u3", "u4", "u5"]
        assert triples.dropped == {reason: {"w1": 1}}
        assert triples.dropped_ids == {reason: ["u1"]}
        assert len(triples.original) == len(triples.rewrite) == len(triples.rewrite2) == len(triples.draw) == 5

    def test_absent_passes(self, tmp_path):
        store = store_of(tmp_path)
        RewriteRun(store, Counting(), attr=ATTR, max_calls=3).run()  # u0 whole, half of u1
        with pytest.raises(DataError, match=r"1 with 'rewrite2_absent', 4 with 'rewrite_absent'.*'u1', 'u2', "):
            store.triples(ATTR)
        assert quiet(store, missing="drop").dropped == {
            "rewrite2_absent": {"w1": 1},
            "rewrite_absent": {"w0": 2, "w1": 2},
        }

    def test_ten_ids_are_listed(self, tmp_path):
        with pytest.raises(DataError, match=r"25 with 'rewrite_absent'\. Their ids: 'u0', .*'u9' and 15 more\."):
            store_of(tmp_path, 25).triples(ATTR)

    def test_one_missing_draw_takes_the_unit_with_it(self, tmp_path):
        store = filled(tmp_path, draws=3, answers={("[0.2] text 1", 1): REFUSED})
        assert "u1" not in quiet(store, missing="drop").ids
        assert quiet(store, missing="drop").dropped == {"rewrite2_refused": {"w1": 1}}
        assert store.triples(ATTR, draws=[0, 1]).ids.count("u1") == 2

    def test_unlabelled_units_are_left_out_and_counted(self, tmp_path):
        given = [*units(4), Unit(id="nobody knows", text="x", w=None)]
        store = filled(tmp_path, given)
        triples = store.triples(ATTR)  # nobody can supply a label, so missing="raise" is no help
        assert triples.dropped == {"unlabelled": {"none": 1}}
        assert triples.dropped_ids == {"unlabelled": ["nobody knows"]}
        assert len(triples) == 4

    def test_everything_may_be_missing(self, tmp_path):
        triples = quiet(store_of(tmp_path), missing="drop")
        assert len(triples) == 0
        assert triples.cluster is None
        assert triples.dropped == {"rewrite_absent": {"w0": 3, "w1": 3}}

    @pytest.mark.parametrize(
        ("lost", "warned"),
        [({}, None), ({0: 2, 1: 2}, None), ({0: 3, 1: 3}, "6 of 100 labelled units are left out"),
         ({1: 1}, None), ({1: 2}, "0.0% of w0")],
    )  # fmt: skip
    def test_a_warning_where_many_are_dropped_or_more_of_one_arm(self, tmp_path, lost, warned):
        """Above 5 % of all, or a difference of the arms above 2 points: 2 of 50 are 4 points, 1 of 50 is 2."""
        answers = {(f"text {2 * k + w}", 1 - w): REFUSED for w, count in lost.items() for k in range(count)}
        store = filled(tmp_path, units(100), answers=answers)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store.triples(ATTR, missing="drop")
        assert bool(caught) == bool(warned)
        assert not warned or warned in str(caught[0].message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"missing": "skip"}, "missing='skip'; expected 'raise' or 'drop'"),
            ({"identical": "skip"}, "identical='skip'; expected 'keep', 'drop' or 'raise'"),
            ({"passes": 1}, "passes=1; expected 2, or 3"),
            ({"draws": []}, "draws is empty"),
        ],
    )
    def test_wrong_options(self, tmp_path, options, message):
        with pytest.raises(RecipeError, match=message):
            filled(tmp_path).triples(ATTR, **options)


class TestIdentical:
    def test_they_are_kept_counted_and_warned_of(self, tmp_path):
        store = filled(tmp_path, answers={**SAME_FIRST, **SAME_SECOND})
        with pytest.warns(UserWarning, match=r"in 1 of 6 rows 'rewrite2' says the same .*\(0 in arm w1, 1 in arm w0\)"):
            triples = store.triples(ATTR)
        assert len(triples) == 6
        assert triples.identical() == {"rewrite": {"w1": 1, "w0": 0}, "rewrite2": {"w1": 0, "w0": 1}}

    def test_no_warning_up_to_five_percent(self, tmp_path, recwarn):
        filled(tmp_path, units(20), answers=SAME_FIRST).triples(ATTR)
        assert not recwarn

    def test_they_may_be_dropped_or_refused(self, tmp_path):
        store = filled(tmp_path, answers={**SAME_FIRST, **SAME_SECOND})
        triples = quiet(store, identical="drop")
        assert triples.ids == ["u0", "u3", "u4", "u5"]
        assert triples.dropped == {"identical_rewrite": {"w1": 1}, "identical_rewrite2": {"w0": 1}}
        with pytest.raises(
            DataError, match=r"1 with 'identical_rewrite', 1 with 'identical_rewrite2'.*'u1', 'u2'.*identical='drop'"
        ):
            store.triples(ATTR, identical="raise")

    def test_a_perfect_round_trip_is_no_identical_rewrite(self, tmp_path):
        store = filled(tmp_path, units(1), answers={("[1.0] text 0", 0): RewriteResult(text="text 0")})
        triples = store.triples(ATTR, identical="raise")
        assert triples.rewrite2 == triples.original

    def test_a_missing_text_is_told_before_an_identical_one(self, tmp_path):
        answers = {**SAME_FIRST, ("  text\n 1", 1): REFUSED}
        store = filled(tmp_path, answers=answers)
        assert quiet(store, missing="drop", identical="raise").dropped == {"rewrite2_refused": {"w1": 1}}


class TestSameText:
    @pytest.mark.parametrize(
        ("a", "b", "same"),
        [
            ("a b", " a\t\nb ", True),
            ("é", "e\u0301", True),
            ("a\u00a0b", "a b", True),
            ("a b", "ab", False),
            ("A", "a", False),
            ("ﬁ", "fi", False),
            ("", " \n", True),
        ],
    )
    def test_spaces_and_composition_do_not_count(self, a, b, same):
        assert same_text(a, b) is same
        assert same_text(b, a) is same

    @given(st.text(), st.integers())
    def test_any_text_is_itself_however_it_is_spaced(self, text, seed):
        spaces = random.Random(seed)  # noqa: S311
        other = "".join(spaces.choice([" ", "\n", "\t ", "  "]) if one.isspace() else one for one in text)
        assert same_text(text, unicodedata.normalize("NFD", other))


def test_a_table_without_rows():
    empty = RewriteTriples(attr="a", ids=[], w=[], prompts=[], original=[], rewrite=[], rewrite2=[], draw=[])
    assert empty.rows() == []
    assert empty.identical() == {"rewrite": {"w1": 0, "w0": 0}, "rewrite2": {"w1": 0, "w0": 0}}


def test_some_rows_keep_every_column_together():
    names = "abcd"
    triples = RewriteTriples(
        attr="x", ids=[*names], w=[1, 0, 1, 0], prompts=[f"p{n}" for n in names], draw=[0, 0, 1, 0],
        **{stage: [f"{stage} {n}" for n in names] for stage in ("original", "rewrite", "rewrite2", "rewrite3")},
        cluster=[*"uuvv"], dropped={"unlabelled": {"none": 2}},
    )  # fmt: skip
    few = triples.select([3, 0])
    assert few.rows() == [triples.rows()[3], triples.rows()[0]]
    assert few.dropped == triples.dropped
    assert triples.select(range(4)) == triples == triples.first(0) == triples.first(9)
    assert triples.first(2).rows() == triples.rows()[:2]
    assert len(triples.select([])) == 0


def table(**columns):
    plain = {
        "attr": "x", "ids": ["7", "b"], "w": [1, 0], "prompts": ["", "p"], "draw": [0, 1],
        "original": ["NA", "a,b\r\nc"], "rewrite": ['say "hi"', "\u2028 null"], "rewrite2": ["1.0", ""],
    }  # fmt: skip
    return RewriteTriples(**plain | columns)


@pytest.mark.parametrize("kind", ["", ".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"cluster": ["1", "1"], "rewrite3": ["x", "y"]},
        {"reward": {"original": [0.1, 1e-17], "rewrite": [1.0, -2.0], "rewrite2": [3.0, float("nan")]}},
    ],
)
def test_files_of_every_kind_hold_the_same_units(tmp_path, kind, columns):
    units = table(**columns)
    path = write_triples(tmp_path, units, name=f"mine{kind}")
    assert path.name == f"mine{kind or '.json'}"
    again = read_triples(path)
    assert repr(again) == repr(units)  # NaN is not equal to itself
    assert again.to_frame().to_dict("list").keys() == units.rows()[0].keys()


def test_a_file_of_units_is_a_users_own_file_too(tmp_path):
    units = table(rewrite2=["1.0", "z"], reward={"original": [1.0, 2.0], "rewrite": [3.0, 4.0]})
    path = write_triples(tmp_path, units, name="mine.jsonl")
    own = read_own(path)
    assert own.triples("x").rewrite2 == units.rewrite2
    assert own.rewards["columns"] == {"7": {"original": 1.0, "rewrite": 3.0}, "b": {"original": 2.0, "rewrite": 4.0}}
    path.write_text(path.read_text().replace('"attr"', '"kind"').replace('"draw"', '"number"'))
    assert read_triples(path).attr == "attribute"


def test_what_is_left_out_is_kept_in_json_and_a_file_of_before_is_read(tmp_path):
    units = table(dropped={"unlabelled": {"none": 1}}, dropped_ids={"unlabelled": ["c"]})
    path = write_triples(tmp_path, units)
    assert read_triples(path) == units
    assert "reward" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"draw": [0]}, r"'draw' of 'x' has 1 values, but ids has 2; expected one a row"),
        ({"reward": {"rewrite": [1.0]}}, r"'reward_rewrite' of 'x' has 1 values"),
        ({"w": [1, 2]}, r"'w' of unit 'b' of 'x' is 2; expected 0 or 1"),
        ({"w": [None, 1]}, r"'w' of unit '7' of 'x' is None; expected 0 or 1"),
        ({"rewrite": ["a", None]}, r"'rewrite' of unit 'b' of 'x' is None; expected a text"),
    ],
)
def test_columns_are_checked(columns, message):
    with pytest.raises(DataError, match=message):
        table(**columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"rows has no rows; expected rows with id, w and original, rewrite, rewrite2"),
        ([{"id": "a", "w": 1, "original": "x", "rewrite": "y"}], r"rows has no rewrite2;"),
        ([{**r, "attr": n} for r, n in zip(table().rows(), "ab", strict=True)], r"rows has units of 2 attributes"),
    ],
)
def test_rows_that_are_no_complete_units(rows, message):
    with pytest.raises(DataError, match=message):
        RewriteTriples.from_rows(rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "{}"), ("a.json", "[1]"), ("a.csv", "id,w\n1,x\n"), ("a.parquet", "no"), ("gone.csv", None)],
)
def test_files_that_hold_no_complete_units(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_triples(tmp_path / name)


def test_rewards_go_with_their_rows():
    units = table(rewrite2=["1.0", "z"])
    with pytest.raises(DataError, match=r"The units of 'x' have no rewards. Add them by triples.with_scores"):
        TripleScores.of(units)
    with pytest.raises(DataError, match=r"There is no stage 'rewrite3' of 'x'"):
        units.with_scores({"rewrite3": [1.0, 2.0]})
    scores = score_triples(lambda prompts, texts: [len(text) for text in texts], units)
    scored = units.with_scores(scores.reward)
    assert TripleScores.of(scored).reward["original"].tolist() == [2.0, 6.0]
    few = scored.select([1])
    assert few.reward == {stage: [float(len(units.texts(stage)[1]))] for stage in units.stages}
    assert TripleScores.of(scored).effects(scored).rate.ate.value == scores.effects(units).rate.ate.value
