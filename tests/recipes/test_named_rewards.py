"""Rewards that a recipe names: read as they were trained, shown, and tried before anything is paid for."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from served import serving

from lightning_interp import cli
from lightning_interp.errors import DataError, IncompatibleModelError, InterpError, RecipeError
from lightning_interp_recipes.rate._named import named_scorer
from lightning_interp_recipes.rate._scored import output_of

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from reward_folders import leave_card, saved, theirs

pytestmark = pytest.mark.usefixtures("undrawn", "few_dummies")

ROWS = [
    {"id": str(i), "text": f"a film {i}", "rewrite": "a film", "rewrite2": f"a film {i}!", "w": i % 2, "prompt": "say"}
    for i in range(8)
]
WORDS = [
    {**row, "text": ("good ", "bad ")[i % 2] * (1 + i % 3), "rewrite2": "ok " * (1 + i % 4)}
    for i, row in enumerate(ROWS)
]


def data(folder, rows=ROWS):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(name="audit", **settings):
    return type(cli._configured(f"rate/{name}", []))(**settings)


def reading(folder):
    with (folder / "tables" / "reading.csv").open(encoding="utf-8", newline="") as file:
        return {row["of"]: row["is"] for row in csv.DictReader(file)}


def effect(metrics):
    return metrics["effects"]["raw"]["rate"]["ate"]["estimate"]


def by_hand(rewards):
    """The double rewrite's ATE of rewards of rewrites and of rewrites of these."""
    signs = torch.tensor([1.0 if row["w"] else -1.0 for row in ROWS])
    return float((signs * (rewards[1] - rewards[0])).mean())


def test_a_model_of_trl_is_read_with_its_end_token(tmp_path):
    folder = saved(tmp_path / "rm", "llama")
    leave_card(folder)
    recipe(data=data(tmp_path), reward=str(folder), run_dir=str(tmp_path / "run")).run()
    found = reading(tmp_path / "run")
    assert found["end token"] == "yes, <eos>"
    assert found["an example, as it is read"] == "saya film 0<eos>"
    assert "saya film 0&lt;eos&gt;" in (tmp_path / "run" / "report.html").read_text()
    rewards = [theirs(folder, [(f"say{row[key]}<eos>",) for row in ROWS])[:, 0] for key in ("rewrite", "rewrite2")]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert effect(metrics) == pytest.approx(by_hand(rewards), abs=1e-5)


def test_an_encoder_is_read_as_asked_and_weighs_its_outputs(tmp_path):
    folder = saved(tmp_path / "rm", "bert", labels=3)
    asked = {"data": data(tmp_path, WORDS), "reward": str(folder), "reward_output": "kind=1,long=-0.5"}
    with pytest.raises(IncompatibleModelError, match=r"Say so: pair=True"):
        recipe(**asked, run_dir=str(tmp_path / "a")).run()
    recipe(**asked, reward_pair=True, reward_batch=1, run_dir=str(tmp_path / "run")).run()
    assert reading(tmp_path / "run")["an example, as it is read"] == "[CLS] say [SEP] good [SEP]"
    both = [theirs(folder, [("say", row[key]) for row in WORDS]) for key in ("rewrite", "rewrite2")]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert effect(metrics) == pytest.approx(by_hand([x[:, 1] - 0.5 * x[:, 2] for x in both]), abs=1e-5)


