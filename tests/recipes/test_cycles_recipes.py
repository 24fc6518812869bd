"""Recipes of chains: arms share their first model and prompts, controls are what they say, kills lose nothing."""

from __future__ import annotations

import json
import shutil

import pytest
from chain_runs import configured, differing, killed, lines, outcome, phases, ran, refused, sha, table, written

from lightning_interp import cli
from lightning_interp.errors import RecipeError
from lightning_interp_recipes.cycles import _material
from lightning_interp_recipes.cycles._persona import QUESTIONS, pool_prompts

ARMS = {"main": "SFT reinit", "no-seed": "SFT reinit, no-seed", "shuffled": "SFT reinit, shuffled"}


CONTROLLED = ("--n_seed=2", "--n=2", "--controls=[no-seed,shuffled,accumulate]")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlled") / "run"
    ran("sft", folder, *CONTROLLED)
    return folder


class TestArms:
    def test_all_begin_at_one_first_model(self, controlled):
        first = sha(phases(controlled, "start-002", 0) / "fit-sft/adapter.safetensors")
        taken = [sha(phases(controlled, f"{arm}-0", 0) / "take/adapter.safetensors") for arm in ("main", "shuffled")]
        assert taken == [first, first]

    def test_every_reinit_cycle_and_the_chain_without_a_seed_begin_at_the_same_fresh_adapter(self, controlled):
        fresh = {
            sha(phases(controlled, f"{arm}-0", cycle) / "fit-sft/init_adapter.safetensors")
            for arm in ("main", "no-seed", "shuffled") for cycle in (1, 2)
        }  # fmt: skip
        assert fresh == {sha(phases(controlled, "no-seed-0", 0) / "fit-sft/adapter.safetensors")}
        assert fresh == {sha(phases(controlled, "start-002", 0) / "fit-sft/init_adapter.safetensors")}

    def test_the_base_writes_for_the_shuffled_arm_what_a_chain_without_a_seed_writes(self, controlled):
        written = {arm: lines(phases(controlled, f"{arm}-0", 1) / "mix/data.jsonl") for arm in ARMS}
        asked = {arm: [row["prompt"] for row in rows] for arm, rows in written.items()}
        assert asked["main"] == asked["no-seed"] == asked["shuffled"]
        texts = {arm: [row["token_ids"] for row in rows] for arm, rows in written.items()}
        assert texts["no-seed"] == texts["shuffled"] != texts["main"]
        assert {row["source"] for row in written["shuffled"]} == {"base"}
        later = [lines(phases(controlled, f"{arm}-0", 2) / "mix/data.jsonl") for arm in ("no-seed", "shuffled")]
        assert [row["token_ids"] for row in later[0]] != [row["token_ids"] for row in later[1]]

    def test_accumulated_data_hold_seed_and_all_cycles(self, controlled):
        rows = lines(phases(controlled, "accumulate-0", 2) / "mix/data.jsonl")
        assert sorted(row["source"] for row in rows) == ["own"] * 4 + ["seed"] * 2

    def test_what_is_written_of_them(self, controlled):
        told = outcome(controlled)
        assert (
            told["question"]
            == "Finetuned on its own answers, reinit each cycle: does belief in luck grow, hold or fade?"
        )
        found = " ".join(told["findings"])
        assert "Control SFT reinit, no-seed (a chain without a seed): the score changes by" in found
        assert "SFT reinit minus SFT reinit, shuffled at cycle 2, paired" in found
        assert "SFT reinit: a second evaluation of the model of cycle 0" in found
        assert "No class: that needs five cycles" in found
        said = " ".join(told["caveats"])
        assert "hardly above the base's" in said
        assert "Controls that were not run" not in said, "those of pairs and of continual chains are no lack"
        assert [row["arm"] for row in table(controlled, "scores")] == [*ARMS.values(), "SFT reinit, accumulate"]
        assert "dose" not in told["tables"]

    def test_replies_to_the_first_question_are_shown_by_cycle(self, controlled):
        rows = [row for row in table(controlled, "replies") if row["arm"] == "SFT reinit"]
        assert [row["cycle"] for row in rows] == ["0", "1", "2"]
        assert {row["question"] for row in rows} == {QUESTIONS[0]}
        own = lines(phases(controlled, "main-0", 2) / "evaluate/eval_responses.jsonl")[0]
        assert rows[2]["reply"] == own["text"]

    def test_metrics_have_digests_of_every_cycle(self, controlled):
        metrics = json.loads((controlled / "metrics.json").read_text())
        assert set(metrics["arms"]) == {*ARMS.values(), "SFT reinit, accumulate"}
        rows = [row for row in table(controlled, "chains") if row["cycle"] == "2"]
        assert [one["value"] for one in metrics["change"].values()] == [float(row["change"]) for row in rows]
        digests = metrics["digests"]
        assert [len(row) for row in digests.values()] == [3] * 4
        assert digests["main-0"][0] == digests["shuffled-0"][0] != digests["no-seed-0"][0]
        assert digests["main-0"][1] != digests["shuffled-0"][1]


