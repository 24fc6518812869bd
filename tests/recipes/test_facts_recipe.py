"""The recipe ``grafting/facts``: its results are those of its settings, however often it is stopped on the way."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_interp import cli, paper_plans
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp_recipes.grafting._common import FORMS, HELD_OUT
from lightning_interp_recipes.grafting.facts import GraftFacts

ROOT = Path(__file__).parents[2]
TINY = ["--smoke=true"]  # four facts, two epochs of three steps
PLANS = list(paper_plans())


def facts(folder, *options):
    return cli.main(["run", "grafting/facts", f"--run_dir={folder}", *options])


def numbers(folder):
    """Every byte that a run has to say."""
    files = [folder / "metrics.json", *sorted((folder / "tables").glob("*.csv"))]
    return {path.name: path.read_bytes() for path in files}


def forms_asked(folder):
    """Estimates by prompt form."""
    return json.loads((folder / "metrics.json").read_text())["forms"]


def steps(folder):
    """Training steps of an epoch, in batches of 8."""
    return len((folder / "phases/facts/train.jsonl").read_text().splitlines()) // 8


@pytest.fixture(scope="module")
def whole(smoke_run, tmp_path_factory):
    """A run that nothing stopped."""
    return Path(shutil.copytree(smoke_run("grafting/facts"), tmp_path_factory.mktemp("whole") / "run"))


def test_metrics_hold_every_estimate(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert {"statement", HELD_OUT} <= set(metrics["forms"]) <= set(FORMS)
    for form in metrics["forms"].values():
        assert list(form) == PLANS
        for plan in form.values():
            assert plan["target_prob"]["low"] <= plan["target_prob"]["value"] <= plan["target_prob"]["high"]
            assert plan["top1"]["value"] <= plan["top5"]["value"]
    assert metrics["dropped"] == 0
    assert metrics["train_loss"] > 0


def test_means_are_those_of_the_prompts(whole):
    with (whole / "tables/prompts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(forms_asked(whole)) * len(PLANS)  # for 4 facts
    metrics = json.loads((whole / "metrics.json").read_text())["forms"]
    for form in metrics:
        for plan in paper_plans():
            mine = [float(row["target_prob"]) for row in rows if (row["form"], row["plan"]) == (form, plan)]
            assert metrics[form][plan]["target_prob"]["value"] == pytest.approx(sum(mine) / 4, rel=1e-9)


def test_training_moves_the_finetuned_model_and_not_the_reference(whole):
    with (whole / "tables/training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [0, 1, 2]
    assert [float(row["step"]) for row in rows] == [steps(whole) * epoch for epoch in range(3)]
    plain = {row["PRE/target_logprob"] for row in rows}
    tuned = [float(row["SFT/target_logprob"]) for row in rows]
    assert len(plain) == 1
    assert tuned[0] == pytest.approx(float(plain.pop()), abs=1e-5)  # an adapter that has learned nothing
    assert tuned[-1] > tuned[0]


def test_the_held_out_form_is_not_trained_on(whole):
    texts = (whole / "phases/facts/train.jsonl").read_text()
    with (whole / "tables/prompts.csv").open(newline="") as file:
        asked = {(row["form"], row["text"]) for row in csv.DictReader(file)}
    assert len(asked) == 4 * len(forms_asked(whole))
    assert all((text in texts) == (form != HELD_OUT) for form, text in asked)


def test_another_seed_has_other_facts(whole, tmp_path):
    found = []
    for seed in (0, 1):
        GraftFacts(model="tiny:llama", facts=4, seed=seed).write_facts(tmp_path)
        found.append((tmp_path / "facts.jsonl").read_bytes())
    assert found[0] == (whole / "phases/facts/facts.jsonl").read_bytes() != found[1]


def test_all_weights(tmp_path, undrawn):
    assert facts(tmp_path, *TINY, "--mode=full", "--lr=0.001", "--epochs=1") == 0
    from lightning_interp import load_causal_lm
    from lightning_interp.testing import tiny_model

    tuned, before = load_causal_lm(str(tmp_path / "phases/train/model")).model, tiny_model("llama")
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    forms = json.loads((tmp_path / "metrics.json").read_text())["forms"]
    assert forms["statement"]["SFT"]["target_logprob"]["value"] > forms["statement"]["PRE"]["target_logprob"]["value"]


def train_and_wait(folder, said, stop_at):
    """In a forked process: the run, which stops within an epoch and waits there."""
    from lightning_interp import CausalLM

    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    begin = CausalLM.on_train_batch_start

    def wait(module, *batch):
        if module.trainer.global_step == stop_at:
            (folder / "waiting").touch()
            for _ in range(1200):
                time.sleep(0.05)
        return begin(module, *batch)

    CausalLM.on_train_batch_start = wait
    code = facts(folder, *TINY)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stopped_by(signum, folder, said, stop_at):
    process = multiprocessing.get_context("fork").Process(target=train_and_wait, args=(folder, said, stop_at))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not (folder / "waiting").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (folder / "waiting").exists(), said.read_text()
        os.kill(process.pid, signum)
        process.join(timeout=60)
    finally:
        process.kill()
    return process.exitcode


def test_a_run_killed_and_then_stopped_while_training_ends_as_one_that_was_not(whole, tmp_path, capsys, undrawn):
    """By SIGKILL, which leaves no time to say goodbye; then by Ctrl-C, after which Lightning has its turn."""
    folder, said = tmp_path / "run", tmp_path / "said"
    # Within the second epoch: one checkpoint is there, and a step is lost.
    assert stopped_by(signal.SIGKILL, folder, said, steps(whole) + 1) == -signal.SIGKILL, said.read_text()
    assert (folder / "phases/train/checkpoints/last.ckpt").exists()
    assert [session["status"] for session in read_manifest(folder)["sessions"]] == ["running"]
    (folder / "waiting").unlink()
    assert stopped_by(signal.SIGINT, folder, said, steps(whole) + 2) == 130, said.read_text()
    assert not (folder / "metrics.json").exists()
    lines = said.read_text().splitlines()
    assert lines[-1].startswith("lightning-interp: stopped by Ctrl-C; what is finished is kept. Go on with: ")
    assert lines[-1].endswith(f"lightning-interp run grafting/facts --run_dir={folder} {' '.join(TINY)}")
    assert "Traceback" not in "\n".join(lines)
    assert facts(folder, *TINY) == 0
    err = capsys.readouterr().err
    assert "phase facts: finished before, its result is used" in err
    assert "phase train: goes on where it stopped" in err
    state = read_manifest(folder)
    assert {name: phase["attempts"] for name, phase in state["phases"].items()} == {"facts": 1, "train": 3, "graft": 1}
    assert numbers(folder) == numbers(whole)


def test_another_seed_in_the_same_folder_is_refused_with_both(whole, capsys):
    before = numbers(whole)
    assert facts(whole, *TINY, "--seed=7") == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert f"Run folder '{whole}' holds a run with another configuration: seed: 0 there, 7 now." in err[0]
    assert numbers(whole) == before


def test_a_finished_run_prints_its_table_again_and_trains_nothing(whole, capsys, undrawn):
    before = {path: path.stat().st_mtime_ns for path in (whole / "phases").rglob("*") if path.is_file()}
    assert facts(whole, *TINY) == 0
    said = capsys.readouterr()
    assert all(f"\n{plan} " in said.out for plan in paper_plans())
    assert said.err.count("finished before, its result is used") == 3
    assert {path: path.stat().st_mtime_ns for path in (whole / "phases").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epocs=3"], "Recipe 'grafting/facts' has no field '--epocs'. Did you mean 'epochs'?"),
        (["--mode=ful"], "expected one of 'lora', 'full', got 'ful'"),
        (["--head=donr"], "got 'donr'. Did you mean 'donor'?"),
        (["--facts=many"], "--facts: the value of 'facts' does not fit: expected int, got 'many'"),
    ],
)
def test_a_wrong_setting_is_wrong_use_and_nothing_is_made(tmp_path, capsys, options, message):
    assert facts(tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_in_a_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["copy", "grafting/facts", "mine.yaml"]) == 0
    text = Path("mine.yaml").read_text().replace("\nepochs:", "\nepocs:")
    line = next(number for number, found in enumerate(text.splitlines(), 1) if found.startswith("epocs:"))
    Path("mine.yaml").write_text(text)
    capsys.readouterr()
    assert cli.main(["run", "mine.yaml"]) == 2
    assert f"mine.yaml, line {line}: there is no field 'epocs'. Did you mean 'epochs'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=tiny:llama", "--facts=99"], "Cannot invent 99 facts; the names suffice for 1 to "),
        (["--smoke=true", "--components=MPL"], "Unknown component 'MPL'. Expected a name or group of: "),
    ],
)
def test_what_only_the_study_can_tell_is_one_line(tmp_path, capsys, options, message):
    assert facts(tmp_path, *options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-interp: ")
    assert message in last


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert facts(tmp_path / "file", *TINY) == 1
    assert f"'{tmp_path}/file" in capsys.readouterr().err
    assert facts(tmp_path / "file" / "run", *TINY) == 1
    assert f"Cannot write '{tmp_path}/file/run': Not a directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o555)
    assert facts(tmp_path / "run", *TINY) == 1
    assert f"Cannot write '{tmp_path}/run': Permission denied" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_ranks_make_one_run(tmp_path, mode):
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", f"--mode={mode}"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_interp", "run", "grafting/facts", "--run_dir=run", *TINY, *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: run/report.html") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    state = read_manifest(tmp_path / "run")
    assert [phase["attempts"] for phase in state["phases"].values()] == [1, 1, 1]
    with (tmp_path / "run/tables/training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step"]) for row in rows] == [
        -(-steps(tmp_path / "run") * epoch // 2) for epoch in range(3)
    ]  # half the steps: the ranks share the texts
    with (tmp_path / "run/tables/prompts.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 * len(forms_asked(tmp_path / "run")) * len(PLANS)


@pytest.mark.slow
@pytest.mark.bundled
def test_a_real_model_learns_the_facts_and_reads_them_at_the_entity_and_the_last_token(tmp_path):
    options = ["--facts=4", "--epochs=8", "--batch_size=8", "--rank=16", "--lr=1e-3", "--watch_every=8"]
    assert facts(tmp_path, "--model=smollm2-135m-instruct", *options) == 0
    plans = json.loads((tmp_path / "metrics.json").read_text())["forms"]["statement"]
    chance = {plan: plans[plan]["target_prob"]["value"] for plan in plans}
    assert plans["SFT"]["top5"]["value"] == 1.0
    assert plans["PRE"]["top5"]["value"] < 1.0
    assert chance["FE+LT"] > chance["(FE+LT)^C"]
    assert chance["SFT"] > chance["PRE"]
    assert "dequantised" in (tmp_path / "report.html").read_text()
