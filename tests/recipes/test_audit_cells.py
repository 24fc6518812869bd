"""rate/audit with several attributes and rewards: each pair is an audit of its own, and nothing is done twice."""

from __future__ import annotations

import csv
import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from served import completion, serving

from lightning_interp import cli
from lightning_interp.core.storage.distributed import JsonlWriter
from lightning_interp.errors import DataError, InterpError, RecipeError
from lightning_interp.rate import CallableScorer, RewriteTriples, read_rewards
from lightning_interp.rate.checks.placebo import dummy_outcome_check
from lightning_interp.rate.report.study import EffectStudy
from lightning_interp.rate.rewriting.store import StoreWriter
from lightning_interp.rate.scoring.reward_scorer import RewardScorer
from lightning_interp_recipes.rate._audit_cells import _short

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from reward_folders import saved, theirs

pytestmark = pytest.mark.usefixtures("undrawn", "few_dummies")

MARK = {"attribute": "mark", "label": "contains:!", "toggle": "mark:!"}
OPENER = {"attribute": "its opener", "label": "contains:^Well", "toggle": "opener:|Well,", "always": ["links"]}
REWARDS = """
asked = []
def marks(prompts, texts):
    asked.extend(texts)
    return [text.count("!") + 0.1 * len(text) + 0.01 * (sum(map(ord, text)) % 7) for text in texts]
def wells(prompts, texts):
    return [text.count("Well") - 0.01 * (sum(map(ord, text)) % 11) for text in texts]
"""


@cache
def audit():
    return type(cli._configured("rate/audit", []))


def recipe(**settings):
    found = audit()(**settings)
    found.imports = ("my_cells",)
    return found


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts, half of them with each attribute, and a module of rewards."""
    folder = tmp_path_factory.mktemp("cells")
    texts = [f"{'Well, ' * (k // 2 % 2)}text number {k}{'!' * (k % 2)}" for k in range(12)]
    rows = [json.dumps({"id": f"u{k}", "text": text, "prompt": f"p{k}"}) for k, text in enumerate(texts)]
    (folder / "mine.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "my_cells.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
        sys.modules.pop("my_cells", None)


@pytest.fixture
def plain(monkeypatch):
    """No figure of a single pair: half the time of a run."""
    monkeypatch.setattr(EffectStudy, "figures", lambda *_: {})
    monkeypatch.setattr(EffectStudy, "captions", lambda *_: {})


def settings(place, **more):
    return {"data": str(place / "mine.jsonl"), "rewriter": "rules", **more}


SEVERAL = {"attributes": [MARK, OPENER], "rewards": ["my_cells:marks", {"reward": "my_cells:wells"}]}


@pytest.fixture(scope="module")
def both(place):
    """A run with two attributes and two rewards, and what the first reward was asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
        few = partial(dummy_outcome_check, repeats=10)
        patch.setattr("lightning_interp.rate.report.study.dummy_outcome_check", few)
        sys.modules.pop("my_cells", None)
        recipe(**settings(place, **SEVERAL), run_dir=str(place / "run")).run()
        return place / "run", list(sys.modules["my_cells"].asked)


def test_each_pair_is_an_audit_of_its_own(place, both, tmp_path, plain):
    folder, _ = both
    cells = json.loads((folder / "metrics.json").read_text())["cells"]
    assert {attribute: list(rewards) for attribute, rewards in cells.items()} == {
        name: ["my_cells:marks", "my_cells:wells"] for name in ("mark", "its opener")
    }
    alone = recipe(**settings(place, **OPENER, reward="my_cells:wells"), run_dir=str(tmp_path / "run")).run().metrics
    for key in ("effects", "compliance", "text_changes", "left_out"):
        assert cells["its opener"]["my_cells:wells"][key] == json.loads(json.dumps(alone[key]))


