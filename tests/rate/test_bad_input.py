"""Every rule for inputs that cannot be used, each with the value that the user gave in the message."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from rate_oracle import GOLDEN, IDS, random_units

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import combine_draws, rate_effects

TEXTS = [[f"{stage} {i}" for i in range(7)] for stage in ("original", "rewrite", "again")]


def golden(**changes):
    return rate_effects(**{**GOLDEN, "ids": IDS, **changes})


def changed(name, place, value):
    return {name: [value if i == place else x for i, x in enumerate(GOLDEN[name])]}


class TestShape:
    @pytest.mark.parametrize("name", ["r_orig", "r_rw", "r_rw2", "ids", "cluster", "incomplete"])
    def test_lengths_differ(self, name):
        with pytest.raises(DataError, match=rf"{name} has 2 values, but w has 7"):
            golden(**{name: [1, 2]})

    def test_lengths_of_columns_differ(self):
        with pytest.raises(DataError, match=r"texts\[1\] has 1 values, but w has 7"):
            golden(texts=(TEXTS[0], ["x"], TEXTS[2]))
        with pytest.raises(DataError, match=r"labels\[1\] has 3 values, but w has 7"):
            golden(labels=([0] * 7, [1] * 3))
        with pytest.raises(
            DataError, match="texts holds 2 columns; expected 3, one for each of original, rewrite, rewrite2"
        ):
            golden(texts=TEXTS[:2])
        with pytest.raises(DataError, match="labels holds 1 columns; expected 2, one for each of rewrite, rewrite2"):
            golden(labels=[[0] * 7])

    @pytest.mark.parametrize("empty", [[], np.zeros(0), torch.zeros(0)])
    def test_empty(self, empty):
        with pytest.raises(DataError, match="w is empty; expected one label a unit"):
            rate_effects(empty, empty, empty, empty)

    @pytest.mark.parametrize("name", ["w", "r_orig", "r_rw", "r_rw2"])
    @pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
    def test_two_axes(self, name, kind):
        with pytest.raises(DataError, match=rf"{name} is an array of shape \(7, 2\); expected one axis"):
            golden(**{name: kind([[0.0, 1.0]] * 7)})

    @pytest.mark.parametrize("value", [3.0, torch.tensor(1.0), None, "words"])
    def test_a_single_value(self, value):
        with pytest.raises(DataError, match="r_rw is a single value; expected one axis, one value a unit"):
            golden(r_rw=value)

    @pytest.mark.parametrize("name", ["ids", "cluster"])
    @pytest.mark.parametrize("value", [5, torch.tensor(3)])
    def test_no_column(self, name, value):
        with pytest.raises(DataError, match=rf"{name} is {re.escape(repr(value))}; expected a list, array or tensor"):
            golden(**{name: value})

    def test_ragged(self):
        with pytest.raises(DataError, match=r"r_rw\[1\] is \[1, 2\], which is no real number"):
            golden(r_rw=[0.5, [1, 2], 1, 1, 1, 1, [3]])


class TestLabels:
    @pytest.mark.parametrize(
        ("value", "shown"), [(2, "2.0"), (0.5, "0.5"), (-1, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf")]
    )
    def test_neither_0_nor_1(self, value, shown):
        with pytest.raises(DataError, match=rf"w\[3\] is {shown}; expected 0 or 1 .* 1 of 7 labels .* binary first"):
            golden(**changed("w", 3, value))

    @pytest.mark.parametrize("value", ["1", "positive", b"1", {}])
    def test_no_number(self, value):
        with pytest.raises(DataError, match=rf"w\[2\] is {value!r}, which is no real number"):
            golden(**changed("w", 2, value))

    def test_graded_attribute(self):
        with pytest.raises(DataError, match=r"w\[0\] is 3.0; .* 5 of 7 labels are neither"):
            golden(w=[3, 4, 2, 0, 1, 2, 2])

    def test_unlabelled_units_are_dropped_and_counted(self):
        found = golden(w=[1, 1, 1, 0, 0, None, 0])
        assert found.counts.dropped == {"unlabelled": 1}
        assert found.counts.dropped_by_arm == {"w1": {}, "w0": {}}
        assert found.ids == ("t1", "t2", "t3", "u1", "u2", "u4")
        rest = {name: [x for i, x in enumerate(column) if i != 5] for name, column in GOLDEN.items()}
        assert found.raw == rate_effects(**rest, ids=found.ids).raw

    def test_nothing_labelled(self):
        with pytest.raises(DataError, match="None of the 7 units can be used: 7 unlabelled"):
            golden(w=[None] * 7)


class TestIds:
    def test_twice(self):
        with pytest.raises(DataError, match="ids holds 't1', 'u2' more than once"):
            golden(ids=["t1", "u2", "t1", "u2", "x", "y", "t1"])

    def test_at_most_ten_are_listed(self):
        data = random_units(30)
        with pytest.raises(DataError, match=r"ids holds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 5 more more than once"):
            rate_effects(*data, ids=np.arange(30) % 15)

    @pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (True, "True"), (None, "None"), (("a",), r"\('a',\)")])
    def test_no_id(self, value, shown):
        with pytest.raises(DataError, match=rf"ids\[6\] is {shown}; expected integers or strings"):
            golden(ids=[*range(6), value])

    def test_no_cluster(self):
        with pytest.raises(DataError, match=r"cluster\[1\] is None; expected integers or strings"):
            golden(se="cluster", cluster=["a", None, "a", "b", "b", "c", "c"])


class TestMissing:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [("r_orig", "missing_original"), ("r_rw", "missing_rewrite"), ("r_rw2", "missing_rewrite2")],
    )
    def test_absent_rewards(self, name, reason):
        with pytest.raises(DataError, match=rf"1 of 7 units are incomplete \(1 {reason}\): 'u1'.*missing='drop'"):
            golden(**changed(name, 3, None))
        with pytest.warns(UserWarning, match=r"1 of 7 labelled units \(14.3%\) were left out"):
            found = golden(**changed(name, 3, None), missing="drop")
        assert found.counts.dropped == {reason: 1}
        assert found.counts.dropped_by_arm == {"w1": {}, "w0": {reason: 1}}
        assert (found.counts.given, found.counts.n, found.counts.n0) == (7, 6, 3)

    @pytest.mark.parametrize("name", ["r_orig", "r_rw", "r_rw2"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_rewards_that_are_not_finite(self, name, value, kind):
        column = {name: kind(changed(name, 0, value)[name])}
        with pytest.raises(DataError, match=r"1 of 7 units are incomplete \(1 nonfinite\): 't1'"):
            golden(**column)
        with pytest.warns(UserWarning, match="left out"):
            found = golden(**column, missing="drop")
        assert found.counts.dropped == {"nonfinite": 1}
        rest = {key: values[1:] for key, values in GOLDEN.items()}
        assert found.raw == rate_effects(**rest, ids=IDS[1:]).raw  # the whole unit is gone, from every estimator

    def test_a_unit_counts_once_by_its_first_reason(self):
        both = {**changed("r_rw", 3, None), **changed("r_rw2", 3, float("nan"))}
        with pytest.warns(UserWarning, match="left out"):
            assert golden(**both, missing="drop").counts.dropped == {"missing_rewrite": 1}

    @pytest.mark.parametrize("text", ["", "  \n", None])
    def test_empty_texts(self, text):
        texts = [list(column) for column in TEXTS]
        texts[1][4] = text
        with pytest.raises(DataError, match=r"\(1 missing_rewrite\): 'u2'"):
            golden(texts=texts)

    def test_reasons_of_the_caller(self):
        why = [None, "refused", None, None, "error", "refused", None]
        with pytest.raises(DataError, match=r"3 of 7 units are incomplete \(1 error, 2 refused\): 't2', 'u2', 'u3'"):
            golden(incomplete=why)
        with pytest.warns(UserWarning, match="left out"):
            found = golden(incomplete=why, missing="drop")
        assert found.counts.dropped == {"error": 1, "refused": 2}
        assert found.counts.dropped_by_arm == {"w1": {"refused": 1}, "w0": {"error": 1, "refused": 1}}

    def test_unlabelled_units_are_not_incomplete(self):
        with pytest.raises(DataError, match=r"1 of 7 units are incomplete \(1 nonfinite\): 't1'"):
            golden(w=[1, None, 1, 0, 0, 0, 0], **changed("r_rw", 0, float("nan")))

    def test_no_unit_left(self):
        with pytest.raises(DataError, match="None of the 7 units can be used: 7 nonfinite"):
            golden(r_rw=[float("nan")] * 7, missing="drop")

    def test_few_missing_units_in_both_arms_are_no_reason_to_warn(self):
        w, *rewards = random_units(400)
        rewards[1][[np.flatnonzero(w)[5], np.flatnonzero(~w)[5]]] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert rate_effects(w, *rewards, missing="drop").counts.dropped == {"nonfinite": 2}

    def test_arms_that_lose_different_shares_are_warned_of(self):
        w, *rewards = random_units(400)
        rewards[1][np.flatnonzero(w)[:8]] = np.nan
        with pytest.warns(UserWarning, match="left out") as caught:
            found = rate_effects(w, *rewards, missing="drop")
        share = 8 / (found.counts.n1 + 8)
        assert [str(one.message) for one in caught] == list(found.warnings)
        assert found.warnings == (
            f"{share:.1%} of the units with w=1 and 0.0% of those with w=0 were left out, so the rest may differ from "
            "the sample.",
        )


class TestIdentical:
    def same(self, *places):
        texts = [list(column) for column in TEXTS]
        for stage, place in places:
            texts[stage][place] = f" {texts[stage - 1][place]}\n"
        return texts

    def test_kept_counted_and_warned_of(self):
        with pytest.warns(
            UserWarning, match=r"1 of 3 units with w=1 \(33.3%\) have a rewrite that is the text it was made"
        ):
            found = golden(texts=self.same((1, 0)))
        assert found.counts.n == 7
        assert found.counts.identical == {"rewrite": {"w1": 1, "w0": 0}, "rewrite2": {"w1": 0, "w0": 0}}

    def test_a_round_trip_is_legal(self):
        texts = [TEXTS[0], TEXTS[1], TEXTS[0]]
        found = golden(texts=texts, identical="raise")
        assert found.counts.identical == {"rewrite": {"w1": 0, "w0": 0}, "rewrite2": {"w1": 0, "w0": 0}}

    def test_dropped(self):
        with pytest.warns(UserWarning, match="left out"):
            found = golden(texts=self.same((1, 0), (2, 4)), identical="drop")
        assert found.counts.dropped == {"identical_rewrite": 1, "identical_rewrite2": 1}
        assert found.ids == ("t2", "t3", "u1", "u3", "u4")

    def test_refused(self):
        with pytest.raises(
            DataError, match="2 of 7 units have a rewrite that is the text it was made from: 't1', 'u2'"
        ):
            golden(texts=self.same((1, 0), (2, 4)), identical="raise")

    @pytest.mark.parametrize("policy", ["drop", "raise"])
    def test_without_texts_there_is_nothing_to_compare(self, policy):
        with pytest.raises(
            RecipeError, match=f"identical='{policy}' compares the texts of a unit, but none were given"
        ):
            golden(identical=policy)
        assert golden().counts.identical is None


def test_rewrites_that_miss_their_target_are_counted_and_nothing_else():
    labels = ([0, 1, 0, 1, 1, None, 1], [1, 1, 0, 0, 1, 0, 0])
    found = golden(labels=labels)
    assert found.counts.non_compliant == {"rewrite": {"w1": 1, "w0": 0}, "rewrite2": {"w1": 1, "w0": 1}}
    assert found.raw == golden().raw
    with pytest.raises(DataError, match=r"labels\[0\]\[2\] is 7.0; expected 0 or 1"):
        golden(labels=([0, 1, 7, 1, 1, 1, 1], labels[1]))


class TestThinArms:
    @pytest.mark.parametrize(("value", "own", "other"), [(1, "att", "atu"), (0, "atu", "att")])
    def test_an_empty_arm(self, value, own, other):
        with pytest.warns(
            UserWarning, match=f"No unit has w={1 - value}, so {other.upper()}, ATE, the naive difference"
        ):
            found = golden(w=[value] * 7)
        for effects in (found.rate, found.single):
            assert np.isfinite([getattr(effects, own).value, getattr(effects, own).low]).all()
            for gone in (getattr(effects, other), effects.ate):
                assert np.isnan([gone.value, gone.se, gone.low, gone.high]).all()
        assert np.isnan([found.naive.value, found.naive.se, found.reward_std]).all()
        assert np.isnan(getattr(found.standardized.rate, own).value)
        assert found.to_dict()["raw"]["rate"]["ate"]["estimate"] is None

    @pytest.mark.parametrize("kind", ["paired", "stratified", "unpaired", "cluster"])
    def test_an_arm_of_one_unit(self, kind):
        cluster = list("abcdefg") if kind == "cluster" else None
        with pytest.warns(UserWarning, match="One unit has w=1, so ATT has neither an error nor an interval"):
            found = golden(w=[1, *[0] * 6], se=kind, cluster=cluster)
        assert found.rate.att.value == pytest.approx(1.5)
        assert np.isnan([found.rate.att.se, found.rate.att.low, found.rate.att.high]).all()
        assert np.isnan([found.naive.se, found.naive.low]).all()
        assert np.isfinite([found.rate.ate.value, found.rate.atu.se, found.naive.value]).all()
        assert np.isfinite(found.rate.ate.se) == (kind != "stratified")

    def test_one_unit_in_all(self):
        with pytest.warns(UserWarning, match="No unit has w=0"), pytest.warns(UserWarning, match="One unit has w=1"):
            found = rate_effects([1], [1.0], [0.5], [2.0])
        assert found.rate.att.value == 1.5
        assert np.isnan(found.rate.att.se)

    def test_no_spread_of_the_originals(self):
        with pytest.warns(UserWarning, match="standard deviation within arms is 0, so standardised effects are NaN"):
            found = golden(r_orig=[0.1] * 7)
        assert found.reward_std == 0
        assert np.isnan([found.standardized.rate.ate.value, found.standardized.naive.se]).all()
        assert found.rate.ate.value == pytest.approx(0.9285714286)

    @pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
    def test_a_spread_beyond_all_numbers(self):
        with pytest.warns(UserWarning, match="standard deviation within arms is inf, so standardised effects are NaN"):
            found = golden(r_orig=[1e200, -1e200, 0, 1, 0, 2, 1])
        assert np.isnan(found.standardized.rate.ate.value)
        assert found.rate.ate.value == pytest.approx(0.9285714286)


class TestDraws:
    def test_lengths(self):
        with pytest.raises(DataError, match="r_rw2 has 1 values, but ids has 2; expected one value a draw in each"):
            combine_draws(["a", "a"], [1, 1], None, [0.0, 1.0], [2.0])

    def test_labels_of_a_unit_differ(self):
        with pytest.raises(DataError, match="w differs between the draws of 'b'; a unit has one w"):
            combine_draws(["a", "b", "b"], [1, 0, 1], None, [0.0, 1.0, 1.0], [2.0, 1.0, 1.0])

    def test_clusters_of_a_unit_differ(self):
        with pytest.raises(DataError, match="cluster differs between the draws of 7"):
            combine_draws([7, 7], [1, 1], None, [0.0, 1.0], [2.0, 1.0], cluster=["p", "q"])
