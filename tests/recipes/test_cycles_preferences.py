"""Recipes of chains of pairs: twins share all but where a cycle starts, and swapped pairs are the same texts."""

from __future__ import annotations

import math

import pytest
from chain_runs import configured, differing, killed, lines, outcome, phases, ran, sha, table

from lightning_interp.errors import RecipeError


@pytest.fixture(scope="module")
def contrast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrast") / "run"
    ran("dpo_contrast", folder, "--n_seed=2", "--lr=0.01", "--batch_size=2", "--controls=[swapped]")
    return folder


class TestContrast:
    def test_twins_share_the_first_model_prompts_and_first_answers(self, contrast):
        rows = {arm: lines(phases(contrast, f"{arm}-0", 1) / "mix/data.jsonl") for arm in ("main", "twin")}
        assert rows["main"] == rows["twin"], "written by the same model with the same random numbers"
        first = sha(phases(contrast, "start-002", 0) / "fit-sft/adapter.safetensors")
        assert sha(phases(contrast, "main-0", 1) / "fit-dpo/init_adapter.safetensors") == first
        assert sha(phases(contrast, "twin-0", 1) / "fit-dpo/init_adapter.safetensors") != first

    def test_each_cycle_begins_where_it_should(self, contrast):
        ends = [sha(phases(contrast, "main-0", cycle) / "fit-dpo/adapter.safetensors") for cycle in (1, 2)]
        begins = [
            sha(phases(contrast, f"{arm}-0", cycle) / "fit-dpo/init_adapter.safetensors")
            for arm in ("main", "twin") for cycle in (1, 2)
        ]  # fmt: skip
        assert begins[1] == ends[0]
        assert begins[2] == begins[3]
        asked = [[row["prompt"] for row in lines(phases(contrast, f"{arm}-0", 2) / "mix/data.jsonl")]
                 for arm in ("main", "twin")]  # fmt: skip
        assert asked[0] == asked[1]

    def test_every_training_begins_at_its_reference(self, contrast):
        for arm in ("main", "twin", "swapped"):
            for cycle in (1, 2):
                losses = lines(phases(contrast, f"{arm}-0", cycle) / "fit-dpo/metrics.jsonl")
                assert losses[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    def test_swapped_pairs_are_the_same_texts(self, contrast):
        same = [lines(phases(contrast, f"{arm}-0", 1) / "mix/data.jsonl") for arm in ("main", "swapped")]
        assert same[0] == same[1]
        logged = {row["arm"]: row for row in table(contrast, "training") if row["cycle"] == "1"}
        assert float(logged["DPO continual"]["chosen_reward"]) != float(
            logged["DPO continual, swapped"]["chosen_reward"]
        )

    def test_what_is_written_of_it(self, contrast):
        told = outcome(contrast)
        found = told["findings"]
        assert found[0].startswith("From the same first model, whose score of belief in luck is 0.00 [")
        assert "distinct-2" in found[0]
        assert any("DPO continual minus DPO reinit at cycle 2, paired" in one for one in found)
        assert any("Control DPO continual, swapped (chosen and rejected swapped)" in one for one in found)
        assert told["figures"][0] == "contrast"
        missing = next(one for one in told["caveats"] if one.startswith("Controls that were not run"))
        assert missing == "Controls that were not run: a chain without a seed, data written by the base."

    def test_it_has_both(self, tmp_path):
        with pytest.raises(RecipeError, match="init='reinit': cycles/dpo_contrast has both"):
            configured("dpo_contrast", tmp_path / "run", "--init=reinit")
        twice = configured("dpo_contrast", tmp_path / "run", "--controls=[reinit-twin,swapped]")
        assert [arm.key for arm in twice.arms()] == ["main", "twin", "swapped"]

    def test_the_figure_has_both_arms_in_each_panel(self):
        from lightning_interp.cycles import Chain, ChainReport, Checkpoint
        from lightning_interp_recipes.cycles._contrast import contrast_figure, distinct

        def evaluated(score, words=None):
            return Checkpoint.of({"scores": [[score, score + 2]], "coherence": [[90, 80]], "distinct_2": words})

        chains = [
            Chain(arm, [evaluated(score, 1 - score / 200) for score in scores], base=evaluated(3, 0.9))
            for arm, scores in {"DPO continual": (40, 60, 90), "DPO reinit": (40, 20, 10)}.items()
        ]
        arms = list(ChainReport(chains, resamples=20).arms.values())
        assert distinct(arms[0]) == [0.8, 0.7, 0.55]
        figure = contrast_figure(arms, title="it")
        for axis in figure.axes:
            assert {"DPO continual", "DPO reinit", "base"} <= set(axis.get_legend_handles_labels()[1])


@pytest.mark.slow
def test_a_killed_contrast_goes_on_to_the_same_bytes(tmp_path):
    how = ("--n_seed=2", "--cycles=2", "--n=2")
    ran("dpo_contrast", tmp_path / "whole", *how)
    killed(tmp_path / "run", "shard:1", *how, name="dpo_contrast")
    assert differing(tmp_path / "run", tmp_path / "whole") == []


def test_a_start_by_preferences_has_pairs_of_the_seed(tmp_path):
    folder = tmp_path / "run"
    settings = ("--start=dpo", "--n_seed=2", "--cycles=2", "--data_rule=mix", "--real_fraction=0.5")
    ran("dpo", folder, *settings, "--n=2", "--init=reinit")
    rows = lines(phases(folder, "start-002", 0) / "mix/data.jsonl")
    assert len(rows) == 2
    assert {(row["source"], row["rejected"]["parent"]) for row in rows} == {("seed", "base")}
    mixed = lines(phases(folder, "main-0", 1) / "mix/data.jsonl")
    assert sorted(row["source"] for row in mixed) == ["own", "own", "seed-mix"]
    assert all(row["chosen"]["token_ids"] for row in mixed)