def test_a_text_is_rewritten_once_an_attribute_and_scored_once_a_reward(both):
    folder, asked = both
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["calls"] == 2 * 2 * 12
    lines = (folder / "phases" / "score-my_cells-marks" / "rewards.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 3 * 12
    assert len(asked) == len(set(asked)) < len(lines) - 12  # both attributes have the originals


def test_a_table_of_all_and_sections_of_each(both):
    folder, _ = both
    rows = table(folder, "attributes_and_rewards")
    assert [(row["attribute"], row["reward"]) for row in rows] == [
        (name, f"my_cells:{reward}") for name in ("mark", "its opener") for reward in ("marks", "wells")
    ]
    own = {row["estimator"]: row for row in table(folder, "mark_my_cells-marks_effects") if row["estimand"] == "ATE"}
    assert rows[0]["double rewrite (RATE)"] == own["double rewrite (RATE)"]["raw"]
    assert rows[0]["units"] == "12"
    outcome = json.loads((folder / "manifest.json").read_text())["outcome"]
    assert len(outcome["findings"]) == 4
    assert "not of all 4 at once" in outcome["caveats"][0]
    assert any(note.startswith("its opener, my_cells:wells: 12 units") for note in outcome["caveats"])
    assert "Its-opener my cells-wells effects" in (folder / "report.html").read_text()
    assert {"check", "rewrite-mark", "rewrite-its-opener", "effects-mark-my_cells-wells"} <= {
        path.name for path in (folder / "phases").iterdir()
    }


@pytest.mark.parametrize(
    "when", ["scoring by the second", pytest.param("rewriting the second", marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_and_nothing_is_done_twice(place, both, tmp_path, monkeypatch, plain, when):
    wrote, scored = [], []
    append, write = StoreWriter.append, JsonlWriter.write

    def appending(self, records):
        append(self, records)
        wrote.extend(record.key for record in records)
        if when == "rewriting the second" and len(wrote) > 24 and (tmp_path / "kill").exists():
            raise KeyboardInterrupt

    def writing(self, records):
        write(self, records)
        scored.extend(record["index"] for record in records)
        if when == "scoring by the second" and len(scored) > 72 and (tmp_path / "kill").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "append", appending)
    monkeypatch.setattr(JsonlWriter, "write", writing)
    (tmp_path / "kill").touch()
    asked = recipe(**settings(place, **SEVERAL), run_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        asked.run()
    (tmp_path / "kill").unlink()
    recipe(**settings(place, **SEVERAL), run_dir=str(tmp_path / "run")).run()
    assert (len(wrote), len(scored)) == (len(set(wrote)), len(set(scored))) == (48, 144)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (both[0] / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("attributes", "rewards", "match"),
    [
        ([MARK], ["my_cells:marks", "my_cells:nothing"], "There is no function 'my_cells:nothing'"),
        ([MARK], ["my_cells:marks", "other:marks"], "--import=other"),
        ([MARK], ["my_cells:marks", "no.ckpt"], "There is no checkpoint 'no.ckpt'"),
        ([MARK], ["my_cells:marks", "columns"], "reward='columns', but rewriter='rules'"),
        ([MARK], [{"reward": "my_cells:marks", "reward_pair": True}], "keeps its own settings, but pair=True"),
        ([MARK, {**OPENER, "label": "vowl"}], [], "no labeller 'vowl'"),
        ([MARK, {**OPENER, "check": "vowl"}], [], "no labeller 'vowl'"),
        ([MARK, {**OPENER, "toggle": "marc:!"}], [], "no toggle 'marc:!'"),
        ([MARK, {**OPENER, "always": ["link"]}], [], "no rule 'link'"),
        ([MARK, {**OPENER, "data": "none.jsonl"}], [], "none.jsonl"),
    ],
)
def test_a_wrong_name_of_any_is_said_before_a_text_is_rewritten(
    place, tmp_path, monkeypatch, attributes, rewards, match
):
    monkeypatch.setattr(StoreWriter, "append", None)
    given = settings(place, attributes=attributes, rewards=rewards or ["my_cells:marks"])
    with pytest.raises(InterpError, match=match):
        recipe(**given, run_dir=str(tmp_path / "run")).run()
    assert not list(tmp_path.rglob("rewrites.jsonl"))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rewards": ["vader"], "reward": "fluency"}, "reward='fluency' beside rewards"),
        ({"attributes": [MARK], "attribute": "mine"}, "attribute='mine' beside attributes"),
        ({"attributes": [MARK, MARK]}, "attributes names mark, mark: two of them"),
        ({"attributes": [MARK], "rewards": ["vader", "vader"]}, "rewards names vader, vader: two of them"),
        ({"attributes": [{"label": "vowel"}]}, r"attributes has \{'label': 'vowel'\}: expected attribute"),
        (
            {"attributes": [{**MARK, "reward": "vader"}]},
            r"attributes has .*'reward'.*expected attribute, and of its own",
        ),
        ({"attributes": [MARK], "rewards": [{"reward": "vader", "label": "vowel"}]}, "expected reward, and of its own"),
        ({"attributes": [{**MARK, "always": "links"}]}, "attributes, 'mark': always='links' is a str"),
        ({"attributes": [MARK], "rewards": [{"reward": "m", "reward_batch": "2"}]}, "reward_batch='2' is a str"),
        ({"attributes": [{**MARK, "template": "length"}]}, "template='length' has no use with rewriter='rules'"),
        ({"attributes": [{"attribute": "mark"}]}, r"rewriter='rules' needs --toggle"),
    ],
)
def test_what_cannot_be_several_is_refused_at_once(place, given, match):
    with pytest.raises(RecipeError, match=match):
        recipe(**settings(place, **given))


def test_one_model_can_be_several_rewards(place):
    outputs = [{"reward": "org/rm", "reward_output": name} for name in ("helpful", "verbose")]
    ((first, second),) = recipe(**settings(place, attributes=[MARK], rewards=outputs)).cells()
    assert first.called == ("mark", "org/rm, reward_output=helpful")
    assert (second.reward_output, second.phases[1]) == ("verbose", "score-rm-reward_output-verbose")
    assert (first.reward_output, first.phases[1]) == ("helpful", "score-rm-reward_output-helpful")
    assert _short(["a/b", "b", "!"]) == ["b1", "b2", "3"]


def test_settings_of_one_say_nothing_of_several(place):
    assert not {"attributes", "rewards"} & recipe(**settings(place, **MARK)).config().keys()
    assert recipe(**settings(place, **SEVERAL)).config()["rewards"] == SEVERAL["rewards"]


def test_rewards_of_the_file_and_of_a_function_from_a_command_line(place, tmp_path, plain):
    rows = []
    for k in range(8):
        texts = [f"a text {k}{'!' * (k % 2)}", f"a text {k}{'!' * (1 - k % 2)}", f"a text {k}{'!' * (k % 2)}"]
        stages = dict(zip(("text", "rewrite", "rewrite2"), texts, strict=True))
        scores = dict(zip(("reward", "reward_rewrite", "reward_rewrite2"), map(len, texts), strict=True))
        rows.append({"w": k % 2, **stages, **scores})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = "--rewards=[columns, {reward: my_cells:marks}]"
    command = ["run", "rate/audit", f"--data={tmp_path / 'm.jsonl'}", rewards, "--check=contains:!"]
    assert cli.main([*command, "--import=my_cells", f"--run_dir={tmp_path / 'run'}"]) == 0
    row, other = table(tmp_path / "run", "attributes_and_rewards")
    assert row["double rewrite (RATE)"].startswith("1.000")
    assert other["reward"] == "my_cells:marks"
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    again = ["run", str(tmp_path / "run" / "config.yaml"), "--import=my_cells"]
    assert cli.main(again) == 0
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_a_store_of_several_attributes_is_scored_again(place, both, tmp_path, plain):
    stores = {name: str(both[0] / "phases" / f"rewrite-{name}" / "store") for name in ("mark", "its-opener")}
    attributes = [
        {"attribute": "mark", "store": stores["mark"]},
        {"attribute": "its opener", "store": stores["its-opener"]},
    ]
    given = {"rewriter": "replay", "attributes": attributes, "rewards": ["my_cells:wells"]}
    found = recipe(**given, run_dir=str(tmp_path / "run")).run().metrics
    cells = json.loads((both[0] / "metrics.json").read_text())["cells"]
    for name in ("mark", "its opener"):
        again = json.loads(json.dumps(found["cells"][name]["my_cells:wells"]["effects"]))
        assert again == cells[name]["my_cells:wells"]["effects"]
    assert found["calls"] == 0
    attributes[1]["attribute"] = "none"
    with pytest.raises(DataError, match="has no attribute 'none'"):
        recipe(**given, run_dir=str(tmp_path / "other")).run()


def test_the_budget_of_an_endpoint_is_that_of_all_attributes(place, tmp_path, monkeypatch, plain):
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def answer(body):
        return completion(body["messages"][-1]["content"].strip().splitlines()[-1] + " so")

    with serving(answer=answer) as served:
        attributes = [{"attribute": name, "label": "contains:!", "template": name} for name in ("length", "sentiment")]
        given = {
            "data": str(place / "mine.jsonl"), "rewriter": "endpoint", "model": "m", "base_url": served.url,
            "attributes": attributes, "rewards": ["my_cells:marks"], "run_dir": str(tmp_path / "run"),
        }  # fmt: skip
        with pytest.raises(RecipeError, match=r"up to 48 times: .* agree with --max_calls=48"):
            recipe(**given).run()
        assert served.bodies == []
        with pytest.raises(RecipeError, match="ended at max_calls=24 before attribute 'sentiment'"):
            recipe(**given, max_calls=24).run()
        assert len(served.bodies) == 24
        found = recipe(**given, max_calls=48).run()
        assert len(served.bodies) == 48
    assert found.metrics["calls"] == 48


def test_texts_of_several_attributes_go_through_a_scorer_once(tmp_path):
    asked = []

    def length(prompts, texts):
        asked.extend(texts)
        return [float(len(text)) for text in texts]

    row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
    one = RewriteTriples.from_rows([row])
    other = RewriteTriples.from_rows([{**row, "rewrite": "o!", "attr": "other"}])
    scorer = CallableScorer(length, name="length")
    found = RewardScorer(scorer, one, tmp_path / "r.jsonl", also=[other]).run()
    assert found.reward["rewrite"].tolist() == [2.0]
    assert read_rewards(tmp_path / "r.jsonl").scores(other, scorer).reward["original"].tolist() == [3.0]
    assert sorted(asked) == ["o!", "oh", "oh!"]


def test_outputs_of_one_reward_model_are_rewards_with_settings_of_their_own(place, tmp_path, monkeypatch, plain):
    folder = str(saved(tmp_path / "rm", "bert", labels=3))
    names = ("good", "1", "nice")
    good, kind, wrong = ({"reward": folder, "reward_pair": True, "reward_output": name} for name in names)
    asked = recipe(**settings(place, attributes=[MARK], rewards=[good, wrong]), run_dir=str(tmp_path / "a"))
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", None)
        with pytest.raises(InterpError, match="has no output label='nice'"):
            asked.run()
    recipe(**settings(place, attributes=[MARK], rewards=[good, kind]), run_dir=str(tmp_path / "run")).run()
    cells = json.loads((tmp_path / "run" / "metrics.json").read_text())["cells"]["mark"]
    texts = [f"{'Well, ' * (k // 2 % 2)}text number {k}" for k in range(12)]
    off, on = (theirs(folder, [(f"p{k}", f"{text}{end}") for k, text in enumerate(texts)]) for end in (".", "!"))
    for place_of, found in enumerate(cells.values()):
        effect = found["effects"]["raw"]["rate"]["ate"]["estimate"]
        assert effect == pytest.approx(float((on - off)[:, place_of].mean()), abs=1e-6)
    told = {row["of"]: row["is"] for row in table(tmp_path / "run", "mark_rm-reward_output-1_reading")}
    assert (told["texts"], told["reward"]) == ("two segments, prompt and answer", "output 1")
