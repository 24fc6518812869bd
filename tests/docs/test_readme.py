"""The README is true: its Python runs, its commands run in the order in which they stand, what it names exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp import cli, errors, paper_plans
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.running.catalog import recipe_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every command of the bash blocks, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def commands_of(program):
    return [words[1:] for words in commands() if words[0] == program]


def section(title):
    """The text below a heading, up to the next one of its kind."""
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def first_column(text):
    """What stands in backticks in the first column of the tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_block_is_collected():
    assert len(blocks("python")) == README.count("```python") >= 3
    assert len(blocks("bash")) == README.count("```bash") >= 5
    assert README.count("```") == 2 * (len(blocks("python")) + len(blocks("bash")))  # no block of another kind
    assert len(commands_of("lightning-interp")) >= 9
    assert {words[0] for words in commands()} == {"lightning-interp", "make", "python", "source"}


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_runs_as_it_stands(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[index], f"README.md, block {index}", "exec"), {"__name__": "readme"})  # noqa: S102
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir())


def test_commands_run_in_order(tmp_path, monkeypatch, capsys, smoke_run):
    """A recipe as it is left its smoke run, and a copy of its settings finds that; other settings run, but for models
    that must be downloaded, which are understood."""
    monkeypatch.chdir(tmp_path)
    for words in commands_of("lightning-interp"):
        line = shlex.join(["lightning-interp", *words])
        if words[0] == "run" and "--help" not in words:
            recipe = cli._configured(words[1], words[2:])
            assert recipe.smoke == ("--smoke=true" in words)
            if "/" in recipe.model and not recipe.smoke:
                assert recipe.run_dir, line
                continue
            if words[1] in recipe_names() and words[2:] in ([], ["--smoke=true"]):
                shutil.copytree(smoke_run(words[1]), recipe.run_path)
                continue
            if words[1] == "mine.yaml":
                shutil.copytree(smoke_run("grafting/facts"), recipe.run_path)
            words = [*words, "--smoke=true", f"--run_dir={recipe.run_path}"]
            words += ["--trainer.max_epochs=1"] * (words[1] in recipe_names())
        if words[0] == "sweep":  # one of its cells
            words += ["--smoke=true", "--trainer.max_epochs=1", "--only=rank=4", "--only=seed=0"]
        with monkeypatch.context() as patch:  # what smoke runs draw is drawn
            patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
            assert cli.main(words) == 0, f"{line}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), line
    runs = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("manifest.json")}
    assert runs >= {"runs/grafting/facts", "runs/facts-seed-1", "runs/facts-full", "runs/mine"}
    seeds = {read_manifest(tmp_path / "runs" / run)["config"]["seed"] for run in ("grafting/facts", "facts-seed-1")}
    assert seeds == {0, 1}
    assert read_manifest(tmp_path / "runs/facts-full")["config"]["mode"] == "full"
    assert all(read_manifest(tmp_path / run)["sessions"][-1]["status"] == "finished" for run in runs)


def test_settings_of_the_command_for_many_devices_are_understood():
    (words,) = (words for words in commands_of("lightning-interp") if "--trainer.devices=4" in words)
    recipe = cli._configured(words[1], words[2:])
    assert recipe.trainer == {"devices": 4, "strategy": "ddp", "precision": "bf16-mixed"}
    assert recipe.run_dir == "runs/facts-qwen"


def test_make_targets_exist():
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {target for words in commands_of("make") for target in words} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert named >= {"quickstart", "test", "test-all"}
    assert named <= set(rules)


def test_the_files_of_a_run_are_those_that_a_run_leaves(smoke_run):
    folder = smoke_run("grafting/facts")
    named = first_column(section("Two commands"))
    patterns = [name for name in named if re.fullmatch(r"[\w.*/]+", name)]
    assert {"report.html", "figures/*.png", "tables/*.csv", "tensorboard/", "manifest.json"} <= set(patterns)
    assert [pattern for pattern in patterns if not list(folder.glob(pattern.rstrip("/")))] == []
    tables = re.search(r"^\| `tables/\*\.csv` \| (.*) \|$", README, flags=re.MULTILINE)[1]
    assert set(re.findall(r"`(\w+)`", tables)) == {path.stem for path in (folder / "tables").iterdir()}


def test_tables_name_what_exists():
    assert first_column(section("The eight plans")) == list(paper_plans())
    assert sorted([*first_column(section("Errors")), "InterpError"]) == errors.__all__
    refused = set(re.findall(r"`(\w+Error)`", section("Not supported yet")))
    assert refused
    assert refused <= set(errors.__all__)
    rooms = [name.split("<")[0] for name in first_column(section("Where things live"))]
    assert len(rooms) >= 9
    assert [name for name in rooms if not ((ROOT / name).exists() or (ROOT / "lightning_interp" / name).exists())] == []


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        assert target.removeprefix("#") in anchors if target.startswith("#") else (ROOT / target).exists(), target


def test_benchmarks_exist():
    scripts = [words[0] for words in commands_of("python")]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.slow
@pytest.mark.parametrize("words", commands_of("python"), ids=lambda words: Path(words[0]).stem)
def test_benchmarks_run(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