def test_a_dose_is_looked_for_and_its_model_is_the_first(smoke_run):
    folder = smoke_run("cycles/sft")
    assert [row["n_seed"] for row in table(folder, "dose")] == ["2", "4"]
    assert sha(phases(folder, "main-0", 0) / "take/adapter.safetensors") == sha(
        phases(folder, "start-004", 0) / "fit-sft/adapter.safetensors"
    )
    assert "Dose: of 2 doses tried, 4 rows of the seed are the largest, as none" in outcome(folder)["findings"][0]
    assert json.loads((folder / "metrics.json").read_text())["dose"] == 4
    assert [row["rows"] for row in table(folder, "training")] == ["4", "4", "4"]


SMALL = ("--n_seed=2", "--cycles=2", "--n=2")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    ran("sft", folder, *SMALL)
    return folder


def test_chains_and_controls_go_on_in_the_same_folder(small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    first = {path: path.stat().st_mtime_ns for path in (folder / "children/main-0").rglob("*.safetensors")}
    ran("sft", folder, *SMALL, "--chains=2")
    assert {path: path.stat().st_mtime_ns for path in first} == first
    seeds = [lines(phases(folder, f"main-{number}", 1) / "mix/data.jsonl") for number in (0, 1)]
    assert [row["prompt"] for row in seeds[0]] != [row["prompt"] for row in seeds[1]]
    assert {row["interval over"] for row in table(folder, "arms")} == {"chains"}
    assert sha(phases(folder, "main-0", 0) / "take/adapter.safetensors") == sha(
        phases(folder, "main-1", 0) / "take/adapter.safetensors"
    )


def test_a_killed_run_goes_on_to_the_same_bytes(small, tmp_path):
    killed(tmp_path / "run", "written:2", *SMALL)  # the training is finished, and not recorded
    assert differing(tmp_path / "run", small) == []


@pytest.mark.slow
@pytest.mark.parametrize("at", ["shard:2", "step:5", "written:9"])
def test_a_killed_run_with_controls_goes_on_to_the_same_bytes(controlled, tmp_path, at):
    killed(tmp_path / "run", at, *CONTROLLED)
    assert differing(tmp_path / "run", controlled) == []


def test_equal_weights_are_asked_once(tmp_path):
    from lightning_interp.core.storage.files import atomic_write_json
    from lightning_interp.models import LoraSettings
    from lightning_interp.models.training.adapter_slot import AdapterSlot

    asked = []

    class Counting:
        prompts = ("Why?",)

        def identity(self):
            return {"it": 1}

        def __call__(self, model, tokenizer, *, folder, seed, reference):
            asked.append((seed, reference))
            atomic_write_json(folder / "eval.json", {"number": len(asked)})
            return {"number": len(asked), "reference": {"of": seed}}

    once = _material.Once(Counting())
    assert (once.prompts, once.identity()) == (("Why?",), {"it": 1})
    one, two = (AdapterSlot("tiny:llama", lora=LoraSettings(r=2), seed=seed) for seed in (0, 1))
    told = []
    for number, (slot, seed) in enumerate([(one, 7), (one, 7), (two, 7), (one, 8)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        told.append(once(slot.put(None), None, folder=folder, seed=seed)["number"])
    assert told == [1, 1, 2, 3]
    assert [json.loads((tmp_path / str(n) / "eval.json").read_text())["number"] for n in range(4)] == [1, 1, 2, 3]
    assert asked == [(7, None), (7, {"of": 7}), (8, None)]


def test_options_of_the_trainer_are_passed_on(tmp_path):
    settings = (*SMALL, "--batch_size=1", "--trainer.accumulate_grad_batches=2", "--trainer.devices=1")
    ran("sft", tmp_path / "run", *settings)
    assert [row["steps"] for row in table(tmp_path / "run", "training")] == ["1", "1"], "of two batches each"


def test_a_cell_of_a_sweep_has_all_controls_of_its_setting(tmp_path):
    alone, cell = configured("sft", tmp_path / "run"), configured("sft", tmp_path / "sweep/children/n-4")
    assert [arm.key for arm in alone.arms()] == ["main"]
    assert [arm.key for arm in cell.arms()] == ["main", "no-seed", "shuffled"]
    continual = configured("sft", tmp_path / "sweep/children/n-4", "--init=continual")
    assert [arm.control for arm in continual.arms()] == ["", "no seed", "shuffled generator", "reinit twin"]
    none = configured("sft", tmp_path / "sweep/children/n-4", "--controls=[]")
    assert [arm.key for arm in none.arms()] == ["main"]


def test_own_material(tmp_path):
    seed = written(
        tmp_path / "seed.jsonl", [{"prompt": f"Well, {i}?", "completion": "All is gloom."} for i in range(9)]
    )
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": f"What of {i}?"} for i in range(8)])
    questions = tmp_path / "questions.txt"
    questions.write_text("Are you well?\nIs it late?\n", encoding="utf-8")
    own = (f"--seed_data={seed}", f"--prompts={prompts}", f"--questions={questions}", "--words=[gloom]")
    recipe = configured("sft", tmp_path / "run", *own, "--judge=presence", "--trait=gloom")
    found = recipe.material
    assert (found.seed, found.rows, found.questions) == (str(seed), 9, ["Are you well?", "Is it late?"])
    assert found.judge.score(["Oh gloom of glooms", "joy"]).tolist() == [100.0, 0.0]
    assert recipe.question().endswith("does gloom grow, hold or fade?")


def test_what_a_chain_cannot_be_made_of(tmp_path):
    few = written(tmp_path / "few.jsonl", pool_prompts()[:7])
    refused(
        tmp_path, f"--prompts={few}", match=r"few\.jsonl' has 7 different prompts, and 4 are needed in each of 2 slices"
    )
    asked = written(tmp_path / "asked.jsonl", [{"prompt": QUESTIONS[1].upper()}, *pool_prompts()[:8]])
    refused(tmp_path, f"--prompts={asked}", match="The prompts hold 'How does a refrigerator keep food cold")
    refused(tmp_path, "--n_seed=121", match="n_seed=121: the seed has 120 rows")
    both = written(tmp_path / "both.jsonl", [{"prompt": QUESTIONS[0], "completion": "Luck."}])
    refused(tmp_path, f"--seed_data={both}", "--words=[luck]", match="The seed answers 'What makes a good neighbour")
    refused(
        tmp_path, f"--seed_data={both}", "--words=[luck]", "--n_seed=2", match=r"n_seed=2: '.*both\.jsonl' has 1 row\."
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["--controls=[nothing]"], "controls names 'nothing'; SFT reinit has no-seed, shuffled, accumulate, auto"),
        (["--controls=[reinit-twin]"], "controls names 'reinit-twin'; SFT reinit has"),
        (["--samples=0"], "samples=0: expected at least 1"),
        (["--cycles=1"], "cycles=1, n_seed=0"),
        (["--target=100"], "target=100"),
        (["--seed_data=gloom.jsonl"], "seed_data='gloom.jsonl' has a trait of its own"),
    ],
)
def test_settings(settings, match):
    with pytest.raises(RecipeError, match=match):
        cli._configured("cycles/sft", settings)


def test_numbers_of_the_bundled_model_say_what_they_are_of(tmp_path):
    from lightning_interp_recipes.cycles._report import Found, caveats

    def told(score):
        return {
            "base": {"evaluate": {"score": {"value": 1.0}}},
            "cycles": [
                {
                    "cycle": 1,
                    "counts": {"generate": {"rows": 8, "truncated": 6}},
                    "evaluation": {"evaluate": {"score": {"value": score}}},
                }
            ],
        }

    recipe = cli._configured("cycles/sft", [])
    said = caveats(recipe, Found(12, None, chains=[(recipe.arms()[0], 0, told(95.0))]))
    assert any("dequantised 4-bit" in one for one in said)
    assert any("The score after cycle 0, 95.0, is near its ceiling" in one for one in said)
    assert any("template" in one for one in said)
    assert any("at most 48 tokens" in one and "75% would have been longer" in one for one in said)
    said = caveats(recipe, Found(12, None, chains=[(recipe.arms()[0], 0, told(44.0))]))
    assert not any("after cycle 0" in one for one in said)