def module_of(folder, monkeypatch, text):
    (folder / "my_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


def test_a_function_of_a_named_module_scores(tmp_path, monkeypatch):
    module_of(tmp_path, monkeypatch, "def marks(prompts, texts):\n    return [text.count('!') for text in texts]\n")
    found = recipe(data=data(tmp_path), reward="my_rewards:marks", run_dir=str(tmp_path / "run"))
    found.imports = ("my_rewards",)
    found.run()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["scorer"] == "my_rewards:marks"
    assert effect(metrics) == 0.0  # one mark more in both arms


MARKS = "def marks(prompts, texts):\n    return [text.count('!') for text in texts]\n"


@pytest.mark.parametrize(
    "how",
    ["named so", "a file alone", *(pytest.param(x, marks=pytest.mark.slow) for x in ("import", "a file and import"))],
)
def test_whose_word_imports_a_module(tmp_path, monkeypatch, capsys, how):
    """That of the command line, and never that of a settings file that somebody sent."""
    (tmp_path / "sent_rewards.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{MARKS}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "sent_rewards", raising=False)
    given = {"data": data(tmp_path), "reward": "sent_rewards:marks", "run_dir": str(tmp_path / "run")}
    name, options = "rate/audit", [f"--{key}={value}" for key, value in given.items()]
    if how.startswith("a file"):
        name, options = str(tmp_path / "sent.yaml"), []
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in {"recipe": "rate/audit", **given}.items()]
        (tmp_path / "sent.yaml").write_text("".join(lines))
    if "import" in how:
        options.append("--import=sent_rewards")
    fine = how != "a file alone"
    assert cli.main(["run", name, *options]) == (0 if fine else 1)
    assert (tmp_path / "ran").exists() == fine
    assert fine or "--import=sent_rewards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "more", "match"),
    [
        ("my_rewards:marks", {}, r"not imported unasked.*--import=my_rewards"),
        ("os:system", {"imports": ("my_rewards",)}, r"--import=os"),
        ("my_rewards:wrong", {"imports": ("my_rewards",)}, r"There is no function 'my_rewards:wrong'"),
        ("my_rewards:number", {"imports": ("my_rewards",)}, r"is a int: expected a function"),
        ("my_broken:f", {"imports": ("my_broken",)}, r"There is no function 'my_broken:f' .division by zero"),
        ("no_module_there:f", {"imports": ("no_module_there",)}, r"There is no function 'no_module_there:f'"),
        ("no/such-model", {}, r"There is no model|cannot be loaded"),
        pytest.param("vadr", {}, r"There is no model", marks=pytest.mark.slow),
        ("columns", {}, r"reward='columns', but rewriter='endpoint'"),
        ("FOLDER", {}, r"say so: add_eos=True or add_eos=False"),
        ("FOLDER", {"reward_eos": True, "reward_output": "kind"}, r"has no output label='kind'"),
        pytest.param(
            "FOLDER", {"reward_eos": True, "reward_chat": True}, r"chat=True needs a chat", marks=pytest.mark.slow
        ),
        ("vader", {"reward_pair": True}, r"keeps its own settings, but pair=True"),
        ("no.ckpt", {}, r"There is no checkpoint 'no.ckpt'"),
    ],
)
@pytest.mark.parametrize("name", ["audit", pytest.param("llm_rewriter", marks=pytest.mark.slow)])
def test_what_cannot_score_is_said_before_a_text_is_paid_for(tmp_path, monkeypatch, name, reward, more, match):
    module_of(tmp_path, monkeypatch, "number = 7\ndef marks(prompts, texts):\n    return [0.0] * len(texts)\n")
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if reward == "FOLDER":
        reward = str(saved(tmp_path / "rm", "llama"))
    if name == "llm_rewriter" and reward == "columns":
        match = "There is no model"
    imports = more.pop("imports", ()) if "imports" in (more := dict(more)) else ()
    with serving() as served:
        if name == "audit":
            asked = {"data": data(tmp_path), "model": "m", "template": "length", "max_calls": 99, "reward": reward}
        else:
            asked = {"texts": data(tmp_path), "endpoint_model": "m", "scorer": reward}
        found = recipe(name, rewriter="endpoint", base_url=served.url, run_dir=str(tmp_path / "run"), **asked, **more)
        found.imports = imports
        with pytest.raises(InterpError, match=match):
            found.run()
        assert served.bodies == []


def test_outputs_on_a_command_line():
    assert output_of("kind = 1") == {"kind": 1.0}
    with pytest.raises(RecipeError, match="expected names with weights"):
        output_of("kind=much")
    with pytest.raises(RecipeError, match="expected names with weights"):
        recipe(reward_output="kind=much")
    with pytest.raises(DataError, match="There is no checkpoint"):
        named_scorer("x.ckpt")


@pytest.mark.slow
def test_a_run_from_before_these_settings_goes_on(tmp_path):
    """A manifest without them is the same run's; one that a setting was changed of is not."""
    folder = saved(tmp_path / "rm", "llama", chat=True)
    asked = {"data": data(tmp_path), "reward": str(folder), "run_dir": str(tmp_path / "run")}
    recipe(**asked).run()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert not [key for key in manifest["config"] if key.startswith("reward_")]
    assert {"dtype", "max_length"} <= manifest["config"].keys()
    recipe(**asked).run()
    with pytest.raises(InterpError, match=r"reward_chat: not set there, false now"):
        recipe(**asked, reward_chat=False, reward_eos=True).run()


def test_the_plan_shows_how_texts_are_read(tmp_path, capsys):
    folder = saved(tmp_path / "rm", "llama", chat=True)
    rules = {"rewriter": "rules", "toggle": "mark:!", "label": "contains:!"}
    rows = [{**row, "text": row["text"] + "!" * row["w"]} for row in ROWS]
    recipe(data=data(tmp_path, rows), reward=str(folder), run_dir=str(tmp_path / "run"), **rules).run()
    printed = capsys.readouterr().out
    assert "reward, texts: a chat by the tokenizer's template (the tokenizer has a chat template)" in printed
    assert "reward, an example, as it is read: <|im_start|>user\nsay<|im_end|>" in printed
    assert "a chat by the tokenizer's template" in json.loads((tmp_path / "run" / "metrics.json").read_text())["plan"]
