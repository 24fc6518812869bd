from __future__ import annotations

import pytest

from lightning_interp.core.measure.statistics import proportion_interval
from lightning_interp.errors import DataError
from lightning_interp.generation.labellers import (
    Contains,
    Lexicon,
    StartsWithVowel,
)
from lightning_interp.rate.checks.compliance import compliance_rates, label_units
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit


class TestUnits:
    def test_one_a_text(self):
        assert label_units(["An idea", "The idea", "1"], StartsWithVowel()) == [
            Unit(id="0", text="An idea", w=1),
            Unit(id="1", text="The idea", w=0),
            Unit(id="2", text="1", w=None),
        ]
        more = {"prompts": ["p", "q"], "ids": ["a", "b"], "clusters": ["c", "c"]}
        assert label_units(["An", "The"], StartsWithVowel(), **more)[1] == Unit(
            id="b", text="The", w=0, prompt="q", cluster="c"
        )
        assert {unit.prompt for unit in label_units(["An", "The"], StartsWithVowel(), prompts="Write.")} == {"Write."}

    @pytest.mark.parametrize("name", ["prompts", "ids", "clusters"])
    def test_other_lengths(self, name):
        with pytest.raises(DataError, match=f"{name} has 1 values, but texts has 2"):
            label_units(["a", "b"], StartsWithVowel(), **{name: ["x"]})


class TestRates:
    def triples(self, draws=1):
        """Of four units with w=1, pass 1 fails for one; of two with w=0, pass 2 fails for one."""
        w = [1, 1, 1, 1, 0, 0]
        rewrite = ["no", "no", "no", "yes!", "yes!", "yes!"]
        back = ["yes!", "yes!", "yes!", "yes!", "no", "no!"]
        n = len(w)
        return RewriteTriples(
            attr="mark", ids=[str(i // draws) for i in range(n)], w=w, prompts=[""] * n, original=["x"] * n,
            rewrite=rewrite, rewrite2=back, rewrite3=None, draw=[i % draws for i in range(n)],
        )  # fmt: skip

    def test_each_pass_and_direction(self):
        rows = {(row.stage, row.target): row.share for row in compliance_rates(self.triples(), Contains("!"))}
        assert {key: (share.value, share.n) for key, share in rows.items()} == {
            ("rewrite", 0): (0.75, 4),
            ("rewrite", 1): (1.0, 2),
            ("rewrite2", 0): (0.5, 2),
            ("rewrite2", 1): (1.0, 4),
        }
        assert rows["rewrite", 0] == proportion_interval([1, 1, 1, 0])

    def test_draws_are_no_further_units(self):
        (row,) = [
            r for r in compliance_rates(self.triples(draws=2), Contains("!")) if (r.stage, r.target) == ("rewrite", 0)
        ]
        assert row.share == proportion_interval([1.0, 0.5])

    def test_what_cannot_be_told_is_counted_apart(self):
        rows = compliance_rates(self.triples(), Lexicon(frozenset({"yes"}), frozenset()))
        first = rows[0]
        assert (first.stage, first.target, first.share.value, first.share.n, first.unknown) == ("rewrite", 0, 0.0, 1, 3)
        assert first.to_dict()["unknown"] == 3
        assert first.to_dict()["value"] == 0.0

    def test_directions_that_do_not_occur_are_left_out(self):
        one = RewriteTriples(
            attr="m", ids=["a"], w=[1], prompts=[""], original=["a!"], rewrite=["a"], rewrite2=["a!"], draw=[0]
        )
        assert [(row.stage, row.target) for row in compliance_rates(one, Contains("!"))] == [
            ("rewrite", 0),
            ("rewrite2", 1),
        ]
