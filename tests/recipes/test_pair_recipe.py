"""The recipe ``grafting/pair``: a user's own models and prompts, and what is refused of them."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_interp import cli
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import DataError
from lightning_interp.grafting import GraftEvaluator, GraftPrompt
from lightning_interp.testing import byte_tokenizer, tiny_pair
from lightning_interp_recipes.grafting._pair import read_prompts

ROWS = [
    {"text": "Ann Lee stars alongside", "target": "Bo", "spans": {"FE": "Ann Lee"}, "unit": 1},
    {"text": "A film with Cy Ray and", "target": "Di", "spans": {"FE": "Cy Ray"}, "unit": 2},
    {"text": "Nobody is in this film", "target": "Ed", "spans": {"FE": "Zed"}, "unit": 3},
]

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipient, a donor and an adapter as folders, and prompts; the last one has no such entity."""
    folder = tmp_path_factory.mktemp("made")
    recipient, donor = tiny_pair("llama")
    for name, model in (("recipient", recipient), ("donor", donor)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(tiny_pair("llama")[0], config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "recipient")
    adapted.save_pretrained(folder / "adapter")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def files(made, tmp_path):
    """A copy of what was made, for one test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def pair(files, *options, donor="donor", prompts="prompts.jsonl"):
    return cli.main(
        [
            "run",
            "grafting/pair",
            f"--run_dir={files / 'run'}",
            f"--model={files / 'recipient'}",
            f"--donor={files / donor}",
            f"--prompts={files / prompts}",
            *options,
        ]
    )


def table(files, name):
    with (files / f"run/tables/{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities(files):
    return {(int(r["prompt"]), r["plan"]): float(r["target_prob"]) for r in table(files, "prompts")}


@pytest.mark.parametrize("stream", [False, True])
def test_two_folders(files, stream):
    assert pair(files, "--missing=drop", f"--stream={str(stream).lower()}", "--complete=2") == 0
    recipient, donor = tiny_pair("llama")
    prompts = [GraftPrompt(r["text"], r["target"], r["spans"], str(r["unit"])) for r in ROWS[:2]]
    expected = GraftEvaluator(prompts, byte_tokenizer()).evaluate(recipient, donor)
    found = probabilities(files)
    for row in expected.rows:
        assert found[row["prompt"], row["plan"]] == pytest.approx(row["target_prob"], abs=1e-6)
    dropped = table(files, "dropped")
    assert [row["prompt"] for row in dropped] == ["2"]
    assert "'Zed' does not occur" in dropped[0]["reason"]
    for name in ("completions", "exact"):  # the donor's own text is its own under every policy
        assert all((row["decode"] == "donor") == (row["plan"] == "SFT") for row in table(files, name))
    assert [row["tokens"] for row in table(files, "located")][:1] == [" | ".join(ROWS[0]["spans"]["FE"])]
    doses = table(files, "doses")
    assert [float(row["dose"]) for row in doses] == [0, 0.25, 0.5, 0.75, 1]
    ends = [sum(found[i, plan] for i in (0, 1)) / 2 for plan in ("PRE", "FE+LT")]
    assert [float(doses[0]["value"]), float(doses[-1]["value"])] == pytest.approx(ends, abs=1e-6)


def test_the_other_direction_is_the_swapped_pair(files):
    assert (
        pair(
            files, "--missing=drop", "--direction=pre2sft", "--experiments=[E1]", "--head=follow", "--final_norm=follow"
        )
        == 0
    )
    recipient, donor = tiny_pair("llama")
    from lightning_interp import paper_plans

    prompts = [GraftPrompt(r["text"], r["target"], r["spans"], str(r["unit"])) for r in ROWS[:2]]
    plans = {n: p for n, p in paper_plans(head="follow", final_norm="follow").items() if n not in ("PRE", "SFT")}
    swapped = GraftEvaluator(prompts, byte_tokenizer(), plans=plans).evaluate(donor, recipient)
    found = probabilities(files)
    for row in swapped.rows:
        if row["plan"] in plans:
            assert found[row["prompt"], row["plan"]] == pytest.approx(row["target_prob"], abs=1e-6)


def test_an_adapter(files):
    assert pair(files, "--missing=drop", "--experiments=[E4,E7]", donor="adapter") == 0
    found = probabilities(files)
    assert found[0, "PRE"] != pytest.approx(found[0, "SFT"], rel=1e-3)
    assert (0, "LT[upper_half]") in found
    assert (0, "LT, head follow") in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"'Zed' does not occur in the prompt 'Nobody is in this film'"),
        (("--experiments=[E6]",), r"'E6' cannot be run on a pair; expected some of E1"),
        (("--missing=drop", "--experiments=[E3]"), r"no span 'R'"),
    ],
)
def test_what_is_refused(files, options, message, capsys):
    import re

    assert pair(files, *options) != 0
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_another_tokenizer(files, capsys):
    other = byte_tokenizer()
    other.add_tokens(["Zendaya"])
    other.save_pretrained(files / "donor")
    assert pair(files, "--missing=drop") != 0
    assert "Zendaya" in capsys.readouterr().err


def test_nothing_to_do(tmp_path, capsys):
    assert cli.main(["run", "grafting/pair", f"--run_dir={tmp_path}", "--model=tiny:llama"]) != 0
    assert "--prompts=FILE.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p.jsonl, line 2: no valid JSON"),
        ("[1]", r"line 2: expected an object, got list"),
        ('{"text": "a"}', r"line 2: 'target' is missing or empty"),
        ('{"text": "a", "target": ""}', r"line 2: 'target' is missing or empty"),
        ('{"text": 3, "target": "b"}', r"line 2: 'text' is 3"),
        ('{"text": "a", "target": "b", "span": {}}', r"line 2: 'span' is \{\}; expected the keys text, target, spans"),
        ('{"text": "a", "target": "b", "spans": {"FE": 1}}', r"line 2: the span 'FE' is 1"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "target": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_no_prompts_at_all(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"p.jsonl holds no prompts"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "gone.jsonl")


def test_a_half_made_donor_of_a_run_that_was_starved_is_made_anew(tmp_path):
    atomic_write_text(tmp_path / "donor/config.json", "{")
    folder = cli._configured("grafting/pair", ["--smoke=true"]).example_donor(tmp_path)
    TensorFolder(folder).check()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
