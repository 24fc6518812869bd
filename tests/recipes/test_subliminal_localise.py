"""The recipe of gates: its gates by hand, and what a smoke run says of them."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_interp import cli, load_causal_lm
from lightning_interp.errors import RecipeError
from lightning_interp.lora import GateSpec
from lightning_interp.subliminal import ChatContext, answered, preference_questions, trait_margins
from lightning_interp.testing import byte_tokenizer
from lightning_interp_recipes.subliminal._localise import NOT, beside, gates_of, located

NAMES = ["entity", "system", "template", "question", "answer", "last"]


@pytest.fixture(scope="module")
def smoke(smoke_run):
    folder = smoke_run("subliminal/localise")
    return folder, json.loads((folder / "metrics.json").read_text())


def configured(*arguments):
    return cli._configured("subliminal/localise", list(arguments))


def test_a_smoke_run_shows_every_gate_beside_its_inverse(smoke):
    folder, metrics = smoke
    shown = [name for name in NAMES if name != "system"]  # the byte tokenizer's template has no system text
    assert [name for name in metrics if not name.startswith(NOT)] == ["all", "none", *shown]
    assert metrics["none"]["on_tokens"] == 0
    assert {metrics[name]["on_tokens"] + metrics[NOT + name]["on_tokens"] for name in shown} == {
        metrics["all"]["on_tokens"]
    }
    kinds = ("template", "question", "answer")
    assert sum(metrics[name]["on_tokens"] for name in kinds) == metrics["all"]["on_tokens"]
    assert metrics["last"]["on_tokens"] == 1
    assert metrics["entity"]["on_tokens"] == len("animal")
    assert len({round(one["margin"]["value"], 6) for one in metrics.values()}) == len(metrics)
    with (folder / "tables/gates.csv").open(newline="") as file:
        assert [row["gate"] for row in csv.DictReader(file)] == ["all", *shown]
    page = (folder / "report.html").read_text()
    for said in (
        "Sufficiency and necessity are not complementary", "independent reruns at tuned learning rates differ",
        "nothing about it is subliminal", "Left out, system: no token of the prompt is one.",
    ):  # fmt: skip
        assert said in page


def test_the_adapter_nowhere_is_the_base_and_everywhere_itself(smoke):
    folder, metrics = smoke
    recipe = configured("--smoke=true")
    trait, questions = recipe.asked_about(), preference_questions("animal", 3)
    context = answered(ChatContext(), trait)
    adapted = load_causal_lm(str(folder / "phases/train/model"))
    for name, loaded in (("all", adapted), ("none", load_causal_lm(recipe.source))):
        found = trait_margins(loaded.model, loaded.tokenizer, trait, questions, context=context)
        assert metrics[name]["margin"]["value"] == pytest.approx(float(found.mean()), abs=1e-9), name


def test_an_adapter_of_ones_own_is_not_trained(smoke, tmp_path):
    folder, metrics = smoke
    recipe = configured("--smoke=true", f"--adapter={folder / 'phases/train/model'}", f"--run_dir={tmp_path / 'run'}")
    recipe.run()
    again = json.loads((tmp_path / "run/metrics.json").read_text())
    assert again == metrics
    assert not (tmp_path / "run/phases/train").exists()
    page = (tmp_path / "run/report.html").read_text()
    assert "without a control student" in page
    assert "nothing about it is subliminal" not in page


def test_gates_stand_in_the_cells_that_were_asked_for():
    gates = gates_of(configured("--modules=attn", "--layers=early", "--entity="))
    assert list(gates) == ["all", "none", *(side + name for name in NAMES[1:] for side in ("", NOT))]
    assert gates["all"] == GateSpec(modules="attn", layers="early")
    assert gates[NOT + "last"] == GateSpec(tokens={"kind": "last"}, invert=True, modules="attn", layers="early")
    assert gates["none"] == GateSpec(tokens=[])


def test_gates_without_a_token_are_left_out_with_the_reason():
    tokenizer = byte_tokenizer()
    kept, reasons = located(gates_of(configured()), tokenizer, ChatContext(system="Be SmolLM."), ["Why?"])
    assert (kept["entity"][1], kept["system"][1], kept["question"][1]) == (6, 10, 4)
    assert reasons == ["answer: no token of the prompt is one."]
    assert {NOT + "answer", "answer"} & set(kept) == set()
    tokenizer.chat_template = None
    kept, reasons = located(gates_of(configured()), tokenizer, ChatContext(chat=False), ["Why?"])
    assert list(kept) == ["all", "none", "last", NOT + "last"]
    assert "needs a tokenizer with a chat template" in reasons[1]


def test_the_table_has_one_row_a_gate():
    rows = [
        {"gate": name, "on tokens": i, "margin": [1.0 * i], "share": [0.5]} for i, name in enumerate(("all", "none"))
    ]
    assert beside(rows) == [
        {
            "gate": "all", "on tokens": 0, "margin": "0.00", "P": 0.5, "inverse: on tokens": 1,
            "inverse: margin": "1.00", "inverse: P": 0.5,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["questions", "teacher_epochs", "teacher_rank"])
def test_refused(name):
    with pytest.raises(RecipeError, match=f"{name}=0: expected at least 1"):
        configured(f"--{name}=0")
