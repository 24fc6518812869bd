"""Run folders that were written in format 1, with the results of the phases inside the manifest."""

import json
import math
import shutil
from pathlib import Path

import pytest

from lightning_interp.core.storage import manifest_follower
from lightning_interp.core.storage.files import atomic_write_text, digest
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.phase_results import Lineage, phase_result

STORED = Path(__file__).with_name("manifest_format1.json")  # written by the version before format 2
FIRST = {"b": [1, 2.0, [3, None]], "a": "\u00e9 \ud800", "nan": math.nan}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    atomic_write_text(folder / "phases/fit/sub/weights.txt", "w\n")
    atomic_write_text(folder / "phases/last/step-1", "one\n")
    for name in ("prepare", "given"):
        (folder / "phases" / name).mkdir()
    atomic_write_text(tmp_path / "data.txt", "data\n")
    shutil.copy(STORED, folder / "manifest.json")
    return folder


def opened(folder):
    return RunManifest.open(folder, config={"seed": 0}, name="demo")


def walk(run, folder, calls=()):
    """The phases of the stored run; the names of those that are called are added to ``calls``."""

    def phase(name, result, **more):
        return run.phase(name, lambda at: calls.append(name) or result, **more)

    first = phase("prepare", FIRST)
    second = phase("fit", ["weights.txt", 0.001])
    third = phase("given", 7, inputs={"data": folder.parent / "data.txt", "fit": run.folder("fit")})
    return first, second, third


def test_finished_phases_are_not_run_again_and_an_unfinished_one_goes_on(folder):
    for _ in range(2):
        with opened(folder) as run:
            first, second, third = walk(run, folder)
            assert repr(first) == repr(FIRST)
            assert (second, third) == (["weights.txt", 0.001], 7)
            last = run.phase("last", lambda at: sorted(path.name for path in at.iterdir()))
            assert last == ["step-1"]
            assert run.phases["last"]["attempts"] == 2
            assert run.phase("next", lambda at: 5) == 5
    state = read_manifest(folder)
    assert state["format"] == 2
    assert state["phases"]["next"]["attempts"] == 1
    assert phase_result(folder, "fit", state["phases"]["fit"]) == ["weights.txt", 0.001]
    assert phase_result(folder, "last", state["phases"]["last"]) == ["step-1"]
    assert state["phases"]["fit"]["files"]["sub/weights.txt"]["size"] == 2  # checked once, and stamped then


def test_a_phase_that_is_computed_again_leaves_the_old_ones_after_it_as_they_are(folder):
    shutil.rmtree(folder / "phases/prepare")
    calls = []
    with opened(folder) as run:
        walk(run, folder, calls)
    assert calls == ["prepare"]
    with opened(folder) as run:
        walk(run, folder)
    assert "result" not in read_manifest(folder)["phases"]["prepare"]


def test_another_result_before_an_old_phase_runs_it_again(folder):
    calls = []
    shutil.rmtree(folder / "phases/prepare")
    with opened(folder) as run:
        run.phase("prepare", lambda at: "another")
        run.phase("fit", lambda at: calls.append("fit"))
    assert calls == ["fit"]


def test_a_follower_reads_an_old_run(folder):
    follower = manifest_follower.FollowerManifest.join(folder, {"seed": 0}, "demo")
    assert repr(walk(follower, folder)[0]) == repr(FIRST)


def test_the_old_tokens_are_those_that_format_1_wrote():
    stored = json.loads(STORED.read_text())["phases"]
    lineage, before = Lineage(old=True), []
    for name in ("prepare", "fit"):
        entry = stored[name]
        token = lineage.token(name, None)
        assert token.old == entry["inputs"] == digest([name, before])
        assert token.fits(entry)
        lineage.add_phase(name, token, result_digest="", files=entry["files"], result=entry["result"])
        before.append([name, entry["inputs"], entry["result"], entry["files"]])
