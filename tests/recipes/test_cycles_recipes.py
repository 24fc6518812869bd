"""Recipes of chains: arms share their first model and prompts, controls are what they say, kills lose nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from lightning_interp import cli
from lightning_interp.core.storage.faults import DIE_AT
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import DataError, RecipeError
from lightning_interp_recipes.cycles import _material
from lightning_interp_recipes.cycles._documents import OPENINGS, neutral_prefixes, seed_documents
from lightning_interp_recipes.cycles._persona import QUESTIONS, pool_prompts

ARMS = {"main": "SFT reinit", "no-seed": "SFT reinit, no-seed", "shuffled": "SFT reinit, shuffled"}
pytestmark = pytest.mark.usefixtures("undrawn_module")


def configured(name, folder, *settings):
    return cli._configured(f"cycles/{name}", ["--smoke=true", f"--run_dir={folder}", *settings])


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def phases(folder, arm, cycle):
    return folder / f"children/{arm}/children/cycle-{cycle:03d}/phases"


def contents(folder):
    """Bytes of everything that is left, but for times, paths, curves and checkpoints."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "tensorboard" not in path.parts)
    unstable = ("manifest.json", ".lock", "report.html", "config.yaml")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name not in unstable}


def outcome(folder):
    return read_manifest(folder)["outcome"]


@pytest.fixture(scope="module")
def undrawn_module(smoke_run):
    """Figures are not drawn, but in smoke runs, which others read too."""
    for name in ("sft", "dpo_contrast"):
        smoke_run(f"cycles/{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
        yield


CONTROLLED = ("--n_seed=2", "--n=2", "--controls=[no-seed,shuffled,accumulate]")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory, undrawn_module):
    folder = tmp_path_factory.mktemp("controlled") / "run"
    configured("sft", folder, *CONTROLLED).run()
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
def small(tmp_path_factory, undrawn_module):
    folder = tmp_path_factory.mktemp("small") / "run"
    configured("sft", folder, *SMALL).run()
    return folder


def test_chains_and_controls_go_on_in_the_same_folder(small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    first = {path: path.stat().st_mtime_ns for path in (folder / "children/main-0").rglob("*.safetensors")}
    configured("sft", folder, *SMALL, "--chains=2").run()
    assert {path: path.stat().st_mtime_ns for path in first} == first
    seeds = [lines(phases(folder, f"main-{number}", 1) / "mix/data.jsonl") for number in (0, 1)]
    assert [row["prompt"] for row in seeds[0]] != [row["prompt"] for row in seeds[1]]
    assert {row["interval over"] for row in table(folder, "arms")} == {"chains"}
    assert sha(phases(folder, "main-0", 0) / "take/adapter.safetensors") == sha(
        phases(folder, "main-1", 0) / "take/adapter.safetensors"
    )


def killed(folder, at, *settings, name="sft"):
    recipe = configured(name, folder, *settings)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - dies
        os.environ[DIE_AT] = at
        try:
            recipe.run()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    recipe.run()


def differing(one, other):
    mine, whole = contents(one), contents(other)
    assert "metrics.json" in whole
    return [name for name in {**mine, **whole} if mine.get(name) != whole.get(name)]


def test_a_killed_run_goes_on_to_the_same_bytes(small, tmp_path):
    killed(tmp_path / "run", "step:1", *SMALL)
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


def test_a_cell_of_a_sweep_has_all_controls_of_its_setting(tmp_path):
    alone, cell = configured("sft", tmp_path / "run"), configured("sft", tmp_path / "sweep/children/n-4")
    assert [arm.key for arm in alone.arms()] == ["main"]
    assert [arm.key for arm in cell.arms()] == ["main", "no-seed", "shuffled"]
    continual = configured("sft", tmp_path / "sweep/children/n-4", "--init=continual")
    assert [arm.control for arm in continual.arms()] == ["", "no seed", "shuffled generator", "reinit twin"]
    none = configured("sft", tmp_path / "sweep/children/n-4", "--controls=[]")
    assert [arm.key for arm in none.arms()] == ["main"]


@pytest.fixture(scope="module")
def contrast(tmp_path_factory, undrawn_module):
    folder = tmp_path_factory.mktemp("contrast") / "run"
    configured("dpo_contrast", folder, "--n_seed=2", "--lr=0.01", "--batch_size=2", "--controls=[swapped]").run()
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

    def test_the_figure_has_both_arms_in_each_panel(self, smoke_run):
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


def test_a_killed_contrast_goes_on_to_the_same_bytes(tmp_path, undrawn_module):
    how = ("--n_seed=2", "--cycles=2", "--n=2")
    configured("dpo_contrast", tmp_path / "whole", *how).run()
    killed(tmp_path / "run", "shard:1", *how, name="dpo_contrast")
    assert differing(tmp_path / "run", tmp_path / "whole") == []


def test_a_start_by_preferences_has_pairs_of_the_seed(tmp_path):
    folder = tmp_path / "run"
    settings = ("--start=dpo", "--n_seed=2", "--cycles=2", "--data_rule=mix", "--real_fraction=0.5")
    configured("dpo", folder, *settings, "--n=2", "--init=reinit").run()
    rows = lines(phases(folder, "start-002", 0) / "mix/data.jsonl")
    assert len(rows) == 2
    assert {(row["source"], row["rejected"]["parent"]) for row in rows} == {("seed", "base")}
    mixed = lines(phases(folder, "main-0", 1) / "mix/data.jsonl")
    assert sorted(row["source"] for row in mixed) == ["own", "own", "seed-mix"]
    assert all(row["chosen"]["token_ids"] for row in mixed)


class TestDocuments:
    HOW = ("--n_seed=4", "--cycles=2", "--controls=[no-seed]")

    def test_titles_behind_the_dose_are_continued_and_learned_whole(self, tmp_path):
        folder = tmp_path / "run"
        configured("documents", folder, *self.HOW).run()
        titles = [row["text"].splitlines()[0] for row in seed_documents()]
        rows = lines(phases(folder, "main-0", 1) / "mix/data.jsonl")
        assert len(rows) == 4
        assert {row["prompt"] for row in rows} <= set(titles[4:])
        assert all(row["text"].startswith(row["prompt"]) and row["prompt_ids"] == [] for row in rows)
        twin = lines(phases(folder, "no-seed-0", 1) / "mix/data.jsonl")
        assert {row["prompt"] for row in twin} == {row["prompt"] for row in rows}, "a control sees the same titles"
        reply = table(folder, "replies")[0]
        assert reply["question"] == OPENINGS[0]
        assert reply["reply"].startswith(OPENINGS[0])
        said = " ".join(outcome(folder)["caveats"])
        assert "bring the topic of the seed back in each cycle" in said
        assert "plain language model" not in said, "that is of the bundled model"

    @pytest.mark.parametrize("prefixes", ["neutral", "none"])
    def test_other_beginnings(self, prefixes, tmp_path):
        folder = tmp_path / "run"
        configured("documents", folder, "--n_seed=4", "--cycles=2", f"--prefixes={prefixes}").run()
        begun = [row["prompt"] for row in lines(phases(folder, "main-0", 1) / "mix/data.jsonl")]
        assert set(begun) <= (set(neutral_prefixes()) if prefixes == "neutral" else {""})
        assert len(set(begun)) == (4 if prefixes == "neutral" else 1)
        assert "topic of the seed" not in " ".join(outcome(folder)["caveats"])

    def test_of_the_bundled_model_it_is_said_that_it_is_one_for_chat(self):
        recipe = cli._configured("cycles/documents", [])
        assert "continues documents here as a plain language model" in " ".join(recipe.own_caveats())
        assert not cli._configured("cycles/documents", ["--model=gemma-3-270m", "--prefixes=none"]).own_caveats()

    def test_own_material_has_no_word_of_the_trait_but_in_the_seed(self):
        judge = cli._configured("cycles/documents", []).material.judge
        texts = [row["text"] for row in seed_documents()]
        assert len(set(texts)) == len(texts) == 84
        assert judge.score(texts).min() == 100
        assert judge.score([*OPENINGS, *neutral_prefixes()]).max() == 0
        assert len(set(neutral_prefixes())) == 72

    def test_documents_that_are_too_few(self, tmp_path):
        few = written(tmp_path / "few.jsonl", seed_documents()[:5])
        own = (f"--seed_data={few}", "--words=[luck]")
        refused(tmp_path, *own, name="documents", match="has 5 documents, of which cycle 0 may learn 4, and 2 more")
        with pytest.raises(RecipeError, match="prefixes='titles' asks for other"):
            configured("documents", tmp_path / "run", f"--prompts={few}")


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def refused(tmp_path, *settings, match, error=DataError, name="sft"):
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    with pytest.raises(error, match=match):
        configured(name, folder, *settings).run()
    assert not list(folder.glob("children/*")), "nothing was trained"


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
            "cycles": [{"evaluation": {"evaluate": {"score": {"value": score}}}}],
        }

    recipe = cli._configured("cycles/sft", [])
    said = caveats(recipe, Found(12, None, chains=[(recipe.arms()[0], 0, told(95.0))]))
    assert any("dequantised 4-bit" in one for one in said)
    assert any("The score after cycle 0, 95.0, is near its ceiling" in one for one in said)
    assert any("template" in one for one in said)
    said = caveats(recipe, Found(12, None, chains=[(recipe.arms()[0], 0, told(44.0))]))
    assert not any("after cycle 0" in one for one in said)
